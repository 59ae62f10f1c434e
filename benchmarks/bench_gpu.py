"""The fused kernels on an NVIDIA GPU, compared with a copy, the scan and other packages, at their published shapes.

    python benchmarks/bench_gpu.py [--json FILE] [--tables NAME ...] [--units N ...] [--steps T ...] [--repeats R]
    python benchmarks/bench_gpu.py --mnist mnist.npz       also 30 epochs of examples/bfa_snn.py
    python benchmarks/bench_gpu.py --lower                 without a GPU: lower each program of slif for CUDA, and stop

Three tables: "kernels", the cell with a refractory period and sticky spikes, by units and steps; "neuron", the plain
cell on [T, 64, 65536] in 16 bits and [T, 2^20] in float32; "layer", Linear(N, N) and the plain cell on [500, 16, N],
with its product in float32 throughout. Below each row are SpikingJelly, spyx, jaxpike and sparx, if installed, and
published figures with the cards they were measured on; these were not measured here.

Checks against the scan come first, and run on any machine; the rest needs a GPU. An update is one step of one unit. The
bytes counted are those that must move: currents in and spikes out, and for a gradient also currents and the cotangent
of the spikes in and the gradient out; for a layer only those of its cells. Programs that do not fit in memory are
skipped. Each time is a tenth of ten calls in a row, as in a loop that trains: a single call waits as long again for
Python and the driver.
"""

import argparse
import functools
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for PyTorch

import cases
import jax
import jax.numpy as jnp
import numpy as np
import peers
from apart import Apart

import slif

DTYPES = (("float32", "float32"), ("float32", "bool"), ("bfloat16", "float32"), ("bfloat16", "bool"))
STICKY = {"refract_time": 2.0, "sticky_spikes": True}
TABLES = ("kernels", "neuron", "layer")
KERNELS = {"forward": 1, "secant": 1, "voltage": 2}  # per program
BACKENDS = ("triton", "cuda")  # of SpikingJelly 2.0
HALF_STEPS, HALF_SHAPE = tuple(range(4, 33, 4)), (64, 65536)
FULL_STEPS, FULL_SHAPE = (8, 16, 32, 64, 128), (2**20,)
LAYER_STEPS, LAYER_BATCH, LAYER_WIDTHS = 500, 16, (4096, 16384)
CALLS = 10  # in a row
MNIST_SECONDS = "1124.6 s on an RTX 2070, published for the reference"

# In ms, by kind and shape.
PUBLISHED: dict[tuple[str, tuple[int, ...]], list[str]] = {}


def publish(kind: str, who: str, shape: tuple[int, ...], figures: dict[int, float]) -> None:
    for n_steps, ms in figures.items():
        PUBLISHED.setdefault((kind, (n_steps, *shape)), []).append(f"{who}: {ms} ms")


TRITON = (0.771, 0.857, 1.289, 1.705, 2.116, 2.533, 2.941, 3.366)
publish("voltage", "SpikingJelly 2.0, Triton, fp16, RTX 4090", HALF_SHAPE, dict(zip(HALF_STEPS, TRITON, strict=True)))
publish("voltage", "SpikingJelly 2.0, CuPy, fp16, RTX 4090", HALF_SHAPE, {4: 0.668, 8: 1.338, 32: 5.189})
publish("voltage", "SpikingJelly 2.0, torch, fp16, RTX 4090", HALF_SHAPE, {4: 0.993, 32: 41.9})
CUPY = {"forward": (0.817, 1.60, 3.26, 6.83, 14.05), "voltage": (1.65, 3.21, 6.42, 13.1, 26.7)}
for kind, figures in CUPY.items():
    publish(kind, "SpikingJelly, CuPy, fp32, RTX 2080 Ti", FULL_SHAPE, dict(zip(FULL_STEPS, figures, strict=True)))
LAYERS = {  # seconds forward, and backward alone
    "SpikingJelly, CuPy": ((0.0090, 0.0082), (0.0226, 0.2330)),
    "Norse": ((0.210, 0.376), (0.508, 1.457)),
    "snnTorch": ((0.220, 0.184), (0.890, 2.620)),
}
for who, pairs in LAYERS.items():
    for width, (forward, backward) in zip(LAYER_WIDTHS, pairs, strict=True):
        shape = (LAYER_BATCH, width)
        publish("forward", f"{who}, fp32, RTX 3090", shape, {LAYER_STEPS: round(1e3 * forward, 1)})
        publish("voltage", f"{who}, fp32, RTX 3090", shape, {LAYER_STEPS: round(1e3 * (forward + backward), 1)})


class Program(NamedTuple):
    """A row of a table: what slif runs, and the shapes of its arguments."""

    table: str
    kind: str  # "forward", or the surrogate that the gradient goes through
    shape: tuple[int, ...]  # of the currents
    dtypes: tuple[str, str]  # of currents and spikes

    def function(self, implementation: Literal["xla", "pallas"]) -> Callable:
        """A function of the currents, or a layer's matrix and input; for a gradient also a cotangent of the spikes."""
        surrogate = slif.secant() if self.kind == "secant" else slif.arctan()
        mechanism = STICKY if self.table == "kernels" else {}
        params = cases.make_params(self.shape[-1], surrogate=surrogate, **mechanism)
        spikes = functools.partial(raster, implementation, jnp.dtype(self.dtypes[1]), params)
        return with_gradient(of_layer(spikes) if self.table == "layer" else spikes, self.kind != "forward")

    @property
    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        currents, spikes = (jax.ShapeDtypeStruct(self.shape, dtype) for dtype in self.dtypes)
        matrix = jax.ShapeDtypeStruct((self.shape[-1],) * 2, jnp.float32)
        inputs = (matrix, currents) if self.table == "layer" else (currents,)
        return inputs if self.kind == "forward" else (*inputs, spikes)

    @property
    def size(self) -> int:
        """Bytes of the arguments and of the results, which are as large."""
        return 2 * sum(math.prod(x.shape) * x.dtype.itemsize for x in self.arguments)


def raster(implementation: Literal["xla", "pallas"], spikes: Any, params: slif.SLIFParams, x: jax.Array) -> jax.Array:
    state = slif.init_state(params, x.shape[1:-1])
    return slif.simulate(params, state, x, dt=cases.DT, spike_dtype=spikes, implementation=implementation)[1]["s"]


def of_layer(spikes: Callable) -> Callable:
    return lambda matrix, x: spikes(jnp.matmul(x, matrix, precision="highest"))


def with_gradient(function: Callable, training: bool) -> Callable:
    """The function itself, or one that also takes a cotangent and also returns the gradient of the first argument."""
    if not training:
        return function

    def both(x, *others):
        *rest, bar = others
        s, pull = jax.vjp(lambda x: function(x, *rest), x)
        return s, pull(bar.astype(s.dtype))[0]

    return both


def programs(tables: list[str], units: list[int], steps: list[int]) -> Iterator[Program]:
    trained = [dtypes for dtypes in DTYPES if "bool" not in dtypes]
    if "kernels" in tables:
        for n_steps in steps:
            for n_units in units:
                plan = [("forward", dtypes) for dtypes in DTYPES]
                plan += [(kind, dtypes) for kind in ("secant", "voltage") for dtypes in trained]
                yield from (Program("kernels", kind, (n_steps, n_units), dtypes) for kind, dtypes in plan)
    if "neuron" in tables:
        for dtype, of_steps, shape in (("float16", HALF_STEPS, HALF_SHAPE), ("float32", FULL_STEPS, FULL_SHAPE)):
            for n_steps in of_steps:
                for kind in ("forward", "voltage"):
                    yield Program("neuron", kind, (n_steps, *shape), (dtype, dtype))
    if "layer" in tables:
        for width in LAYER_WIDTHS:
            for kind in ("forward", "voltage"):
                yield Program("layer", kind, (LAYER_STEPS, LAYER_BATCH, width), ("float32", "float32"))


def lower(chosen: list[Program]) -> None:
    """Lowers each program for CUDA, with kernels and as a scan; fails if the number of kernels is not as expected."""
    for program in chosen:
        for which in ("pallas", "xla"):
            expected = KERNELS[program.kind] if which == "pallas" else 0
            traced = jax.jit(program.function(which)).trace(*program.arguments)
            found = traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2")
            print(f"{title(program)}{which}: {found} kernels", flush=True)
            if found != expected:
                sys.exit(f"{program} should have {expected} kernels as {which}")


def check(n_units: int = 1000, n_steps: int = 50) -> None:
    """Spikes and gradients of the kernels equal the scan's, up to ties within a rounding."""
    x = jnp.asarray(cases.make_currents((n_steps, n_units)))
    for surrogate in (slif.secant(), slif.arctan()):
        params = cases.make_params(n_units, surrogate=surrogate, thr_gain=0.01, **STICKY)
        functions = [functools.partial(raster, which, jnp.float32, params) for which in ("pallas", "xla")]
        results = [jax.jit(with_gradient(function, True))(x, x) for function in functions]
        (s, gradient), (expected_s, expected) = jax.tree.map(np.asarray, results)
        assert np.mean(s == expected_s) > 0.999, "the spikes differ"
        same = (s == expected_s).all(0)
        np.testing.assert_allclose(gradient[:, same], expected[:, same], rtol=1e-3, atol=1e-4)


def check_peer(name: str, spikes: Callable[[np.ndarray], Any]) -> None:
    """If a peer has the same equations, its spikes agree with the scan's at a small shape."""
    x = cases.make_currents((50, 4, 1000))
    expected = raster("xla", jnp.float32, cases.make_params(1000), jnp.asarray(x))
    same = np.mean(np.asarray(spikes(x)) == np.asarray(expected))
    if name in peers.SAME_SPIKES:
        assert same > 0.999, f"only {same:.4%} of the spikes agree"


def random_arguments(program: Program) -> list[jax.Array]:
    """Currents, or inputs, up to 2; a matrix that keeps the currents in that range; a cotangent."""
    keys = jax.random.split(jax.random.key(0), len(program.arguments))
    scale = {True: 2 / program.shape[-1], False: 2.0}
    return [
        (scale[x.ndim == 2 and program.table == "layer"] * jax.random.uniform(key, x.shape)).astype(x.dtype)
        for key, x in zip(keys, program.arguments, strict=True)
    ]


def row(program: Program, bandwidth: float, repeats: int) -> dict[str, Any]:
    """One row of a table; `bandwidth` is that of a copy, in bytes per second."""
    arguments, runs, compiling = random_arguments(program), {}, {}
    for which in ("pallas", "xla"):
        compiled, compiling[which] = cases.compile_seconds(program.function(which), *arguments)
        runs[which] = functools.partial(compiled, *arguments)
    seconds = median_seconds(runs, repeats)
    currents, spikes = (jnp.dtype(dtype).itemsize for dtype in program.dtypes)
    moved = currents + spikes + (2 * currents + spikes if program.kind != "forward" else 0)
    updates = math.prod(program.shape) / seconds["pallas"]
    return {
        **program._asdict(),
        "ms": 1e3 * seconds["pallas"],
        "us_per_step": 1e6 * seconds["pallas"] / program.shape[0],
        "G_updates_s": updates / 1e9,
        "GB_s": updates * moved / 1e9,
        "of_copy": updates * moved / bandwidth,
        "over_scan": seconds["xla"] / seconds["pallas"],
        "compile_s": compiling["pallas"],
    }


def copy_bandwidth(repeats: int, size: int = 2**28) -> float:
    """Bytes per second, read and written, by the fastest possible program: one elementwise pass over 1 GiB."""
    x = jnp.ones(size, jnp.float32)
    compiled, _ = cases.compile_seconds(lambda x: x + 1, x)
    return 8 * size / median_seconds({"copy": functools.partial(compiled, x)}, repeats)["copy"]


def median_seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median of a call, in a row of calls."""

    def row_of_calls(run: Callable[[], Any]) -> Any:
        for _ in range(CALLS - 1):
            run()
        return run()

    rows = {name: functools.partial(row_of_calls, run) for name, run in runs.items()}
    return {name: seconds / CALLS for name, seconds in cases.median_seconds(rows, repeats, budget=5.0).items()}


def spikingjelly(backend: str) -> Callable:
    """Its multi-step LIF by that backend: a function that times a program, or returns the spikes of given currents.

    Call it in a new process: the variable is read only once.
    """
    os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = backend
    torch = importlib.import_module("torch")
    functional = importlib.import_module("spikingjelly.activation_based.functional")
    surrogate = importlib.import_module("spikingjelly.activation_based.surrogate").ATan()

    def spikes(x: Any) -> Any:
        v = torch.zeros(x.shape[1:], device="cuda")  # its kernels need float32
        return functional.lif_multi_step(
            x, v, cases.TAU_M / cases.DT, v_threshold=cases.THR, surrogate_function=surrogate, detach_reset=True
        )[0]

    def seconds(program: Program, repeats: int) -> float:
        training, width = program.kind != "forward", program.shape[-1]
        x = 2 * torch.rand(program.shape, device="cuda").to(getattr(torch, program.dtypes[0]))
        bar = torch.rand_like(x) if training else None
        linear = torch.nn.Linear(width, width, bias=False, device="cuda") if program.table == "layer" else None
        if linear is None:
            x.requires_grad_(training)
        else:
            torch.nn.init.uniform_(linear.weight, 0, 2 / width)

        def row_of_calls() -> None:
            with torch.set_grad_enabled(training):
                for _ in range(CALLS):
                    s = spikes(x if linear is None else linear(x))
                    if training:
                        (x if linear is None else linear.weight).grad = None
                        s.backward(bar)
            torch.cuda.synchronize()

        return cases.median_seconds({"row": row_of_calls}, repeats, budget=5.0)["row"] / CALLS

    def run(given: Program | np.ndarray, repeats: int = 0) -> Any:
        if isinstance(given, np.ndarray):
            return spikes(torch.from_numpy(given).cuda()).cpu()
        try:
            return np.asarray(seconds(given, repeats))
        finally:
            torch.cuda.empty_cache()

    return run


@functools.cache
def spikingjelly_process(backend: str) -> Apart | str:
    """A process that runs all programs, or the reason why there is none."""
    process = Apart(spikingjelly, backend)
    reason = attempt(lambda: check_peer("spikingjelly", process.result))
    if reason is None:
        return process
    process.close()
    return reason


def spikingjelly_seconds(backend: str, program: Program, repeats: int) -> float | str:
    process = spikingjelly_process(backend)
    return process if isinstance(process, str) else attempt(lambda: float(process.result(program, repeats)))


def spikes_of(name: str, n_units: int) -> Callable:
    # jaxpike's default of 8 steps per iteration of its loop is for GPUs.
    run = peers.jaxpike_run(n_units, None) if name == "jaxpike" else peers.JAX[name](n_units)
    return lambda x: run(x)[0]


@functools.cache
def check_jax_peer(name: str) -> None:
    check_peer(name, lambda x: jax.jit(spikes_of(name, x.shape[-1]))(jnp.asarray(x)))


def jax_seconds(name: str, program: Program, repeats: int) -> float:
    check_jax_peer(name)
    spikes = spikes_of(name, program.shape[-1])
    function = with_gradient(of_layer(spikes) if program.table == "layer" else spikes, program.kind != "forward")
    arguments = random_arguments(program)
    if program.table != "layer" and len(program.shape) == 2:  # these packages need a batch axis
        arguments = [x[:, None] for x in arguments]
    compiled, _ = cases.compile_seconds(function, *arguments)
    return median_seconds({"run": functools.partial(compiled, *arguments)}, repeats)["run"]


def others(program: Program, names: list[str], repeats: int) -> dict[str, float | str]:
    """Seconds of each, or the reason why there are none."""
    found = {}
    for name in names:
        if name == "spikingjelly":
            for backend in BACKENDS:
                found[f"SpikingJelly, {backend}"] = spikingjelly_seconds(backend, program, repeats)
        elif program.table != "kernels":
            found[name] = attempt(functools.partial(jax_seconds, name, program, repeats))
    return found


def attempt(run: Callable[[], Any]) -> Any:
    """Its result, or why it failed."""
    try:
        return run()
    except Exception as error:  # a peer that fails must not end the table
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[-1][:100]}"


def mnist(data: str, epochs: int = 30) -> float:
    """Seconds of examples/bfa_snn.py, from start to end."""
    script = Path(__file__).parents[1] / "examples" / "bfa_snn.py"
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        subprocess.run([sys.executable, script, "--data", data, "--epochs", str(epochs), "--out", out], check=True)
        return time.perf_counter() - start


def title(program: Program) -> str:
    shape = ", ".join(map(str, program.shape))
    return f"{program.table:<9}{program.kind:<9}[{shape + ']':<18}{program.dtypes[0]:<9}{program.dtypes[1]:<9}"


def print_row(r: dict[str, Any]) -> None:
    print(
        f"{title(Program(*(r[name] for name in Program._fields)))}{r['ms']:>9.3f}{r['us_per_step']:>9.2f}"
        f"{r['G_updates_s']:>9.1f}{r['GB_s']:>7.0f}{r['of_copy']:>9.2f}{r['over_scan']:>11.1f}{r['compile_s']:>8.1f}s",
        flush=True,
    )


def run(chosen: list[Program], names: list[str], repeats: int, memory: int, bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    head = f"{'ms':>9}{'us/step':>9}{'G upd/s':>9}{'GB/s':>7}{'of copy':>9}{'over scan':>11}{'compile':>9}"
    print(f"{'':<55}{head}")
    for program in chosen:
        if program.size > 0.8 * memory:
            print(f"{title(program)}  skipped: too large for this GPU")
            continue
        r = attempt(lambda program=program: row(program, bandwidth, repeats))
        if isinstance(r, str):
            print(f"{title(program)}  {r}")
            continue
        print_row(r)
        float32 = program.dtypes == DTYPES[0] and program.kind != "secant"
        compared = others(program, names, repeats) if program.table != "kernels" or float32 else {}
        for name, seconds in compared.items():
            text = f"{1e3 * seconds:.3f} ms, {1e3 * seconds / r['ms']:.1f} x" if isinstance(seconds, float) else seconds
            print(f"{'':<18}{name}: {text}", flush=True)
        published = PUBLISHED.get((program.kind, program.shape), []) if program.dtypes[0] != "bfloat16" else []
        for line in published:
            print(f"{'':<18}published, {line}")
        rows.append(r | {"others": compared, "published": published})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--units", type=int, nargs="+", default=[2**14, 2**18, 2**20, 2**22], help='for "kernels"')
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000], help='for "kernels"')
    parser.add_argument("--repeats", type=int, default=9, help="number of repeats to take the median of")
    everyone = ["spikingjelly", *peers.JAX]
    parser.add_argument("--peers", nargs="*", choices=everyone, default=everyone, help="other packages to compare with")
    parser.add_argument("--mnist", metavar="FILE", help="also run 30 epochs of examples/bfa_snn.py on this file")
    parser.add_argument("--lower", action="store_true", help="lower the programs for CUDA, on any machine, and stop")
    options = parser.parse_args()
    chosen = list(programs(options.tables, options.units, options.steps))
    if options.lower:
        return lower(chosen)

    check()
    print("The kernels' spikes and gradients agree with the scan's.")
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(
            "The timings need an NVIDIA GPU of compute capability 8.0 or later (9.0 with jax 0.10); "
            f"this is {device.device_kind}."
        )

    memory = (device.memory_stats() or {}).get("bytes_limit", 2**34)
    bandwidth = copy_bandwidth(options.repeats)
    print(f"{device.device_kind}, jax {jax.__version__}; a copy moves {bandwidth / 1e9:.0f} GB/s")
    names = peers.installed(options.peers)
    rows = run(chosen, names, options.repeats, memory, bandwidth)
    result = {"device": device.device_kind, "copy_GB_s": bandwidth / 1e9, "rows": rows}
    if options.mnist:
        result["mnist_s"] = mnist(options.mnist)
        print(f"30 epochs of examples/bfa_snn.py: {result['mnist_s']:.1f} s ({MNIST_SECONDS})")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main()
