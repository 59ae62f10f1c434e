"""Arrays on a mesh: what differs between devices inside `jax.shard_map`, and what is sharded over explicit axes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from slif.types import SLIFState


def varying(array: Array) -> frozenset[str]:
    """The mesh axes over which JAX knows this to vary, under the name that the installed JAX uses."""
    kind = jax.typeof(array)
    axes = getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    return frozenset(axes or ())


def match_varying_axes(tree: Any) -> Any:
    """The leaves, each varying over all axes that any of them varies over, as a loop's carry must from the start."""
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(tree)))

    def cast(x: Array) -> Array:
        more = tuple(sorted(axes - varying(x)))
        if not more:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, more, to="varying")
        return lax.pvary(x, more)  # pyright: ignore[reportAttributeAccessIssue] (before jax 0.8)

    return jax.tree.map(cast, tree) if axes else tree


def explicit_axes(x: Array) -> list[Any]:
    """For each axis of x, the mesh axes that it is explicitly sharded over, or None."""
    spec = jax.typeof(x).sharding.spec
    return [*spec, *[None] * (x.ndim - len(spec))]


def explicit_mesh(*arrays: Array) -> Any:
    """The mesh with explicit axes that one of the arrays is on, or None."""
    mesh = next((m for x in arrays if not (m := jax.typeof(x).sharding.mesh).empty), None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


def reshard(x: Array, mesh: Any, *axes: Any) -> Array:
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*axes)))


def reshard_like_currents(
    params: Any, state: SLIFState, currents: Array, valid: Array | None = None
) -> tuple[Any, ...]:
    """All of them with the sharding of the currents [T, ..., N], on a mesh with explicit axes.

    There a state at rest is replicated like any new array, and JAX refuses to mix it with sharded ones. Where only the
    state is sharded, the currents get its sharding.
    """
    mesh = explicit_mesh(currents, state.v)
    if mesh is None:
        return params, state, currents, valid
    time, *row = explicit_axes(currents)
    row = [a if a is not None else b for a, b in zip(row, explicit_axes(state.v), strict=True)]

    def shard_units(x: Array) -> Array:
        return x if x.shape[-1:] != state.v.shape[-1:] else reshard(x, mesh, *[None] * (x.ndim - 1), row[-1])

    return (
        jax.tree.map(shard_units, params),
        jax.tree.map(lambda x: reshard(x, mesh, *row), state),
        reshard(currents, mesh, time, *row),
        valid if valid is None else reshard(valid, mesh, time, *row[:-1]),
    )


def broadcast_like(x: Array, other: Array) -> Array:
    """x with the shape and the sharding of the other."""
    x = jnp.broadcast_to(x.reshape((1,) * (other.ndim - x.ndim) + x.shape), other.shape)
    mesh = explicit_mesh(other)
    return x if mesh is None else reshard(x, mesh, *explicit_axes(other))


def broadcast_to_units(x: Array, like: Array) -> Array:
    """A scalar as [1, ..., N], its units sharded like those of `like`."""
    x = jnp.broadcast_to(x, (1,) * (like.ndim - 1) + like.shape[-1:])
    mesh = explicit_mesh(like)
    return x if mesh is None else reshard(x, mesh, *[None] * (like.ndim - 1), explicit_axes(like)[-1])


def replicate_units(s: Array) -> Array:
    """s with all units on every device, for a product over them."""
    *batch, units = explicit_axes(s)
    return s if units is None else reshard(s, jax.typeof(s).sharding.mesh, *batch, None)
