"""One launch for all units: axes that `vmap` adds become axes of units, and every device launches its own share."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from slif._mesh import explicit_axes, explicit_mesh, match_varying_axes, reshard

Fun = Callable[[int, Any], Any]


def partition(fun: Fun, out_type: Callable, rank: int, args: Any) -> Any:
    """`fun(rank, args)`, whose arrays begin with axes of steps and end in `rank` axes of independent units.

    The axes of units broadcast against each other to some shape; the result is `out_type(shape)`.
    """
    leaves, tree = jax.tree.flatten(args)

    @custom_vmap
    def call(*leaves):
        return _over_devices(fun, out_type, rank, tree.unflatten(leaves))

    # A kernel's own rule would turn the mapped axis into a grid axis, and pad every point of it to a tile.
    @call.def_vmap
    def fold(size, mapped, *leaves):
        def beside(x: Array, mapped: bool) -> Array:
            first = x.ndim - mapped - rank
            return jnp.moveaxis(x, 0, first) if mapped else jnp.expand_dims(x, first)

        args = tree.unflatten(map(beside, leaves, mapped))
        outs = partition(fun, out_type, rank + 1, args)
        outs = jax.tree.map(lambda x: jnp.moveaxis(x, x.ndim - rank - 1, 0), outs)
        return outs, jax.tree.map(lambda _: True, outs)

    return call(*leaves)


def units_shape(rank: int, args: Any) -> tuple[int, ...]:
    """The shape that the axes of units broadcast to."""
    return np.broadcast_shapes(*(x.shape[x.ndim - rank :] for x in jax.tree.leaves(args)))


def _over_devices(fun: Fun, out_type: Callable, rank: int, args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)
    shape = units_shape(rank, args)
    out_leaves, out_tree = jax.tree.flatten(out_type(shape))

    def local(*leaves: Array) -> tuple[Array, ...]:
        outs = fun(rank, tree.unflatten(leaves))
        return tuple(match_varying_axes((leaves, jax.tree.leaves(outs)))[1])

    mesh = explicit_mesh(*leaves)
    if mesh is not None:
        run = _explicit(local, mesh, rank, shape, leaves, out_leaves)
    elif getattr(jax.config, "jax_use_shardy_partitioner", True):
        run = _automatic(local, rank, shape, leaves, out_leaves)
    else:
        run = local
    return out_tree.unflatten(run(*leaves))


def _explicit(local: Callable, mesh: Any, rank: int, shape: tuple, leaves: list, out_leaves: list) -> Callable:
    """For axes whose sharding is part of types: a `shard_map` over these."""
    rows = [None] * rank
    for x in leaves:
        for n, name in enumerate(explicit_axes(x)[x.ndim - rank :]):
            rows[n] = rows[n] if name is None else name

    def spec(x: Any) -> P:
        own = [name if size == full else None for name, size, full in zip(rows, x.shape[-rank:], shape, strict=True)]
        return P(*[None] * (x.ndim - rank), *own)

    in_specs = tuple(spec(x) for x in leaves)
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    mapped = jax.shard_map(
        local, mesh=mesh, axis_names=axes, in_specs=in_specs, out_specs=tuple(map(spec, out_leaves)), check_vma=False
    )

    def run(*leaves: Array) -> tuple[Array, ...]:
        placed = (reshard(x, mesh, *s) for x, s in zip(leaves, in_specs, strict=True))
        return mapped(*placed)

    return run


def _automatic(local: Callable, rank: int, shape: tuple, leaves: list, out_leaves: list) -> Callable:
    """For axes that XLA's partitioner decides on: a rule by which units are independent, and steps are not."""
    number = itertools.count()
    steps: list[str] = []

    def factors(x: Any) -> str:
        lead = [f"t{next(number)}" for _ in range(x.ndim - rank)]
        steps.extend(lead)
        rows = zip(range(rank), x.shape[x.ndim - rank :], shape, strict=True)
        return " ".join((*lead, *(f"u{n}" if size == full else f"o{next(number)}" for n, size, full in rows)))

    rule = f"{', '.join(map(factors, leaves))} -> {', '.join(map(factors, out_leaves))}"
    run = custom_partitioning(local)
    run.def_partition(
        lambda mesh, args, outs: (mesh, local, tuple(x.sharding for x in outs), tuple(x.sharding for x in args)),
        sharding_rule=rule,
        need_replication_factors=tuple(steps),
    )
    return run
