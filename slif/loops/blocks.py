"""`lax.scan` with several steps per iteration, which keeps only every so many carries for the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def scan(body: Callable, carry: Any, xs: Any, every: int | None, unroll: int = 1) -> tuple[Any, Any]:
    length = jax.tree.leaves(xs)[0].shape[0]
    if every is None or every >= length:
        return _turns(body, unroll, carry, xs)
    # For a shorter last block the sequences are split, and so copied, which costs more memory than it saves: at
    # T = 1000, 25 steps per block take a sixth of the memory, 32 with a tail of 8 twice as much.
    every = _divisor(length, every)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(carry, xs):
        return _turns(body, unroll, carry, xs)

    def blocks(carry, xs):
        # Not -1, which JAX cannot infer of an empty batch.
        xs = jax.tree.map(lambda x: x.reshape(x.shape[0] // every, every, *x.shape[1:]), xs)
        carry, ys = lax.scan(block, carry, xs)
        return carry, jax.tree.map(lambda y: y.reshape(y.shape[0] * every, *y.shape[2:]), ys)

    return _split(blocks, block, length - length % every, carry, xs)


def _turns(body: Callable, unroll: int, carry: Any, xs: Any) -> tuple[Any, Any]:
    """A scan of `unroll` steps per iteration, or fewer if that leaves no steps over."""
    length = jax.tree.leaves(xs)[0].shape[0]
    # If the length is symbolic, as under `jax.export`, JAX does not unroll.
    unroll = _divisor(length, unroll) if isinstance(length, int) else 1
    left = length % unroll
    # Steps left over get a scan of their own: the gradient of 101 steps of [64, 1024] on a GPU then takes 91 MB, and
    # 128 MB if left to JAX.
    turns, rest = (functools.partial(lax.scan, body, unroll=steps) for steps in (unroll, left))
    return _split(turns, rest, length - left, carry, xs)


def _split(first: Callable, rest: Callable, whole: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`first` over the first `whole` steps, and `rest` over the steps left over; each takes (carry, xs)."""
    if whole == jax.tree.leaves(xs)[0].shape[0]:
        return first(carry, xs)
    if whole == 0:
        return rest(carry, xs)
    carry, ys = first(carry, jax.tree.map(lambda x: x[:whole], xs))
    carry, tail = rest(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda y, z: jnp.concatenate([y, z]), ys, tail)


def _divisor(length: int, most: int) -> int:
    """The largest number up to `most`, and above half of it, that divides the length; else `most`."""
    return next((k for k in range(most, most // 2, -1) if length % k == 0), most)
