"""What the two Flax layers share: how parameters are stored and learned, and the calls to the plain functions.

A stored array has the name of its parameter behind a prefix that tells its kind:
    logscale_tau_m    given value * exp(stored): keeps its sign, never reaches 0, starts exactly at the given value
    learned_thr_gain  the parameter itself, of which any real number is valid
    fixed_thr         drawn once and not trained
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from slif import _check, _warn
from slif._attach import attach
from slif._host import shown
from slif._mesh import follow
from slif.cell import advance, init_params, init_state, is_off, prepare, take_thresholds
from slif.simulation import simulate
from slif.surrogate import secant
from slif.types import SLIFParams, SLIFState

Carry = tuple[SLIFState, Array]

KINDS = {
    "tau_m": "logscale",
    "resist_m": "logscale",
    "rho_b": "logscale",
    "resist_inh": "logscale",
    "thr": "learned",
    "thr_gain": "learned",
    "thr_leak": "learned",
    "inh_weights": "learned",
}
# What a surrogate with respect to the current can train: the spike's derivative knows of nothing else.
BY_CURRENT = ("resist_m", "resist_inh", "inh_weights")
# A factor of 3000 up or down: no step of an optimiser overflows the parameter, or rounds it to 0.
BOUND = 8.0


def switch_on(hyper: Mapping[str, Any], learn: Iterable[str]) -> dict[str, Any]:
    """The hyperparameters with the mechanisms to learn switched on; raises for what cannot be learned."""
    learn = _check.names("learn", learn, tuple(KINDS))
    if "inh_weights" in learn and is_off(hyper["resist_inh"]):
        raise ValueError("learn: inh_weights cannot be learned without inhibition; give resist_inh")
    surrogate = hyper["surrogate"]
    blind = [name for name in learn if name not in BY_CURRENT]
    if blind and (surrogate is None or getattr(surrogate, "wrt", None) == "current"):
        raise ValueError(
            f"learn: expected a surrogate with respect to the voltage, such as slif.arctan(), to train "
            f"{', '.join(blind)}, got one with respect to the current, which gives no gradient to them"
        )
    hyper = dict(hyper)
    for name in set(learn) - {"inh_weights"}:
        value = hyper[name]
        if KINDS[name] == "logscale":
            given = _check.real(name, value)
            if not isinstance(given, jax.Array) and (given == 0).any():
                raise ValueError(f"{name}: expected a value other than 0 to start learning from, got {shown(value)}")
        hyper[name] = np.float32(0) if is_off(value) else value
    return hyper


def watch(features: Any, hyper: Mapping[str, Any], dt: Any) -> np.dtype:
    """Warns of what is known when a layer is made, as under jit its parameters are traced; returns its dtype."""
    _check.size("features", features, 1)
    _check.countable("features", features, 1 if is_off(hyper["resist_inh"]) else features)
    dtype = _check.requested("dtype", hyper["dtype"])
    dt = _check.number("dt", dt, dtype)
    for name, worst, warn in (
        ("tau_m", np.min, _warn.euler),
        ("refract_time", np.max, functools.partial(_warn.clock, dtype=dtype)),
    ):
        value = _check.real(name, hyper[name], dtype)
        _check.shaped(name, value.shape, features)
        if not isinstance(value, jax.Array):
            warn(worst(value), dt)
    return dtype


def stored_names(hyper: Mapping[str, Any], learn: Iterable[str]) -> list[str]:
    names = [f"{kind}_{name}" for name, kind in KINDS.items() if name in learn]
    if "thr" not in learn and not is_off(hyper["thr_jitter"]):
        names.append("fixed_thr")
    if "inh_weights" not in learn and not is_off(hyper["resist_inh"]):
        names.append("fixed_inh_weights")
    return names


def check_stored(features: int, hyper: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """That the stored arrays are those of one cell, and not, as `nn.RNN` can have them, of one for each step."""
    shapes = {"thr": (features,), "inh_weights": (features, features)}
    for key, value in stored.items():
        name = key.partition("_")[2]
        expected = shapes.get(name, np.shape(hyper.get(name)))
        if np.shape(value) != expected:
            raise ValueError(
                f"params: expected {key} of shape {expected}, got shape {np.shape(value)}; all steps share the "
                "parameters of a cell, so nn.RNN takes it with its own variable_axes and variable_broadcast"
            )


def stored_values(key: Array, features: int, hyper: Mapping[str, Any], names: Iterable[str]) -> dict[str, Array]:
    """Initial values, in float32 or wider so that small steps of an optimiser do not round away."""
    params = init_params(key, features, **{**hyper, "dtype": _wide(_check.floating("dtype", hyper["dtype"]))})
    values = {name: getattr(params, name.partition("_")[2]) for name in names}
    with _check.transfers():
        return {name: jnp.zeros_like(x) if name.startswith("logscale_") else x for name, x in values.items()}


def given_params(features: int, hyper: Mapping[str, Any]) -> SLIFParams:
    """The parameters as given, without what is drawn: no jitter, no inhibition matrix."""
    dtype = _check.floating("dtype", hyper["dtype"])
    thr = _check.real("thr", hyper["thr"], dtype)
    _check.shaped("thr", thr.shape, features, _check.Rule())
    mechanisms = ("refract_time", "thr_gain", "thr_leak", "rho_b", "resist_inh")
    return SLIFParams(
        thr=jnp.broadcast_to(_check.put(thr, _wide(dtype)).astype(dtype), (features,)),
        surrogate=secant() if hyper["surrogate"] is None else hyper["surrogate"],
        **{name: hyper[name] for name in ("tau_m", "resist_m", *_check.FLAGS)},
        **{name: hyper[name] for name in mechanisms if not is_off(hyper[name])},
    )


def assemble(given: SLIFParams, stored: Mapping[str, Array]) -> SLIFParams:
    """The parameters of the cell now: what was given, with what is stored in its place."""
    dtype, leaves = given.thr.dtype, {}
    for key, value in stored.items():
        kind, _, name = key.partition("_")
        if kind == "logscale":
            # Beyond the bound too a gradient comes through, or a parameter that got there would never come back.
            with _check.transfers():
                bounded = attach(jnp.clip(value, -BOUND, BOUND), value, jnp.ones_like(value))
                value = jnp.asarray(getattr(given, name), value.dtype) * jnp.exp(bounded)
        elif kind == "fixed":
            value = lax.stop_gradient(value)
        leaves[name] = value.astype(dtype)
    return _check.params(given.replace(**leaves))


def initial_carry(params: SLIFParams, input_shape: tuple[int, ...]) -> Carry:
    if not isinstance(input_shape, tuple | list):
        raise TypeError(f"input_shape: expected a tuple of ints, got {shown(input_shape)}")
    *batch, features = [_check.size("input_shape", n, 0, symbolic=True) for n in input_shape] or [None]
    if features != params.n_units:
        raise ValueError(f"input_shape: expected (..., {params.n_units}), got {input_shape}")
    _check.countable("input_shape", *input_shape)
    with _check.transfers():
        # One count a row: `RNN` picks the last carry of each row by its sequence length.
        return init_state(params, tuple(batch)), jnp.zeros(batch, jnp.int32)


def run_cell(params: SLIFParams, dt: ArrayLike, carry: Carry, inputs: Array) -> tuple[Carry, Array]:
    params = _check.values(params)
    if not isinstance(carry, tuple | list) or len(carry) != 2 or not isinstance(carry[0], SLIFState):
        raise TypeError(f"carry: expected a pair of an SLIFState and the counts of steps, got {shown(carry)}")
    state, count = _check.fields(carry[0], "carry[0]"), _counts(carry[1])
    dt = _check.number("dt", dt, params.thr.dtype)
    inputs = _check.currents("inputs", inputs, params.thr.dtype)
    with _check.transfers():
        return _run_cell(params, dt, (state, count), inputs)


def _counts(value: Any) -> Array | np.ndarray:
    counts = _check.array("carry", value, "an array of the counts of steps")
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise TypeError(f"carry: expected integers as counts of steps, got dtype {counts.dtype}")
    if not isinstance(counts, jax.Array) and not (counts == counts.astype(np.int32)).all():
        raise ValueError(f"carry: expected counts of steps within int32, got {shown(counts)}")
    return counts


@jax.jit
def _run_cell(params: SLIFParams, dt: Array, carry: Carry, inputs: Array) -> tuple[Carry, Array]:
    state, count = carry
    _check.signature(params, state, "carry[0]")
    if count.shape != state.v.shape[:-1]:
        raise ValueError(f"carry: expected counts of steps of shape {state.v.shape[:-1]}, got shape {count.shape}")
    _check.scalars(dt=dt)
    _check.current("inputs", inputs, state.v.shape)
    params, state, currents, _ = follow(params, state, inputs[None])
    dtype = params.thr.dtype
    dt = jnp.asarray(dt).astype(dtype)
    t = (count.astype(_wide(dtype)) * dt.astype(_wide(dtype)))[..., None]
    params, t, dt = prepare(params, state.v.ndim, t, dt)
    state = advance(params, take_thresholds(params, state), currents[0], t, dt)
    return (state, count + 1), state.s


def run_sequence(
    params: SLIFParams,
    dt: float,
    x: Array,
    *,
    time_major: bool,
    initial_state: SLIFState | None,
    valid: Array | None,
    record: tuple[str, ...],
    return_state: bool,
    **options: Any,
) -> Any:
    x = _check.currents("x", x, params.thr.dtype)
    if x.ndim < 2 or x.shape[-1] != params.n_units:
        raise ValueError(f"x: expected a time axis and a last axis of {params.n_units} features, got shape {x.shape}")
    _check.current("x", x, x.shape)
    return_state = _check.flag("return_state", return_state)
    time = 0 if _check.flag("time_major", time_major) else x.ndim - 2
    with _check.transfers():
        currents = jnp.moveaxis(x, time, 0)
        if valid is not None:
            _check.mask("valid", _check.array("valid", valid, "a boolean array"), x.shape[:-1])
            valid = jnp.moveaxis(valid, time, 0)
    if initial_state is None:
        state = init_state(params, currents.shape[1:-1])
    else:
        _check.signature(params, _check.fields(initial_state, "initial_state"), "initial_state")
        if initial_state.v.shape != currents.shape[1:]:
            shapes = f"{currents.shape[1:]}, got shape {initial_state.v.shape}"
            raise ValueError(f"initial_state: expected fields of shape {shapes}")
        state = initial_state
    state, out = simulate(params, state, currents, dt=dt, record=record, valid=valid, **options)
    out = {name: y if y.ndim < x.ndim else jnp.moveaxis(y, 0, time) for name, y in out.items()}
    result = out["s"] if tuple(out) == ("s",) else out
    return (result, state) if return_state else result


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
