"""The simplified leaky integrate-and-fire cell (sLIF) as pure functions over explicit state.

To be imported explicitly: `slif.linen` and `slif.nnx` (Flax), `slif.checkpoint`, `slif.nir`, `slif.plot`.
"""

from slif.cell import step
from slif.describe import describe
from slif.init import detach, init_params, init_state, reset
from slif.raster import pack_spikes, unpack_spikes
from slif.simulation import simulate
from slif.surrogate import (
    Surrogate,
    arctan,
    boxcar,
    custom,
    fast_sigmoid,
    gaussian,
    secant,
    sigmoid,
    straight_through,
    triangular,
)
from slif.sweeps import grid, point, sweep
from slif.types import SLIFParams, SLIFState

__version__ = "0.1.0"

__all__ = [
    "SLIFParams",
    "SLIFState",
    "Surrogate",
    "__version__",
    "arctan",
    "boxcar",
    "custom",
    "describe",
    "detach",
    "fast_sigmoid",
    "gaussian",
    "grid",
    "init_params",
    "init_state",
    "pack_spikes",
    "point",
    "reset",
    "secant",
    "sigmoid",
    "simulate",
    "step",
    "straight_through",
    "sweep",
    "triangular",
    "unpack_spikes",
]
