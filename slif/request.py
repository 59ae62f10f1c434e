"""What a run is asked for, beside the cell and its input, and how its records are made."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

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

    def summaries(self, state: SLIFState) -> dict[str, Array]:
        """The running summaries before the first step, those that are asked for."""
        count = {"spike_count": jnp.zeros_like(state.v, self.wide)}
        first = {"first_spike_time": jnp.full_like(state.v, jnp.inf, self.wide)}
        return {name: x for name, x in (count | first).items() if name in self.record}

    def summarise(self, summaries: dict[str, Array], s: Array, t: Array) -> dict[str, Array]:
        """The summaries after one more step, whose spikes are s."""
        new = dict(summaries)
        if "spike_count" in new:
            new["spike_count"] += s.astype(self.wide)
        if "first_spike_time" in new:
            first = new["first_spike_time"]
            new["first_spike_time"] = jnp.where((s > 0) & (first == jnp.inf), lax.stop_gradient(t), first)
        return new

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
