"""The loop for GPUs where no fused kernel runs: the plain one, with several steps per iteration."""

from jax import Array

from slif.loops import plain
from slif.request import Request
from slif.types import SLIFParams, SLIFState


def run(params: SLIFParams, state: SLIFState, currents: Array, request: Request) -> tuple[SLIFState, dict[str, Array]]:
    """The same as `plain.run`."""
    # XLA launches 3 kernels per iteration forwards and 9 in training; with eight steps per iteration 3 and 11. Sixteen
    # gain little more, and 32 take three times longer to compile.
    return plain.run(params, state, currents, request, unroll=8)
