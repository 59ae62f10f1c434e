"""Values from the host: which of them are numbers, and how they reach the device.

JAX takes more than it should, depending on what ran before: masked arrays without their mask, bytes in a foreign order,
and integers cut to 32 bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def transfers() -> Any:
    """Lets what was checked go to the device with the call, under `jax.transfer_guard("disallow")` too."""
    return jax.transfer_guard_host_to_device("allow")


def put(value: Any, dtype: Any) -> Array:
    """The value on the device; what is there already stays as it is."""
    if isinstance(value, jax.Array):
        return value
    with np.errstate(over="ignore"):
        return jax.device_put(np.asarray(value).astype(dtype))


@functools.cache
def is_real(dtype: Any) -> bool:
    """Whether JAX has numbers of this dtype, and they are real."""
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        return False
    return dtype.kind != "m" and dtype.isnative and dtype.itemsize <= 8


def shown(value: Any) -> str:
    """The value as a message tells it: short, and not read back from a device."""
    if isinstance(value, jax.Array):
        return f"a jax.Array of dtype {value.dtype} and shape {value.shape}"
    try:
        text = repr(value)
    except Exception:  # whatever a class of the caller's raises, or an int of too many digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def plain(name: str, array: np.ndarray) -> np.ndarray:
    """An array that holds its numbers, all of them, and nothing beside them: no mask, no unit."""
    kind = type(array)
    if kind not in (np.ndarray, np.memmap) and not kind.__module__.startswith("jax."):  # JAX has one of its own
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
    """Whether arrays from a device are among the rows of a list."""
    if not isinstance(value, list | tuple) or depth == 0:
        return False
    return any(isinstance(x, jax.Array) or holds_arrays(x, depth - 1) for x in value)


def _is_listed(name: str, value: Any, depth: int = 8) -> bool:
    """Whether these are rows of numbers; raises for an array among them that is not plain."""
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
        raise ValueError(f"{name}: expected rows of one length, got {shown(value)}") from None


def stored(name: str, array: np.ndarray, dtype: Any, *, infinite: bool = False, normal: bool = False) -> np.ndarray:
    """The array in a dtype that holds its values: finite, but for +inf where `infinite`, and not taken for 0 by XLA."""
    with np.errstate(over="ignore", under="ignore"):
        new = array.astype(dtype)
    if not (np.isfinite(new) | (infinite & np.isposinf(new) & np.isposinf(array))).all():
        raise ValueError(f"{name}: expected finite values in {new.dtype}, got {shown(array.tolist())}")
    if normal and ((array > 0) & (new < (tiny := jnp.finfo(dtype).tiny))).any():
        raise ValueError(f"{name}: expected no positive value below {tiny} in {new.dtype}, got {shown(array.tolist())}")
    return new
