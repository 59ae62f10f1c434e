"""The loop for CPUs: the same recurrence, turned by half a step.

On CPUs XLA runs one kernel a step for each array that the loop carries or returns, and each computes all that it needs
anew. Between the two halves of a step, after the Euler step and before the spike, that is least: the spikes returned
are then one comparison in place of a second Euler step.
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
    """What `plain.run` gives for one step or more; v in the carry is u, whose spike is still to be dealt with."""
    valid, times = request.valid, request.times(currents.shape[0])
    paired = constant and params.refract_time is not None and state.v.dtype in (jnp.float32, jnp.float64)

    def settle(pending, t, live):
        """The state after the step whose Euler half is done."""
        return freeze(live, fire(params, pending, pending.v, pending.j, t.astype(pending.v.dtype), request.dt), pending)

    def body(carry, x):
        pending, summaries = carry
        j, t, live, t_before, live_before = x
        old = settle(_apart(pending), t_before, live_before)
        i = drive(params, old.s, freeze(live, j, jnp.zeros_like(j)).astype(old.v.dtype))
        pending = freeze(live, old.replace(v=charge(params, old, i, request.dt), j=i), old)
        pending = _together(pending) if paired else pending
        charged = _apart(pending)
        u, new = charged.v, settle(charged, t, live)
        s = freeze(live, new.s, jnp.zeros_like(new.s))
        return (pending, request.summarise(summaries, s, t)), request.observe(new, u, s)

    if valid is None:
        live_before = jnp.arange(currents.shape[0]) > 0  # before the first step there is nothing to settle
    else:
        live_before = jnp.concatenate([jnp.zeros_like(valid[:1]), valid[:-1]])
    t_before = jnp.concatenate([times[:1], times[:-1]])
    xs = (currents, times, valid, t_before, live_before)
    carry = (_together(state) if paired else state, request.summaries(state))
    (pending, summaries), out = scan(body, carry, xs, request.checkpoint_every)
    pending = _apart(pending)
    if params.resist_inh is None and valid is None:  # then the last current tells i, and nothing has to carry it
        pending = pending.replace(j=drive(params, pending.s, currents[-1].astype(pending.v.dtype)))
    return settle(pending, times[-1], None if valid is None else valid[-1]), out | request.summed_up(summaries)


def _together(state: SLIFState) -> SLIFState:
    """v and rfr as one complex array: one kernel a step in place of two.

    Behind a barrier, lest XLA take them apart again. Bool rasters of (100, 250, 1000) take 0.7 of the time; under
    differentiation it costs more than it saves.
    """
    return state.replace(v=lax.optimization_barrier(lax.complex(state.v, state.rfr)), rfr=None)


def _apart(state: SLIFState) -> SLIFState:
    return state if state.rfr is not None else state.replace(v=lax.real(state.v), rfr=lax.imag(state.v))
