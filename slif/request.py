"""What a run is asked for, beside the cell and its input, and how its records are made."""

from typing import Any

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


class Request(struct.PyTreeNode):
    """The clock, the mask, and what to return; one value from the entry to every loop."""

    dt: Array  # ms
    t0: Array  # time of the first step, ms
    valid: Array | None = None  # [T, ..., 1] where False, a row is frozen
    record: tuple[str, ...] = struct.field(pytree_node=False, default=("s",))
    spike_dtype: np.dtype = struct.field(pytree_node=False, default=np.dtype("float32"))
    checkpoint_every: int | None = struct.field(pytree_node=False, default=None)

    @property
    def wide(self) -> Any:
        """The dtype of times and counts, float32 at least: bfloat16 cannot count past 256 steps."""
        return jnp.promote_types(self.dt.dtype, jnp.float32)

    def times(self, n_steps: int) -> Array:
        """t0 + k dt, [T]."""
        steps = jnp.arange(n_steps, dtype=jnp.int32)
        return self.t0.astype(self.wide) + steps.astype(self.wide) * self.dt.astype(self.wide)

    def summaries(self, state: SLIFState) -> dict[str, Any]:
        """The running summaries before the first step, those that are asked for."""
        summaries = {}
        if "spike_count" in self.record:
            summaries["count"] = jnp.zeros_like(state.v, jnp.int32), jnp.zeros_like(state.v, self.wide)
        if "first_spike_time" in self.record:
            summaries["first_spike_time"] = jnp.full_like(state.v, jnp.inf, self.wide)
        return summaries

    def summarise(self, summaries: dict[str, Any], s: Array, t: Array) -> dict[str, Any]:
        """The summaries after one more step, whose spikes are s."""
        new = dict(summaries)
        if "count" in new:
            count, total = new["count"]
            new["count"] = count + (s > 0).astype(jnp.int32), total + s.astype(self.wide)
        if "first_spike_time" in new:
            first = new["first_spike_time"]
            new["first_spike_time"] = jnp.where((s > 0) & (first == jnp.inf), lax.stop_gradient(t), first)
        return new

    def summed_up(self, summaries: dict[str, Any]) -> dict[str, Array]:
        """The summaries after the last step, as they are returned."""
        told = dict(summaries)
        if "count" in told:
            # The integer is exact, where float32 stops at 2^24; the sum in floating point is what has a derivative, and
            # where nobody asks for one, the compiler leaves it out.
            count, total = told.pop("count")
            told["spike_count"] = attach(count.astype(self.wide), total, jnp.ones_like(total))
        return told

    def observe(self, state: SLIFState, u: Array, s: Array) -> dict[str, Array]:
        """What is recorded of one step, from the state after it, its u, and the spikes that it shows."""
        shown: dict[str, Array] = {**vars(state), "u": u}
        if "s" in self.record:
            shown["s"] = s.astype(self.spike_dtype)
        if "s_packed" in self.record:
            shown["s_packed"] = pack_spikes(s)
        return {name: shown[name] for name in self.record if name not in SUMMARIES}


def freeze(live: Array | None, new: Any, old: Any) -> Any:
    """`new` in the rows that are live, [..., 1], or at a step that is, a scalar; `old` in the others."""
    if live is None:
        return new
    return jax.tree.map(lambda n, o: jnp.where(live, n, o), new, old)
