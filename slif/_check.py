"""Checks at the public entry: what was expected, what came. Values on a device are never read back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from slif.surrogate import Surrogate
from slif.types import SLIFParams, SLIFState

FIELDS = ("j", "v", "s", "thr", "rfr", "tols", "surrogate")
# Lowest value of a parameter, and whether that value itself is allowed.
BOUNDS = {"tau_m": (0, False), "refract_time": (0, True), "thr_jitter": (0, True), "dt": (0, False)}


def is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def real(name: str, value: Any, dtype: Any = np.float64) -> Array | np.ndarray:
    """A jax.Array as it is, anything else as a NumPy array whose values are finite and within bounds in this dtype."""
    if isinstance(value, jax.Array):
        if not is_real(value.dtype):
            raise TypeError(f"{name}: expected real numbers, got dtype {value.dtype}")
        return value
    array = np.asarray(value) if isinstance(value, int | float | np.generic | np.ndarray | list | tuple) else None
    if array is None or not is_real(array.dtype):
        raise TypeError(f"{name}: expected a real number or array, got {value!r}")
    with np.errstate(over="ignore", under="ignore"):
        stored = array.astype(dtype)
    if not np.isfinite(stored).all():
        raise ValueError(f"{name}: expected finite values in {stored.dtype}, got {value!r}")
    low, allowed = BOUNDS.get(name, (-np.inf, True))
    if not (stored >= low if allowed else stored > low).all():
        raise ValueError(f"{name}: expected values {'>=' if allowed else '>'} {low} in {stored.dtype}, got {value!r}")
    return array


def put(array: Any, dtype: Any) -> Array:
    """The value on the device; what is there already stays as it is."""
    return array if isinstance(array, jax.Array) else jax.device_put(np.asarray(array).astype(dtype))


def scalar(name: str, value: Any, dtype: Any) -> Array:
    array = real(name, value, dtype)
    if array.ndim != 0:
        raise ValueError(f"{name}: expected a scalar, got shape {array.shape}")
    return put(array, dtype)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return bool(value)


def scalar_or_units(name: str, array: Any, n_units: int) -> None:
    if array.shape not in ((), (n_units,)):
        raise ValueError(f"{name}: expected a scalar or shape ({n_units},), got shape {array.shape}")


def floating(name: str, dtype: Any) -> np.dtype:
    """The dtype as JAX would store it."""
    try:
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"{name}: expected a floating dtype, got {dtype!r}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: expected a floating dtype, got {dtype}")
    return dtype


def params(value: Any) -> SLIFParams:
    """Params whose every leaf is checked and on the device."""
    if not isinstance(value, SLIFParams):
        raise TypeError(f"params: expected SLIFParams, got {type(value).__name__}")
    flag("sticky_spikes", value.sticky_spikes)
    flag("thr_persist", value.thr_persist)
    thr = real("thr", value.thr)
    if thr.ndim < 1:
        raise ValueError("thr: expected shape [..., N], got a scalar")
    dtype, n_units = floating("thr", thr.dtype), thr.shape[-1]
    leaves: dict[str, Any] = {"thr": put(real("thr", thr, dtype), dtype)}
    for name in ("tau_m", "resist_m", "refract_time", "thr_gain", "thr_leak", "rho_b", "resist_inh", "inh_weights"):
        leaf = getattr(value, name)
        if leaf is None:
            if name in ("tau_m", "resist_m", "refract_time"):
                raise TypeError(f"{name}: expected a real number or array, got None")
            continue
        array = real(name, leaf, dtype)
        if name == "rho_b":
            scalar(name, array, dtype)
        elif name == "inh_weights":
            if array.shape != (n_units, n_units):
                raise ValueError(f"inh_weights: expected shape {(n_units, n_units)}, got shape {array.shape}")
        else:
            scalar_or_units(name, array, n_units)
        leaves[name] = put(array, dtype)
    if value.resist_inh is not None and value.inh_weights is None:
        raise ValueError("inh_weights: expected shape [N, N] because resist_inh is given, got None")
    return value.replace(**leaves, surrogate=surrogate(value.surrogate, dtype, n_units))


def surrogate(value: Any, dtype: Any, n_units: int) -> Any:
    if not isinstance(value, Surrogate):
        raise TypeError(f"surrogate: expected a Surrogate, got {value!r}")
    numbers = {name: real(f"surrogate {name}", number, dtype) for name, number in value.numbers.items()}
    for name, number in numbers.items():
        scalar_or_units(f"surrogate {name}", number, n_units)
    return value.replace(numbers={name: put(number, dtype) for name, number in numbers.items()})


def state(params: SLIFParams, value: Any) -> SLIFState:
    """A state whose every leaf is [..., N], in the dtype of params, and on the device."""
    if not isinstance(value, SLIFState):
        raise TypeError(f"state: expected SLIFState, got {type(value).__name__}")
    dtype, shape = params.thr.dtype, np.shape(value.v)
    leaves = {}
    for name in FIELDS:
        leaf = getattr(value, name)
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(f"state.{name}: expected an array, got {leaf!r}")
        if leaf.shape != shape or leaf.shape[-1:] != (params.n_units,):
            raise ValueError(
                f"state.{name}: expected shape {(*shape[:-1], params.n_units)} (batch of state.v, then units), "
                f"got shape {leaf.shape}"
            )
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != dtype:
            raise TypeError(f"state.{name}: expected the dtype of params, {dtype}, got {leaf.dtype}")
        leaves[name] = put(leaf, dtype)
    return SLIFState(**leaves)


def current(name: str, value: Any, shape: tuple[int | None, ...]) -> Array:
    """Currents of the shape, None standing for any length; they keep their dtype and may hold inf and NaN."""
    if not isinstance(value, jax.Array | np.ndarray) or not is_real(value.dtype):
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else repr(value)
        raise TypeError(f"{name}: expected an array of real numbers, got {got}")
    if not fits(value.shape, shape):
        raise ValueError(f"{name}: expected shape {spell(shape)}, got shape {value.shape}")
    return put(value, jax.dtypes.canonicalize_dtype(value.dtype))


def mask(name: str, value: Any, shape: tuple[int | None, ...]) -> Array:
    if not isinstance(value, jax.Array | np.ndarray | np.bool_) or value.dtype != bool:
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else repr(value)
        raise TypeError(f"{name}: expected a boolean array, got {got}")
    if not fits(value.shape, shape):
        raise ValueError(f"{name}: expected shape {spell(shape)}, got shape {value.shape}")
    return put(value, bool)


def fits(got: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(got) == len(expected) and all(e in (None, g) for g, e in zip(got, expected, strict=True))


def spell(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("T" if length is None else str(length) for length in shape) + ",)"[len(shape) > 1 :]


def size(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name}: expected an int >= {low}, got {value}")
    return int(value)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def key(value: Any) -> None:
    if isinstance(value, jax.Array | np.ndarray):
        if value.shape == () and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return
        if value.ndim == 1 and value.dtype == np.uint32:
            return
        raise TypeError(f"key: expected one PRNG key, got dtype {value.dtype} and shape {value.shape}")
    raise TypeError(f"key: expected a PRNG key, got {value!r}")


def raster(name: str, value: Any) -> Array:
    if not isinstance(value, jax.Array | np.ndarray) or not (is_real(value.dtype) or value.dtype == bool):
        raise TypeError(f"{name}: expected an array of spikes, got {value!r}")
    if value.ndim == 0:
        raise ValueError(f"{name}: expected shape [..., N], got a scalar")
    return put(value, value.dtype)


def varying(array: Array) -> Any:
    """The mesh axes over which JAX knows this to differ, inside shard_map; by the name that the installed JAX has."""
    kind = jax.typeof(array)
    return getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", None)
