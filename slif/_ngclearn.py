"""Files and live cells of ngc-learn; `slif.checkpoint` exports these functions."""

import io
import math
import os
import zipfile
from typing import IO, Any

import jax
import numpy as np

from slif import _check
from slif._files import as_path, reading, replacing
from slif.types import FIELDS, SLIFParams, SLIFState


def save_ngclearn(directory: str | os.PathLike[str], name: str, params: SLIFParams, state: SLIFState) -> None:
    """Saves the thresholds, all that ngc-learn's cell saves, in a file that ngc-learn loads.

        threshold = params.thr   [state.thr with thr_persist]

    Args:
        directory: the folder, which must exist.
        name: the cell's name; the file is `<name>.npz`, replaced as in `save`.
        params: the parameters.
        state: the state, fields [..., N]; batch dimensions become one, so that the array is [1, N] or [B, N].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape is wrong, a parameter is out of range or not finite, or `name` leads out of the folder.
        OSError: the file cannot be written, or its path is not a regular file.

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
    # ngc-learn uses float32, and knows no 16-bit type but NumPy's.
    thr = thr.astype(np.promote_types(thr.dtype, np.float32)).reshape(-1, params.n_units)
    with replacing(path) as file:
        np.savez(file, threshold=thr)


def load_ngclearn(
    directory: str | os.PathLike[str], name: str, params: SLIFParams, state: SLIFState
) -> tuple[SLIFParams, SLIFState]:
    """Loads the thresholds that ngc-learn's cell saved, as both the base and the current ones.

        params.thr = state.thr = threshold

    Args:
        directory: the folder.
        name: the cell's name; the file is `<name>.npz`.
        params: the parameters; all but the thresholds are kept.
        state: the state, fields [..., N]; all but the thresholds are kept.

    Returns:
        The parameters and the state. Base thresholds are [N] if the file holds [1, N], else [..., N], one set per row.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the file is damaged or of another kind, its thresholds do not match N or the batch of the state, or
            are not finite (inf is allowed), or `name` leads out of the folder.
        OSError: the file cannot be read, or is not a regular file.

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
    with reading(path) as file:
        thr = _thresholds(file, ((1, params.n_units), (math.prod(shape[:-1]), params.n_units)))
        thr = np.asarray(_check.as_real("thr", thr, params.thr.dtype)).astype(params.thr.dtype)
    base = thr[0] if len(thr) == 1 else thr.reshape(shape)
    now = np.array(np.broadcast_to(base, shape))
    return params.replace(thr=jax.device_put(base)), state.replace(thr=jax.device_put(now))


def from_ngclearn(cell: Any) -> tuple[SLIFParams, SLIFState]:
    """Takes parameters and state from a live ngc-learn cell, to continue from there spike for spike.

        params.thr = threshold0,   inh_weights = the cell's own,   every field of the state = the compartment's value

    Args:
        cell: an ngc-learn `SLIFCell`.

    Returns:
        The parameters, with the mechanisms that the cell uses, and the state [B, N]. Leaves are float32. If nothing
            adapts the thresholds but they differ from the base ones, `thr_gain` is an array of 0, so that they count.

    Raises:
        TypeError: `cell` is not an ngc-learn `SLIFCell`.
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
        leaves["thr_gain"] = np.float32(0)  # so that the thresholds of the state are used
    params = _check.as_device_params(SLIFParams(**jax.device_get(leaves), **static))
    return params, _check.as_device_state(params, SLIFState(**fields))


def _ngclearn_file(directory: str | os.PathLike[str], name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a cell, got {name!r}")
    if name in ("", os.curdir, os.pardir) or "\\" in name or os.path.basename(as_path("name", name)) != name:
        raise ValueError(f"name: expected the name of a cell, not a path, got {name!r}")
    return os.path.join(as_path("directory", directory), f"{name}.npz")


def _thresholds(file: IO[bytes], shapes: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """The array that ngc-learn saved; no more of the file is read or unpacked than an array of these shapes needs."""
    limit = 16 * max(map(math.prod, shapes)) + 2**20  # the widest real numbers, and room for headers
    content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"expected no more than {limit} bytes, got a longer file")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [member for member in archive.infolist() if member.filename == "threshold.npy"]
        if len(members) != 1:
            names = str(archive.namelist()[:9])[:200]
            raise ValueError(f"expected one array threshold, got {len(members)} among {names}")
        # The other methods unpack a whole block, however little of it is requested.
        if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"expected an array as NumPy packs it, got method {members[0].compress_type}")
        with archive.open(members[0]) as member:
            # Headers of later versions can have any length, and are read before they are checked.
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
    # In this machine's byte order, whatever the file's.
    thr = np.frombuffer(data, dtype).astype(np.float64)
    return thr.reshape(shape, order="F" if fortran_order else "C")
