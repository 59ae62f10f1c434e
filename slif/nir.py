"""Neuromorphic Intermediate Representation (NIR): a cell as a `nir.LIF` node, and back. Extra: `nir`."""

import warnings
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from slif import _check
from slif.hyperparameters import ABOUT, OPTIONAL, STATIC
from slif.surrogate import Surrogate, kind_of, named, secant
from slif.types import SLIFParams

try:
    import nir
except ImportError as error:
    raise ImportError("slif.nir needs the package nir: pip install nir") from error

__all__ = ["from_nir", "to_nir"]

MAX_UNITS = 2**31 - 1
PER_STEP = tuple(name for name in OPTIONAL if name != "refract_time")  # these act once per step, whatever its length


def to_nir(params: SLIFParams, *, dt: ArrayLike, strict: bool = True) -> nir.LIF:
    """Converts the cell to a NIR node, exactly if it has no adaptation, inhibition, soft reset or refractory steps.

        tau dv/dt = (v_leak - v) + r i,   z = v > v_threshold,   v = v_reset where z
        tau = tau_m / 1000 (s),   r = resist_m,   v_leak = v_reset = 0,   v_threshold = thr with its jitter

    NIR has no surrogates; one other than the default goes into the node's metadata.

    Args:
        params: the parameters; thresholds [N].
        dt: the length of a step of the cell, ms; a refractory period of dt or less has no effect.
        strict: refuse a cell that NIR cannot express. If False, warn, and keep what NIR lacks in the node's metadata,
            which `from_nir` reads and other libraries ignore.

    Returns:
        The node; fields are [N], in float32 (float64 for float64 params), but tau in float64, to convert back exactly.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: something would be lost and `strict` is set (the message lists it all), thresholds are batched, or a
            number is out of range or not finite.

    Source: Pedersen et al. (2024), Neuromorphic intermediate representation, Nature Communications 15.

    Example:
        >>> import jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
        >>> to_nir(params, dt=1.0).tau
        array([0.02, 0.02, 0.02])
    """
    params = _check.as_host_params(_check.as_device_params(params))
    strict = _check.as_flag("strict", strict)
    dtype = params.thr.dtype
    dt = _time_step(dt, np.promote_types(dtype, np.float32))
    if params.thr.ndim != 1:
        raise ValueError(f"thr: expected shape [N], got shape {params.thr.shape}; NIR has no batches")
    leaves = {name: _wide(getattr(params, name)) for name in PER_STEP if getattr(params, name) is not None}
    lost = _lost(params, leaves, dt.astype(dtype))
    if lost and strict:
        raise ValueError(f"params: NIR has no {', no '.join(lost)}; strict=False keeps them in the metadata")
    kept: dict[str, Any] = _surrogate_metadata(params.surrogate, dtype)
    if lost:
        warnings.warn(f"other libraries will run this node without {', '.join(lost)}", UserWarning, stacklevel=2)
        if params.refract_time is not None:
            leaves["refract_time"] = _wide(params.refract_time)
        # Plain scalars, since NIR files cannot hold compressed arrays of rank 0.
        kept["params"] = {name: x[()] for name, x in leaves.items()}
        kept["params"] |= {name: getattr(params, name) for name in STATIC}
        kept["dt"] = float(dt)

    def units(value: Any) -> np.ndarray:
        return np.broadcast_to(_wide(value), params.thr.shape).copy()

    return nir.LIF(
        tau=units(params.tau_m).astype(np.float64) / 1000,
        r=units(params.resist_m),
        v_leak=units(np.zeros((), dtype)),
        v_threshold=units(params.thr),
        v_reset=units(np.zeros((), dtype)),
        metadata={"slif": kept} if kept else {},
    )


def from_nir(node: nir.LIF, *, dt: ArrayLike, n_units: int | None = None) -> SLIFParams:
    """Makes parameters from a NIR node, including what `to_nir` kept in its metadata.

        tau_m = 1000 tau (ms),   resist_m = r,   thr = v_threshold,   refract_time = None

    Args:
        node: a `nir.LIF` with v_leak = v_reset = 0 and fields [N] or, with `n_units`, scalars.
        dt: the length of a step, ms. NIR is continuous in time, but the terms in the metadata are per step.
        n_units: the number of units, needed if the fields are scalars; None to take it from the node.

    Returns:
        The parameters, in the dtype of v_threshold. Values equal for all units become scalars, except thr, [N].

    Raises:
        TypeError: an argument has the wrong type; pass a node, not a graph.
        ValueError: v_leak or v_reset is not 0, for which the cell has no term; a shape is wrong; a value is out of
            range; or the metadata is damaged, or holds per-step terms written for another dt.

    Source: Pedersen et al. (2024), Neuromorphic intermediate representation, Nature Communications 15.

    Example:
        >>> import jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> back = from_nir(to_nir(params, dt=1.0), dt=1.0)
        >>> float(back.tau_m), bool((back.thr == params.thr).all())
        (20.0, True)
    """
    if not isinstance(node, nir.LIF):
        raise TypeError(f"node: expected a nir.LIF, got {type(node).__name__}")
    dt = _time_step(dt, np.float32)
    if n_units is not None:
        n_units = _check.as_size("n_units", n_units, 1)
    fields = {name: _field(node, name) for name in ("tau", "r", "v_leak", "v_threshold", "v_reset")}
    for name in ("v_leak", "v_reset"):
        if fields[name].any():
            raise ValueError(f"{name}: expected 0, which the cell rests at and resets to, got {fields[name]}")
    thr = fields["v_threshold"]
    if thr.ndim == 0:
        if n_units is None:
            raise ValueError("n_units: expected an int for a node of scalars, got None")
        if n_units > MAX_UNITS:
            raise ValueError(f"n_units: expected an int up to {MAX_UNITS}, got {n_units}")
        thr = np.broadcast_to(thr, n_units)
    if thr.ndim != 1 or not thr.size or n_units not in (None, thr.size):
        raise ValueError(f"v_threshold: expected shape ({n_units or 'N'},), got shape {thr.shape}")
    for name in ("tau", "r"):
        if fields[name].shape != fields["v_threshold"].shape:
            raise ValueError(f"{name}: expected the shape of v_threshold, got shape {fields[name].shape}")
    dtype = jax.dtypes.canonicalize_dtype(thr.dtype if thr.dtype.kind == "f" else np.float32)
    kept = _mapping(node.metadata, "slif")
    leaves: dict[str, Any] = {
        "tau_m": _scalar_if_equal(fields["tau"].astype(np.float64) * 1000),
        "resist_m": _scalar_if_equal(fields["r"]),
        "thr": thr,
        **_kept_params(kept, dt),
    }
    static = {name: leaves.pop(name, ABOUT[name].default) for name in STATIC}
    for name, value in static.items():
        _check.check_static(name, value)
    leaves = {
        name: np.asarray(_check.as_real(name, jax.device_get(x), dtype)).astype(dtype) for name, x in leaves.items()
    }
    return _check.as_device_params(SLIFParams(**leaves, **static, surrogate=_kept_surrogate(kept, dtype)))


def _field(node: nir.LIF, name: str) -> np.ndarray:
    value = getattr(node, name)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if not _check.is_real(array.dtype):
        raise TypeError(f"{name}: expected an array of real numbers, got {value!r}")
    return array


def _time_step(dt: Any, dtype: Any) -> np.ndarray:
    """dt in host memory, where it is checked even if it was on a device."""
    dt = _wide(_check.as_scalar("dt", dt, dtype))
    _check.as_real("dt", dt, dtype)
    return dt


def _wide(value: Any) -> np.ndarray:
    """The value on the host, in a dtype that NIR files can hold."""
    array = np.asarray(jax.device_get(value))
    return array.astype(np.promote_types(array.dtype, np.float32))


def _lost(params: SLIFParams, leaves: dict[str, np.ndarray], dt: np.ndarray) -> list[str]:
    """What the cell does and NIR cannot express; a mechanism that is present but 0 does nothing."""
    refractory = params.refract_time is not None and (_wide(params.refract_time).astype(dt.dtype) > dt).any()
    acting = {name for name, x in leaves.items() if np.any(x > 0 if ABOUT[name].positive else x != 0)}
    if "rho_b" in acting:
        acting -= {"thr_gain", "thr_leak"}
    lost = (["refract_time > dt"] if refractory else []) + [
        name for name in PER_STEP if name in acting and name != "inh_weights"
    ]
    lost = ["resist_inh with inh_weights" if name == "resist_inh" else name for name in lost]
    # Two static fields make no difference: NIR has no `slif.reset`, and without a refractory period nothing sticks.
    idle = {"thr_persist"} if refractory else {"thr_persist", "sticky_spikes"}
    lost += [name for name in STATIC if getattr(params, name) != ABOUT[name].default and name not in idle]
    try:
        kind_of(params.surrogate)
    except ValueError:
        lost.append("surrogate of your own (which no file can hold)")
    return lost


def _surrogate_metadata(surrogate: Surrogate, dtype: Any) -> dict[str, Any]:
    numbers = {name: np.asarray(jax.device_get(x)) for name, x in surrogate.numbers.items()}
    default = {name: np.asarray(x) for name, x in secant().numbers.items()}
    static = surrogate.replace(numbers={}) == secant().replace(numbers={})
    if static and all(np.all(x == default[name].astype(x.dtype)) for name, x in numbers.items()):
        return {}
    try:
        kind = kind_of(surrogate)
    except ValueError:
        return {}
    numbers = {name: _wide(x)[()] for name, x in numbers.items()}
    _check.check_slope_numbers(numbers, dtype)
    return {"surrogate": {"kind": kind, "detach_reset": surrogate.detach_reset, "numbers": numbers}}


def _kept_surrogate(kept: dict[str, Any], dtype: Any) -> Surrogate:
    if "surrogate" not in kept:
        return secant()
    fields = _mapping(kept, "surrogate")
    numbers = jax.device_get(_mapping(fields, "numbers"))
    surrogate = named(fields.get("kind"), numbers, fields.get("detach_reset"))
    _check.check_slope_numbers(numbers, dtype)
    return surrogate


def _kept_params(kept: dict[str, Any], dt: np.ndarray) -> dict[str, Any]:
    params = _mapping(kept, "params")
    known = (*OPTIONAL, *STATIC)
    if unknown := [name for name in params if name not in known]:
        raise ValueError(f"metadata: expected names among {', '.join(known)}, got {unknown}")
    if set(params) & set(PER_STEP):
        written: Any = kept.get("dt")
        number = isinstance(written, int | float | np.number) and _check.is_real(np.asarray(written).dtype)
        if not (number and abs(float(written) - float(dt)) <= 1e-6 * float(dt)):
            raise ValueError(f"dt: expected {written}, the step that the metadata was written with, got {dt}")
    return params


def _mapping(parent: Any, name: str) -> dict[str, Any]:
    if not isinstance(parent, dict):
        raise ValueError(f"metadata: expected a dict, got {parent!r}")
    value = parent.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"metadata: expected a dict {name}, got {value!r}")
    return dict(value)


def _scalar_if_equal(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)[0] if array.size and (array == array.reshape(-1)[0]).all() else array
