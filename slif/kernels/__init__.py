"""Fused kernels: the whole time loop with the state in registers. The modules are imported only when needed."""

import jax
import jax.numpy as jnp
from jax import Array

from slif import _device
from slif.kernels.inline import obstacle
from slif.request import Request
from slif.types import SLIFParams

OLDEST_JAX = (0, 10)  # Pallas changes with every release; older ones get the scan
NEWEST_JAX = (0, 12)  # that the tests have run on; a newer one gets the kernels only on request
AMPERE_JAX = (0, 11)  # before it, Mosaic's code for anything older than Hopper kills the process
LEAST_CAPABILITY = (8, 0)
_CURRENTS = ("float32", "bfloat16", "float16")
_SPIKES = ("float32", "bfloat16", "float16", "bool", "uint8", "int8", "int32")


def tried() -> bool:
    """Whether the tests have run on this release of JAX."""
    return OLDEST_JAX <= jax.__version_info__[:2] <= NEWEST_JAX


def missing(params: SLIFParams, currents: Array, request: Request) -> str | None:
    """What a kernel cannot do of this run, or None."""
    symbolic = not all(isinstance(n, int) for n in currents.shape)
    reasons = {
        f"jax {jax.__version__}, which is too old for it": jax.__version_info__ < OLDEST_JAX,
        "rho_b, which mixes units": params.rho_b is not None,
        "lateral inhibition, which mixes units": params.resist_inh is not None,
        "feedback, which mixes units": request.feedback is not None,
        f"params of dtype {params.thr.dtype}": params.thr.dtype != jnp.float32,
        f"currents of dtype {currents.dtype}": str(currents.dtype) not in _CURRENTS,
        f"spike_dtype {request.spike_dtype}": str(request.spike_dtype) not in _SPIKES,
        "a symbolic shape": symbolic,
        "an empty sequence or batch": not symbolic and 0 in currents.shape,
    }
    return next((reason for reason, so in reasons.items() if so), None) or _of_slope(params, currents)


def _of_slope(params: SLIFParams, currents: Array) -> str | None:
    """What a kernel cannot do of the surrogate's slope: it sees the units of a tile, whatever rows they are in."""
    surrogate = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params.surrogate)
    x = jax.ShapeDtypeStruct(currents.shape[1:], params.thr.dtype)
    found = obstacle(lambda surrogate, x: surrogate(x), surrogate, x)
    if found is None and surrogate.wrt == "voltage":  # backwards, a custom derivative also computes the value
        found = obstacle(lambda surrogate, x: jax.vjp(surrogate, x)[0], surrogate, x)
    return None if found is None else f"{found} in the surrogate's slope"


def unfit() -> str | None:
    """Why the kernels cannot run on the default device; None if they can, if only in a CPU's interpreter."""
    device = _device.default()
    if device.platform == "cpu":
        return None
    ampere = jax.__version_info__ >= AMPERE_JAX
    least = LEAST_CAPABILITY if ampere else (9, 0)
    wanted = f"NVIDIA's of compute capability {_dotted(least)} or later with jax {jax.__version__}"
    if not ampere:
        wanted += f", {_dotted(LEAST_CAPABILITY)} or later from jax {_dotted(AMPERE_JAX)} on"
    version = str(getattr(device, "compute_capability", ""))
    if "NVIDIA" not in device.device_kind.upper() or not version.replace(".", "").isdigit():
        return f"{device.device_kind}: it takes {wanted}"
    if tuple(map(int, version.split("."))) < least:
        return f"{device.device_kind} (compute capability {version}): it takes {wanted}"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
