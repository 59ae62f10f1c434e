"""Reads regular files, and replaces them atomically.

A file is written under a temporary name and then renamed, so that a kill at any moment leaves the old or the new one
whole.
"""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import IO, Any


def as_path(name: str, value: Any) -> str:
    try:
        path = os.fsdecode(value)
        if b"\0" not in os.fsencode(path):
            return path
    except TypeError:
        raise TypeError(f"{name}: expected a path, got {value!r}") from None
    except UnicodeEncodeError:
        pass
    raise ValueError(f"{name}: expected a path that the system can hold, got {value!r}")


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _status(path: str) -> os.stat_result:
    """The status of a regular file; OSError for anything else, including a loop of links."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, f"expected a regular file, got {kind}", path)
    return status


@contextlib.contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """A file next to `path` that replaces it once complete, with its mode and owner from the start."""
    old = None
    with contextlib.suppress(FileNotFoundError):
        old = _status(path)
    if old and not os.access(path, os.W_OK):  # which renaming would not check
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    if os.path.islink(path):
        path = os.path.realpath(path)  # else the link itself would be replaced
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    mode = 0o600 if old else 0o666  # never readable by anyone who could not read the old one
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if old:
                _inherit(old, path, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        # Files left by killed saves are recognised by age: a process id means nothing on another host, and recurs in a
        # restarted container. The file system dates both. A live save of an hour may be hit: it fails, harmlessly.
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
        # With an access control list, the group bits do not mean what they mean alone.
        for name in os.listxattr(path) if hasattr(os, "listxattr") else ():
            os.setxattr(temporary, name, os.getxattr(path, name))


@contextlib.contextmanager
def reading(path: str) -> Iterator[IO[bytes]]:
    """The open file; in the block, any error about its contents becomes a ValueError that names it."""
    _status(path)
    # If a FIFO has taken its place by now, this does not wait for a writer.
    flags = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, other: os.open(name, other | flags)) as file:
        try:
            yield file
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # from the system; those of decompressors have no number
                raise OSError(error.errno, error.strerror, path) from error
            raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error
