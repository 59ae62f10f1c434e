"""Spike rasters at one bit per spike."""

import jax.numpy as jnp
from jax import Array

from slif import _check


def pack_spikes(s: Array) -> Array:
    """Packs a raster to one bit per spike along its last axis, in little bit order.

        packed[..., n // 8] bit (n % 8) = s[..., n] != 0

    Args:
        s: spikes [..., N] of any dtype.

    Returns:
        uint8 [..., ceil(N / 8)]; bits past N are 0.

    Raises:
        TypeError: `s` is not an array of numbers.
        ValueError: `s` is a scalar.

    Source: `numpy.packbits`.

    Example:
        >>> pack_spikes(jnp.array([1.0, 0, 0, 0, 0, 0, 0, 0, 1.0]))
        Array([1, 1], dtype=uint8)
    """
    s = _check.check_raster("s", s)
    with _check.transfers():
        return jnp.packbits(_check.put(s, bool).astype(bool), axis=-1, bitorder="little")


def unpack_spikes(packed: Array, n_units: int) -> Array:
    """Unpacks a raster packed by `pack_spikes`.

        s[..., n] = packed[..., n // 8] bit (n % 8)

    Args:
        packed: uint8 [..., ceil(N / 8)].
        n_units: the number of units, N.

    Returns:
        bool [..., N].

    Raises:
        TypeError: `packed` is not uint8, or `n_units` is not an int.
        ValueError: the last axis of `packed` does not hold N bits.

    Source: `numpy.unpackbits`.

    Example:
        >>> unpack_spikes(jnp.array([5], jnp.uint8), 3)
        Array([ True, False,  True], dtype=bool)
    """
    packed, n_units = _check.check_raster("packed", packed), _check.as_size("n_units", n_units, 1, symbolic=True)
    if packed.dtype != jnp.uint8:
        raise TypeError(f"packed: expected dtype uint8, got {packed.dtype}")
    if packed.shape[-1] != -(-n_units // 8):
        raise ValueError(f"packed: expected {-(-n_units // 8)} bytes for {n_units} units, got shape {packed.shape}")
    with _check.transfers():
        if packed.size == 0:  # unpackbits divides by its size
            return jnp.zeros((*packed.shape[:-1], n_units), bool)
        return jnp.unpackbits(_check.put(packed, jnp.uint8), axis=-1, count=n_units, bitorder="little").astype(bool)
