"""Checks of the arguments of public functions.

Python and NumPy values are checked in every call, shapes and dtypes of arrays once per signature, while the call is
traced. Values on a device are never read back.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from slif import _warn
from slif._host import as_numbers, holds_arrays, is_real, plain, put, shown, stored, transfers
from slif.hyperparameters import ABOUT, NUMERIC, OPTIONAL, STATIC, THR_JITTER, Hyperparameter
from slif.surrogate import Surrogate, has_bounds
from slif.types import FIELDS, SLIFParams, SLIFState

_DEVICE = (jax.Array, type(None))


TIMES = {
    "dt": Hyperparameter("length of a step", "ms", shape="scalar", low=0, open=True, normal=True),
    "t": Hyperparameter("time of the step", "ms", shape="scalar"),
    "t0": Hyperparameter("time of the first step", "ms", shape="scalar"),
}
KNOWN = ABOUT | TIMES | {"thr_jitter": THR_JITTER}
ANY = Hyperparameter("a number without known bounds")
SURROGATE = "surrogate."  # prefix of the surrogate's numbers
SLOPE = Hyperparameter("a number of a built-in surrogate", low=0, open=True, normal=True)
FLOATS = {np.dtype(name) for name in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)}


# --- Python and NumPy values ---


def as_real(name: str, value: Any, dtype: Any = np.float64, about: Hyperparameter | None = None) -> Array | np.ndarray:
    """A jax.Array as it is; anything else as a NumPy array whose values are finite and within bounds in this dtype."""
    if isinstance(value, jax.Array):
        if not is_real(value.dtype):
            raise TypeError(f"{name}: expected real numbers, got dtype {value.dtype}")
        return value
    if holds_arrays(value):
        return _stacked(name, [as_real(name, x, dtype, about) for x in value], dtype)
    array = as_numbers(name, value)
    about = about or KNOWN.get(name, ANY)
    inside = stored(name, array, dtype, infinite=about.infinite, normal=about.normal)
    if not (inside > about.low if about.open else inside >= about.low).all():
        sign = ">" if about.open else ">="
        raise ValueError(f"{name}: expected values {sign} {about.low} in {inside.dtype}, got {shown(value)}")
    return array


def _stacked(name: str, values: list[Any], dtype: Any) -> Array:
    """Values that are on the device stay there."""
    shapes = sorted({x.shape for x in values})
    if len(shapes) > 1:
        raise ValueError(f"{name}: expected values of one shape, got shapes {', '.join(map(str, shapes))}")
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    with transfers():
        return jnp.stack([put(x, dtype).astype(dtype) for x in values])


def _is_ordinary(value: Any) -> bool:
    """Whether this is clearly within bounds for any argument and dtype; NumPy takes twenty times as long to check."""
    return type(value) in (float, int) and 1e-4 < value < 6e4


def as_number(name: str, value: Any, dtype: Any) -> Any:
    """A jax.Array as it is; anything else as a Python float, which gives jit no new signature."""
    if isinstance(value, jax.Array):
        return value
    if _is_ordinary(value) or (type(value) in (float, int) and value == 0 and not KNOWN[name].open):
        return float(value)
    array = as_real(name, value, dtype)
    check_shape(name, array.shape, 0)
    return float(array)


def as_params(params: Any) -> SLIFParams:
    """Params whose leaves are all arrays, those from the host within bounds."""
    if not isinstance(params, SLIFParams):
        raise TypeError(f"params: expected SLIFParams, got {type(params).__name__}")
    leaves, surrogate = vars(params), params.surrogate
    for name in STATIC:
        check_static(name, leaves[name])
    if not isinstance(surrogate, Surrogate):
        raise TypeError(f"surrogate: expected a Surrogate, got {shown(surrogate)}")
    if leaves["thr"] is None:
        raise TypeError("thr: expected a real number or array, got None")
    given = {name: x for name in NUMERIC if not isinstance(x := leaves[name], _DEVICE)}
    slopes = {name: x for name, x in surrogate.numbers.items() if not isinstance(x, jax.Array)}
    dtype = as_floating_dtype("thr", (as_real("thr", given["thr"]) if "thr" in given else leaves["thr"]).dtype)
    if not given and not slopes:
        return params
    given = {name: _as_leaf(name, x, dtype) for name, x in given.items()}
    about = about_slope(surrogate)
    slopes = {name: _as_leaf(f"surrogate {name}", x, dtype, about) for name, x in slopes.items()}
    return params.replace(**given, surrogate=surrogate.replace(numbers={**surrogate.numbers, **slopes}))


def about_slope(surrogate: Surrogate) -> Hyperparameter:
    """The bounds of the numbers of its slope."""
    return SLOPE if has_bounds(surrogate) else ANY


def _as_leaf(name: str, value: Any, dtype: Any, about: Hyperparameter | None = None) -> Any:
    return np.asarray(value, dtype) if _is_ordinary(value) else as_real(name, value, dtype, about).astype(dtype)


def as_state(state: Any, name: str = "state") -> SLIFState:
    """A state whose leaves are all arrays."""
    if not isinstance(state, SLIFState):
        raise TypeError(f"{name}: expected SLIFState, got {type(state).__name__}")
    given = {field: x for field, x in vars(state).items() if not isinstance(x, jax.Array)}
    if not given:
        return state
    return state.replace(**{field: cast(check_array(f"{name}.{field}", x)) for field, x in given.items()})


def check_array(name: str, value: Any, kind: str = "an array") -> Any:
    """An array of numbers or bools."""
    if isinstance(value, jax.Array):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected {kind}, got {shown(value)}")
    if not (is_real(plain(name, value).dtype) or value.dtype == bool):
        raise TypeError(f"{name}: expected {kind}, got dtype {value.dtype}")
    return value


def as_currents(name: str, value: Any, dtype: Any) -> Any:
    """An array of currents, in the dtype of params if JAX would truncate it to 32 bits."""
    return cast(check_array(name, value, "an array of real numbers"), dtype)


def cast(value: Any, dtype: Any = None) -> Any:
    """Narrows 64-bit host values that JAX holds in 32: it would wrap integers, and NumPy would warn of overflow."""
    if isinstance(value, jax.Array) or (narrow := jax.dtypes.canonicalize_dtype(value.dtype)) == value.dtype:
        return value
    with np.errstate(over="ignore"):
        return value.astype(dtype or narrow)


def as_names(name: str, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names, each once, in the order of `known`."""
    if not isinstance(value, tuple | list | set | frozenset) or not all(isinstance(x, str) for x in value):
        raise TypeError(f"{name}: expected a tuple of names, got {shown(value)}")
    if unknown := sorted(set(value).difference(known)):
        raise ValueError(f"{name}: expected names among {', '.join(known)}, got {', '.join(unknown)}")
    return tuple(x for x in known if x in value)


def check_static(name: str, value: Any) -> None:
    """Checks that a static hyperparameter has one of its allowed values."""
    choices = ABOUT[name].choices
    if choices == (False, True):
        as_flag(name, value)
    elif not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {shown(value)}")
    elif value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {shown(value)}")


def as_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {shown(value)}")
    return bool(value)


def as_size(name: str, value: Any, low: int, *, symbolic: bool = False) -> Any:
    if symbolic and export.is_symbolic_dim(value):
        return value
    if not isinstance(value, int | np.integer) or isinstance(value, bool | np.timedelta64):
        raise TypeError(f"{name}: expected an int, got {shown(value)}")
    if value < low:
        raise ValueError(f"{name}: expected an int >= {low}, got {shown(value)}")
    return int(value)


def check_countable(name: str, *shape: Any) -> None:
    """Checks that XLA can count the bits of such an array; otherwise it would end the process."""
    if math.prod(max(n, 1) for n in shape if isinstance(n, int)) >= 2**57:
        raise ValueError(f"{name}: expected an array of fewer than 2**57 numbers, got shape {shown(shape)}")


def check_jitter(name: str, width: Any, thr: np.ndarray, dtype: Any) -> None:
    """Checks that neither the range of the jitter nor the jittered thresholds overflow."""
    top = np.abs(np.asarray(thr, np.float64))
    top = np.where(np.isinf(top), 0, top) + float(width)
    with np.errstate(over="ignore"):
        if not (np.isfinite(np.float32(2 * float(width))) and np.isfinite(top.astype(dtype)).all()):
            raise ValueError(f"{name}: expected thresholds that stay finite in {np.dtype(dtype)}, got {shown(width)}")


def as_floating_dtype(name: str, dtype: Any) -> np.dtype:
    """The dtype as JAX would store it."""
    dtype = _dtype(name, dtype, "a floating dtype")
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype (float16, bfloat16, float32 or float64), got {dtype}")
    return dtype


def as_requested_dtype(name: str, dtype: Any) -> np.dtype:
    """The same for a dtype that the caller requests, with a warning if JAX only has a narrower one."""
    return _warn.narrowed(name, dtype, as_floating_dtype(name, dtype))


def as_spike_dtype(asked: Any, own: Any) -> np.dtype:
    """The same for any dtype that can hold spikes; None stands for the dtype of params."""
    dtype = _dtype("spike_dtype", own if asked is None else asked, "a dtype")
    if not (is_real(dtype) or dtype == np.dtype(bool)):
        raise TypeError(f"spike_dtype: expected bool, an integer or a floating dtype, got {dtype}")
    if not _holds_spikes(dtype):
        raise TypeError(f"spike_dtype: expected a dtype that can represent 0 and 1, got {dtype}")
    return _warn.narrowed("spike_dtype", asked, dtype)


@functools.cache
def _holds_spikes(dtype: np.dtype) -> bool:
    """Whether 0 and 1 are numbers of this dtype; some of 8 bits or fewer lack one of them."""
    spikes = np.array([0, 1], np.float32)
    return np.array_equal(spikes.astype(dtype).astype(np.float32), spikes)


def _dtype(name: str, dtype: Any, kind: str) -> Any:
    try:
        return jax.dtypes.canonicalize_dtype(dtype)
    except Exception:  # NumPy and JAX raise many types here
        raise TypeError(f"{name}: expected {kind}, got {shown(dtype)}") from None


def check_implementation(value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"implementation: expected None, 'xla' or 'pallas', got {shown(value)}")


def as_key(value: Any) -> Any:
    """One PRNG key, on the device."""
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"key: expected a PRNG key, got {shown(value)}")
    if value.shape == () and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    if value.ndim == 1 and value.dtype == np.uint32:
        data = put(value if isinstance(value, jax.Array) else plain("key", value), np.uint32)
        try:
            jax.random.wrap_key_data(data)
        except (TypeError, ValueError):
            pass
        else:
            return data
    raise TypeError(f"key: expected one PRNG key, got dtype {value.dtype} and shape {value.shape}")


# --- shapes and dtypes ---


def check_shape(name: str, shape: tuple[int, ...], n_units: int, kind: str | None = None) -> None:
    kind = kind or KNOWN[name].shape
    if kind == "scalar" and shape != ():
        raise ValueError(f"{name}: expected a scalar, got shape {shape}")
    if kind == "units" and shape not in ((), (n_units,)):
        raise ValueError(f"{name}: expected a scalar or shape ({n_units},), got shape {shape}")
    if kind == "matrix" and shape != (n_units, n_units):
        raise ValueError(f"{name}: expected shape {(n_units, n_units)}, got shape {shape}")
    if kind == "thresholds" and not shape:
        raise ValueError(f"{name}: expected shape [..., N], got a scalar")


def check_scalars(**numbers: Any) -> None:
    """Checks that each is a real scalar."""
    for name, x in numbers.items():
        check_shape(name, as_real(name, jnp.asarray(x)).shape, 0)


def check_signature(params: SLIFParams, state: SLIFState | None = None, named: str = "state") -> None:
    """Checks that the leaves of params match each other, and those of the state match params."""
    thr = as_real("thr", params.thr)
    check_shape("thr", thr.shape, 0)
    dtype, n_units = as_floating_dtype("thr", thr.dtype), params.n_units
    for name in NUMERIC:
        leaf = getattr(params, name)
        if leaf is not None:
            check_shape(name, as_real(name, leaf).shape, n_units)
        elif name not in OPTIONAL:
            raise TypeError(f"{name}: expected a real number or array, got None")
    if params.resist_inh is not None and params.inh_weights is None:
        raise ValueError("inh_weights: expected shape [N, N] because resist_inh is given, got None")
    for name, leaf in params.surrogate.numbers.items():
        check_shape(f"surrogate {name}", as_real(f"surrogate {name}", leaf).shape, n_units, "units")
    if state is None:
        return
    batch = np.shape(state.v)[:-1]
    for name in FIELDS:
        leaf = getattr(state, name)
        if np.shape(leaf) != (*batch, n_units):
            expected = f"{(*batch, n_units)} (batch of {named}.v, then units)"
            raise ValueError(f"{named}.{name}: expected shape {expected}, got shape {leaf.shape}")
        if not is_real(leaf.dtype) or jax.dtypes.canonicalize_dtype(leaf.dtype) != dtype:
            raise TypeError(f"{named}.{name}: expected the dtype of params, {dtype}, got {leaf.dtype}")
    if not broadcasts(thr.shape, np.shape(state.v)):
        shape = np.shape(state.v)
        raise ValueError(f"thr: expected a shape that broadcasts to {named}.v {shape}, got shape {thr.shape}")


def check_currents(name: str, value: Any, shape: tuple[Any, ...]) -> None:
    """Checks the dtype and shape of currents; None stands for any length, and inf and NaN are allowed."""
    if not isinstance(value, jax.Array | np.ndarray) or not (is_real(value.dtype) or value.dtype == bool):
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else shown(value)
        raise TypeError(f"{name}: expected an array of real numbers, got {got}")
    if not fits(value.shape, shape):
        hint = ""
        if len(value.shape) > len(shape) and value.shape[-1:] == shape[-1:]:
            hint = f"; a state with batch_shape {value.shape[len(shape) - len(value.shape) - 1 : -1]} takes these"
        raise ValueError(f"{name}: expected shape {spell(shape)}, got shape {value.shape}{hint}")


def check_mask(name: str, value: Any, shape: tuple[Any, ...]) -> None:
    if not isinstance(value, jax.Array | np.ndarray | np.bool_) or value.dtype != bool:
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else shown(value)
        raise TypeError(f"{name}: expected a boolean array, got {got}")
    if not fits(value.shape, shape):
        raise ValueError(f"{name}: expected shape {spell(shape)}, got shape {value.shape}")


def check_raster(name: str, value: Any) -> Any:
    value = check_array(name, value, "an array of spikes")
    if not (is_real(value.dtype) or value.dtype == bool):
        raise TypeError(f"{name}: expected an array of spikes, got dtype {value.dtype}")
    if value.ndim == 0:
        raise ValueError(f"{name}: expected shape [..., N], got a scalar")
    return value


def fits(got: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return len(got) == len(expected) and all(e is None or e == g for g, e in zip(got, expected, strict=True))


def spell(shape: tuple[Any, ...]) -> str:
    return "(" + ", ".join("T" if length is None else str(length) for length in shape) + ",)"[len(shape) > 1 :]


def broadcasts(shape: tuple[Any, ...], to: tuple[Any, ...]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1], strict=False))


# --- values and shapes together, for functions that are called rarely ---


def as_scalar(name: str, value: Any, dtype: Any) -> Array:
    value = put(as_number(name, value, dtype), dtype)
    check_scalars(**{name: value})
    return value


def as_device_params(value: Any) -> SLIFParams:
    """Params whose leaves are all checked and on the device."""
    value = as_params(value)
    check_signature(value)
    return jax.tree.map(lambda x: put(x, value.thr.dtype), value)


def as_host_params(params: SLIFParams) -> SLIFParams:
    """Params in host memory, for a file; values that were on a device are checked too."""
    params = jax.device_get(params)
    as_params(params)
    return params


def check_slope_numbers(numbers: Any, dtype: Any) -> None:
    """Checks numbers in host memory against the bounds of the built-in surrogates."""
    for name, x in numbers.items():
        as_real(f"{SURROGATE}{name}", x, dtype, SLOPE)


def as_device_state(params: SLIFParams, value: Any) -> SLIFState:
    """A state whose leaves are all checked and on the device."""
    check_signature(params, as_state(value))
    return jax.tree.map(lambda x: put(x, params.thr.dtype), value)
