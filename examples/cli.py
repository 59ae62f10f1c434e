"""Shared by the scripts: options, files that are never half written, and how Ctrl-C or a missing package ends them."""

import argparse
import contextlib
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

import numpy as np

MAX_SEED = 2**32 - 1  # jax.random.key accepts no larger seed


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_default = action.default is None or action.default is False
        return action.help if no_default else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults in its help, and reports errors in one line with exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def check_steps(self, duration: float, dt: float) -> None:
        """Refuses runs of too few steps to show anything, and of too many to finish."""
        if not 10 <= duration / dt <= 1e6:
            self.error("--duration: expected 10 to 1000000 steps of --dt")

    def probe(self, folder: Path) -> None:
        """Creates the folder and, briefly, a file in it, to make sure before the work that results can be written.

        Permissions are not enough: they say nothing about a disk that is mounted read-only, and do not bind root.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            self.error(f"--out: cannot write to {folder}: {error.strerror}")


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """An argparse type that reads a number of that kind from low to high, both included."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        name = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"expected {name} from {low} to {high}, got {text!r}")

    return parse


@contextlib.contextmanager
def saved(path: Path) -> Iterator[IO[Any]]:
    """A binary file that appears under its name only once it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of those names; OSError or a ValueError of one line for a file that does not hold them."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:  # an .npy is not a context manager: TypeError
            if missing := set(keys) - set(arrays):
                raise ValueError(f"no {', '.join(sorted(missing))} among its keys ({', '.join(arrays)})")
            return {key: arrays[key] for key in keys}
    except (EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not an .npz with {', '.join(keys)}: {error}") from error


def check_weights(path: Path, arrays: Mapping[str, np.ndarray], like: Mapping[str, Any], network: str) -> None:
    """ValueError if an array does not have the shape and dtype of the one in `like`, the weights of such a network."""
    for name, leaf in like.items():
        array = arrays[name]
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise ValueError(
                f"{path}: expected {name} {leaf.dtype}{list(leaf.shape)} for {network}, "
                f"got {array.dtype}{list(array.shape)}"
            )


def _end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    name = Path(sys.argv[0]).name
    if issubclass(kind, ModuleNotFoundError):
        return print(f'{name}: error: {error}; install it with pip install ".[examples,speech]"', file=sys.stderr)
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    sys.stdout.flush()
    print(f"{name}: interrupted; the files written so far are kept", file=sys.stderr, flush=True)
    os._exit(130)  # a normal exit would wait for the other processes of a sweep


# Scripts import this module first, so that the hook also covers their other imports, which take seconds.
sys.excepthook = _end
