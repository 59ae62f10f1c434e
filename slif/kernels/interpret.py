"""Launches the loops in Pallas' interpreter, on any machine: slow, but enough to test them without a GPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from slif.kernels.loop import Plan, Tile


def launch(body: Callable, plan: Plan, inputs: Any, out_type: Any, name: str) -> Any:
    """Runs `body(plan, tile, *inputs, outs)` for every tile, with references in place of arrays."""
    leaves, tree = jax.tree.flatten(inputs)
    out_leaves, out_tree = jax.tree.flatten(out_type)

    def kernel(*refs):
        start = jnp.minimum(pl.program_id(0) * plan.width, plan.n_units - plan.width)
        tile = Tile(
            slice_of=lambda n: pl.ds(start % n, plan.width),
            load=lambda ref: ref[...],
            fill=lambda x, dtype=jnp.float32: jnp.full((plan.width,), x, dtype),
            # XLA's CPU backend takes minutes to compile a whole block in one piece.
            part=jax.lax.optimization_barrier,
        )
        body(plan, tile, *tree.unflatten(refs[: len(leaves)]), out_tree.unflatten(refs[len(leaves) :]))

    whole = pl.BlockSpec(memory_space=pl.ANY)
    run = pl.pallas_call(
        kernel,
        out_shape=out_leaves,
        grid=(plan.n_tiles,),
        in_specs=[whole] * len(leaves),
        out_specs=[whole] * len(out_leaves),
        interpret=True,
        name=name,
    )
    return out_tree.unflatten(run(*leaves))
