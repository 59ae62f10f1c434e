"""Checkpoints: parameters and state in one file without pickle, and the files of ngc-learn (`slif._ngclearn`)."""

import hashlib
import os
from typing import Any

import jax
from flax import serialization

from slif import _check
from slif._files import as_path, reading, replacing
from slif._ngclearn import from_ngclearn, load_ngclearn, save_ngclearn
from slif.hyperparameters import ABOUT, STATIC
from slif.surrogate import kind_of, named
from slif.types import SLIFParams, SLIFState

__all__ = ["from_ngclearn", "load", "load_ngclearn", "save", "save_ngclearn"]

MAGIC = b"slif checkpoint 1\n"  # the number is the version of the schema


def save(path: str | os.PathLike[str], params: SLIFParams, state: SLIFState) -> None:
    """Saves parameters and state, every leaf bit for bit, in one file without pickle.

        load(path) = (params, state)   after   save(path, params, state)

    Args:
        path: the file, under exactly this name. An existing file is replaced as a whole or not at all, and keeps its
            mode and, where permitted, its owner; a link is followed. Temporary files that killed saves left next to it
            are removed by the first save an hour later.
        params: the parameters. A surrogate made by `custom` holds a function and cannot be saved: replace it
            before saving, and put it back with `params.replace(surrogate=...)` after `load`.
        state: the state, fields [..., N].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape does not match, a parameter is out of range or not finite, or the surrogate cannot be saved.
        OSError: the file cannot be written, or `path` is not a regular file.

    Source: the msgpack format of `flax.serialization`, after a line that names the schema and a SHA-256 digest.

    Example:
        >>> import tempfile, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> path = f"{tempfile.mkdtemp()}/cell.slif"
        >>> save(path, params, slif.init_state(params))
        >>> load(path)[1].v
        Array([0., 0., 0.], dtype=float32)
    """
    path = as_path("path", path)
    params = _check.as_device_params(params)
    state = jax.device_get(_check.as_device_state(params, state))
    params = _check.as_host_params(params)
    static = {"kind": kind_of(params.surrogate), "detach_reset": params.surrogate.detach_reset}
    static |= {name: getattr(params, name) for name in STATIC}
    _check.check_slope_numbers(params.surrogate.numbers, params.thr.dtype)
    params = params.replace(surrogate=params.surrogate.numbers)
    body = serialization.to_bytes({"params": params, "state": state, **static})
    with replacing(path) as file:
        file.writelines([MAGIC, hashlib.sha256(body).digest(), body])


def load(path: str | os.PathLike[str]) -> tuple[SLIFParams, SLIFState]:
    """Loads what `save` wrote, every leaf bit for bit.

        load(path) = (params, state)   after   save(path, params, state)

    Nothing in the file is trusted: its digest is checked before anything is parsed, nothing in it is executed, and its
    parameters must be within the bounds of `init_params`. The state may hold NaN and inf, as after a run.

    Args:
        path: the file.

    Returns:
        The parameters and the state.

    Raises:
        TypeError: `path` is not a path.
        ValueError: the file differs from what `save` wrote; has another schema version, shapes that do not match, or a
            parameter that is out of range or not finite; or holds float64 without jax_enable_x64.
        OSError: the file cannot be read, or is not a regular file.

    Source: the msgpack format of `flax.serialization`, after a line that names the schema and a SHA-256 digest.

    Example:
        >>> import tempfile, jax, slif
        >>> params = slif.init_params(jax.random.key(0), 3, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> path = f"{tempfile.mkdtemp()}/cell.slif"
        >>> save(path, params, slif.init_state(params, 2))
        >>> load(path)[1].v.shape
        (2, 3)
    """
    with reading(as_path("path", path)) as file:
        start = file.read(len(MAGIC))
        if start != MAGIC:
            raise ValueError(f"expected a file that begins with {MAGIC!r}, got {start!r}")
        digest, body = file.read(32), file.read()
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("damaged: expected the bytes that were saved, got others")
        entries: Any = serialization.msgpack_restore(body)
        return _restored(**entries)


def _restored(params: Any, state: Any, kind: Any, detach_reset: Any, **static: Any) -> tuple[SLIFParams, SLIFState]:
    """The arguments of `save`, rebuilt from the entries of its file."""
    static = {"reset": ABOUT["reset"].default} | static  # absent from files of 0.1
    if static.keys() != set(STATIC):
        raise ValueError(f"expected the entries {', '.join(STATIC)}, got {', '.join(static)}")
    for keys, x in jax.tree_util.tree_leaves_with_path({"params": params, "state": state}):
        _check.check_array(jax.tree_util.keystr(keys, simple=True, separator="."), x, "an array of real numbers")
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise ValueError(f"expected jax_enable_x64 to be set, since the file holds {x.dtype}")
    surrogate = named(kind, params.pop("surrogate"), detach_reset)
    params, state = SLIFParams(**params, **static, surrogate=surrogate), SLIFState(**state)
    # Checked on the host, where values can be read; the result is dropped, since it has cast leaves.
    _check.as_params(params)
    _check.check_slope_numbers(surrogate.numbers, params.thr.dtype)
    params, state = jax.device_put((params, state))
    _check.check_signature(params, _check.as_state(state))
    return params, state
