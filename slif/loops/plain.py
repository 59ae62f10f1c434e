"""The recurrence as written: the reference that every other loop must equal."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from slif.cell import charge, drive, fire
from slif.loops.blocks import scan
from slif.request import Request, freeze
from slif.types import SLIFParams, SLIFState


def run(
    params: SLIFParams, state: SLIFState, currents: Array, request: Request, *, unroll: int = 1
) -> tuple[SLIFState, dict[str, Array]]:
    """state[k] = step(params, state[k - 1], currents[k], t0 + k dt, dt); the numbers come from `as_runtime_values`."""

    def body(carry, x):
        old, summaries = carry
        j, t, valid = x
        new, u, s = masked_step(params, old, j, t, request.dt, valid, request.feedback)
        return (new, request.summarise(summaries, s, t)), request.observe(new, u, s)

    xs = (currents, request.times(currents.shape[0]), request.valid)
    carry = (state, request.start_summaries(lambda value, dtype: jnp.full_like(state.v, value, dtype)))
    (state, summaries), out = scan(body, carry, xs, request.checkpoint_every, unroll)
    return state, out | request.finish_summaries(summaries)


def masked_step(
    params: SLIFParams,
    old: SLIFState,
    j: Array,
    t: Array,
    dt: Array,
    valid: Array | None,
    feedback: Array | None = None,
) -> tuple[SLIFState, Any, Any]:
    """The state after a step, its u, and its spikes as recorded."""
    # A frozen row's current never reaches the equations, so that no NaN in it reaches a gradient.
    j = freeze(valid, j, jnp.zeros_like(j)).astype(old.v.dtype)
    i = drive(params, old.s, j, feedback)
    u = charge(params, old, i, dt)
    new = fire(params, old, u, i, t.astype(old.v.dtype), dt, valid)
    return freeze(valid, (new, u, new.s), (old, old.v, jnp.zeros_like(new.s)))
