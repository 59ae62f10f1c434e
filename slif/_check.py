"""Checks at the public entry: what was expected, what came.

Python and NumPy values are looked at in every call; shapes and dtypes of arrays while the call is traced, once for each
signature. Values on a device are never read back.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from slif.surrogate import Surrogate
from slif.types import FIELDS, SLIFParams, SLIFState

_DEVICE = (jax.Array, type(None))


class Rule(NamedTuple):
    """What a number of the cell may be: its shape, and its lowest value."""

    shape: str = "units"  # a scalar or [N]; "scalar", "matrix" [N, N] or "thresholds" [..., N]
    low: float = -np.inf
    allowed: bool = True  # the lowest value itself
    optional: bool = True  # None leaves the mechanism out
    endless: bool = False  # infinity too


RULES = {
    "tau_m": Rule(low=0, allowed=False, optional=False),
    "resist_m": Rule(optional=False),
    "thr": Rule("thresholds", optional=False, endless=True),
    "refract_time": Rule(low=0),
    "thr_gain": Rule(),
    "thr_leak": Rule(),
    "rho_b": Rule("scalar"),
    "resist_inh": Rule(),
    "inh_weights": Rule("matrix"),
    "thr_jitter": Rule("scalar", low=0),
    "dt": Rule("scalar", low=0, allowed=False),
    "t": Rule("scalar"),
    "t0": Rule("scalar"),
}
SURROGATE = "surrogate."  # before the name of one of the surrogate's numbers
FLAGS = ("sticky_spikes", "thr_persist")
LEAVES = tuple(name for name in RULES if name in SLIFParams.__annotations__)


def transfers() -> Any:
    """Lets what was checked go to the device with the call, under `jax.transfer_guard("disallow")` too."""
    return jax.transfer_guard_host_to_device("allow")


# --- Python and NumPy values ---


def real(name: str, value: Any, dtype: Any = np.float64) -> Array | np.ndarray:
    """A jax.Array as it is, anything else as a NumPy array whose values are finite and within bounds in this dtype."""
    if isinstance(value, jax.Array):
        if not is_real(value.dtype):
            raise TypeError(f"{name}: expected real numbers, got dtype {value.dtype}")
        return value
    array = None
    if isinstance(value, int | float | np.generic | np.ndarray | list | tuple):
        with contextlib.suppress(ValueError):  # of a ragged list
            array = np.asarray(value)
    if array is None or not is_real(array.dtype):
        raise TypeError(f"{name}: expected a real number or array, got {value!r}")
    with np.errstate(over="ignore", under="ignore"):
        stored = array.astype(dtype, copy=False)
    rule = RULES.get(name, Rule(low=0, allowed=False) if name.startswith(SURROGATE) else Rule())
    allowed = np.isfinite(stored)
    if rule.endless:
        allowed |= np.isposinf(stored) & np.isposinf(array)
    if not allowed.all():
        raise ValueError(f"{name}: expected finite values in {stored.dtype}, got {value!r}")
    if not (stored >= rule.low if rule.allowed else stored > rule.low).all():
        sign = ">=" if rule.allowed else ">"
        raise ValueError(f"{name}: expected values {sign} {rule.low} in {stored.dtype}, got {value!r}")
    return array


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
        raise TypeError(f"surrogate: expected a Surrogate, got {surrogate!r}")
    given = {name: x for name in LEAVES if not isinstance(x := leaves[name], _DEVICE)}
    numbers = {name: x for name, x in surrogate.numbers.items() if not isinstance(x, jax.Array)}
    if not given and not numbers:
        return params
    dtype = floating("thr", real("thr", leaves["thr"]).dtype)
    given = {name: real(name, x, dtype).astype(dtype, copy=False) for name, x in given.items()}
    numbers = {name: real(f"surrogate {name}", x, dtype).astype(dtype) for name, x in numbers.items()}
    return params.replace(**given, surrogate=surrogate.replace(numbers={**surrogate.numbers, **numbers}))


def fields(state: Any) -> SLIFState:
    """A state whose every leaf is an array."""
    if not isinstance(state, SLIFState):
        raise TypeError(f"state: expected SLIFState, got {type(state).__name__}")
    for name, x in vars(state).items():
        array(f"state.{name}", x)
    return state


def array(name: str, value: Any, kind: str = "an array") -> Any:
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name}: expected {kind}, got {value!r}")
    return value


def names(name: str, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names in the order of the known ones, each once."""
    if not isinstance(value, tuple | list | set | frozenset) or not all(isinstance(x, str) for x in value):
        raise TypeError(f"{name}: expected a tuple of names, got {value!r}")
    if unknown := sorted(set(value).difference(known)):
        raise ValueError(f"{name}: expected names among {', '.join(known)}, got {', '.join(unknown)}")
    return tuple(x for x in known if x in value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return bool(value)


def size(name: str, value: Any, low: int) -> Any:
    if export.is_symbolic_dim(value):
        return value
    if isinstance(value, bool | np.timedelta64) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name}: expected an int >= {low}, got {value}")
    return int(value)


def floating(name: str, dtype: Any) -> np.dtype:
    """The dtype as JAX would store it."""
    try:
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"{name}: expected a floating dtype, got {dtype!r}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: expected a floating dtype, got {dtype}")
    return dtype


def key(value: Any) -> None:
    if isinstance(value, jax.Array | np.ndarray):
        if value.shape == () and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return
        if value.ndim == 1 and value.dtype == np.uint32:
            return
        raise TypeError(f"key: expected one PRNG key, got dtype {value.dtype} and shape {value.shape}")
    raise TypeError(f"key: expected a PRNG key, got {value!r}")


# --- shapes and dtypes ---


def is_real(dtype: Any) -> bool:
    if jnp.issubdtype(dtype, np.timedelta64):  # a signed integer to NumPy
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


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


def signature(params: SLIFParams, state: SLIFState | None = None) -> None:
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
            expected = f"{(*batch, n_units)} (batch of state.v, then units)"
            raise ValueError(f"state.{name}: expected shape {expected}, got shape {leaf.shape}")
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != dtype:
            raise TypeError(f"state.{name}: expected the dtype of params, {dtype}, got {leaf.dtype}")
    if not broadcasts(thr.shape, np.shape(state.v)):
        raise ValueError(f"thr: expected a shape that broadcasts to state.v {np.shape(state.v)}, got shape {thr.shape}")


def current(name: str, value: Any, shape: tuple[Any, ...]) -> None:
    """Currents of the shape, None standing for any length; they keep their dtype and may hold inf and NaN."""
    if not isinstance(value, jax.Array | np.ndarray) or not (is_real(value.dtype) or value.dtype == bool):
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else repr(value)
        raise TypeError(f"{name}: expected an array of real numbers, got {got}")
    if not fits(value.shape, shape):
        hint = ""
        if len(value.shape) > len(shape) and value.shape[-1:] == shape[-1:]:
            hint = f"; a state with batch_shape {value.shape[len(shape) - len(value.shape) - 1 : -1]} takes these"
        raise ValueError(f"{name}: expected shape {spell(shape)}, got shape {value.shape}{hint}")


def mask(name: str, value: Any, shape: tuple[Any, ...]) -> None:
    if not isinstance(value, jax.Array | np.ndarray | np.bool_) or value.dtype != bool:
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else repr(value)
        raise TypeError(f"{name}: expected a boolean array, got {got}")
    if not fits(value.shape, shape):
        raise ValueError(f"{name}: expected shape {spell(shape)}, got shape {value.shape}")


def raster(name: str, value: Any) -> Array:
    array(name, value, "an array of spikes")
    if not (is_real(value.dtype) or value.dtype == bool):
        raise TypeError(f"{name}: expected an array of spikes, got {value!r}")
    if value.ndim == 0:
        raise ValueError(f"{name}: expected shape [..., N], got a scalar")
    return put(value, value.dtype)


def fits(got: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return len(got) == len(expected) and all(e is None or e == g for g, e in zip(got, expected, strict=True))


def spell(shape: tuple[Any, ...]) -> str:
    return "(" + ", ".join("T" if length is None else str(length) for length in shape) + ",)"[len(shape) > 1 :]


def broadcasts(shape: tuple[Any, ...], to: tuple[Any, ...]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1], strict=False))


# --- both, for what is called now and then ---


def put(value: Any, dtype: Any) -> Array:
    """The value on the device; what is there already stays as it is."""
    return value if isinstance(value, jax.Array) else jax.device_put(np.asarray(value).astype(dtype))


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
