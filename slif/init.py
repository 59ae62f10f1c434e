"""Makes parameters and states of the cell, and puts a state back to rest."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from slif import _check, _warn
from slif.hyperparameters import NUMERIC, OPTIONAL, STATIC, Mechanisms, Numbers, with_defaults
from slif.rounding import as_runtime_values, hollow
from slif.surrogate import secant
from slif.types import FIELDS, SLIFParams, SLIFState


@with_defaults
def init_params(
    key: Array,
    n_units: int,
    *,
    tau_m: Numbers,
    resist_m: Numbers,
    thr: Numbers,
    **mechanisms: Unpack[Mechanisms],
) -> SLIFParams:
    """Makes the parameters of N units, with the reference cell's random draws for the same key.

        inh_weights ~ U(0.025, 1) with a zero diagonal,   thr = thr + U(-thr_jitter, thr_jitter)

    A Python 0 for `thr_gain`, `thr_leak`, `rho_b` or `resist_inh` leaves the mechanism out; an array keeps it traced,
    whatever its values, so that a sweep can cross zero. Every number is a scalar or an array [N], except that `rho_b`
    and `thr_jitter` are scalars.

    Args:
        key: a PRNG key.
        n_units: the number of units, N.
        tau_m: membrane time constant, ms, positive; below dt / 2 forward Euler diverges.
        resist_m: membrane resistance, voltage per current.
        thr: base threshold, in units of voltage.
        resist_inh: resistance to lateral inhibition, voltage per spike; active where positive.
        thr_persist: `slif.reset` leaves the thresholds alone.
        thr_gain: voltage added to a unit's threshold when it spikes.
        thr_leak: fraction of the threshold lost at each step.
        rho_b: sparsity control of the thresholds, voltage per spike; where positive, it replaces thr_gain and thr_leak.
        refract_time: refractory period, ms, 0 or more; a period of dt or less has no effect. If a clock of this dtype,
            in steps of dt, stops before the period ends, calls that take dt give a UserWarning: such a unit fires only
            once.
        sticky_spikes: hold the output at 1 throughout the refractory period.
        thr_jitter: half the range of the uniform jitter of the thresholds, in units of voltage, 0 or more. There
            is a UserWarning if it reaches thr: a unit with a threshold below 0 fires at every step without input.
        surrogate: the estimator of the spike's derivative; None for `secant()`, under which v, tau_m and thr have no
            gradient.
        dtype: dtype of every leaf; without x64, float64 becomes float32, with a UserWarning. Random draws are float32,
            then cast. bfloat16 is lossy: small changes of v, thr and the clock round away; to save memory, prefer
            bfloat16 currents with float32 params.
        reset: what a spike does to the potential: "zero" sets it to 0; "subtract", a soft reset, subtracts the
            threshold.

    Returns:
        The parameters; thresholds are [N].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, is out of range or not finite.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); ngc-learn's `SLIFCell`.

    Example:
        >>> params = init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
        >>> params.thr
        Array([0.4, 0.4, 0.4], dtype=float32)
    """
    given: dict[str, Any] = {"tau_m": tau_m, "resist_m": resist_m, "thr": thr, **mechanisms}
    dtype = _check.as_requested_dtype("dtype", given["dtype"])
    key, n_units = _check.as_key(key), _check.as_size("n_units", n_units, 1)
    left_out = {name for name in OPTIONAL if is_off(given.get(name, 0))}
    numbers = {name: given[name] for name in NUMERIC if name in given and name not in left_out}
    numbers = {name: _check.as_real(name, x, dtype) for name, x in numbers.items()}
    for name, x in numbers.items():
        _check.check_shape(name, x.shape, n_units, "units" if name == "thr" else None)
    inhibits = "resist_inh" in numbers
    _check.check_countable("n_units", n_units, n_units if inhibits else 1)
    thr_jitter = given["thr_jitter"]
    width = _check.as_scalar("thr_jitter", thr_jitter, jnp.float32)
    if not isinstance(numbers["thr"], Array) and not isinstance(thr_jitter, Array):
        _check.check_jitter("thr_jitter", thr_jitter, numbers["thr"], dtype)
        _warn.jitter(thr, thr_jitter)

    with _check.transfers():
        leaves = {name: _check.put(x, dtype).astype(dtype) for name, x in numbers.items()}
        key, k = jax.random.split(key)
        if inhibits:
            leaves["inh_weights"] = hollow(jax.random.uniform(k, (n_units, n_units), jnp.float32, 0.025, 1.0)).astype(
                dtype
            )
        key, k = jax.random.split(key)
        wide = jnp.promote_types(dtype, jnp.float32)
        jitter = jax.random.uniform(k, (1, n_units), jnp.float32, -width, width)[0]
        leaves["thr"] = (_check.put(numbers["thr"], wide).astype(wide) + jitter.astype(wide)).astype(dtype)

    surrogate = secant() if given["surrogate"] is None else given["surrogate"]
    static = {name: given[name] for name in STATIC}
    params = _check.as_device_params(SLIFParams(**leaves, **static, surrogate=surrogate))
    for name, worst in (("tau_m", np.min), ("refract_time", np.max)):
        if name in numbers and not isinstance(numbers[name], Array):
            _warn.made(getattr(params, name), float(worst(numbers[name])))
    return params


def is_off(value: Any) -> bool:
    """Whether this leaves a mechanism out: a Python 0 does, an array never."""
    return type(value) in (int, float) and value == 0


def init_state(params: SLIFParams, batch_shape: int | tuple[int, ...] = ()) -> SLIFState:
    """Makes a state at rest, which can be donated: its fields share no buffers with params or each other.

        j = v = s = tols = 0,   thr = params.thr,   rfr = refract_time,   surrogate = 1

    Args:
        params: the parameters.
        batch_shape: the batch dimensions, an int or a tuple of ints.

    Returns:
        The state; every field is [*batch_shape, N].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a batch dimension is negative, or thresholds [..., N] do not broadcast to the batch.

    Source: ngc-learn's `SLIFCell`.

    Example:
        >>> params = init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> init_state(params, 2).v.shape
        (2, 3)
    """
    params = _check.as_params(params)
    sizes = batch_shape if isinstance(batch_shape, tuple | list) else (batch_shape,)
    batch = tuple(_check.as_size("batch_shape", size, 0, symbolic=True) for size in sizes)
    with _check.transfers():
        return _init_state(params, batch)


@functools.partial(jax.jit, static_argnums=1)
def _init_state(params: SLIFParams, batch: tuple[Any, ...]) -> SLIFState:
    _check.check_signature(params)
    shape = (*batch, params.n_units)
    _check.check_countable("batch_shape", *shape)
    if not _check.broadcasts(params.thr.shape, shape):
        raise ValueError(f"batch_shape: expected one that params.thr {params.thr.shape} broadcasts to, got {batch}")
    return at_rest(params, shape)


def at_rest(params: SLIFParams, shape: tuple[Any, ...]) -> SLIFState:
    """The state at rest, with fields of this shape."""
    (params,) = as_runtime_values(params, len(shape))
    dtype = params.thr.dtype

    def fresh(leaf: Array) -> Array:
        # jit may return an input's own buffer, but a state that can be donated must share none with params.
        leaf = leaf.reshape((1,) * (len(shape) - leaf.ndim) + leaf.shape)
        return jnp.copy(jnp.broadcast_to(leaf, shape))

    j, v, s, rfr, tols = (jnp.zeros(shape, dtype) for _ in range(5))
    rfr = rfr if params.refract_time is None else fresh(params.refract_time)
    return SLIFState(j=j, v=v, s=s, thr=fresh(params.thr), rfr=rfr, tols=tols, surrogate=jnp.ones(shape, dtype))


def reset(
    params: SLIFParams, state: SLIFState, *, where: Array | None = None, fields: tuple[str, ...] | None = None
) -> SLIFState:
    """Puts the state back to rest, except for the thresholds if `thr_persist` is set.

        j = v = s = tols = 0,   thr = params.thr [kept with thr_persist],   rfr = refract_time,   surrogate = 1

    Args:
        params: the parameters.
        state: the state, fields [..., N].
        where: boolean [...], the rows to reset; None for all.
        fields: names of the fields to reset; None for all, except thr if `thr_persist` is set. ("thr", "rfr") brings
            new thresholds and periods of params into a state and leaves the rest alone.

    Returns:
        The state at rest.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape does not match, or a name is unknown.

    Source: ngc-learn's `SLIFCell.reset`.

    Example:
        >>> params = init_params(jax.random.key(0), 1, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> state = init_state(params, 2).replace(v=jnp.ones((2, 1)))
        >>> reset(params, state, where=jnp.array([True, False])).v
        Array([[0.],
               [1.]], dtype=float32)
    """
    params, state = _check.as_params(params), _check.as_state(state)
    if where is not None:
        _check.check_array("where", where, "a boolean array")
    if fields is not None:
        fields = _check.as_names("fields", fields, FIELDS)
    with _check.transfers():
        return _reset(params, state, where, fields)


@functools.partial(jax.jit, static_argnums=3)
def _reset(params: SLIFParams, state: SLIFState, where: Array | None, fields: tuple[str, ...] | None) -> SLIFState:
    _check.check_signature(params, state)
    if fields is None:
        fields = tuple(name for name in FIELDS if not (name == "thr" and params.thr_persist))
    new = {name: x for name, x in vars(at_rest(params, state.v.shape)).items() if name in fields}
    if where is not None:
        _check.check_mask("where", where, state.v.shape[:-1])
        new = {name: jnp.where(where[..., None], x, getattr(state, name)) for name, x in new.items()}
    return state.replace(**new)


def detach(state: SLIFState) -> SLIFState:
    """Stops gradients through the state, as between the windows of truncated back-propagation through time.

        d detach(state) / d state = 0

    Args:
        state: the state, fields [..., N].

    Returns:
        The same state, constant under differentiation.

    Raises:
        TypeError: `state` is not an SLIFState.

    Source: Williams & Peng (1990), Neural Computation 2(4).

    Example:
        >>> params = init_params(jax.random.key(0), 1, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> state = init_state(params)
        >>> jax.grad(lambda v: detach(state.replace(v=v)).v.sum())(state.v)
        Array([0.], dtype=float32)
    """
    return lax.stop_gradient(_check.as_state(state))
