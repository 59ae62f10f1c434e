"""The simplified leaky integrate-and-fire cell: its equations, and one step of them."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from slif import _check, _warn
from slif._attach import attach
from slif._mesh import broadcast_like, replicate_units, reshard_like_currents
from slif.rounding import as_runtime_values
from slif.types import SLIFParams, SLIFState


def advance(
    params: SLIFParams, state: SLIFState, j: Array, t: Array, dt: Array, feedback: Array | None = None
) -> SLIFState:
    """One step of the equations, on numbers from `as_runtime_values`."""
    i = drive(params, state.s, j.astype(state.v.dtype), feedback)
    u = charge(params, state, i, dt)
    return fire(params, state, u, i, t, dt)


def drive(params: SLIFParams, s: Array, j: Array, feedback: Array | None = None) -> Array:
    """i = j resist_m [- (s @ inh_weights) resist_inh where resist_inh > 0], with s the spikes of the previous step.

    With feedback, s @ feedback is added to j first.
    """
    if feedback is not None:
        j = j + matmul(s, feedback)
    i = j * params.resist_m
    if params.resist_inh is None or params.inh_weights is None:
        return i
    return jnp.where(params.resist_inh > 0, i - matmul(s, params.inh_weights) * params.resist_inh, i)


def charge(params: SLIFParams, state: SLIFState, i: Array, dt: Array) -> Array:
    """u = v + ((i - v) (1 / tau_m)) dt if ready, else v."""
    v = state.v
    u = v + ((i - v) * (1 / params.tau_m)) * dt
    if params.refract_time is not None:
        u = jnp.where(state.rfr >= params.refract_time, u, v)
    return u if params.surrogate.wrt == "voltage" else lax.stop_gradient(u)


def fire(
    params: SLIFParams, state: SLIFState, u: Array, i: Array, t: Array, dt: Array, valid: Array | None = None
) -> SLIFState:
    """z = u > thr, and everything that a spike changes; rows that are not `valid` are for the caller to freeze."""
    by_current = params.surrogate.wrt == "current"
    x = i if by_current else distance(u, state.thr)
    h = params.surrogate(x)
    if valid is not None:  # a slope may be infinite where a frozen row stands, and 0 * inf would reach gradients
        h = jnp.where(valid, h, 0)
    if by_current:  # d s' = h(i) di; all else counts as constant
        params, state, u, t, dt = lax.stop_gradient((params, state, u, t, dt))
    thr, rfr, tols = state.thr, state.rfr, state.tols

    z = (u > thr).astype(u.dtype)
    z = z if by_current else attach(z, x, h)
    v_new = reset_potential(params, u, thr, z)
    thr_new = adapt(params, thr, z)
    rfr_new = jnp.where(z > 0, dt, rfr + dt)
    s = z
    if params.sticky_spikes and params.refract_time is not None:
        s = jnp.where(rfr >= params.refract_time, z, 1)
    tols_new = jnp.where(s > 0, t, tols)

    s = attach(s, x, h) if by_current else s
    rfr_new, tols_new, h = lax.stop_gradient((rfr_new, tols_new, h))
    return SLIFState(j=i, v=v_new, s=s, thr=thr_new, rfr=rfr_new, tols=tols_new, surrogate=h)


def distance(u: Array, thr: Array) -> Array:
    """u - thr, or far below 0 for an infinite threshold, where the derivatives of slopes would be NaN."""
    return jnp.where(thr < jnp.inf, u - thr, -(float(jnp.finfo(u.dtype).max) ** 0.5))


def reset_potential(params: SLIFParams, u: Array, thr: Array, z: Array) -> Array:
    """v' = 0 (u - thr for a soft reset) if z, else u; differentiated through z as (1 - z) u, or u - z thr."""
    spiked = 0 if params.reset == "zero" else u - thr
    v = jnp.where(z > 0, spiked, u)
    if params.surrogate.detach_reset:
        return v
    lost = u if params.reset == "zero" else thr
    finite = jnp.isfinite(lost)  # 0 * inf would be NaN
    return jnp.where(finite, u - z * jnp.where(finite, lost, 0), v)


def adapt(params: SLIFParams, thr: Array, z: Array) -> Array:
    """thr' = (thr + z thr_gain) - thr thr_leak, or max(thr + (z.sum() - 1) rho_b, 0.025) where rho_b > 0."""
    adapted = thr
    if params.thr_gain is not None:
        adapted = adapted + z * params.thr_gain
    if params.thr_leak is not None:
        # An infinite threshold loses nothing: inf - inf is NaN. With a constant in place of z, the compiler would move
        # the product into the select and round it separately.
        adapted = adapted - jnp.where(thr < jnp.inf, thr, lax.stop_gradient(z)) * params.thr_leak
    if params.rho_b is None:
        return adapted
    sparse = jnp.maximum(thr + (z.sum(-1, keepdims=True) - 1) * params.rho_b, 0.025)
    return jnp.where(params.rho_b > 0, sparse, adapted)


def matmul(s: Array, weights: Array) -> Array:
    """s @ weights, from row to column, in full precision: GPUs and TPUs multiply in fewer bits by default."""
    return jnp.dot(replicate_units(s), weights, precision=lax.Precision.HIGHEST)


def adapts(params: SLIFParams) -> bool:
    """Whether anything changes the thresholds; if so, those of the state are used, else those of params."""
    return not (params.thr_gain is params.thr_leak is params.rho_b is None)


def take_thresholds(params: SLIFParams, state: SLIFState) -> SLIFState:
    """The state to step from: thresholds that nothing adapts come from params, whatever the state holds."""
    return state if adapts(params) else state.replace(thr=broadcast_like(params.thr, state.v))


def step(params: SLIFParams, state: SLIFState, j: Array, t: ArrayLike, dt: ArrayLike) -> SLIFState:
    """Advances the cell by one step of forward Euler.

        i    = j * resist_m                                   [- (s @ inh_weights) * resist_inh   where resist_inh > 0]
        u    = v + ((i - v) * (1 / tau_m)) * dt               if rfr >= refract_time else v
        z    = u > thr
        v'   = 0 if z else u                                  [u - thr if z, with reset="subtract"]
        thr' = (thr + z * thr_gain) - thr * thr_leak          [max(thr + (z.sum() - 1) * rho_b, 0.025)  where rho_b > 0]
        rfr' = dt if z else rfr + dt
        s'   = z, or with sticky spikes: 1 while refractory
        tols'= t if s' else tols

    Args:
        params: the parameters.
        state: the state after the previous step, fields [..., N].
        j: input current [..., N], cast to the dtype of params; 64-bit integers from NumPy do not wrap.
        t: the time of this step, ms; only tols depends on it.
        dt: the length of the step, ms, positive. Above 2 tau_m forward Euler diverges, with a UserWarning if both
            come from Python or NumPy values.

    Returns:
        The state after the step; v is after the reset, s is the output.

    Raises:
        TypeError: an argument has the wrong type, or its dtype is not that of params.
        ValueError: a shape does not match, or a Python or NumPy value is out of range or not finite.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); ngc-learn's `SLIFCell.advance_state`.

    Example:
        >>> from slif import init_params, init_state
        >>> params = init_params(jax.random.key(0), 1, tau_m=16.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
        >>> state = init_state(params)
        >>> for k in range(3):
        ...     state = step(params, state, jnp.array([4.0]), t=k * 1.0, dt=1.0)
        ...     print(state.v, state.s)
        [0.25] [0.]
        [0.] [1.]
        [0.25] [0.]
    """
    params, state = _check.as_params(params), _check.as_state(state)
    t, dt = (_check.as_number(name, x, params.thr.dtype) for name, x in (("t", t), ("dt", dt)))
    _warn.euler(params.tau_m, dt)
    _warn.clock(params.refract_time, dt, params.thr.dtype)
    j = _check.as_currents("j", j, params.thr.dtype)
    with _check.transfers():
        return _step(params, state, j, t, dt)


@jax.jit
def _step(params: SLIFParams, state: SLIFState, j: Array, t: Array, dt: Array) -> SLIFState:
    _check.check_signature(params, state)
    _check.check_currents("j", j, state.v.shape)
    _check.check_scalars(t=t, dt=dt)
    params, state, currents, _ = reshard_like_currents(params, state, j[None])
    params, t, dt = as_runtime_values(params, state.v.ndim, t, dt)
    return advance(params, take_thresholds(params, state), currents[0], t, dt)
