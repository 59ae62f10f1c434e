"""The loop for TPUs: the plain one, with scalar parameters broadcast over units."""

import jax
from jax import Array, lax

from slif._mesh import broadcast_to_units
from slif.loops import plain
from slif.request import Request
from slif.types import SLIFParams, SLIFState


def run(
    params: SLIFParams, state: SLIFState, currents: Array, request: Request, *, constant: bool = False
) -> tuple[SLIFState, dict[str, Array]]:
    """The same as `plain.run`.

    The reasons lie in the machine code for v5e; benchmarks/speed.md has the figures.
    """
    numbers = params.replace(thr=None, inh_weights=None)
    numbers = jax.tree.map(lambda x: broadcast_to_units(x, state.v) if x.ndim == 0 else x, numbers)
    # A scalar stays in the device's memory, and the loop waits for it again and again: 18 times in eight steps of the
    # cell with a refractory period. The barrier keeps XLA from moving the broadcast back into the loop.
    numbers = lax.optimization_barrier(numbers)
    params = numbers.replace(thr=params.thr, inh_weights=params.inh_weights)
    # By the compiler's estimate, eight steps per iteration take 0.8 of the cycles forwards, but 1.3 in training. If
    # steps are left over, XLA copies whole sequences.
    eight = constant and currents.shape[0] % 8 == 0
    return plain.run(params, state, currents, request, unroll=8 if eight else 1)
