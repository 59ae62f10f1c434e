"""The loop for TPUs: the plain one, with numbers of each unit in place of scalars."""

import jax
from jax import Array, lax

from slif._mesh import broadcast_to_units
from slif.loops import plain
from slif.request import Request
from slif.types import SLIFParams, SLIFState


def run(params: SLIFParams, state: SLIFState, currents: Array, request: Request) -> tuple[SLIFState, dict[str, Array]]:
    """What `plain.run` gives."""
    numbers = params.replace(thr=None, inh_weights=None)
    numbers = jax.tree.map(lambda x: broadcast_to_units(x, state.v) if x.ndim == 0 else x, numbers)
    # A scalar stays in the device's memory, and every step waits for a copy of it. The barrier keeps XLA from moving
    # the broadcast back into the loop.
    numbers = lax.optimization_barrier(numbers)
    params = numbers.replace(thr=params.thr, inh_weights=params.inh_weights)
    return plain.run(params, state, currents, request, unroll=8)
