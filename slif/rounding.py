"""Makes literals round as arguments do, so that spikes do not depend on which numbers the compiler sees as constants.

XLA multiplies constants together in another order than the equations have them, and LLVM leaves out a factor of 1 and
then contracts the multiply-adds in another order. So every number of the equations is hidden from both.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from slif.types import SLIFParams


def as_runtime_values(params: SLIFParams, ndim: int, *clock: Array) -> tuple[SLIFParams, *tuple[Array, ...]]:
    """Params and times for states of `ndim` axes: of one dtype, aligned with the states, hidden from the compiler."""
    dtype = params.thr.dtype
    numbers = jax.tree.map(lambda x: align(x.astype(dtype), ndim), params.replace(thr=None, inh_weights=None))
    weights = None if params.inh_weights is None else hollow(params.inh_weights.astype(dtype))
    params = lax.optimization_barrier(numbers).replace(thr=params.thr, inh_weights=weights)
    return params, *(hide(jnp.asarray(x).astype(dtype)) for x in clock)


def align(x: Array, ndim: int) -> Array:
    """A number as it is, and [N] with as many axes as [..., N]."""
    return x if x.ndim == 0 else x.reshape((1,) * (ndim - 1) + x.shape)


def hollow(weights: Array) -> Array:
    """The matrix without its diagonal: no unit inhibits itself."""
    return jnp.where(jnp.eye(len(weights), dtype=bool), 0, weights)


def reciprocal(x: Array) -> Array:
    """1 / x to the nearest float32, for normal x > 0 with a normal 1 / x, on GPUs too."""
    return nearest_reciprocal(x, 1 / x)


def nearest_reciprocal(x: Array, y: Array) -> Array:
    """The float32 nearest to 1 / x, given one within two ulps of it, which is what a GPU's division gives.

    With the 24 bits m of x, those of the quotient are the q for which 2^47 - m q is least. Modulo 2^32 that difference
    is exact.
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
    """x, which neither XLA nor LLVM knows, and so does not leave out where it is 1.

    The code of a small loop XLA hands over to LLVM as a whole, without its barriers; neither looks through a sort. Only
    times need it: without the factor dt, the multiply-add of the Euler step would take in the product before it.
    """
    return lax.sort(lax.optimization_barrier(jnp.stack([x, x], -1)))[..., 0]


hide.defjvps(lambda dx, _, x: dx)
