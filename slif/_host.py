"""Values from the host: which of them are numbers, and how they reach the device.

JAX accepts too much, depending on what ran before: masked arrays without their mask, arrays in a foreign byte order,
and integers truncated to 32 bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def transfers() -> Any:
    """Allows checked values to be transferred to the device, even under `jax.transfer_guard("disallow")`."""
    return jax.transfer_guard_host_to_device("allow")


def put(value: Any, dtype: Any) -> Array:
    """The value on the device; an array already there stays as it is."""
    if isinstance(value, jax.Array):
        return value
    with np.errstate(over="ignore"):
        return jax.device_put(np.asarray(value).astype(dtype))


@functools.cache
def is_real(dtype: Any) -> bool:
    """Whether this is a dtype of real numbers that JAX has."""
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        return False
    return dtype.kind != "m" and dtype.isnative and dtype.itemsize <= 8


def shown(value: Any) -> str:
    """The value as shown in a message: short, and not read back from a device."""
    if isinstance(value, jax.Array):
        return f"a jax.Array of dtype {value.dtype} and shape {value.shape}"
    try:
        text = repr(value)
    except Exception:  # from a caller's own class, or an int with too many digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def plain(name: str, array: np.ndarray) -> np.ndarray:
    """Checks that an array is plain numbers in native byte order, with no mask and no unit."""
    kind = type(array)
    if kind not in (np.ndarray, np.memmap) and not kind.__module__.startswith("jax."):  # JAX has a subclass of its own
        raise TypeError(f"{name}: expected a plain NumPy array, got {type(array).__name__}")
    if not array.dtype.isnative:
        raise TypeError(f"{name}: expected numbers in native byte order, got dtype {array.dtype}")
    return array


def as_numbers(name: str, value: Any) -> np.ndarray:
    """A Python or NumPy value as a plain array of real numbers."""
    if isinstance(value, np.ndarray):
        array = plain(name, value)
    elif isinstance(value, int | float | np.generic) or _is_listed(name, value):
        array = _converted(name, value)
    else:
        raise TypeError(f"{name}: expected a real number or array, got {shown(value)}")
    if not is_real(array.dtype):
        raise TypeError(f"{name}: expected a real number or array, got {shown(value)}")
    return array


def holds_arrays(value: Any, depth: int = 8) -> bool:
    """Whether a list or tuple holds arrays from a device."""
    if not isinstance(value, list | tuple) or depth == 0:
        return False
    return any(isinstance(x, jax.Array) or holds_arrays(x, depth - 1) for x in value)


def _is_listed(name: str, value: Any, depth: int = 8) -> bool:
    """Whether this is a list or tuple of numbers, or of such; raises for an array in it that is not plain."""
    if not isinstance(value, list | tuple) or depth == 0:
        return False
    return all(
        type(x) in (int, float)
        or (isinstance(x, np.generic) and is_real(x.dtype))
        or (isinstance(x, np.ndarray) and is_real(plain(name, x).dtype))
        or _is_listed(name, x, depth - 1)
        for x in value
    )


def _converted(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
        return array.astype(np.float64) if array.dtype == object else array  # integers past 64 bits
    except OverflowError:
        raise ValueError(f"{name}: expected finite values in float64, got {shown(value)}") from None
    except ValueError:
        raise ValueError(f"{name}: expected rows of equal length, got {shown(value)}") from None


def stored(name: str, array: np.ndarray, dtype: Any, *, infinite: bool = False, normal: bool = False) -> np.ndarray:
    """The array in this dtype, in which it must be finite (or +inf, if `infinite`) and, if `normal`, not subnormal."""
    with np.errstate(over="ignore", under="ignore"):
        new = array.astype(dtype)
    if not (np.isfinite(new) | (infinite & np.isposinf(new) & np.isposinf(array))).all():
        raise ValueError(f"{name}: expected finite values in {new.dtype}, got {shown(array.tolist())}")
    if normal and ((array > 0) & (new < (tiny := jnp.finfo(dtype).tiny))).any():
        raise ValueError(f"{name}: expected no positive value below {tiny} in {new.dtype}, got {shown(array.tolist())}")
    return new
