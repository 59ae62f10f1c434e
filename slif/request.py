"""The options of a run, besides the cell and its input, and how its records are made."""

from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from slif._attach import attach
from slif.raster import pack_spikes
from slif.types import FIELDS, SLIFState

SUMMARIES = ("spike_count", "first_spike_time")
RECORDS = ("u", *FIELDS, "s_packed", *SUMMARIES)
Record = Literal["u", "j", "v", "s", "thr", "rfr", "tols", "surrogate", "s_packed", "spike_count", "first_spike_time"]
Records = Collection[Record]


class Request(struct.PyTreeNode):
    """The clock, the mask, the feedback and what to return, passed as one value from the entry to every loop."""

    dt: Array  # ms
    t0: Array  # time of the first step, ms
    valid: Any = None  # [T, ..., 1]; where False, a row is frozen
    feedback: Any = None  # [N, N], from the spikes of a step to the currents of the next
    record: tuple[str, ...] = struct.field(pytree_node=False, default=("s",))
    spike_dtype: np.dtype = struct.field(pytree_node=False, default=np.dtype("float32"))
    checkpoint_every: int | None = struct.field(pytree_node=False, default=None)
    at_rest: bool = struct.field(pytree_node=False, default=False)  # no state was passed

    @property
    def wide(self) -> Any:
        """The dtype of times and counts, float32 at least: bfloat16 cannot count past 256 steps."""
        return jnp.promote_types(self.dt.dtype, jnp.float32)

    def times(self, n_steps: int) -> Array:
        """t0 + k dt, [T]."""
        steps = jnp.arange(n_steps, dtype=jnp.int32)
        return self.t0.astype(self.wide) + steps.astype(self.wide) * self.dt.astype(self.wide)

    def start_summaries(self, fill: Callable[[Any, Any], Array], *, differentiable: bool = True) -> dict[str, Array]:
        """The requested summaries before the first step; `fill(value, dtype)` is [..., N]."""
        summaries = {}
        if "spike_count" in self.record:
            # The integer is exact, where float32 stops counting at 2^24. The floating-point sum carries the derivative;
            # the compiler drops it if none is needed.
            summaries["spike_count"] = fill(0, jnp.int32)
            if differentiable:
                summaries["spike_sum"] = fill(0, self.wide)
        if "first_spike_time" in self.record:
            summaries["first_spike_time"] = fill(jnp.inf, self.wide)
        return summaries

    def summarise(self, summaries: dict[str, Array], s: Array, t: Array) -> dict[str, Array]:
        """The summaries after one more step, whose spikes are s."""
        new = dict(summaries)
        if "spike_count" in new:
            new["spike_count"] = jnp.where(s > 0, new["spike_count"] + 1, new["spike_count"])
        if "spike_sum" in new:
            new["spike_sum"] += s.astype(self.wide)
        if "first_spike_time" in new:
            first = new["first_spike_time"]
            new["first_spike_time"] = jnp.where(s > 0, jnp.minimum(first, lax.stop_gradient(t)), first)
        return new

    def finish_summaries(self, summaries: dict[str, Array]) -> dict[str, Array]:
        """The summaries after the last step, as they are returned."""
        finished = dict(summaries)
        if "spike_count" in finished:
            finished["spike_count"] = finished["spike_count"].astype(self.wide)
        if "spike_sum" in finished:
            total = finished.pop("spike_sum")
            finished["spike_count"] = attach(finished["spike_count"], total, jnp.ones_like(total))
        return finished

    def observe(self, state: SLIFState, u: Array, s: Array) -> dict[str, Array]:
        """The records of one step, from the state after it, its u, and its spikes as recorded."""
        shown: dict[str, Array] = {**vars(state), "u": u}
        if "s" in self.record:
            shown["s"] = s.astype(self.spike_dtype)
        if "s_packed" in self.record:
            shown["s_packed"] = pack_spikes(s)
        return {name: shown[name] for name in self.record if name not in SUMMARIES}


def freeze(valid: Array | None, new: Any, old: Any) -> Any:
    """`new` where valid, else `old`; `valid` is [..., 1] for rows, or a scalar for a whole step."""
    if valid is None:
        return new
    return jax.tree.map(lambda n, o: jnp.where(valid, n, o), new, old)
