"""Fused kernels: the whole time loop with the state in registers. Nothing here is imported before it is needed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from slif._check import varying
from slif.types import SLIFParams, SLIFState

OLDEST_JAX = (0, 10)  # Pallas changes with every release; the scan serves those before
_CURRENTS = ("float32", "bfloat16", "float16")
_SPIKES = ("float32", "bfloat16", "float16", "bool", "uint8", "int8", "int32")


def missing(params: SLIFParams, state: SLIFState, currents: Array, valid: Array | None, spike_dtype: Any) -> str | None:
    """What of this run a kernel cannot do, or None."""
    reasons = {
        f"jax {jax.__version__}, which is too old for it": jax.__version_info__ < OLDEST_JAX,
        "rho_b, which mixes units": params.rho_b is not None,
        "lateral inhibition, which mixes units": params.resist_inh is not None,
        "valid": valid is not None,
        f"params of dtype {params.thr.dtype}": params.thr.dtype != jnp.float32,
        f"currents of dtype {currents.dtype}": str(currents.dtype) not in _CURRENTS,
        f"spike_dtype {spike_dtype}": str(np.dtype(spike_dtype)) not in _SPIKES,
        "jax.shard_map with check_vma=True": bool(varying(currents)),
        "an empty sequence or batch": 0 in currents.shape,
    }
    return next((reason for reason, so in reasons.items() if so), None)


def gpu(array: Any) -> bool | None:
    """Whether this array, traced or not, is going to be on a GPU that the kernels run on; None where on no GPU."""
    if isinstance(array, jax.Array) and not isinstance(array, Tracer):
        device = next(iter(array.devices()))
    else:
        device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform != "gpu":
        return None
    version = str(getattr(device, "compute_capability", "")).split(".")[0]
    return "NVIDIA" in device.device_kind.upper() and version.isdigit() and int(version) >= 9
