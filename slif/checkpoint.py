"""Checkpoints: parameters and state in one file without pickle, and the files and cells of ngc-learn.

A file is written beside its name and then renamed, so that a kill at any moment leaves the old or the new one whole.
"""

import contextlib
import errno
import glob
import hashlib
import io
import math
import os
import secrets
import shutil
import stat
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import jax
import numpy as np
from flax import serialization

from slif import _check
from slif.hyperparameters import ABOUT, STATIC
from slif.surrogate import kind_of, named
from slif.types import FIELDS, SLIFParams, SLIFState

__all__ = ["from_ngclearn", "load", "load_ngclearn", "save", "save_ngclearn"]

MAGIC = b"slif checkpoint 1\n"  # the number is that of the schema


def save(path: str | os.PathLike[str], params: SLIFParams, state: SLIFState) -> None:
    """Saves parameters and state, every leaf to the bit, in one file that needs no pickle.

        load(path) = (params, state)   after   save(path, params, state)

    Args:
        path: the file, under exactly this name; what it held before is replaced as a whole or not at all, and its mode
            stays, as does its owner where that is permitted. Through a link, the file that it leads to. What killed
            saves left beside it goes with the first save an hour later.
        params: the parameters. A surrogate made by `custom` holds a function and cannot be saved: give params another
            one for the file, and put yours back with `params.replace(surrogate=...)` after `load`.
        state: the state, fields [..., N].

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a shape does not fit, a parameter is out of range or not finite, or the surrogate cannot be saved.
        OSError: the file cannot be written, or what is there is no regular file.

    Source: the msgpack format of `flax.serialization`, after a line that names the schema and a SHA-256 digest.

    Example:
        >>> import tempfile, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> path = f"{tempfile.mkdtemp()}/cell.slif"
        >>> save(path, params, slif.init_state(params))
        >>> load(path)[1].v
        Array([0., 0., 0.], dtype=float32)
    """
    path = _path("path", path)
    params = _check.as_device_params(params)
    state = jax.device_get(_check.as_device_state(params, state))
    params = _check.as_host_params(params)
    static = {"kind": kind_of(params.surrogate), "detach_reset": params.surrogate.detach_reset}
    static |= {name: getattr(params, name) for name in STATIC}
    _check.check_slope_numbers(params.surrogate.numbers, params.thr.dtype)
    params = params.replace(surrogate=params.surrogate.numbers)
    body = serialization.to_bytes({"params": params, "state": state, **static})
    with _replacing(path) as file:
        file.writelines([MAGIC, hashlib.sha256(body).digest(), body])


def load(path: str | os.PathLike[str]) -> tuple[SLIFParams, SLIFState]:
    """Loads what `save` wrote, every leaf to the bit.

        load(path) = (params, state)   after   save(path, params, state)

    Nothing in the file is trusted: its digest is checked before any of it is parsed, no code of it is run, and its
    parameters are held to the bounds of `init_params`. The state may hold NaN and inf, as that of a run may.

    Args:
        path: the file.

    Returns:
        The parameters and the state.

    Raises:
        TypeError: `path` is not one.
        ValueError: the file is not what `save` wrote, to the byte; is of another schema version; its shapes do not fit
            each other; a parameter is out of range or not finite; or it holds float64 and JAX is not set to.
        OSError: the file cannot be read, or is no regular file.

    Source: the msgpack format of `flax.serialization`, after a line that names the schema and a SHA-256 digest.

    Example:
        >>> import tempfile, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> path = f"{tempfile.mkdtemp()}/cell.slif"
        >>> save(path, params, slif.init_state(params, 2))
        >>> load(path)[1].v.shape
        (2, 3)
    """
    with _reading(_path("path", path)) as file:
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
        name: the cell's name; the file is `<name>.npz`, replaced as that of `save` is.
        params: the parameters.
        state: the state, fields [..., N]; batch dimensions become one, so that the array is [1, N] or [B, N].

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a shape does not fit, a parameter is out of range or not finite, or `name` leads out of the folder.
        OSError: the file cannot be written, or what is there is no regular file.

    Source: ngc-learn's `SLIFCell.save`.

    Example:
        >>> import tempfile, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> folder = tempfile.mkdtemp()
        >>> save_ngclearn(folder, "z1", params, slif.init_state(params))
        >>> np.load(f"{folder}/z1.npz")["threshold"].shape
        (1, 3)
    """
    path = _ngclearn_file(directory, name)
    params = _check.as_device_params(params)
    state = jax.device_get(_check.as_device_state(params, state))
    params = _check.as_host_params(params)
    thr = np.asarray(_check.as_real("thr", state.thr if params.thr_persist else params.thr))
    # ngc-learn holds float32 and has no other 16-bit type than NumPy's.
    thr = thr.astype(np.promote_types(thr.dtype, np.float32)).reshape(-1, params.n_units)
    with _replacing(path) as file:
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
        ValueError: the file is damaged or of another kind, its thresholds do not fit N or the batch of the state or are
            not finite (inf is a threshold), or `name` leads out of the folder.
        OSError: the file cannot be read, or is no regular file.

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
    path = _ngclearn_file(directory, name)
    params = _check.as_device_params(params)
    state = _check.as_device_state(params, state)
    shape = state.v.shape
    with _reading(path) as file:
        thr = _thresholds(file, ((1, params.n_units), (math.prod(shape[:-1]), params.n_units)))
        thr = np.asarray(_check.as_real("thr", thr, params.thr.dtype)).astype(params.thr.dtype)
    base = thr[0] if len(thr) == 1 else thr.reshape(shape)
    now = np.array(np.broadcast_to(base, shape))
    return params.replace(thr=jax.device_put(base)), state.replace(thr=jax.device_put(now))


def from_ngclearn(cell: Any) -> tuple[SLIFParams, SLIFState]:
    """Takes parameters and state from a live cell of ngc-learn, to go on from there spike for spike.

        params.thr = threshold0,   inh_weights = the cell's own,   every field of the state = the compartment's value

    Args:
        cell: an ngc-learn `SLIFCell`.

    Returns:
        The parameters, with the mechanisms that the cell uses, and the state [B, N]. Leaves are float32. `thr_gain` is
        an array of 0 where nothing adapts the thresholds and they are not the base ones, so that they count.

    Raises:
        TypeError: `cell` is not one.
        ValueError: a unit of the cell inhibits itself, which slif leaves out, or a number is out of range.

    Source: ngc-learn's `SLIFCell`.

    Example:
        >>> from ngclearn import Context                                                 # doctest: +SKIP
        >>> from ngclearn.components import SLIFCell                                     # doctest: +SKIP
        >>> with Context("model"):                                                       # doctest: +SKIP
        ...     cell = SLIFCell("z1", n_units=3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> params, state = from_ngclearn(cell)                                          # doctest: +SKIP
    """
    kind = f"{type(cell).__module__}.{type(cell).__qualname__}"
    if "SLIFCell" not in {cls.__name__ for cls in type(cell).__mro__} or not hasattr(cell, "threshold0"):
        raise TypeError(f"cell: expected an ngc-learn SLIFCell, got {kind}")
    try:
        return _taken(cell)
    except AttributeError as error:
        raise TypeError(f"cell: expected an ngc-learn SLIFCell, got {kind}: {error}") from error
    except (TypeError, ValueError) as error:
        raise type(error)(f"cell: {error}") from error


def _taken(cell: Any) -> tuple[SLIFParams, SLIFState]:
    base = np.asarray(jax.device_get(cell.threshold0), np.float32)
    leaves = {"refract_time": cell.refract_T, "thr_gain": cell.thrGain, "thr_leak": cell.thrLeak}
    leaves |= {"rho_b": cell.rho_b, "resist_inh": cell.inh_R}
    leaves = {name: value for name, value in leaves.items() if np.any(value != 0)}
    leaves |= {"tau_m": cell.tau_m, "resist_m": cell.R_m}
    leaves["thr"] = base[0] if len(base) == 1 else base
    if "resist_inh" in leaves:
        leaves["inh_weights"] = np.asarray(jax.device_get(cell.inh_weights))
        if np.diagonal(leaves["inh_weights"]).any():
            raise ValueError("expected inh_weights with a zero diagonal, got a unit that inhibits itself")
    static: Any = {name: bool(getattr(cell, name)) for name in ("sticky_spikes", "thr_persist")}
    fields: Any = {name: np.asarray(jax.device_get(getattr(cell, name).get()), np.float32) for name in FIELDS}
    fields = {name: np.array(np.broadcast_to(x, fields["v"].shape)) for name, x in fields.items()}
    if not {"thr_gain", "thr_leak", "rho_b"} & set(leaves) and (fields["thr"] != base).any():
        leaves["thr_gain"] = np.float32(0)  # with which the thresholds are those of the state
    params = _check.as_device_params(SLIFParams(**jax.device_get(leaves), **static))
    return params, _check.as_device_state(params, SLIFState(**fields))


def _path(name: str, value: Any) -> str:
    try:
        path = os.fsdecode(value)
        if b"\0" not in os.fsencode(path):
            return path
    except TypeError:
        raise TypeError(f"{name}: expected a path, got {value!r}") from None
    except UnicodeEncodeError:
        pass
    raise ValueError(f"{name}: expected a path that the system can hold, got {value!r}")


def _ngclearn_file(directory: str | os.PathLike[str], name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a cell, got {name!r}")
    if name in ("", os.curdir, os.pardir) or "\\" in name or os.path.basename(_path("name", name)) != name:
        raise ValueError(f"name: expected the name of a cell, which is no path, got {name!r}")
    return os.path.join(_path("directory", directory), f"{name}.npz")


def _thresholds(file: IO[bytes], shapes: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """The array that ngc-learn saved; no more of the file is read or unpacked than an array of these shapes takes."""
    limit = 16 * max(map(math.prod, shapes)) + 2**20  # the longest real numbers, and what may stand beside them
    content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"expected no more than {limit} bytes, got a longer file")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [member for member in archive.infolist() if member.filename == "threshold.npy"]
        if len(members) != 1:
            names = str(archive.namelist()[:9])[:200]
            raise ValueError(f"expected one array threshold, got {len(members)} among {names}")
        # The other methods unpack a whole block, however little of it is asked for.
        if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"expected an array as NumPy packs it, got method {members[0].compress_type}")
        with archive.open(members[0]) as member:
            # Headers of later versions are of any length, and are read before they are looked at.
            if (version := np.lib.format.read_magic(member)) != (1, 0):
                raise ValueError(f"threshold: expected version (1, 0) of NumPy's format, got {version}")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
            if dtype.kind not in "iuf" or shape not in shapes:
                expected = f"real numbers of shape {shapes[0]} or {shapes[1]}"
                raise ValueError(f"threshold: expected {expected}, got {dtype} of shape {shape}")
            size = math.prod(shape) * dtype.itemsize
            data = member.read(size + 1)
            if len(data) != size:
                raise ValueError(f"threshold: expected {size} bytes of numbers, got {len(data)} or more")
    # In the byte order of this machine, whatever that of the file's was.
    thr = np.frombuffer(data, dtype).astype(np.float64)
    return thr.reshape(shape, order="F" if fortran_order else "C")


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _status(path: str) -> os.stat_result:
    """The status of a regular file; OSError for whatever else is there, and for a loop of links."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, f"expected a regular file, got {kind}", path)
    return status


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place once it is whole, and its mode and owner from the start."""
    old = None
    with contextlib.suppress(FileNotFoundError):
        old = _status(path)
    if old and not os.access(path, os.W_OK):  # which renaming would not ask
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    if os.path.islink(path):
        path = os.path.realpath(path)  # the link would be replaced itself
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    mode = 0o600 if old else 0o666  # at no moment readable to whom the old one was not
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if old:
                _inherit(old, path, temporary)
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
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _inherit(old: os.stat_result, path: str, temporary: str) -> None:
    """Gives a new file the mode and owner of the old one, as far as the system permits."""
    if hasattr(os, "chown"):
        for owner, group in ((old.st_uid, -1), (-1, old.st_gid)):
            with contextlib.suppress(OSError):
                os.chown(temporary, owner, group)
    with contextlib.suppress(OSError):
        shutil.copymode(path, temporary)
        # Access control lists, beside which the bits of the group say less than they would alone.
        for name in os.listxattr(path) if hasattr(os, "listxattr") else ():
            os.setxattr(temporary, name, os.getxattr(path, name))


@contextlib.contextmanager
def _reading(path: str) -> Iterator[IO[bytes]]:
    """The file, for a block whose every error over what is in it becomes a ValueError that names it."""
    _status(path)
    # Should a FIFO have taken its place by now, this does not wait for whoever writes to it.
    flags = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, other: os.open(name, other | flags)) as file:
        try:
            yield file
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # of the system; decompressors raise it without a number
                raise OSError(error.errno, error.strerror, path) from error
            raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error


def _restored(params: Any, state: Any, kind: Any, detach_reset: Any, **static: Any) -> tuple[SLIFParams, SLIFState]:
    """What `save` was given, from the entries of its file."""
    static = {"reset": ABOUT["reset"].default} | static  # which files of 0.1 do not have
    if static.keys() != set(STATIC):
        raise ValueError(f"expected the entries {', '.join(STATIC)}, got {', '.join(static)}")
    for keys, x in jax.tree_util.tree_leaves_with_path({"params": params, "state": state}):
        _check.check_array(jax.tree_util.keystr(keys, simple=True, separator="."), x, "an array of real numbers")
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise ValueError(f"expected jax_enable_x64 to be set, since the file holds {x.dtype}")
    surrogate = named(kind, params.pop("surrogate"), detach_reset)
    params, state = SLIFParams(**params, **static, surrogate=surrogate), SLIFState(**state)
    # On the host, where values can be looked at. The leaves go on as they are: the check would cast them.
    _check.as_params(params)
    _check.check_slope_numbers(surrogate.numbers, params.thr.dtype)
    params, state = jax.device_put((params, state))
    _check.check_signature(params, _check.as_state(state))
    return params, state
