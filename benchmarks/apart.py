"""A package in a process of its own: PyTorch's threads slow JAX in the same process, and memory is told apart."""

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
    """A process that calls `make(*arguments)` for a function, and then that function whenever it is asked."""

    def __init__(self, make: Callable[..., Callable], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, *arguments: Any) -> None:
        self._ask(seconds, arguments)

    def seconds(self, *arguments: Any) -> float:
        """How long a run took there."""
        return self._ask(seconds, arguments)

    def result(self, *arguments: Any) -> Any:
        """What a run gives, which has to be of NumPy."""
        return self._ask(result, arguments)

    def peak(self, *arguments: Any) -> int | None:
        """Bytes by which the process grew at most during a second run, its result included; None but on Linux.

        Asked of a process last, since it makes malloc give back all it can from then on, which takes time.
        """
        return self._ask(peak, arguments)

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _ask(self, how: Callable, arguments: tuple) -> Any:
        # What `make` may have raised is there before the question, so the first answer is that.
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


def give_back() -> None:
    """Has malloc of glibc take arrays from the system and give them back, so that memory counts while it is in use."""
    libc, mmap_threshold = ctypes.CDLL(None), -3
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 2**16)
        libc.malloc_trim(0)


def peak(run: Callable, given: tuple) -> int | None:
    seconds(run, given)
    time.sleep(0.2)  # until what it freed is gone
    give_back()
    try:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest is from now on
    except OSError:
        return None
    seconds(run, given)
    return memory("VmHWM") - before


def memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
