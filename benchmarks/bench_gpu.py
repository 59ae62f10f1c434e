"""The fused kernels on an NVIDIA GPU: updates and bytes a second, beside a copy, the scan and SpikingJelly's kernels.

    python benchmarks/bench_gpu.py [--json FILE] [--units N ...] [--steps T ...] [--repeats R]

Checks against the scan come first, and run on any machine; what follows needs a GPU. An update is one step of one unit.
The bytes are those that have to move: currents in and spikes out, and for a gradient also currents and the cotangent of
the spikes in and the gradient out. Arrays of more than a quarter of the GPU's memory are left out.
"""

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np

import slif

DTYPES = (("float32", "float32"), ("float32", "bool"), ("bfloat16", "float32"), ("bfloat16", "bool"))
STICKY = {"refract_time": 2.0, "sticky_spikes": True}


def raster(implementation: str, spikes: Any, params: slif.SLIFParams, x: jax.Array) -> tuple[slif.SLIFState, jax.Array]:
    state = slif.init_state(params)
    options = {"dt": cases.DT, "spike_dtype": spikes, "implementation": implementation}
    state, out = slif.simulate(params, state, x, **options)
    return state, out["s"]


def both(implementation: str, spikes: Any, params: slif.SLIFParams, x: jax.Array, bar: jax.Array) -> tuple:
    s, pull = jax.vjp(lambda x: raster(implementation, spikes, params, x)[1], x)
    return s, pull(bar)[0]


def check(n_units: int = 1000, n_steps: int = 50) -> None:
    """Spikes and gradients of the kernels are those of the scan, up to ties within a rounding."""
    x = jnp.asarray(cases.make_currents((n_steps, n_units)))
    for surrogate in (slif.secant(), slif.arctan()):
        params = cases.make_params(n_units, surrogate=surrogate, thr_gain=0.01, **STICKY)
        results = [jax.jit(functools.partial(both, which, jnp.float32))(params, x, x) for which in ("pallas", "xla")]
        (s, gradient), (expected_s, expected) = jax.tree.map(np.asarray, results)
        assert np.mean(s == expected_s) > 0.999, "the spikes differ"
        same = (s == expected_s).all(0)
        np.testing.assert_allclose(gradient[:, same], expected[:, same], rtol=1e-3, atol=1e-4)


def row(
    kind: str, n_steps: int, n_units: int, dtypes: tuple[str, str], bandwidth: float, repeats: int
) -> dict[str, Any]:
    """One line of the table; `bandwidth` is that of a copy, in bytes a second."""
    x = jnp.asarray(cases.make_currents((n_steps, n_units)), dtypes[0])
    spikes, training = jnp.dtype(dtypes[1]), kind != "forward"
    surrogate = slif.secant() if kind == "secant" else slif.arctan()
    params = cases.make_params(n_units, surrogate=surrogate, **STICKY)
    runs, compiling = {}, {}
    for which in ("pallas", "xla"):
        function = functools.partial(both if training else raster, which, spikes)
        arguments = (params, x, x.astype(spikes)) if training else (params, x)
        compiled, compiling[which] = cases.compile_seconds(function, *arguments)
        runs[which] = functools.partial(compiled, *arguments)
    seconds = cases.median_seconds(runs, repeats, budget=5.0)
    moved = x.dtype.itemsize + spikes.itemsize
    moved += (2 * x.dtype.itemsize + spikes.itemsize) if training else 0
    updates = n_steps * n_units / seconds["pallas"]
    return {
        "kind": kind,
        "T": n_steps,
        "N": n_units,
        "dtypes": dtypes,
        "ms": 1e3 * seconds["pallas"],
        "us_a_step": 1e6 * seconds["pallas"] / n_steps,
        "G_updates_s": updates / 1e9,
        "GB_s": updates * moved / 1e9,
        "of_copy": updates * moved / bandwidth,
        "over_scan": seconds["xla"] / seconds["pallas"],
        "compile_s": compiling["pallas"],
    }


def copy_bandwidth(repeats: int, size: int = 2**28) -> float:
    """Bytes a second, read and written, of the fastest there is: one elementwise pass over 1 GiB."""
    x = jnp.ones(size, jnp.float32)
    compiled, _ = cases.compile_seconds(lambda x: x + 1, x)
    return 8 * size / cases.median_seconds({"copy": functools.partial(compiled, x)}, repeats)["copy"]


def spikingjelly(backend: str, n_steps: int, n_units: int, training: bool, repeats: int) -> float:
    """Seconds of its multi-step LIF node with that backend, same shape; spikes float32, no refractory period."""
    torch = importlib.import_module("torch")
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    surrogate = importlib.import_module("spikingjelly.activation_based.surrogate")
    node = neuron.LIFNode(
        tau=cases.TAU_M / cases.DT,
        v_threshold=cases.THR,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
        step_mode="m",
        backend=backend,
    ).cuda()
    x = torch.from_numpy(cases.make_currents((n_steps, n_units))).cuda().requires_grad_(training)

    def run() -> None:
        node.reset()
        with torch.set_grad_enabled(training):
            s = node(x)
        if training:
            x.grad = None
            s.backward(x.detach())
        torch.cuda.synchronize()

    return cases.median_seconds({"run": run}, repeats, budget=5.0)["run"]


def attempt(run: Callable[[], float]) -> float | str:
    try:
        return run()
    except Exception as error:  # a peer that is absent or fails is a line of the table, not the end of it
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--units", type=int, nargs="+", default=[2**14, 2**18, 2**20, 2**22])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=9, help="repeats of which the median is told")
    options = parser.parse_args()

    check()
    print("The kernels' spikes and gradients are the scan's.")
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"The timings need an NVIDIA GPU of compute capability 9.0 or later; this is {device.device_kind}.")

    memory = (device.memory_stats() or {}).get("bytes_limit", 2**34)
    bandwidth = copy_bandwidth(options.repeats)
    print(f"{device.device_kind}, jax {jax.__version__}; a copy moves {bandwidth / 1e9:.0f} GB/s\n")
    print(
        f"{'':<9}{'T':>6}{'N':>9}  {'currents':<9}{'spikes':<8}{'ms':>9}{'us/step':>9}{'G upd/s':>9}{'GB/s':>7}", end=""
    )
    print(f"{'of copy':>9}{'over scan':>11}{'compile':>9}")
    rows, peers = [], []
    for n_steps in options.steps:
        for n_units in options.units:
            if 4 * n_steps * n_units > memory / 4:
                print(f"{'':<9}{n_steps:>6}{n_units:>9}  left out: too large for this GPU")
                continue
            plan = [("forward", dtypes) for dtypes in DTYPES]
            plan += [(kind, dtypes) for kind in ("secant", "voltage") for dtypes in DTYPES if "bool" not in dtypes]
            for kind, dtypes in plan:
                r = row(kind, n_steps, n_units, dtypes, bandwidth, options.repeats)
                print(
                    f"{kind:<9}{n_steps:>6}{n_units:>9}  {dtypes[0]:<9}{dtypes[1]:<8}"
                    f"{r['ms']:>9.3f}{r['us_a_step']:>9.2f}{r['G_updates_s']:>9.1f}{r['GB_s']:>7.0f}{r['of_copy']:>9.2f}{r['over_scan']:>11.1f}"
                    f"{r['compile_s']:>8.1f}s",
                    flush=True,
                )
                rows.append(r)
            for backend in ("triton", "cupy"):
                for kind in ("forward", "voltage"):
                    run = functools.partial(spikingjelly, backend, n_steps, n_units, kind != "forward", options.repeats)
                    seconds = attempt(run)
                    ours = next(r for r in rows[::-1] if r["kind"] == kind and r["dtypes"] == DTYPES[0])
                    told = (
                        seconds
                        if isinstance(seconds, str)
                        else f"{1e3 * seconds:.3f} ms, {1e3 * seconds / ours['ms']:.1f} x"
                    )
                    print(f"{kind:<9}{n_steps:>6}{n_units:>9}  SpikingJelly, {backend}: {told}", flush=True)
                    peers.append({"kind": kind, "T": n_steps, "N": n_units, "backend": backend, "result": seconds})
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": device.device_kind, "copy_GB_s": bandwidth / 1e9, "rows": rows, "peers": peers}, file)


if __name__ == "__main__":
    main()
