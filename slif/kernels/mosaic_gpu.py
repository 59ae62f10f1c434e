"""Launches the loops on an NVIDIA GPU: four warps per tile, with its units in registers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slif.kernels.loop import Plan, Tile

WARPGROUP = 128
WIDE_FROM = 2**17  # units; with fewer, tiles are narrow


def width(n_units: int, n_records: int, backwards: bool) -> int:
    """Units per tile.

    Four units per lane make loads of 16 bytes, for which rows must start at a multiple of 16 bytes, and there must be
    tiles for every multiprocessor. On an H200, one, two and four units per lane took the same time to within 10 %, and
    blocks of 4 steps more than of 8. So tiles are narrower where registers run out, of which a thread has 255:
    backwards, where they hold the states of a block and what the next one reads, and with more than four records.
    `ahead_of_time/run` prints registers and spills.
    """
    lanes = 4 if n_records <= 4 else 2
    if backwards:
        lanes = 2 if n_records == 1 else 1
    if n_units % lanes == 0 and n_units >= WIDE_FROM:
        return lanes * WARPGROUP
    return WARPGROUP


def launch(body: Callable, plan: Plan, inputs: Any, out_type: Any, name: str) -> Any:
    """Runs `body(plan, tile, *inputs, outs)` for every tile, with references in place of arrays."""
    leaves, tree = jax.tree.flatten(inputs)
    out_leaves, out_tree = jax.tree.flatten(out_type)
    layout = plgpu.Layout.WG_STRIDED((plan.width,), vec_size=plan.width // WARPGROUP)

    def kernel(*refs):
        # The last tile overlaps the one before instead of being masked: both write the same values there.
        start = jnp.minimum(lax.axis_index("tile") * plan.width, plan.n_units - plan.width)
        tile = Tile(
            slice_of=lambda n: pl.ds(start if n == plan.n_units else start % n, plan.width),
            load=lambda ref: plgpu.layout_cast(ref[...], layout),
            fill=lambda x, dtype=jnp.float32: plgpu.layout_cast(jnp.full((plan.width,), x, dtype), layout),
        )
        body(plan, tile, *tree.unflatten(refs[: len(leaves)]), out_tree.unflatten(refs[len(leaves) :]))

    run = plgpu.kernel(
        kernel,
        out_type=tuple(out_leaves),
        grid=(plan.n_tiles,),
        grid_names=("tile",),
        kernel_name=name,
        # Safe, since nothing that is written is read; barriers would come before and after every store.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return out_tree.unflatten(run(*leaves))
