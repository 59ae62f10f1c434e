"""Makes literals round as arguments do, so that spikes do not depend on which numbers the compiler sees as constants.

XLA reorders products of constants, and LLVM drops factors of 1 and then contracts other multiply-adds. So every number
of the equations is hidden from both.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from slif.types import SLIFParams


def as_runtime_values(params: SLIFParams, ndim: int, *clock: Array) -> tuple[SLIFParams, *tuple[Array, ...]]:
    """Params and times for states with `ndim` axes: in one dtype, aligned with the states, hidden from the compiler."""
    dtype = params.thr.dtype
    numbers = jax.tree.map(lambda x: align(x.astype(dtype), ndim), params.replace(thr=None, inh_weights=None))
    weights = None if params.inh_weights is None else hollow(params.inh_weights.astype(dtype))
    params = lax.optimization_barrier(numbers).replace(thr=params.thr, inh_weights=weights)
    return params, *(hide(jnp.asarray(x).astype(dtype)) for x in clock)


def align(x: Array, ndim: int) -> Array:
    """A scalar as it is; [N] with as many axes as [..., N]."""
    return x if x.ndim == 0 else x.reshape((1,) * (ndim - x.ndim) + x.shape)


def hollow(weights: Array) -> Array:
    """The matrix without its diagonal: no unit inhibits itself."""
    return jnp.where(jnp.eye(len(weights), dtype=bool), 0, weights)


def reciprocal(x: Array) -> Array:
    """1 / x rounded to the nearest float32, on GPUs too, for x > 0 if both x and 1 / x are normal."""
    return nearest_reciprocal(x, 1 / x)


def nearest_reciprocal(x: Array, y: Array) -> Array:
    """The float32 nearest to 1 / x, given one within two ulps of it, the accuracy of a GPU's division.

    With m the 24-bit significand of x, that of the quotient is the q that minimises |2^47 - m q|. Modulo 2^32 that
    difference is exact.
    """
    m, bits = _mantissa(x), lax.bitcast_convert_type(y, jnp.int32)
    for _ in range(2):
        left = 2 * -(m * _mantissa(lax.bitcast_convert_type(bits, jnp.float32)))
        bits = bits + (left > m).astype(jnp.int32) - (left < -m).astype(jnp.int32)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _mantissa(x: Array) -> Array:
    return (lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFF) | 0x800000


@jax.custom_jvp
def hide(x: Array) -> Array:
    """x, hidden from XLA and LLVM, so that neither drops it as a factor if it is 1.

    XLA passes the code of a small loop to LLVM as a whole, without its barriers; neither sees through a sort. Only
    times need this: without the factor dt, the multiply-add of the Euler step would absorb the product before it.
    """
    return lax.sort(lax.optimization_barrier(jnp.stack([x, x], -1)))[..., 0]


hide.defjvps(lambda dx, _, x: dx)
