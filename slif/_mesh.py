"""Arrays on a mesh: what differs between devices inside `jax.shard_map`, and what is sharded over explicit axes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from slif.types import SLIFParams, SLIFState


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
        if hasattr(lax, "pcast"):
            return lax.pcast(x, more, to="varying")
        return lax.pvary(x, more)  # pyright: ignore[reportAttributeAccessIssue] (before jax 0.8)

    return jax.tree.map(cast, tree) if axes else tree


def follow(params: SLIFParams, state: SLIFState, currents: Array, valid: Array | None = None) -> tuple[Any, ...]:
    """All of them with the sharding of the currents [T, ..., N], on a mesh whose axes are explicit.

    There a state at rest is replicated like any new array, and JAX refuses to mix it with what is not. Axes that only
    the state is sharded over, the currents take from it.
    """
    mesh = next((m for x in (currents, state.v) if not (m := jax.typeof(x).sharding.mesh).empty), None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return params, state, currents, valid
    time, *own = names(currents)
    row = [a if a is not None else b for a, b in zip(own, names(state.v), strict=True)]

    def place(x: Array, *names: Any) -> Array:
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*names)))

    def units(x: Array) -> Array:
        return x if x.shape[-1:] != params.thr.shape[-1:] else place(x, *[None] * (x.ndim - 1), row[-1])

    return (
        jax.tree.map(units, params),
        jax.tree.map(lambda x: place(x, *row), state),
        place(currents, time, *row),
        valid if valid is None else place(valid, time, *row[:-1]),
    )


def broadcast_like(x: Array, other: Array) -> Array:
    """x in the shape of the other, and sharded as it is, on a mesh whose axes are explicit."""
    x = jnp.broadcast_to(x.reshape((1,) * (other.ndim - x.ndim) + x.shape), other.shape)
    mesh = jax.typeof(other).sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*names(other))))


def gathered(s: Array) -> Array:
    """s with its units on every device, for a product over them, on a mesh whose axes are explicit."""
    *batch, units = names(s)
    if units is None:
        return s
    return jax.sharding.reshard(s, NamedSharding(jax.typeof(s).sharding.mesh, PartitionSpec(*batch, None)))


def names(x: Array) -> list[Any]:
    """The mesh axes that each axis of x is sharded over explicitly, or None."""
    spec = jax.typeof(x).sharding.spec
    return [*spec, *[None] * (x.ndim - len(spec))]
