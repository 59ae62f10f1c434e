"""Executes compiled kernels in place of Pallas' interpreter, and compares whole programs with the scan."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import programs
import ptx

from slif.kernels import interpret, mosaic_gpu
from slif.kernels.loop import BLOCK

# Equal bit for bit to the scan on a CPU; all else to within TOLERANCE of the largest number.
EXACT = ("s", "u", "v", "thr", "rfr", "j", "s_packed", "spike_count")
TOLERANCE = 5e-7


class Kernel(NamedTuple):
    """What the compiler reports about a kernel."""

    name: str
    program: ptx.Program
    order: list[int]  # which argument, outputs after inputs, each parameter is: they are in order of first use
    n_blocks: int
    block: int  # threads
    registers: int
    spilt: int  # bytes

    @classmethod
    def of(cls, name: str, dump: str) -> "Kernel":
        """The kernel of that name in Mosaic GPU's output: its PTX, ptxas' report, and the code that launches it."""
        text = re.search(rf"\.visible \.entry {name}_mosaic_gpu_kernel\(.*?^}}", dump, re.DOTALL | re.MULTILINE)[0]
        report = dump[dump.index(f"Function properties for {name}_mosaic_gpu_kernel") :]
        launch = re.search(rf"^define void @{name}_mosaic_gpu\(.*?^}}", dump, re.DOTALL | re.MULTILINE)[0]
        slots = {m[1]: int(m[2]) for m in re.finditer(r"(%\d+) = getelementptr ptr, ptr %1, i32 (\d+)", launch)}
        loaded = {m[1]: ({"%1": 0} | slots)[m[2]] for m in re.finditer(r"(%\d+) = load ptr, ptr (%\d+)", launch)}
        order = [loaded[x] for x in re.findall(r"store ptr (%\d+),", launch) if x in loaded]
        grid = re.search(r"@mosaic_gpu_build_kernel_spec\(ptr %0((?:, i32 \d+)+)", launch)[1]
        n_blocks, *more, block, y, z = [int(n) for n in re.findall(r"i32 (\d+)", grid)[:9]]
        if (more, y, z) != ([1, 1, 0, 0, 0], 1, 1):
            raise NotImplementedError(f"a grid of more than one axis, or clusters: {grid}")
        registers, spilt = (
            int(re.search(p, report)[1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
        )
        return cls(name, ptx.parse(text), order, n_blocks, block, registers, spilt)


class Seen(NamedTuple):
    """The cost of one iteration of a kernel's loop."""

    instructions: float  # per thread and update
    moved: float  # bytes that warps load and store, over those not touched by earlier iterations
    sectors: float  # per request
    fewest: float  # sectors needed to hold the bytes of a request


current: dict[str, Kernel] = {}  # what `launch` executes, by name
seen: list[Seen] = []


def launch(body: Callable, plan: Any, inputs: Any, out_type: Any, name: str) -> Any:
    """Replaces `interpret.launch`."""
    outs, tree = jax.tree.flatten(out_type)

    def execute(*leaves: Any) -> tuple[np.ndarray, ...]:
        kernel = current[name]
        given = [np.ascontiguousarray(x) for x in leaves]
        machine = ptx.Machine(given, outs, kernel.order, kernel.n_blocks, kernel.block)
        machine.run(kernel.program)
        turn, updates = machine.turn(), BLOCK * plan.width // kernel.block
        sectors = turn.sectors / turn.requests, turn.bytes / turn.requests / ptx.SECTOR
        seen.append(Seen(turn.instructions / updates, turn.bytes / turn.touched, *sectors))
        return tuple(machine.output(k, x) for k, x in enumerate(outs))

    return tree.unflatten(jax.pure_callback(execute, tuple(outs), *jax.tree.leaves(inputs)))


interpret.launch = launch
mosaic_gpu.WIDE_FROM = programs.WIDE_FROM


def drawn(rng: np.random.Generator, x: Any) -> Any:
    """Currents that make units fire now and then, and masks."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    return rng.random(x.shape) < 0.8 if x.dtype == bool else rng.uniform(-10, 40, x.shape).astype(x.dtype)


def compare(kernels: list[Kernel], function: Callable, args: Any) -> tuple[tuple[str, ...], list[str]]:
    """The columns of a program's row, and its faults."""
    args = jax.tree.map(functools.partial(drawn, np.random.default_rng(0)), args)
    current.clear()
    current.update((kernel.name, kernel) for kernel in kernels)
    seen.clear()
    ours = jax.device_get(jax.jit(function)(*args))
    theirs = jax.device_get(jax.jit(functools.partial(function, implementation="xla"))(*args))
    differ = rest = compared = 0
    for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        if isinstance(ours[0], programs.slif.SLIFState) and re.search(r"\w+", str(path[-1]))[0] in EXACT:
            differ += np.count_nonzero(x.view("u1") != y.view("u1"))
            compared += x.size
        else:
            rest = max(rest, _difference(np.asarray(x, "f8"), np.asarray(y, "f8")))
    faults = {
        f"{differ} bytes are not the scan's": differ > 0,
        f"differs from the scan by {rest:.1e}": not rest <= TOLERANCE,
        "not every kernel ran": len(seen) != len(kernels),
        "nothing but zeros to compare": not any(map(np.any, jax.tree.leaves(theirs[1]))),
    }
    columns = (
        " ".join(f"{x.instructions:.1f}" for x in seen),
        " ".join(f"{x.moved:.2f}" for x in seen),
        " ".join(f"{x.sectors:.1f}/{x.fewest:.1f}" for x in seen),
        f"{differ}/{compared}" if compared else "",
        f"{rest:.1e}",
    )
    return columns, [fault for fault, so in faults.items() if so]


def _difference(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference, relative to the largest number; inf and NaN must be in the same places."""
    finite = np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return np.inf
    return float(np.abs(x - y)[finite].max(initial=0) / max(np.abs(y)[finite].max(initial=0), 1e-30))
