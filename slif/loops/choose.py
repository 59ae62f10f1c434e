"""Which loop runs: a fused kernel where it can, else the scan of the platform."""

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
    """The loop for these arguments; `constant` where nothing is differentiated through it."""
    if fuses(implementation, params, currents, request):
        from slif.kernels import fused  # where it is used, since importing Pallas takes longer than JAX itself

        return functools.partial(fused.run, by_name=implementation == "pallas")
    if currents.shape[0] == 0:
        return plain.run
    # Where thresholds wait for a sum over units, the spikes of the turned loop do too: 0.85 of the plain one's speed.
    # Where currents wait for spikes it gains nothing forwards, and training takes 0.9 of its time in the plain one.
    waits = params.rho_b is not None or request.feedback is not None
    on_cpu = plain.run if waits else functools.partial(cpu.run, constant=constant)
    on_tpu = functools.partial(tpu.run, constant=constant)
    # Under differentiation each branch would keep what the others do as well: there the default device decides.
    if not constant or jax.default_backend() == "cpu":
        return {"cpu": on_cpu, "tpu": on_tpu}.get(_device.default().platform, gpu.run)
    return lambda *arguments: lax.platform_dependent(*arguments, cpu=on_cpu, tpu=on_tpu, default=gpu.run)


def fuses(implementation: str | None, params: SLIFParams, currents: Array, request: Request) -> bool:
    """Whether a kernel runs the loop: when asked for, or on a GPU when it can."""
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
    """Whether it is one of the package's own: of a custom one no card's compiler has seen the code."""
    return any((known.slope, known.wrt) == (surrogate.slope, surrogate.wrt) for known in BUILT_IN.values())
