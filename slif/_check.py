"""Checks at the public entry: what was expected, what came.

Python and NumPy values are looked at in every call; shapes and dtypes of arrays while the call is traced, once for each
signature. Values on a device are never read back.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from slif import _warn
from slif._host import holds_arrays, is_real, numbers, plain, put, shown, stored, transfers
from slif.surrogate import Surrogate, has_bounds
from slif.types import FIELDS, SLIFParams, SLIFState

_DEVICE = (jax.Array, type(None))


class Rule(NamedTuple):
    """What a number of the cell may be: its shape, and its lowest value."""

    shape: str = "units"  # a scalar or [N]; "scalar", "matrix" [N, N] or "thresholds" [..., N]
    low: float = -np.inf
    allowed: bool = True  # the lowest value itself
    optional: bool = True  # None leaves the mechanism out
    endless: bool = False  # infinity too
    normal: bool = False  # no smaller than a normal number, where positive: XLA takes what is smaller for 0


RULES = {
    "tau_m": Rule(low=0, allowed=False, optional=False, normal=True),
    "resist_m": Rule(optional=False),
    "thr": Rule("thresholds", optional=False, endless=True),
    "refract_time": Rule(low=0),
    "thr_gain": Rule(),
    "thr_leak": Rule(),
    "rho_b": Rule("scalar", normal=True),
    "resist_inh": Rule(normal=True),
    "inh_weights": Rule("matrix"),
    "thr_jitter": Rule("scalar", low=0),
    "dt": Rule("scalar", low=0, allowed=False, normal=True),
    "t": Rule("scalar"),
    "t0": Rule("scalar"),
}
SURROGATE = "surrogate."  # before the name of one of the surrogate's numbers
SLOPE = Rule(low=0, allowed=False, normal=True)  # a number of a surrogate of our own
FLOATS = {np.dtype(name) for name in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)}
FLAGS = ("sticky_spikes", "thr_persist")
LEAVES = tuple(name for name in RULES if name in SLIFParams.__annotations__)


# --- Python and NumPy values ---


def real(name: str, value: Any, dtype: Any = np.float64, rule: Rule | None = None) -> Array | np.ndarray:
    """A jax.Array as it is, anything else as a NumPy array whose values are finite and within bounds in this dtype."""
    if isinstance(value, jax.Array):
        if not is_real(value.dtype):
            raise TypeError(f"{name}: expected real numbers, got dtype {value.dtype}")
        return value
    if holds_arrays(value):
        return _stacked(name, [real(name, x, dtype, rule) for x in value], dtype)
    array, rule = numbers(name, value), rule or RULES.get(name, SLOPE if name.startswith(SURROGATE) else Rule())
    inside = stored(name, array, dtype, endless=rule.endless, normal=rule.normal)
    if not (inside >= rule.low if rule.allowed else inside > rule.low).all():
        sign = ">=" if rule.allowed else ">"
        raise ValueError(f"{name}: expected values {sign} {rule.low} in {inside.dtype}, got {shown(value)}")
    return array


def _stacked(name: str, values: list[Any], dtype: Any) -> Array:
    """Arrays from the device among them stay there."""
    shapes = sorted({x.shape for x in values})
    if len(shapes) > 1:
        raise ValueError(f"{name}: expected values of one shape, got shapes {', '.join(map(str, shapes))}")
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    with transfers():
        return jnp.stack([put(x, dtype).astype(dtype) for x in values])


def number(name: str, value: Any, dtype: Any) -> Any:
    """A jax.Array as it is, anything else as a Python float, which jit takes without a new signature."""
    if isinstance(value, jax.Array):
        return value
    # NumPy takes twenty times as long as this for what is plainly within the range of any dtype.
    if type(value) in (float, int) and (1e-4 < value < 6e4 or (value == 0 and RULES[name].allowed)):
        return float(value)
    array = real(name, value, dtype)
    shaped(name, array.shape, 0)
    return float(array)


def values(params: Any) -> SLIFParams:
    """Params whose every leaf is an array, those from the host within bounds."""
    if not isinstance(params, SLIFParams):
        raise TypeError(f"params: expected SLIFParams, got {type(params).__name__}")
    leaves, surrogate = vars(params), params.surrogate
    for name in FLAGS:
        flag(name, leaves[name])
    if not isinstance(surrogate, Surrogate):
        raise TypeError(f"surrogate: expected a Surrogate, got {shown(surrogate)}")
    if leaves["thr"] is None:
        raise TypeError("thr: expected a real number or array, got None")
    if isinstance(leaves["thr"], jax.Array) and leaves["thr"].dtype not in FLOATS:
        floating("thr", leaves["thr"].dtype)
    given = {name: x for name in LEAVES if not isinstance(x := leaves[name], _DEVICE)}
    slopes = {name: x for name, x in surrogate.numbers.items() if not isinstance(x, jax.Array)}
    if not given and not slopes:
        return params
    dtype = floating("thr", real("thr", leaves["thr"]).dtype)
    given = {name: real(name, x, dtype).astype(dtype) for name, x in given.items()}
    rule = SLOPE if has_bounds(surrogate) else Rule()
    slopes = {name: real(f"surrogate {name}", x, dtype, rule).astype(dtype) for name, x in slopes.items()}
    return params.replace(**given, surrogate=surrogate.replace(numbers={**surrogate.numbers, **slopes}))


def fields(state: Any, name: str = "state") -> SLIFState:
    """A state whose every leaf is an array."""
    if not isinstance(state, SLIFState):
        raise TypeError(f"{name}: expected SLIFState, got {type(state).__name__}")
    given = {field: x for field, x in vars(state).items() if not isinstance(x, jax.Array)}
    if not given:
        return state
    return state.replace(**{field: cast(array(f"{name}.{field}", x)) for field, x in given.items()})


def array(name: str, value: Any, kind: str = "an array") -> Any:
    """An array of numbers or bools."""
    if isinstance(value, jax.Array):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected {kind}, got {shown(value)}")
    if not (is_real(plain(name, value).dtype) or value.dtype == bool):
        raise TypeError(f"{name}: expected {kind}, got dtype {value.dtype}")
    return value


def currents(name: str, value: Any, dtype: Any) -> Any:
    """An array of currents; in the dtype of params where JAX would cut it to 32 bits."""
    return cast(array(name, value, "an array of real numbers"), dtype)


def cast(value: Any, dtype: Any = None) -> Any:
    """64 bits from the host that JAX has in 32 only: it wraps integers, and reports the overflow of floats to NumPy."""
    if isinstance(value, jax.Array) or (narrow := jax.dtypes.canonicalize_dtype(value.dtype)) == value.dtype:
        return value
    with np.errstate(over="ignore"):
        return value.astype(dtype or narrow)


def names(name: str, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names in the order of the known ones, each once."""
    if not isinstance(value, tuple | list | set | frozenset) or not all(isinstance(x, str) for x in value):
        raise TypeError(f"{name}: expected a tuple of names, got {shown(value)}")
    if unknown := sorted(set(value).difference(known)):
        raise ValueError(f"{name}: expected names among {', '.join(known)}, got {', '.join(unknown)}")
    return tuple(x for x in known if x in value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {shown(value)}")
    return bool(value)


def size(name: str, value: Any, low: int, *, symbolic: bool = False) -> Any:
    if symbolic and export.is_symbolic_dim(value):
        return value
    if not isinstance(value, int | np.integer) or isinstance(value, bool | np.timedelta64):
        raise TypeError(f"{name}: expected an int, got {shown(value)}")
    if value < low:
        raise ValueError(f"{name}: expected an int >= {low}, got {shown(value)}")
    return int(value)


def countable(name: str, *shape: Any) -> None:
    """That XLA can count the bits of such an array: one that it cannot ends the process."""
    if math.prod(max(n, 1) for n in shape if isinstance(n, int)) >= 2**57:
        raise ValueError(f"{name}: expected an array of less than 2**57 numbers, got shape {shown(shape)}")


def spread(name: str, width: Any, thr: np.ndarray, dtype: Any) -> None:
    """That neither the range of a jitter nor the thresholds overflow with it."""
    top = np.abs(np.asarray(thr, np.float64))
    top = np.where(np.isinf(top), 0, top) + float(width)
    with np.errstate(over="ignore"):
        if not (np.isfinite(np.float32(2 * float(width))) and np.isfinite(top.astype(dtype)).all()):
            raise ValueError(f"{name}: expected thresholds that stay finite in {np.dtype(dtype)}, got {shown(width)}")


def floating(name: str, dtype: Any) -> np.dtype:
    """The dtype as JAX would store it."""
    dtype = _dtype(name, dtype, "a floating dtype")
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype (float16, bfloat16, float32 or float64), got {dtype}")
    return dtype


def requested(name: str, dtype: Any) -> np.dtype:
    """The same of a dtype that the caller asks for, with a warning where JAX has a narrower one only."""
    return _warn.narrowed(name, dtype, floating(name, dtype))


def spike_dtype(asked: Any, own: Any) -> np.dtype:
    """The same of any dtype that can hold spikes; None stands for that of params."""
    dtype = _dtype("spike_dtype", own if asked is None else asked, "a dtype")
    if not (is_real(dtype) or dtype == np.dtype(bool)):
        raise TypeError(f"spike_dtype: expected bool, an integer or a floating dtype, got {dtype}")
    return _warn.narrowed("spike_dtype", asked, dtype)


def _dtype(name: str, dtype: Any, kind: str) -> Any:
    try:
        return jax.dtypes.canonicalize_dtype(dtype)
    except Exception:  # whatever NumPy and JAX make of it
        raise TypeError(f"{name}: expected {kind}, got {shown(dtype)}") from None


def implementation(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"implementation: expected None, 'xla' or 'pallas', got {shown(value)}")
    return value


def key(value: Any) -> Any:
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


def shaped(name: str, shape: tuple[int, ...], n_units: int, rule: Rule | None = None) -> None:
    kind = (rule or RULES[name]).shape
    if kind == "scalar" and shape != ():
        raise ValueError(f"{name}: expected a scalar, got shape {shape}")
    if kind == "units" and shape not in ((), (n_units,)):
        raise ValueError(f"{name}: expected a scalar or shape ({n_units},), got shape {shape}")
    if kind == "matrix" and shape != (n_units, n_units):
        raise ValueError(f"{name}: expected shape {(n_units, n_units)}, got shape {shape}")
    if kind == "thresholds" and not shape:
        raise ValueError(f"{name}: expected shape [..., N], got a scalar")


def scalars(**numbers: Any) -> None:
    """That each is one real number."""
    for name, x in numbers.items():
        shaped(name, real(name, jnp.asarray(x)).shape, 0)


def signature(params: SLIFParams, state: SLIFState | None = None, named: str = "state") -> None:
    """That the leaves of params fit each other, and those of the state them."""
    thr = real("thr", params.thr)
    shaped("thr", thr.shape, 0)
    dtype, n_units = floating("thr", thr.dtype), params.n_units
    for name in LEAVES:
        leaf = getattr(params, name)
        if leaf is not None:
            shaped(name, real(name, leaf).shape, n_units)
        elif not RULES[name].optional:
            raise TypeError(f"{name}: expected a real number or array, got None")
    if params.resist_inh is not None and params.inh_weights is None:
        raise ValueError("inh_weights: expected shape [N, N] because resist_inh is given, got None")
    for name, leaf in params.surrogate.numbers.items():
        shaped(f"surrogate {name}", real(f"surrogate {name}", leaf).shape, n_units, Rule())
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


def current(name: str, value: Any, shape: tuple[Any, ...]) -> None:
    """Currents of the shape, None standing for any length; they keep their dtype and may hold inf and NaN."""
    if not isinstance(value, jax.Array | np.ndarray) or not (is_real(value.dtype) or value.dtype == bool):
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else shown(value)
        raise TypeError(f"{name}: expected an array of real numbers, got {got}")
    if not fits(value.shape, shape):
        hint = ""
        if len(value.shape) > len(shape) and value.shape[-1:] == shape[-1:]:
            hint = f"; a state with batch_shape {value.shape[len(shape) - len(value.shape) - 1 : -1]} takes these"
        raise ValueError(f"{name}: expected shape {spell(shape)}, got shape {value.shape}{hint}")


def mask(name: str, value: Any, shape: tuple[Any, ...]) -> None:
    if not isinstance(value, jax.Array | np.ndarray | np.bool_) or value.dtype != bool:
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else shown(value)
        raise TypeError(f"{name}: expected a boolean array, got {got}")
    if not fits(value.shape, shape):
        raise ValueError(f"{name}: expected shape {spell(shape)}, got shape {value.shape}")


def raster(name: str, value: Any) -> Any:
    value = array(name, value, "an array of spikes")
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


# --- both, for what is called now and then ---


def scalar(name: str, value: Any, dtype: Any) -> Array:
    value = put(number(name, value, dtype), dtype)
    scalars(**{name: value})
    return value


def params(value: Any) -> SLIFParams:
    """Params whose every leaf is checked and on the device."""
    value = values(value)
    signature(value)
    return jax.tree.map(lambda x: put(x, value.thr.dtype), value)


def host(params: SLIFParams) -> SLIFParams:
    """Checked params in host memory, for a file: the values that were on a device are within bounds too."""
    params = jax.device_get(params)
    values(params)
    return params


def positive(numbers: Any, dtype: Any) -> None:
    """That the numbers, in host memory, are those of a surrogate that has a name."""
    for name, x in numbers.items():
        real(f"{SURROGATE}{name}", x, dtype)


def state(params: SLIFParams, value: Any) -> SLIFState:
    """A state whose every leaf is checked and on the device."""
    signature(params, fields(value))
    return jax.tree.map(lambda x: put(x, params.thr.dtype), value)
