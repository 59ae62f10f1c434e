"""Shared by the Linen and NNX layers: how parameters are stored and learned, and the calls to the plain functions.

A stored array has the name of its parameter, with a prefix for how it is stored:
    logscale_tau_m    given value * exp(stored): keeps its sign, never reaches 0, starts exactly at the given value
    learned_thr_gain  the parameter itself, for which any real number is valid
    fixed_thr         drawn once and not trained
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from slif import _check, _warn
from slif._attach import attach
from slif._host import shown
from slif._mesh import reshard_like_currents
from slif.cell import advance, take_thresholds
from slif.hyperparameters import ABOUT, OPTIONAL, STATIC, MechanismFields, Numbers
from slif.init import init_params, init_state, is_off
from slif.request import Records
from slif.rounding import as_runtime_values
from slif.simulation import simulate
from slif.surrogate import secant, straight_through
from slif.types import SLIFParams, SLIFState

Carry = tuple[SLIFState, Array]
LEARNABLE = tuple(name for name, about in ABOUT.items() if about.stored)
# A factor of 3000 up or down: no optimiser step can make the parameter overflow, or round to 0.
BOUND = 8.0


class IntegratorOptions(TypedDict, total=False):
    """Options of any layer's call, besides `return_state`."""

    initial_state: SLIFState | None
    valid: Array | np.ndarray | None
    t0: ArrayLike


class CallOptions(IntegratorOptions, total=False):
    """Further options of a spiking layer's call."""

    spike_dtype: DTypeLike | None
    checkpoint_every: int | None
    implementation: Literal["xla", "pallas"] | None


def complete(hyper: Mapping[str, Any], learn: Iterable[str], dt: Any) -> dict[str, Any]:
    """The hyperparameters, with learned mechanisms switched on and the resistance that follows from a fixed tau_m.

    Raises for names that cannot be learned.
    """
    learn, hyper = _check.as_names("learn", learn, LEARNABLE), dict(hyper)
    if "inh_weights" in learn and is_off(hyper["resist_inh"]):
        raise ValueError("learn: inh_weights cannot be learned without inhibition; give resist_inh")
    surrogate = hyper["surrogate"]
    blind = [name for name in learn if not ABOUT[name].by_current]
    if blind and (surrogate is None or getattr(surrogate, "wrt", None) == "current"):
        raise ValueError(
            f"learn: expected a surrogate with respect to the voltage, such as slif.arctan(), to train "
            f"{', '.join(blind)}, got one with respect to the current, which gives no gradient to them"
        )
    for name in set(learn) - {"inh_weights"}:
        value = hyper[name]
        if value is None:
            raise ValueError(f"{name}: expected a value to start learning from, got None, which means tau_m / dt")
        if ABOUT[name].stored == "logscale":
            given = _check.as_real(name, value)
            if not isinstance(given, jax.Array) and (given == 0).any():
                raise ValueError(f"{name}: expected a value other than 0 to start learning from, got {shown(value)}")
        hyper[name] = np.float32(0) if is_off(value) else value
    if hyper["resist_m"] is None and "tau_m" not in learn:
        with _check.transfers():
            hyper["resist_m"] = _check.as_real("tau_m", hyper["tau_m"]) / _check.as_number("dt", dt, np.float32)
    return hyper


def check_made(features: Any, hyper: Mapping[str, Any], dt: Any) -> np.dtype:
    """Checks hyperparameters when a layer is made, since under jit they are traced later; returns the dtype."""
    _check.as_size("features", features, 1)
    _check.check_countable("features", features, 1 if is_off(hyper["resist_inh"]) else features)
    dtype = _check.as_requested_dtype("dtype", hyper["dtype"])
    dt = _check.as_number("dt", dt, dtype)
    for name in STATIC:
        _check.check_static(name, hyper[name])
    for name, worst, warn in (
        ("tau_m", np.min, _warn.euler),
        ("refract_time", np.max, functools.partial(_warn.clock, dtype=dtype)),
    ):
        value = _check.as_real(name, hyper[name], dtype)
        _check.check_shape(name, value.shape, features)
        if not isinstance(value, jax.Array):
            warn(worst(value), dt)
    return dtype


def stored_names(hyper: Mapping[str, Any], learn: Iterable[str]) -> list[str]:
    names = [f"{ABOUT[name].stored}_{name}" for name in LEARNABLE if name in learn]
    if "thr" not in learn and not is_off(hyper["thr_jitter"]):
        names.append("fixed_thr")
    if "inh_weights" not in learn and not is_off(hyper["resist_inh"]):
        names.append("fixed_inh_weights")
    return names


def check_stored(features: int, hyper: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Checks that the stored arrays are those of one cell, not of one per step, as `nn.RNN` can make them."""
    shapes = {"thr": (features,), "inh_weights": (features, features)}
    for key, value in stored.items():
        name = key.partition("_")[2]
        expected = shapes[name] if name in shapes else np.shape(hyper[name])
        if np.shape(value) != expected:
            raise ValueError(
                f"params: expected {key} of shape {expected}, got shape {np.shape(value)}; all steps share the "
                "parameters of a cell, so nn.RNN takes it with its own variable_axes and variable_broadcast"
            )


def draw(key: Array, features: int, hyper: Mapping[str, Any], dtype: Any) -> SLIFParams:
    """Parameters from `init_params`; a resistance that follows tau_m affects no draw, and is left to `assemble`."""
    given: dict[str, Any] = {**hyper, "dtype": dtype}
    given |= {"resist_m": 1.0} if hyper["resist_m"] is None else {}
    return init_params(key, features, **given)


def stored_values(key: Array, features: int, hyper: Mapping[str, Any], names: Iterable[str]) -> dict[str, Array]:
    """Initial values, in float32 or wider so that small optimiser steps do not round away."""
    params = draw(key, features, hyper, wide(_check.as_floating_dtype("dtype", hyper["dtype"])))
    values = {name: getattr(params, name.partition("_")[2]) for name in names}
    with _check.transfers():
        return {name: jnp.zeros_like(x) if name.startswith("logscale_") else x for name, x in values.items()}


def given_params(features: int, hyper: Mapping[str, Any]) -> SLIFParams:
    """The parameters as given, without what is drawn: no jitter, no inhibition matrix."""
    dtype = _check.as_floating_dtype("dtype", hyper["dtype"])
    thr = _check.as_real("thr", hyper["thr"], dtype)
    _check.check_shape("thr", thr.shape, features, "units")
    given = {name: hyper[name] for name in ("tau_m", "resist_m", *STATIC)}
    given |= {name: hyper[name] for name in OPTIONAL if name in hyper and not is_off(hyper[name])}
    return SLIFParams(
        thr=jnp.broadcast_to(_check.put(thr, wide(dtype)).astype(dtype), (features,)),
        surrogate=secant() if hyper["surrogate"] is None else hyper["surrogate"],
        **given,
    )


def assemble(given: SLIFParams, stored: Mapping[str, Array], dt: ArrayLike) -> SLIFParams:
    """The current parameters of the cell: those given, with stored values in their place."""
    dtype, leaves = given.thr.dtype, {}
    for key, value in stored.items():
        kind, _, name = key.partition("_")
        if kind == "logscale":
            # The gradient passes beyond the bound too, or a parameter that got there could never come back.
            with _check.transfers():
                bounded = attach(jnp.clip(value, -BOUND, BOUND), value, jnp.ones_like(value))
                value = jnp.asarray(getattr(given, name), value.dtype) * jnp.exp(bounded)
        elif kind == "fixed":
            value = lax.stop_gradient(value)
        leaves[name] = value
    if given.resist_m is None:  # then tau_m is learned; whatever its value, a current j moves v by j
        with _check.transfers():
            leaves["resist_m"] = leaves["tau_m"] / jnp.asarray(dt, leaves["tau_m"].dtype)
    return _check.as_device_params(given.replace(**{name: value.astype(dtype) for name, value in leaves.items()}))


def integrator(tau_m: Numbers, resist_m: Numbers | None, dtype: DTypeLike) -> dict[str, Any]:
    """The hyperparameters of a cell that never fires; its v has a gradient under any voltage surrogate."""
    defaults = {field: getattr(MechanismFields(), field) for field in MechanismFields.__annotations__}
    given = {"tau_m": tau_m, "resist_m": resist_m, "thr": np.inf, "thr_jitter": 0.0, "dtype": dtype}
    return defaults | given | {"surrogate": straight_through()}


def initial_carry(params: SLIFParams, input_shape: tuple[int, ...]) -> Carry:
    if not isinstance(input_shape, tuple | list):
        raise TypeError(f"input_shape: expected a tuple of ints, got {shown(input_shape)}")
    *batch, features = [_check.as_size("input_shape", n, 0, symbolic=True) for n in input_shape] or [None]
    if features != params.n_units:
        raise ValueError(f"input_shape: expected (..., {params.n_units}), got {input_shape}")
    _check.check_countable("input_shape", *input_shape)
    with _check.transfers():
        # One count per row: `RNN` picks the last carry of each row by its sequence length.
        return init_state(params, tuple(batch)), jnp.zeros(batch, jnp.int32)


def recurrent_init(init: Any) -> Callable[..., Array]:
    """The initialiser of a recurrent kernel, with a check that it returns the requested shape."""
    if not callable(init):
        raise TypeError(f"recurrent_kernel_init: expected an initialiser, got {shown(init)}")

    def checked(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
        kernel: Any = init(key, shape, dtype)
        if np.shape(kernel) != shape:
            raise ValueError(f"recurrent_kernel_init: expected one that gives {shape}, got shape {np.shape(kernel)}")
        return kernel

    return checked


def run_cell(
    params: SLIFParams, dt: ArrayLike, carry: Carry, inputs: Array, feedback: Array | None
) -> tuple[Carry, Array]:
    params = _check.as_params(params)
    if not isinstance(carry, tuple | list) or len(carry) != 2 or not isinstance(carry[0], SLIFState):
        raise TypeError(f"carry: expected a pair of an SLIFState and the counts of steps, got {shown(carry)}")
    state, count = _check.as_state(carry[0], "carry[0]"), _as_counts(carry[1])
    dt = _check.as_number("dt", dt, params.thr.dtype)
    inputs = _check.as_currents("inputs", inputs, params.thr.dtype)
    if feedback is not None:
        _check.check_shape("recurrent_kernel", feedback.shape, params.n_units, "matrix")
    with _check.transfers():
        return _run_cell(params, dt, (state, count), inputs, feedback)


def _as_counts(value: Any) -> Array | np.ndarray:
    counts = _check.check_array("carry", value, "an array of the counts of steps")
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise TypeError(f"carry: expected integers as counts of steps, got dtype {counts.dtype}")
    if not isinstance(counts, jax.Array) and not (counts == counts.astype(np.int32)).all():
        raise ValueError(f"carry: expected counts of steps within int32, got {shown(counts)}")
    return counts


@jax.jit
def _run_cell(
    params: SLIFParams, dt: Array, carry: Carry, inputs: Array, feedback: Array | None
) -> tuple[Carry, Array]:
    state, count = carry
    _check.check_signature(params, state, "carry[0]")
    if count.shape != state.v.shape[:-1]:
        raise ValueError(f"carry: expected counts of steps of shape {state.v.shape[:-1]}, got shape {count.shape}")
    _check.check_scalars(dt=dt)
    _check.check_currents("inputs", inputs, state.v.shape)
    (params, feedback), state, currents, _ = reshard_like_currents((params, feedback), state, inputs[None])
    dtype = params.thr.dtype
    dt = jnp.asarray(dt).astype(dtype)
    t = (count.astype(wide(dtype)) * dt.astype(wide(dtype)))[..., None]
    params, t, dt = as_runtime_values(params, state.v.ndim, t, dt)
    feedback = None if feedback is None else feedback.astype(dtype)
    state = advance(params, take_thresholds(params, state), currents[0], t, dt, feedback)
    return (state, count + 1), state.s


def run_sequence(
    params: SLIFParams,
    dt: ArrayLike,
    x: Array,
    *,
    time_major: bool,
    initial_state: SLIFState | None,
    valid: Array | np.ndarray | None,
    record: Records,
    return_state: bool,
    alone: str = "s",
    **options: Any,
) -> Any:
    """The result of a layer's call; if only the record `alone` is requested, the array instead of a dict."""
    x = _check.as_currents("x", x, params.thr.dtype)
    if x.ndim < 2 or x.shape[-1] != params.n_units:
        raise ValueError(f"x: expected a time axis and a last axis of {params.n_units} features, got shape {x.shape}")
    _check.check_currents("x", x, x.shape)
    return_state = _check.as_flag("return_state", return_state)
    time = 0 if _check.as_flag("time_major", time_major) else x.ndim - 2
    with _check.transfers():
        currents = jnp.moveaxis(x, time, 0)
        if valid is not None:
            _check.check_mask("valid", _check.check_array("valid", valid, "a boolean array"), x.shape[:-1])
            valid = jnp.moveaxis(valid, time, 0)
    if initial_state is not None:
        _check.check_signature(params, _check.as_state(initial_state, "initial_state"), "initial_state")
        if initial_state.v.shape != currents.shape[1:]:
            shapes = f"{currents.shape[1:]}, got shape {initial_state.v.shape}"
            raise ValueError(f"initial_state: expected fields of shape {shapes}")
    state, out = simulate(params, initial_state, currents, dt=dt, record=record, valid=valid, **options)
    out = {name: y if y.ndim < x.ndim else jnp.moveaxis(y, 0, time) for name, y in out.items()}
    result = out[alone] if tuple(out) == (alone,) else out
    return (result, state) if return_state else result


def wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
