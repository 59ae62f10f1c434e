"""The loop for GPUs without a kernel of their own: the plain one, several steps a turn."""

from jax import Array

from slif.loops import plain
from slif.request import Request
from slif.types import SLIFParams, SLIFState


def run(params: SLIFParams, state: SLIFState, currents: Array, request: Request) -> tuple[SLIFState, dict[str, Array]]:
    """What `plain.run` gives."""
    # XLA launches 3 kernels a turn forwards and 9 in training; eight steps a turn take 3 and 11. Sixteen gain little
    # more, and 32 compile three times longer.
    return plain.run(params, state, currents, request, unroll=8)
