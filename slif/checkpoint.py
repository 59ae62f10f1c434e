"""Checkpoints: parameters and state in one npz file without pickle, and the files and cells of ngc-learn.

A file is written beside its name and then renamed, so that a kill at any moment leaves the old or the new one whole.
"""

import dataclasses
import json
import math
import os
from typing import IO, Any

import jax
import numpy as np

from slif import _check, _npz
from slif import surrogate as surrogates
from slif.surrogate import Surrogate
from slif.types import SLIFParams, SLIFState

__all__ = ["from_ngclearn", "load", "load_ngclearn", "save", "save_ngclearn"]

VERSION = 1
FLAGS = ("sticky_spikes", "thr_persist")
KINDS = {
    "secant": surrogates.secant(),
    "secant_squared": surrogates.secant(squared=True),
    "secant_scaled": surrogates.secant(scaled=True),
    "secant_squared_scaled": surrogates.secant(squared=True, scaled=True),
    "fast_sigmoid": surrogates.fast_sigmoid(),
    "sigmoid": surrogates.sigmoid(),
    "arctan": surrogates.arctan(),
    "triangular": surrogates.triangular(),
    "boxcar": surrogates.boxcar(),
    "gaussian": surrogates.gaussian(),
    "straight_through": surrogates.straight_through(),
}


def save(path: str | os.PathLike[str], params: SLIFParams, state: SLIFState) -> None:
    """Saves parameters and state, every leaf to the bit, in one file that needs no pickle.

        load(path) = (params, state)   after   save(path, params, state)

    Args:
        path: the file, under exactly this name; what it held before is replaced as a whole or not at all.
        params: the parameters. A surrogate made by `custom` holds a function and cannot be saved: give params another
            one for the file, and put yours back with `params.replace(surrogate=...)` after `load`.
        state: the state, fields [..., N].

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a shape does not fit, or the surrogate cannot be saved.
        OSError: the file cannot be written.

    Source: NumPy's npz format; entries are named "params.tau_m", "state.v" and so on.

    Example:
        >>> import tempfile, pathlib, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "cell.npz"
        >>> save(path, params, slif.init_state(params))
        >>> load(path)[1].v
        Array([0., 0., 0.], dtype=float32)
    """
    params = _check.params(params)
    state = _check.state(params, state)
    leaves = {f"params.{name}": x for name, x in _fields(params) if name not in ("surrogate", *FLAGS)}
    leaves |= {f"surrogate.{name}": x for name, x in params.surrogate.numbers.items()}
    leaves |= {f"state.{name}": x for name, x in _fields(state)}
    arrays = {name: np.asarray(jax.device_get(x), order="C") for name, x in leaves.items() if x is not None}
    meta = {
        "slif": VERSION,
        "surrogate": kind_of(params.surrogate),
        "detach_reset": params.surrogate.detach_reset,
        **{name: getattr(params, name) for name in FLAGS},
        "dtypes": {name: array.dtype.name for name, array in arrays.items()},
    }
    natives = {name: _native(x) for name, x in arrays.items()}
    _npz.write(os.fsdecode(path), {"meta": np.array(json.dumps(meta)), **natives})


def load(path: str | os.PathLike[str]) -> tuple[SLIFParams, SLIFState]:
    """Loads what `save` wrote, every leaf to the bit.

        load(path) = (params, state)   after   save(path, params, state)

    Nothing in the file is trusted: sizes are checked before anything is read into memory, and no code of it is run.

    Args:
        path: the file.

    Returns:
        The parameters and the state.

    Raises:
        ValueError: the file is truncated, damaged, of another kind, holds pickles, is larger than it should be, is of
            another schema version, its shapes do not fit each other, or it holds float64 and JAX is not set to.
        OSError: the file cannot be read.

    Source: NumPy's npz format; entries are named "params.tau_m", "state.v" and so on.

    Example:
        >>> import tempfile, pathlib, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "cell.npz"
        >>> save(path, params, slif.init_state(params, 2))
        >>> params, state = load(path)
        >>> params.n_units, state.v.shape
        (3, (2, 3))
    """
    return _npz.decoded(os.fsdecode(path), _decode)


def save_ngclearn(directory: str | os.PathLike[str], name: str, params: SLIFParams, state: SLIFState) -> None:
    """Saves what ngc-learn's cell saves, for ngc-learn to load: the thresholds.

        threshold = params.thr   [state.thr with thr_persist]

    Args:
        directory: the folder, which has to be there.
        name: the cell's name; the file is `<name>.npz`.
        params: the parameters.
        state: the state, fields [..., N]; batch dimensions become one, so that the array is [1, N] or [B, N].

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a shape does not fit.
        OSError: the file cannot be written.

    Source: ngc-learn's `SLIFCell.save`.

    Example:
        >>> import tempfile, pathlib, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> folder = tempfile.mkdtemp()
        >>> save_ngclearn(folder, "z1", params, slif.init_state(params))
        >>> np.load(pathlib.Path(folder) / "z1.npz")["threshold"].shape
        (1, 3)
    """
    params = _check.params(params)
    state = _check.state(params, state)
    thr = np.asarray(jax.device_get(state.thr if params.thr_persist else params.thr))
    # ngc-learn holds float32 and has no other 16-bit type than NumPy's.
    thr = thr.astype(np.promote_types(thr.dtype, np.float32)).reshape(-1, params.n_units)
    _npz.write(_ngclearn_file(directory, name), {"threshold": thr})


def load_ngclearn(
    directory: str | os.PathLike[str], name: str, params: SLIFParams, state: SLIFState
) -> tuple[SLIFParams, SLIFState]:
    """Loads what ngc-learn's cell saved: the thresholds, which become both the base ones and the current ones.

        params.thr = state.thr = threshold

    Args:
        directory: the folder.
        name: the cell's name; the file is `<name>.npz`.
        params: the parameters; all but the thresholds stay.
        state: the state, fields [..., N]; all but the thresholds stay.

    Returns:
        The parameters and the state. Base thresholds are [N] where the file holds [1, N], else [..., N], one a row.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: the file is damaged or of another kind, or its thresholds do not fit N or the batch of the state.
        OSError: the file cannot be read.

    Source: ngc-learn's `SLIFCell.load`.

    Example:
        >>> import tempfile, jax, slif
        >>> folder = tempfile.mkdtemp()
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> save_ngclearn(folder, "z1", params, slif.init_state(params))
        >>> other = slif.init_params(jax.random.key(1), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> other, state = load_ngclearn(folder, "z1", other, slif.init_state(other))
        >>> bool((other.thr == params.thr).all() and (state.thr == params.thr).all())
        True
    """
    params = _check.params(params)
    state = _check.state(params, state)
    shape = state.v.shape
    rows = math.prod(shape[:-1])

    def decode(file: IO[bytes]) -> np.ndarray:
        thr = _npz.read(file, "threshold", only=False)["threshold"]
        if not _check.is_real(thr.dtype):
            raise ValueError(f"threshold: expected real numbers, got dtype {thr.dtype}")
        if thr.shape not in ((1, params.n_units), (rows, params.n_units)):
            expected = f"(1, {params.n_units}) or {(rows, params.n_units)}"
            raise ValueError(f"threshold: expected shape {expected}, got shape {thr.shape}")
        return thr

    thr = _npz.decoded(_ngclearn_file(directory, name), decode).astype(params.thr.dtype)
    base = thr[0] if len(thr) == 1 else thr.reshape(shape)
    now = np.array(np.broadcast_to(base, shape))
    return params.replace(thr=jax.device_put(base)), state.replace(thr=jax.device_put(now))


def from_ngclearn(cell: Any) -> tuple[SLIFParams, SLIFState]:
    """Takes parameters and state from a live cell of ngc-learn, to go on from there spike for spike.

        params.thr = threshold0,   inh_weights = the cell's own,   every field of the state = the compartment's value

    Args:
        cell: an ngc-learn `SLIFCell`.

    Returns:
        The parameters, with the mechanisms that the cell uses, and the state [B, N]. Leaves are float32.

    Raises:
        TypeError: `cell` is not one.
        ValueError: a unit of the cell inhibits itself, which slif leaves out.

    Source: ngc-learn's `SLIFCell`.

    Example:
        >>> from ngclearn import Context                                                 # doctest: +SKIP
        >>> from ngclearn.components import SLIFCell                                     # doctest: +SKIP
        >>> with Context("model"):                                                       # doctest: +SKIP
        ...     cell = SLIFCell("z1", n_units=3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> params, state = from_ngclearn(cell)                                          # doctest: +SKIP
    """
    if "SLIFCell" not in {cls.__name__ for cls in type(cell).__mro__} or not hasattr(cell, "threshold0"):
        raise TypeError(f"cell: expected an ngc-learn SLIFCell, got {type(cell).__name__}")

    def put(value: Any) -> jax.Array:
        return jax.device_put(np.array(jax.device_get(value), np.float32))

    base = np.asarray(jax.device_get(cell.threshold0))
    leaves = {"tau_m": cell.tau_m, "resist_m": cell.R_m, "refract_time": cell.refract_T}
    leaves["thr"] = base[0] if len(base) == 1 else base
    mechanisms = {"thr_gain": cell.thrGain, "thr_leak": cell.thrLeak, "rho_b": cell.rho_b, "resist_inh": cell.inh_R}
    leaves |= {name: value for name, value in mechanisms.items() if value != 0}
    if "resist_inh" in leaves:
        leaves["inh_weights"] = np.asarray(jax.device_get(cell.inh_weights))
        if np.diagonal(leaves["inh_weights"]).any():
            raise ValueError("cell: expected inh_weights with a zero diagonal, got a unit that inhibits itself")
    flags: Any = {name: bool(getattr(cell, name)) for name in FLAGS}
    params = SLIFParams(**{name: put(x) for name, x in leaves.items()}, surrogate=surrogates.secant(), **flags)
    params = _check.params(params)
    shape = np.shape(cell.v.get())
    fields = {name: put(np.broadcast_to(jax.device_get(getattr(cell, name).get()), shape)) for name in _check.FIELDS}
    return params, _check.state(params, SLIFState(**fields))


def kind_of(surrogate: Surrogate) -> str:
    """The name in `KINDS` under which `named` makes this surrogate again."""
    for kind, known in KINDS.items():
        if (known.slope, known.wrt, known.numbers.keys()) == (surrogate.slope, surrogate.wrt, surrogate.numbers.keys()):
            return kind
    raise ValueError(f"surrogate: expected one of {', '.join(KINDS)}; got a custom one, which cannot be saved")


def named(kind: Any, numbers: dict[str, Any], detach_reset: Any) -> Surrogate:
    if not isinstance(kind, str) or kind not in KINDS or numbers.keys() != KINDS[kind].numbers.keys():
        raise ValueError(f"surrogate: expected one of {', '.join(KINDS)}, got {kind!r} with numbers {[*numbers]}")
    return KINDS[kind].replace(numbers=numbers, detach_reset=_check.flag("detach_reset", detach_reset))


def _fields(tree: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]


def _native(array: np.ndarray) -> np.ndarray:
    """The array in a dtype that NumPy's format knows: bfloat16 and its like as their bits."""
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _ngclearn_file(directory: str | os.PathLike[str], name: str) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected the name of a cell, got {name!r}")
    return os.path.join(os.fsdecode(directory), f"{name}.npz")


def _decode(file: IO[bytes]) -> tuple[SLIFParams, SLIFState]:
    text = _npz.read(file, "meta", only=False)["meta"]
    if text.shape != () or text.dtype.kind != "U":
        raise ValueError("meta: expected a string")
    meta = json.loads(str(text))
    if not isinstance(meta, dict) or "slif" not in meta:
        raise ValueError("expected a checkpoint of slif, got another kind of file")
    if meta["slif"] != VERSION:
        raise ValueError(f"expected schema version {VERSION}, got {meta['slif']!r}; another release of slif wrote it")
    arrays = _npz.read(file, "meta", *meta["dtypes"])
    trees: dict[str, dict[str, Any]] = {"params": {}, "surrogate": {}, "state": {}}
    for name, dtype in meta["dtypes"].items():
        tree, _, leaf = name.partition(".")
        if tree not in trees:
            raise ValueError(f"expected entries of params, surrogate and state, got {name}")
        trees[tree][leaf] = _restored(name, arrays[name], np.dtype(dtype))
    flags: Any = {name: _check.flag(name, meta[name]) for name in FLAGS}
    surrogate = named(meta["surrogate"], trees["surrogate"], meta["detach_reset"])
    params = _check.params(SLIFParams(**trees["params"], **flags, surrogate=surrogate))
    return params, _check.state(params, SLIFState(**trees["state"]))


def _restored(name: str, array: np.ndarray, dtype: np.dtype) -> jax.Array:
    if not _check.is_real(dtype) or _native(np.empty(0, dtype)).dtype != array.dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {array.dtype}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name}: expected jax_enable_x64 to be set, since the file holds {dtype}")
    return jax.device_put(array.view(dtype))
