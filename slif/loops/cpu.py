"""The loop for CPUs: the same recurrence, turned by half a step.

On CPUs XLA runs one kernel a step for each array that the loop carries or returns, and each computes all that it needs
anew. Between the two halves of a step, after the Euler step and before the spike, less has to be carried: the spikes
returned are then one comparison, in place of a second Euler step.
"""

import jax.numpy as jnp
from jax import Array

from slif.cell import charge, drive, fire
from slif.loops.blocks import scan
from slif.loops.request import Request, freeze
from slif.types import SLIFParams, SLIFState


def run(params: SLIFParams, state: SLIFState, currents: Array, request: Request) -> tuple[SLIFState, dict[str, Array]]:
    """What `plain.run` gives, for one step or more; the carry holds u in place of v, before its spike is dealt with."""
    valid, times = request.valid, request.times(len(currents))
    coupled = params.resist_inh is not None or valid is not None

    def settle(pending, t, live):
        """The state after the step whose Euler half is done."""
        return freeze(live, fire(params, pending, pending.v, pending.j, t.astype(pending.v.dtype), request.dt), pending)

    def body(carry, x):
        pending, summaries = carry
        j, t, live, t_before, live_before = x
        old = settle(pending, t_before, live_before)
        i = drive(params, old.s, freeze(live, j, jnp.zeros_like(j)).astype(old.v.dtype))
        pending = freeze(live, old.replace(v=charge(params, old, i, request.dt), j=i), old)
        new = settle(pending, t, live)
        s = freeze(live, new.s, jnp.zeros_like(new.s))
        return (pending, request.summarise(summaries, s, t)), request.observe(new, s)

    # Before the first step there is nothing to settle.
    if valid is None:
        live_before = jnp.arange(len(currents)) > 0
    else:
        live_before = jnp.concatenate([jnp.zeros_like(valid[:1]), valid[:-1]])
    t_before = jnp.concatenate([times[:1], times[:-1]])
    xs = (currents, times, valid, t_before, live_before)
    (pending, summaries), out = scan(body, (state, request.summaries(state)), xs, request.checkpoint_every)
    if not coupled:  # then the last current tells i, and nothing has to carry it
        pending = pending.replace(j=drive(params, pending.s, currents[-1].astype(pending.v.dtype)))
    return settle(pending, times[-1], None if valid is None else valid[-1]), out | summaries
