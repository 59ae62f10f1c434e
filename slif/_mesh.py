"""Arrays on a mesh: what differs between devices, inside `jax.shard_map`."""

from typing import Any

import jax
from jax import Array, lax


def varying(array: Array) -> frozenset[str]:
    """The mesh axes over which JAX knows this to differ; by the name that the installed JAX has."""
    kind = jax.typeof(array)
    axes = getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    return frozenset(axes or ())


def alike(tree: Any) -> Any:
    """The leaves, each differing over all axes over which one of them does: a loop's carry has to from the start."""
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(tree)))

    def cast(x: Array) -> Array:
        more = tuple(sorted(axes - varying(x)))
        if not more:
            return x
        return lax.pcast(x, more, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, more)

    return jax.tree.map(cast, tree) if axes else tree
