"""The loop for CPUs: the same recurrence, shifted by half a step.

On CPUs XLA runs one kernel per step for each array that the loop carries or returns, and each recomputes all that it
needs. That is least if an iteration begins between the Euler step and the spike: the returned spikes then take one
comparison instead of a second Euler step.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from slif.cell import adapts, charge, drive, fire
from slif.loops.blocks import scan
from slif.request import Request, freeze
from slif.types import SLIFParams, SLIFState


def run(
    params: SLIFParams, state: SLIFState, currents: Array, request: Request, *, constant: bool = False
) -> tuple[SLIFState, dict[str, Array]]:
    """The same as `plain.run`, for one step or more and without feedback.

    In the carry v is u, whose spike is still to come. Fields that no step reads are carried as they are after that
    spike, since XLA would otherwise copy v at each step for them.
    """
    valid, times = request.valid, request.times(currents.shape[0])
    unread = ("rfr", "tols") if params.refract_time is None else ("tols",)
    # Bool rasters take 0.6 to 0.8 of the time if thr shares an array with v, and 0.7 if rfr does; under differentiation
    # it costs more than it saves.
    partner = ("thr",) if adapts(params) else ("rfr",) if params.refract_time is not None else ()
    charged = ("v", *(partner if constant else ()))
    # Differentiation saves which thresholds are finite: at each step if they are carried, else once.
    fixed = {} if adapts(params) or params.surrogate.wrt == "current" else {"thr": state.thr}

    def pack(state):
        return state.replace(**dict.fromkeys((*charged, *unread, *fixed))), _join(state, charged)

    def unpack(packed, after):
        rest, joined = packed
        return rest.replace(**_split(joined, charged), **fixed, **after)

    def fire_where_valid(pending, t, valid):
        new = fire(params, pending, pending.v, pending.j, t.astype(pending.v.dtype), request.dt, valid)
        return freeze(valid, new, pending)

    def body(carry, x):
        packed, joined_unread, summaries = carry
        j, t, valid, valid_before = x
        after = _split(joined_unread, unread)
        old = fire_where_valid(unpack(packed, after), t, valid_before).replace(**after)
        i = drive(params, old.s, freeze(valid, j, jnp.zeros_like(j)).astype(old.v.dtype))
        packed = pack(freeze(valid, old.replace(v=charge(params, old, i, request.dt), j=i), old))
        pending = unpack(packed, after)
        u, new = pending.v, fire_where_valid(pending, t, valid)
        s = freeze(valid, new.s, jnp.zeros_like(new.s))
        return (packed, _join(new, unread), request.summarise(summaries, s, t)), request.observe(new, u, s)

    if valid is None:
        valid_before = jnp.arange(currents.shape[0]) > 0  # no spike is pending before the first step
    else:
        valid_before = jnp.concatenate([jnp.zeros_like(valid[:1]), valid[:-1]])
    summaries = request.start_summaries(
        lambda value, dtype: jnp.full_like(state.v, value, dtype), differentiable=not constant
    )
    carry = (pack(state), _join(state, unread), summaries)
    xs = (currents, times, valid, valid_before)
    (packed, joined_unread, summaries), out = scan(body, carry, xs, request.checkpoint_every)
    after = _split(joined_unread, unread)
    pending = unpack(packed, after)
    if params.resist_inh is None and valid is None:
        # Then i follows from the last current, and need not be carried.
        pending = pending.replace(j=drive(params, pending.s, currents[-1].astype(pending.v.dtype)))
    final = fire_where_valid(pending, times[-1], None if valid is None else valid[-1]).replace(**after)
    return final, out | request.finish_summaries(summaries)


def _join(state: SLIFState, names: tuple[str, ...]) -> Any:
    """These fields as a tuple; two, which must have no derivatives, as one complex array where their dtype has one.

    An array takes one kernel per step.
    """
    values = tuple(getattr(state, name) for name in names)
    if len(values) == 1 or state.v.dtype not in (jnp.float32, jnp.float64):
        return values
    # The barrier keeps XLA from splitting them again, and would give them derivatives of 0.
    return lax.stop_gradient(lax.optimization_barrier(lax.complex(*values)))


def _split(joined: Any, names: tuple[str, ...]) -> dict[str, Array]:
    values = joined if isinstance(joined, tuple) else (lax.real(joined), lax.imag(joined))
    return dict(zip(names, values, strict=True))
