"""Parameters and state of the cell, as immutable pytrees.

Letters: T time steps, B any batch dimensions, N units. Time is in ms.
"""

import json
from typing import Any

from flax import struct
from jax import Array, export

from slif.hyperparameters import ABOUT, STATIC
from slif.surrogate import BUILT_IN, Surrogate, kind_by


class SLIFParams(struct.PyTreeNode):
    """Parameters of a population of N sLIF units; build them with `init_params`.

    Every field not marked static is a leaf, which can be traced, differentiated and swept like any array. A leaf is a
    scalar or [N] unless another shape is given; an absent mechanism is `None` and costs nothing.

    Attributes:
        tau_m: membrane time constant, ms.
        resist_m: membrane resistance, voltage per current.
        thr: [N] base threshold, jitter included ([..., N] once loaded from a batched file).
        refract_time: refractory period, ms.
        thr_gain: added to a unit's threshold when it spikes.
        thr_leak: fraction of the threshold lost at each step.
        rho_b: scalar; sparsity control of the thresholds; where > 0, thr_gain and thr_leak are ignored.
        resist_inh: resistance to lateral inhibition; active where > 0.
        inh_weights: [N, N] lateral inhibition, from row to column; its diagonal is ignored.
        surrogate: the estimator of the spike's derivative.
        sticky_spikes: static; the output stays 1 while refractory.
        thr_persist: static; `slif.reset` leaves the thresholds alone.
        reset: static; what a spike does to the potential: "zero", or "subtract" for a soft reset.
    """

    tau_m: Array
    resist_m: Array
    thr: Array
    refract_time: Array | None = None
    thr_gain: Array | None = None
    thr_leak: Array | None = None
    rho_b: Array | None = None
    resist_inh: Array | None = None
    inh_weights: Array | None = None
    surrogate: Surrogate = struct.field(default_factory=Surrogate)
    sticky_spikes: bool = struct.field(pytree_node=False, default=False)
    thr_persist: bool = struct.field(pytree_node=False, default=False)
    reset: str = struct.field(pytree_node=False, default="zero")

    @property
    def n_units(self) -> int:
        """The number of units, N."""
        return self.thr.shape[-1]


class SLIFState(struct.PyTreeNode):
    """State of the cell after a step; build it with `init_state`. Every field is [..., N].

    Attributes:
        j: current that drove the step, after resistance and inhibition.
        v: membrane potential, after the reset.
        s: output spikes, 0 or 1; with sticky spikes 1 throughout the refractory period.
        thr: threshold after the step; the next step compares with it if something adapts it, else with params.thr.
        rfr: time since the last raw spike, ms.
        tols: time of the last output spike, ms.
        surrogate: slope of the surrogate at this step.
    """

    j: Array
    v: Array
    s: Array
    thr: Array
    rfr: Array
    tols: Array
    surrogate: Array


FIELDS = tuple(SLIFState.__dataclass_fields__)


# --- serialisation by `jax.export`, under names that must not change ---


def _read_static(text: bytes) -> tuple[Any, ...]:
    """Static fields that are newer than the file get their defaults."""
    values = json.loads(text)
    defaults = [ABOUT[name].default for name in STATIC]
    return *values, *(defaults[len(values) :] if values else ())


def _write_surrogate(static: tuple[Any, ...]) -> bytes:
    slope, wrt, detach_reset = static
    return json.dumps([kind_by(slope, wrt), detach_reset]).encode()


def _read_surrogate(text: bytes) -> tuple[Any, ...]:
    kind, detach_reset = json.loads(text)
    return BUILT_IN[kind].slope, BUILT_IN[kind].wrt, detach_reset


for _type in (SLIFParams, SLIFState):
    export.register_pytree_node_serialization(
        _type,
        serialized_name=f"slif.{_type.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=_read_static,
    )
export.register_pytree_node_serialization(
    Surrogate,
    serialized_name="slif.Surrogate",
    serialize_auxdata=_write_surrogate,
    deserialize_auxdata=_read_surrogate,
)
