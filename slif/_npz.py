"""npz files written whole or not at all, and read without trust: no pickle, nothing larger than the file itself."""

import errno
import io
import math
import os
import secrets
import zipfile
from collections.abc import Callable
from typing import IO, TypeVar

import numpy as np

T = TypeVar("T")


def write(path: str, arrays: dict[str, np.ndarray]) -> None:
    path = os.path.realpath(path)  # through a link, which would be replaced itself
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def decoded(path: str, decode: Callable[[IO[bytes]], T]) -> T:
    """What `decode` makes of the file; whatever is wrong with its content becomes a ValueError that names it."""
    with open(path, "rb") as file:
        try:
            return decode(file)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a damaged offset, before the start of the file
                raise
            raise ValueError(f"{path}: damaged: {error}") from error
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: damaged, or no npz file: {error}") from error
        except Exception as error:  # zipfile and NumPy raise a dozen kinds for damaged files
            raise ValueError(f"{path}: {error or type(error).__name__}") from error


def read(file: IO[bytes], *names: str, only: bool = True) -> dict[str, np.ndarray]:
    """The entries of these names; with `only`, no other may be there, nor a byte before or after the archive."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 22))
    end = file.read(4)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        found = [entry.filename.removesuffix(".npy") for entry in entries]
        missing = sorted(set(names) - set(found))
        if missing:
            raise ValueError(f"expected an entry {missing[0]}, got {', '.join(found) or 'none'}")
        if only and sorted(found) != sorted(names):
            raise ValueError(f"expected the entries {', '.join(sorted(names))}, got {', '.join(sorted(found))}")
        if only and (end != b"PK\5\6" or min(entry.header_offset for entry in entries) != 0):
            raise ValueError("expected an archive and nothing else, got bytes before or after it")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("expected entries that fit into the file, got more bytes than it has")
        return {name: _array(archive, entries[found.index(name)]) for name in names}


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """The array, once its header is found to announce just the bytes that are there."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{entry.filename}: expected an uncompressed entry")
    data = archive.read(entry)
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{entry.filename}: expected version 1.0 of NumPy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError(f"{entry.filename}: expected numbers, got pickled objects, which are never read")
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"{entry.filename}: expected the bytes of shape {shape}, got {len(data) - stream.tell()}")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)
