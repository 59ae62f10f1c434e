"""Runs a package in a separate process: PyTorch's threads would slow JAX down, and memory can be measured for each."""

import ctypes
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax


class Apart:
    """A process that calls `make(*arguments)` to get a function, and runs that function on request."""

    def __init__(self, make: Callable[..., Callable], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, *arguments: Any) -> None:
        self._ask(seconds, arguments)

    def seconds(self, *arguments: Any) -> float:
        """How long a run took in the process."""
        return self._ask(seconds, arguments)

    def result(self, *arguments: Any) -> Any:
        """The result of a run, as NumPy arrays."""
        return self._ask(result, arguments)

    def peak(self, *arguments: Any) -> int | None:
        """The most bytes by which the process grew during a second run, including the result; None except on Linux.

        Call it last: from then on malloc returns as much memory as it can, which takes time.
        """
        return self._ask(peak, arguments)

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _ask(self, how: Callable, arguments: tuple) -> Any:
        # An error in `make` is reported as the answer to the first request.
        try:
            self._pipe.send((how, arguments))
            error, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError) as gone:
            raise RuntimeError(f"the process ended with {self._process.exitcode}") from gone
        if error is not None:
            raise RuntimeError(error)
        return answer


def serve(pipe: Connection, make: Callable, arguments: tuple) -> None:
    run = None
    while True:
        try:
            how, given = pipe.recv()
        except EOFError:
            return
        try:
            run = run or make(*arguments)
            pipe.send((None, how(run, given)))
        except Exception:
            pipe.send((traceback.format_exc(), None))


def seconds(run: Callable, given: tuple) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*given))
    return time.perf_counter() - start


def result(run: Callable, given: tuple) -> Any:
    return jax.tree.map(lambda x: x if isinstance(x, bytes) else x.__array__(), run(*given))


def return_freed_memory() -> None:
    """Makes glibc's malloc return freed arrays to the system, so that memory counts only while it is in use."""
    libc, mmap_threshold = ctypes.CDLL(None), -3
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 2**16)
        libc.malloc_trim(0)


def peak(run: Callable, given: tuple) -> int | None:
    seconds(run, given)
    time.sleep(0.2)  # until freed memory is returned
    return_freed_memory()
    try:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return None
    seconds(run, given)
    return memory("VmHWM") - before


def memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
