"""Chooses the loop: a fused kernel where one can run, else the platform's scan."""

import functools
from collections.abc import Callable

import jax
from jax import Array, lax

from slif import _device, kernels
from slif.loops import cpu, gpu, plain, tpu
from slif.request import Request
from slif.surrogate import BUILT_IN, Surrogate
from slif.types import SLIFParams, SLIFState

Loop = Callable[[SLIFParams, SLIFState, Array, Request], tuple[SLIFState, dict[str, Array]]]


def choose(
    implementation: str | None, params: SLIFParams, currents: Array, request: Request, *, constant: bool
) -> Loop:
    """The loop for these arguments; `constant` if nothing is differentiated through it."""
    if fuses(implementation, params, currents, request):
        from slif.kernels import fused  # only when needed, since Pallas takes longer to import than JAX itself

        return functools.partial(fused.run, by_name=implementation == "pallas")
    if currents.shape[0] == 0:
        return plain.run
    # If thresholds wait for a sum over units, so do the spikes of the CPU's loop: 0.85 of the plain one's speed. If
    # currents wait for spikes, it gains nothing forwards, and training takes 0.9 of its time in the plain one.
    waits = params.rho_b is not None or request.feedback is not None
    on_cpu = plain.run if waits else functools.partial(cpu.run, constant=constant)
    on_tpu = functools.partial(tpu.run, constant=constant)
    # Under differentiation each branch would also keep what the others keep, so there the default device decides.
    if not constant or jax.default_backend() == "cpu":
        return {"cpu": on_cpu, "tpu": on_tpu}.get(_device.default().platform, gpu.run)
    return lambda *arguments: lax.platform_dependent(*arguments, cpu=on_cpu, tpu=on_tpu, default=gpu.run)


def fuses(implementation: str | None, params: SLIFParams, currents: Array, request: Request) -> bool:
    """Whether a kernel runs the loop: on request, or on a GPU if it can."""
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation: expected None, 'xla' or 'pallas', got {implementation!r}")
    if implementation == "xla":
        return False
    by_name = implementation == "pallas"
    if not by_name and not (_device.default().platform == "gpu" and kernels.tried() and _known(params.surrogate)):
        return False
    missing = kernels.missing(params, currents, request) or kernels.unfit()
    if by_name and missing is not None:
        raise NotImplementedError(f"implementation: 'pallas' cannot do {missing}; use None or 'xla'")
    return missing is None


def _known(surrogate: Surrogate) -> bool:
    """Whether it is one of the package's own; custom slopes have not been compiled for any card."""
    return any((known.slope, known.wrt) == (surrogate.slope, surrogate.wrt) for known in BUILT_IN.values())
