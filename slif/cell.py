"""The simplified leaky integrate-and-fire cell: its equations, and the making of its parameters and state."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from slif import _check, _warn
from slif._attach import attach
from slif._mesh import broadcast_like, follow, gathered
from slif.surrogate import Surrogate, fire_and_reset, secant
from slif.types import FIELDS, SLIFParams, SLIFState


def drive(params: SLIFParams, s: Array, j: Array) -> Array:
    """i: the current after membrane resistance and lateral inhibition by the spikes of the step before."""
    i = j * params.resist_m
    if params.resist_inh is None or params.inh_weights is None:
        return i
    inhibition = jnp.dot(gathered(s), params.inh_weights, precision=lax.Precision.HIGHEST)
    return jnp.where(params.resist_inh > 0, i - inhibition * params.resist_inh, i)


def adapt(params: SLIFParams, thr: Array, z: Array) -> Array:
    """thr': the sparsity rule where rho_b > 0, gain and leak otherwise."""
    adapted = thr
    if params.thr_gain is not None:
        adapted = adapted + z * params.thr_gain
    if params.thr_leak is not None:
        # An endless threshold loses nothing: inf - inf is no number. With a constant in place of z the compiler would
        # take the product into the select, and round it on its own.
        adapted = adapted - jnp.where(thr < jnp.inf, thr, lax.stop_gradient(z)) * params.thr_leak
    if params.rho_b is None:
        return adapted
    sparse = jnp.maximum(thr + (z.sum(-1, keepdims=True) - 1) * params.rho_b, 0.025)
    return jnp.where(params.rho_b > 0, sparse, adapted)


def adapts(params: SLIFParams) -> bool:
    """Whether thresholds change: what they are is then told by the state, else by params."""
    return not (params.thr_gain is params.thr_leak is params.rho_b is None)


def take_thresholds(params: SLIFParams, state: SLIFState) -> SLIFState:
    """The state to step from: thresholds that nothing adapts are those of params, whatever the state holds."""
    return state if adapts(params) else state.replace(thr=broadcast_like(params.thr, state.v))


def charge(params: SLIFParams, state: SLIFState, i: Array, dt: Array) -> Array:
    """u: the potential before the spike; a refractory unit keeps its own."""
    v = state.v
    u = v + ((i - v) * (1 / params.tau_m)) * dt
    if params.refract_time is not None:
        u = jnp.where(state.rfr >= params.refract_time, u, v)
    return u if params.surrogate.wrt == "voltage" else lax.stop_gradient(u)


def fire(params: SLIFParams, state: SLIFState, u: Array, i: Array, t: Array, dt: Array) -> SLIFState:
    """The state after the step from u on: the spike and what it does, with the gradient of the estimator."""
    if params.surrogate.wrt == "voltage":
        return _fire(params, state, u, i, t, dt)
    new = _fire(*lax.stop_gradient((params, state, u, i, t, dt)))
    return new.replace(j=i, s=attach(new.s, i, params.surrogate(i)))


def _fire(params: SLIFParams, state: SLIFState, u: Array, i: Array, t: Array, dt: Array) -> SLIFState:
    """Differentiated as it is written, but for the spike."""
    thr, rfr, tols = state.thr, state.rfr, state.tols

    x = i if params.surrogate.wrt == "current" else u - thr
    h = params.surrogate(x)
    z = attach((u > thr).astype(u.dtype), x, h)
    v_new = jnp.where(z > 0, 0, u) if params.surrogate.detach_reset else fire_and_reset(u, z)
    thr_new = adapt(params, thr, z)
    rfr_new = jnp.where(z > 0, dt, rfr + dt)
    s = z
    if params.sticky_spikes and params.refract_time is not None:
        s = jnp.where(rfr >= params.refract_time, z, 1)
    tols_new = jnp.where(s > 0, t, tols)

    rfr_new, tols_new, h = lax.stop_gradient((rfr_new, tols_new, h))
    return SLIFState(j=i, v=v_new, s=s, thr=thr_new, rfr=rfr_new, tols=tols_new, surrogate=h)


def advance(params: SLIFParams, state: SLIFState, j: Array, t: Array, dt: Array) -> SLIFState:
    """One step; params, t and dt come from `prepare`."""
    i = drive(params, state.s, j.astype(state.v.dtype))
    u = charge(params, state, i, dt)
    return fire(params, state, u, i, t, dt)


def prepare(params: SLIFParams, ndim: int, *clock: Array) -> tuple[SLIFParams, *tuple[Array, ...]]:
    """Params and times in one dtype, [N] leaves aligned with states of `ndim` axes, no unit inhibiting itself.

    Every number of the equations goes through here, whichever function it comes by, lest a literal be rounded in
    another way than an argument. Behind the barrier XLA sees no constant, and multiplies none together. The code of a
    small loop it hands over to LLVM as a whole, which would still leave out a factor dt = 1, and then contract the
    multiply-adds in another order: sorting is what neither of them looks through.
    """
    dtype = params.thr.dtype

    def align(leaf: Array) -> Array:
        leaf = leaf.astype(dtype)
        return leaf if leaf.ndim == 0 else leaf.reshape((1,) * (ndim - 1) + leaf.shape)

    weights = params.inh_weights
    if weights is not None:
        weights = jnp.where(jnp.eye(params.n_units, dtype=bool), 0, weights.astype(dtype))
    leaves = jax.tree.map(align, params.replace(thr=None, inh_weights=None))
    leaves = lax.optimization_barrier(leaves).replace(thr=params.thr, inh_weights=weights)
    return leaves, *(_hide(jnp.asarray(x).astype(dtype)) for x in clock)


@jax.custom_jvp
def _hide(x: Array) -> Array:
    return lax.sort(lax.optimization_barrier(jnp.stack([x, x], -1)))[..., 0]


_hide.defjvps(lambda dx, _, x: dx)


def init_params(
    key: Array,
    n_units: int,
    *,
    tau_m: ArrayLike,
    resist_m: ArrayLike,
    thr: ArrayLike,
    resist_inh: ArrayLike = 0.0,
    thr_persist: bool = False,
    thr_gain: ArrayLike = 0.0,
    thr_leak: ArrayLike = 0.0,
    rho_b: ArrayLike = 0.0,
    refract_time: ArrayLike = 0.0,
    sticky_spikes: bool = False,
    thr_jitter: ArrayLike = 0.05,
    surrogate: Surrogate | None = None,
    dtype: DTypeLike = jnp.float32,
) -> SLIFParams:
    """Makes the parameters of N units, with the reference cell's random draws for the same key.

        inh_weights ~ U(0.025, 1) with a zero diagonal,   thr = thr + U(-thr_jitter, thr_jitter)

    A Python 0 for `thr_gain`, `thr_leak`, `rho_b` or `resist_inh` leaves the mechanism out; an array keeps it traced,
    whatever it holds, so that a sweep can cross zero. Every number is a scalar or, but for `rho_b` and `thr_jitter`,
    an array [N].

    Args:
        key: a PRNG key.
        n_units: the number of units, N.
        tau_m: membrane time constant, ms, positive; half of dt or more, or forward Euler diverges.
        resist_m: membrane resistance.
        thr: base threshold, in units of voltage.
        resist_inh: resistance to lateral inhibition; acts where positive.
        thr_persist: keep the thresholds through `reset`.
        thr_gain: what a unit's spike adds to its threshold.
        thr_leak: share of its threshold that a unit loses at each step.
        rho_b: sparsity control of the thresholds; where positive, it replaces gain and leak.
        refract_time: refractory period, ms, 0 or more; one of dt or less blocks nothing. Where a clock of this dtype
            stops before it, in steps of dt, there is a UserWarning in the calls that take dt: such a unit fires once.
        sticky_spikes: hold the output at 1 throughout the refractory period.
        thr_jitter: half the range of the uniform jitter of the thresholds, 0 or more. Where it reaches thr there is a
            UserWarning: a unit of a threshold below 0 fires at every step without input.
        surrogate: the estimator of the spike's derivative; None for `secant()`.
        dtype: dtype of every leaf; float64 is float32 without x64, with a UserWarning. The draws are float32 and then
            cast. bfloat16 is lossy: small changes of v, thr and the clock round away; bfloat16 currents into float32
            params are the better saving.

    Returns:
        The parameters; thresholds are [N].

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: an argument has the wrong shape, is out of range or not finite.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); ngc-learn's `SLIFCell`.

    Example:
        >>> params = init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
        >>> params.thr
        Array([0.4, 0.4, 0.4], dtype=float32)
    """
    n_units, dtype = _check.size("n_units", n_units, 1), _check.requested("dtype", dtype)
    key = _check.key(key)
    numbers = {"tau_m": tau_m, "resist_m": resist_m, "thr": thr}
    mechanisms = {"refract_time": refract_time, "thr_gain": thr_gain, "thr_leak": thr_leak}
    mechanisms |= {"rho_b": rho_b, "resist_inh": resist_inh}
    numbers |= {name: x for name, x in mechanisms.items() if not is_off(x)}
    numbers = {name: _check.real(name, x, dtype) for name, x in numbers.items()}
    for name, x in numbers.items():
        _check.shaped(name, x.shape, n_units, _check.Rule() if name == "thr" else None)
    _check.countable("n_units", n_units, n_units if "resist_inh" in numbers else 1)

    width = _check.scalar("thr_jitter", thr_jitter, jnp.float32)
    if not isinstance(numbers["thr"], Array) and not isinstance(thr_jitter, Array):
        _check.spread("thr_jitter", thr_jitter, numbers["thr"], dtype)
        _warn.jitter(thr, thr_jitter)

    draw = jnp.promote_types(dtype, jnp.float32)
    inh_weights = None
    with _check.transfers():
        key, k = jax.random.split(key)
        if "resist_inh" in numbers:
            inh_weights = jax.random.uniform(k, (n_units, n_units), jnp.float32, 0.025, 1.0).astype(dtype)
            inh_weights = jnp.where(jnp.eye(n_units, dtype=bool), 0, inh_weights)
        key, k = jax.random.split(key)
        jitter = jax.random.uniform(k, (1, n_units), jnp.float32, -width, width)[0]
        numbers["thr"] = (_check.put(numbers["thr"], draw).astype(draw) + jitter.astype(draw)).astype(dtype)

    params = _check.params(
        SLIFParams(
            **{name: _check.put(x, dtype).astype(dtype) for name, x in numbers.items()},
            inh_weights=inh_weights,
            surrogate=secant() if surrogate is None else surrogate,
            sticky_spikes=_check.flag("sticky_spikes", sticky_spikes),
            thr_persist=_check.flag("thr_persist", thr_persist),
        )
    )
    for name, worst in (("tau_m", np.min), ("refract_time", np.max)):
        if not isinstance(numbers.get(name, params.thr), Array):
            _warn.made(getattr(params, name), float(worst(numbers[name])))
    return params


def is_off(value: Any) -> bool:
    """Whether this leaves a mechanism out: a Python 0 does, no array."""
    return type(value) in (int, float) and value == 0


def init_state(params: SLIFParams, batch_shape: int | tuple[int, ...] = ()) -> SLIFState:
    """Makes a state at rest, which shares no buffer with params or between its fields and so can be donated.

        j = v = s = tols = 0,   thr = params.thr,   rfr = refract_time,   surrogate = 1

    Args:
        params: the parameters.
        batch_shape: the batch dimensions, an int or a tuple of ints.

    Returns:
        The state; every field is [*batch_shape, N].

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a batch dimension is negative, or thresholds [..., N] do not broadcast to the batch.

    Source: ngc-learn's `SLIFCell`.

    Example:
        >>> params = init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> init_state(params, 2).v.shape
        (2, 3)
    """
    params = _check.values(params)
    sizes = batch_shape if isinstance(batch_shape, tuple | list) else (batch_shape,)
    batch = tuple(_check.size("batch_shape", size, 0, symbolic=True) for size in sizes)
    with _check.transfers():
        return _init_state(params, batch)


@functools.partial(jax.jit, static_argnums=1)
def _init_state(params: SLIFParams, batch: tuple[Any, ...]) -> SLIFState:
    _check.signature(params)
    shape = (*batch, params.n_units)
    _check.countable("batch_shape", *shape)
    if not _check.broadcasts(params.thr.shape, shape):
        raise ValueError(f"batch_shape: expected one that params.thr {params.thr.shape} broadcasts to, got {batch}")
    return _rest(params, shape)


def _rest(params: SLIFParams, shape: tuple[Any, ...]) -> SLIFState:
    (params,) = prepare(params, len(shape))
    dtype = params.thr.dtype

    def fresh(leaf: Array) -> Array:
        # The state can be donated, so it must be no buffer of params, whatever jit does with an input it returns.
        leaf = leaf.reshape((1,) * (len(shape) - leaf.ndim) + leaf.shape)
        return jnp.copy(jnp.broadcast_to(leaf, shape))

    j, v, s, rfr, tols = (jnp.zeros(shape, dtype) for _ in range(5))
    rfr = rfr if params.refract_time is None else fresh(params.refract_time)
    return SLIFState(j=j, v=v, s=s, thr=fresh(params.thr), rfr=rfr, tols=tols, surrogate=jnp.ones(shape, dtype))


def step(params: SLIFParams, state: SLIFState, j: Array, t: ArrayLike, dt: ArrayLike) -> SLIFState:
    """Advances the cell by one step of forward Euler.

        i    = j * resist_m                                   [- (s @ inh_weights) * resist_inh   where resist_inh > 0]
        u    = v + ((i - v) * (1 / tau_m)) * dt               if rfr >= refract_time else v
        z    = u > thr
        v'   = 0 if z else u
        thr' = (thr + z * thr_gain) - thr * thr_leak          [max(thr + (sum z - 1) * rho_b, 0.025)   where rho_b > 0]
        rfr' = dt if z else rfr + dt
        s'   = z, or with sticky spikes: 1 while refractory
        tols'= t if s' else tols

    Args:
        params: the parameters.
        state: the state after the step before, fields [..., N].
        j: input current [..., N]; another dtype is cast to that of params, 64 bits of NumPy's without wrapping.
        t: the time of this step, ms; it enters tols only.
        dt: the length of the step, ms, positive. Above 2 tau_m forward Euler diverges: a UserWarning where both are
            known as Python or NumPy values.

    Returns:
        The state after the step; its v is after the reset, its s is the output.

    Raises:
        TypeError: an argument is not of its kind, or its dtype is not that of params.
        ValueError: a shape does not fit, or a Python or NumPy value is out of range or not finite.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); ngc-learn's `SLIFCell.advance_state`.

    Example:
        >>> params = init_params(jax.random.key(0), 1, tau_m=16.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
        >>> state = init_state(params)
        >>> for k in range(3):
        ...     state = step(params, state, jnp.array([4.0]), t=k * 1.0, dt=1.0)
        ...     print(state.v, state.s)
        [0.25] [0.]
        [0.] [1.]
        [0.25] [0.]
    """
    params, state = _check.values(params), _check.fields(state)
    t, dt = (_check.number(name, x, params.thr.dtype) for name, x in (("t", t), ("dt", dt)))
    _warn.euler(params.tau_m, dt)
    _warn.clock(params.refract_time, dt, params.thr.dtype)
    j = _check.currents("j", j, params.thr.dtype)
    with _check.transfers():
        return _step(params, state, j, t, dt)


@jax.jit
def _step(params: SLIFParams, state: SLIFState, j: Array, t: Array, dt: Array) -> SLIFState:
    _check.signature(params, state)
    _check.current("j", j, state.v.shape)
    _check.scalars(t=t, dt=dt)
    params, state, currents, _ = follow(params, state, j[None])
    params, t, dt = prepare(params, state.v.ndim, t, dt)
    return advance(params, take_thresholds(params, state), currents[0], t, dt)


def reset(
    params: SLIFParams, state: SLIFState, *, where: Array | None = None, fields: tuple[str, ...] | None = None
) -> SLIFState:
    """Puts the state back to rest, but for the thresholds where `thr_persist` is set.

        j = v = s = tols = 0,   thr = params.thr [kept with thr_persist],   rfr = refract_time,   surrogate = 1

    Args:
        params: the parameters.
        state: the state, fields [..., N].
        where: boolean [...], the rows to reset; None for all.
        fields: names of the fields to reset; None for all, without thr where `thr_persist` is set. ("thr", "rfr") takes
            new thresholds and periods of params into a state and leaves the rest as it is.

    Returns:
        The state at rest.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a shape does not fit, or a name is not known.

    Source: ngc-learn's `SLIFCell.reset`.

    Example:
        >>> params = init_params(jax.random.key(0), 1, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> state = init_state(params, 2).replace(v=jnp.ones((2, 1)))
        >>> reset(params, state, where=jnp.array([True, False])).v
        Array([[0.],
               [1.]], dtype=float32)
    """
    params, state = _check.values(params), _check.fields(state)
    if where is not None:
        _check.array("where", where, "a boolean array")
    if fields is not None:
        fields = _check.names("fields", fields, FIELDS)
    with _check.transfers():
        return _reset(params, state, where, fields)


@functools.partial(jax.jit, static_argnums=3)
def _reset(params: SLIFParams, state: SLIFState, where: Array | None, fields: tuple[str, ...] | None) -> SLIFState:
    _check.signature(params, state)
    if fields is None:
        fields = tuple(name for name in FIELDS if not (name == "thr" and params.thr_persist))
    new = {name: x for name, x in vars(_rest(params, state.v.shape)).items() if name in fields}
    if where is not None:
        _check.mask("where", where, state.v.shape[:-1])
        new = {name: jnp.where(where[..., None], x, getattr(state, name)) for name, x in new.items()}
    return state.replace(**new)


def detach(state: SLIFState) -> SLIFState:
    """Stops gradients through the state, as between the windows of truncated back-propagation through time.

        d detach(state) / d state = 0

    Args:
        state: the state, fields [..., N].

    Returns:
        The same values, constant to differentiation.

    Raises:
        TypeError: `state` is not an SLIFState.

    Source: Williams & Peng (1990), Neural Computation 2(4).

    Example:
        >>> params = init_params(jax.random.key(0), 1, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> state = init_state(params)
        >>> jax.grad(lambda v: detach(state.replace(v=v)).v.sum())(state.v)
        Array([0.], dtype=float32)
    """
    return lax.stop_gradient(_check.fields(state))


def describe() -> dict[str, Any]:
    """Tells what the cell is: its inputs, states and outputs, hyperparameters with units and defaults, and dynamics.

        tau_m * dv/dt = -v + j * resist_m

    Returns:
        A dict with "cell_type", "inputs", "states", "outputs", "hyperparameters" and "dynamics". Each hyperparameter
        is a dict with "description", "unit" (None for a pure number) and "default" (absent where one must be given).

    Source: ngc-learn's `SLIFCell.help`.

    Example:
        >>> describe()["hyperparameters"]["refract_time"]["unit"]
        'ms'
    """
    signature = inspect.signature(init_params)
    hyperparameters = {}
    for name, (unit, description) in _HYPERPARAMETERS.items():
        hyperparameters[name] = {"description": description, "unit": unit}
        default = signature.parameters[name].default
        if default is not inspect.Parameter.empty:
            hyperparameters[name]["default"] = default
    return {
        "cell_type": "SLIFCell: simplified leaky integrate-and-fire cell",
        "inputs": {"j": "input current"},
        "states": {
            "v": "membrane potential, after the reset",
            "rfr": "time since the last raw spike, ms",
            "thr": "threshold that the next step compares with",
        },
        "outputs": {
            "s": "spikes, 0 or 1",
            "tols": "time of the last output spike, ms",
            "surrogate": "slope of the surrogate",
        },
        "hyperparameters": hyperparameters,
        "dynamics": "tau_m * dv/dt = -v + j * resist_m",
    }


_HYPERPARAMETERS = {
    "n_units": (None, "number of units"),
    "tau_m": ("ms", "membrane time constant"),
    "resist_m": ("voltage / current", "membrane resistance"),
    "thr": ("voltage", "base threshold"),
    "resist_inh": ("voltage / spike", "resistance to lateral inhibition; acts where positive"),
    "thr_persist": (None, "thresholds stay through reset"),
    "thr_gain": ("voltage / spike", "what a unit's spike adds to its threshold"),
    "thr_leak": ("1 / step", "share of its threshold that a unit loses at each step"),
    "rho_b": ("voltage / spike", "sparsity control of the thresholds; where positive, it replaces gain and leak"),
    "refract_time": ("ms", "refractory period"),
    "sticky_spikes": (None, "output stays 1 throughout the refractory period"),
    "thr_jitter": ("voltage", "half the range of the uniform jitter of the thresholds"),
}
