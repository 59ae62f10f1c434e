"""Checkpoints: parameters and state in one file without pickle, and the files and cells of ngc-learn.

A file is written beside its name and then renamed, so that a kill at any moment leaves the old or the new one whole.
"""

import contextlib
import glob
import hashlib
import io
import math
import os
import secrets
from collections.abc import Iterator
from typing import IO, Any

import jax
import numpy as np
from flax import serialization

from slif import _check
from slif.surrogate import kind_of, named
from slif.types import FIELDS, SLIFParams, SLIFState

__all__ = ["from_ngclearn", "load", "load_ngclearn", "save", "save_ngclearn"]

MAGIC = b"slif checkpoint 1\n"  # the number is that of the schema


def save(path: str | os.PathLike[str], params: SLIFParams, state: SLIFState) -> None:
    """Saves parameters and state, every leaf to the bit, in one file that needs no pickle.

        load(path) = (params, state)   after   save(path, params, state)

    Args:
        path: the file, under exactly this name; what it held before is replaced as a whole or not at all. What
            killed saves left beside it goes with the first save an hour later.
        params: the parameters. A surrogate made by `custom` holds a function and cannot be saved: give params another
            one for the file, and put yours back with `params.replace(surrogate=...)` after `load`.
        state: the state, fields [..., N].

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a shape does not fit, or the surrogate cannot be saved.
        OSError: the file cannot be written.

    Source: the msgpack format of `flax.serialization`, after a line that names the schema and a SHA-256 digest.

    Example:
        >>> import tempfile, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> path = f"{tempfile.mkdtemp()}/cell.slif"
        >>> save(path, params, slif.init_state(params))
        >>> load(path)[1].v
        Array([0., 0., 0.], dtype=float32)
    """
    params = _check.params(params)
    state = _check.state(params, state)
    params, state = jax.device_get((params, state))
    static = {"kind": kind_of(params.surrogate), "detach_reset": params.surrogate.detach_reset}
    static |= {name: getattr(params, name) for name in _check.FLAGS}
    params = params.replace(surrogate=params.surrogate.numbers)
    body = serialization.to_bytes({"params": params, "state": state, **static})
    with _replacing(os.fsdecode(path)) as file:
        file.writelines([MAGIC, hashlib.sha256(body).digest(), body])


def load(path: str | os.PathLike[str]) -> tuple[SLIFParams, SLIFState]:
    """Loads what `save` wrote, every leaf to the bit.

        load(path) = (params, state)   after   save(path, params, state)

    Nothing in the file is trusted: its digest is checked before any of it is parsed, and no code of it is run.

    Args:
        path: the file.

    Returns:
        The parameters and the state.

    Raises:
        ValueError: the file is not what `save` wrote, to the byte; is of another schema version; its shapes do not fit
            each other; or it holds float64 and JAX is not set to.
        OSError: the file cannot be read.

    Source: the msgpack format of `flax.serialization`, after a line that names the schema and a SHA-256 digest.

    Example:
        >>> import tempfile, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> path = f"{tempfile.mkdtemp()}/cell.slif"
        >>> save(path, params, slif.init_state(params, 2))
        >>> load(path)[1].v.shape
        (2, 3)
    """
    with _reading(os.fsdecode(path)) as file:
        start = file.read(len(MAGIC))
        if start != MAGIC:
            raise ValueError(f"expected a file that begins with {MAGIC!r}, got {start!r}")
        digest, body = file.read(32), file.read()
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("damaged: expected the bytes that were saved, got others")
        entries: Any = serialization.msgpack_restore(body)
        return _restored(**entries)


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
        >>> import tempfile, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> folder = tempfile.mkdtemp()
        >>> save_ngclearn(folder, "z1", params, slif.init_state(params))
        >>> np.load(f"{folder}/z1.npz")["threshold"].shape
        (1, 3)
    """
    params = _check.params(params)
    state = _check.state(params, state)
    thr = np.asarray(jax.device_get(state.thr if params.thr_persist else params.thr))
    # ngc-learn holds float32 and has no other 16-bit type than NumPy's.
    thr = thr.astype(np.promote_types(thr.dtype, np.float32)).reshape(-1, params.n_units)
    with _replacing(_ngclearn_file(directory, name)) as file:
        np.savez(file, threshold=thr)


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
        >>> save_ngclearn(folder, "z1", params.replace(thr=params.thr + 1), slif.init_state(params))
        >>> loaded, state = load_ngclearn(folder, "z1", params, slif.init_state(params))
        >>> bool((loaded.thr == params.thr + 1).all() and (state.thr == params.thr + 1).all())
        True
    """
    params = _check.params(params)
    state = _check.state(params, state)
    shape = state.v.shape
    shapes = ((1, params.n_units), (math.prod(shape[:-1]), params.n_units))
    with _reading(_ngclearn_file(directory, name)) as file:
        # From memory, so that a damaged offset is no failure of the system to seek.
        thr = np.load(io.BytesIO(file.read()), allow_pickle=False)["threshold"]
        if not _check.is_real(thr.dtype) or thr.shape not in shapes:
            expected = f"real numbers of shape {shapes[0]} or {shapes[1]}"
            raise ValueError(f"threshold: expected {expected}, got {thr.dtype} of shape {thr.shape}")
    thr = thr.astype(params.thr.dtype)
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
    leaves = {"refract_time": cell.refract_T, "thr_gain": cell.thrGain, "thr_leak": cell.thrLeak}
    leaves |= {"rho_b": cell.rho_b, "resist_inh": cell.inh_R}
    leaves = {name: value for name, value in leaves.items() if value != 0}
    leaves |= {"tau_m": cell.tau_m, "resist_m": cell.R_m}
    leaves["thr"] = base[0] if len(base) == 1 else base
    if "resist_inh" in leaves:
        leaves["inh_weights"] = np.asarray(jax.device_get(cell.inh_weights))
        if np.diagonal(leaves["inh_weights"]).any():
            raise ValueError("cell: expected inh_weights with a zero diagonal, got a unit that inhibits itself")
    flags: Any = {name: bool(getattr(cell, name)) for name in _check.FLAGS}
    params = _check.params(SLIFParams(**{name: put(x) for name, x in leaves.items()}, **flags))
    shape = np.shape(cell.v.get())
    fields = {name: put(np.broadcast_to(jax.device_get(getattr(cell, name).get()), shape)) for name in FIELDS}
    return params, _check.state(params, SLIFState(**fields))


def _ngclearn_file(directory: str | os.PathLike[str], name: str) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected the name of a cell, got {name!r}")
    return os.path.join(os.fsdecode(directory), f"{name}.npz")


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place once it is whole."""
    path = os.path.realpath(path)  # through a link, which would be replaced itself
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        # What killed saves left goes by age: a process id says nothing on another host, and comes again in a container
        # started anew. The file system dates both. A live save that is hit, an hour long, fails and harms nothing.
        for left in glob.glob(f"{glob.escape(path)}.{'[0-9a-f]' * 16}.tmp"):
            with contextlib.suppress(OSError):
                if os.stat(left).st_mtime < os.stat(path).st_mtime - 3600:
                    os.remove(left)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[IO[bytes]]:
    """The file, for a block whose every error over what is in it becomes a ValueError that names it."""
    with open(path, "rb") as file:
        try:
            yield file
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # of the system; decompressors raise it without a number
                raise
            raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error


def _restored(
    params: Any, state: Any, kind: Any, detach_reset: Any, sticky_spikes: Any, thr_persist: Any
) -> tuple[SLIFParams, SLIFState]:
    """What `save` was given, from the entries of its file; one more or less is a TypeError."""
    dtypes = {x.dtype for x in jax.tree.leaves((params, state))}
    if wide := [dtype.name for dtype in dtypes if jax.dtypes.canonicalize_dtype(dtype) != dtype]:
        raise ValueError(f"expected jax_enable_x64 to be set, since the file holds {', '.join(wide)}")
    params, state = jax.device_put((params, state))
    surrogate = named(kind, params.pop("surrogate"), detach_reset)
    flags: Any = {"sticky_spikes": sticky_spikes, "thr_persist": thr_persist}
    params = _check.params(SLIFParams(**params, **flags, surrogate=surrogate))
    return params, _check.state(params, SLIFState(**state))
