"""The loop for CPUs: the same recurrence, shifted by half a step.

On CPUs XLA runs one kernel per step for each array that the loop carries or returns, and each recomputes all that it
needs. That is least if an iteration begins between the Euler step and the spike: the returned spikes then take one
comparison instead of a second Euler step.
"""

import jax.numpy as jnp
from jax import Array, lax

from slif.cell import charge, drive, fire
from slif.loops.blocks import scan
from slif.request import Request, freeze
from slif.types import SLIFParams, SLIFState


def run(
    params: SLIFParams, state: SLIFState, currents: Array, request: Request, *, constant: bool = False
) -> tuple[SLIFState, dict[str, Array]]:
    """The same as `plain.run`, for one step or more and without feedback.

    In the carry v is u, whose spike is still to come.
    """
    valid, times = request.valid, request.times(currents.shape[0])
    paired = constant and params.refract_time is not None and state.v.dtype in (jnp.float32, jnp.float64)

    def fire_where_valid(charged, t, valid):
        new = fire(params, charged, charged.v, charged.j, t.astype(charged.v.dtype), request.dt, valid)
        return freeze(valid, new, charged)

    def body(carry, x):
        carried, summaries = carry
        j, t, valid, t_before, valid_before = x
        old = fire_where_valid(_unpair(carried), t_before, valid_before)
        i = drive(params, old.s, freeze(valid, j, jnp.zeros_like(j)).astype(old.v.dtype))
        carried = freeze(valid, old.replace(v=charge(params, old, i, request.dt), j=i), old)
        carried = _pair(carried) if paired else carried
        charged = _unpair(carried)
        u, new = charged.v, fire_where_valid(charged, t, valid)
        s = freeze(valid, new.s, jnp.zeros_like(new.s))
        return (carried, request.summarise(summaries, s, t)), request.observe(new, u, s)

    if valid is None:
        valid_before = jnp.arange(currents.shape[0]) > 0  # no spike is pending before the first step
    else:
        valid_before = jnp.concatenate([jnp.zeros_like(valid[:1]), valid[:-1]])
    t_before = jnp.concatenate([times[:1], times[:-1]])
    xs = (currents, times, valid, t_before, valid_before)
    summaries = request.start_summaries(
        lambda value, dtype: jnp.full_like(state.v, value, dtype), differentiable=not constant
    )
    carry = (_pair(state) if paired else state, summaries)
    (carried, summaries), out = scan(body, carry, xs, request.checkpoint_every)
    charged = _unpair(carried)
    if params.resist_inh is None and valid is None:
        # Then i follows from the last current, and need not be carried.
        charged = charged.replace(j=drive(params, charged.s, currents[-1].astype(charged.v.dtype)))
    final = fire_where_valid(charged, times[-1], None if valid is None else valid[-1])
    return final, out | request.finish_summaries(summaries)


def _pair(state: SLIFState) -> SLIFState:
    """v and rfr as one complex array: one kernel per step instead of two.

    The barrier keeps XLA from splitting them again. Bool rasters of (100, 250, 1000) take 0.7 of the time; under
    differentiation it costs more than it saves.
    """
    return state.replace(v=lax.optimization_barrier(lax.complex(state.v, state.rfr)), rfr=None)


def _unpair(state: SLIFState) -> SLIFState:
    return state if state.rfr is not None else state.replace(v=lax.real(state.v), rfr=lax.imag(state.v))
