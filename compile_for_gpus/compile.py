"""Compiles every kernel for GPUs that are not there.

    JAX_PLATFORMS=cpu python compile_for_gpus/compile.py a100|l4|h100|b200|rtx5090|t4 [--only TEXT]

It needs the CUDA wheels of the same version as jax, and no driver; `compile_for_gpus/run` installs them and calls this
for each card, one process a card, since the compiler keeps the first card's limits. Prints a line a program: registers
a thread (none where the kernel is that of a line before), bytes spilt, temporary memory a device. Fails on a spilt
register, on talk between devices, and where a device of many takes more memory than its share.
"""

import argparse
import functools
import glob
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
DUMP = tempfile.mkdtemp()
os.environ |= {"MOSAIC_GPU_DUMP_TO": DUMP, "MOSAIC_GPU_DUMP_PTXAS": "1"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import slif  # noqa: E402
from slif.request import RECORDS  # noqa: E402

# What NVIDIA's and XLA's own descriptions of these cards say.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} threads_per_core_limit: {threads}
  core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {ghz} device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  dnn_version: "9.1.0"
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 1 patch: 0 }}
device_description_str: "{name}"
"""


USUAL = {
    "shared": 102400,
    "threads": 1536,
    "fpus": 128,
    "l2": 6291456,
    "ghz": 1.8,
    "memory": 51041271808,
    "optin": 101376,
}
LARGE = {"threads": 2048, "shared": 233472, "optin": 232448}


def target(name: str, major: int, minor: int, **given: Any) -> tuple[str, tuple[int, int]]:
    feature = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return TARGET.format(name=name, major=major, minor=minor, feature=feature, **USUAL | given), (major, minor)


CARDS = {
    "t4": target("Tesla T4", 7, 5, cores=40, fpus=64, threads=1024, shared=65536, optin=65536, bandwidth=320 * 10**9),
    "a100": target(
        "NVIDIA A100-SXM4-80GB", 8, 0, cores=108, fpus=64, threads=2048, shared=167936, optin=166912,
        bandwidth=2039 * 10**9, l2=41943040, ghz=1.41, memory=85100068864,
    ),
    "l4": target("NVIDIA L4", 8, 9, cores=58, bandwidth=300 * 10**9, l2=50331648),
    "h100": target(
        "NVIDIA H100 80GB HBM3", 9, 0, cores=132, bandwidth=3352 * 10**9, l2=52428800, ghz=1.98, memory=84942979072,
        **LARGE,
    ),
    "b200": target(
        "NVIDIA B200", 10, 0, cores=148, bandwidth=7672 * 10**9, l2=132644864, ghz=1.965, memory=191514411008,
        **LARGE,
    ),
    "rtx5090": target(
        "NVIDIA GeForce RTX 5090", 12, 0, cores=170, bandwidth=1792 * 10**9, l2=100663296, ghz=2.4, memory=34 * 10**9
    ),
}  # fmt: skip
VOLTAGE = (
    slif.arctan, slif.boxcar, slif.fast_sigmoid, slif.gaussian, slif.sigmoid, slif.straight_through, slif.triangular,
)  # fmt: skip
NARROW, WIDE = 2**12, 2**18  # units, one tile width each
T, DT = 100, 0.25

Program = tuple[str, Callable, tuple[Any, ...], int]  # what it is, the function, its arguments, devices


def make_params(n_units: int, surrogate: Any, everything: bool) -> slif.SLIFParams:
    more = {"thr_gain": 0.1, "thr_leak": 0.01, "sticky_spikes": True, "refract_time": 1.0} if everything else {}
    own = jnp.linspace(5.0, 20.0, n_units) if everything else 20.0
    return slif.init_params(jax.random.key(0), n_units, tau_m=own, resist_m=1.0, thr=0.4, surrogate=surrogate, **more)


def run(params: slif.SLIFParams, x: Any, valid: Any = None, record: Any = ("s",), **options: Any) -> Any:
    state = slif.init_state(params, x.shape[1:-1])
    return slif.simulate(params, state, x, dt=DT, record=record, valid=valid, implementation="pallas", **options)


def gradients(params: slif.SLIFParams, x: Any, valid: Any = None, record: Any = ("s",)) -> Any:
    def loss(params, x):
        state, out = run(params, x, valid, record)
        return sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in jax.tree.leaves((state.v, out)))

    return jax.grad(loss, argnums=(0, 1))(params, x)


def programs() -> Iterator[Program]:
    """What is compiled: every surrogate, record, mask, width of a tile and dtype; then many devices, and sweeps."""
    for width, n in (("narrow", NARROW), ("wide", WIDE)):
        x = jax.ShapeDtypeStruct((T, 8, n // 8), jnp.float32)
        valid = jax.ShapeDtypeStruct((T, 8), bool)
        bare, full = (make_params(n // 8, slif.secant(), everything) for everything in (False, True))
        yield f"{width}, forward", run, (bare, x), 1
        for dtype in (bool, jnp.bfloat16):
            yield f"{width}, forward, {jnp.dtype(dtype)}", functools.partial(run, spike_dtype=dtype), (full, x), 1
        half = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
        yield f"{width}, forward, bfloat16 currents", functools.partial(run, spike_dtype=jnp.bfloat16), (full, half), 1
        for record in (*((name,) for name in RECORDS), RECORDS):
            name = record[0] if len(record) == 1 else "all records"
            yield f"{width}, forward, valid, {name}", functools.partial(run, record=record), (full, x, valid), 1
        for make in VOLTAGE:
            for detach in (False, True):
                params = make_params(n // 8, make(detach_reset=detach), True)
                yield f"{width}, training, {make.__name__}{' detached' * detach}", gradients, (params, x), 1
        params = make_params(n // 8, slif.arctan(), True)
        yield f"{width}, training, plain", gradients, (make_params(n // 8, slif.arctan(), False), x), 1
        yield f"{width}, training, valid", gradients, (params, x, valid), 1
        most = ("s", "u", "v", "thr", "j", "spike_count")
        yield f"{width}, training, valid, all records", functools.partial(gradients, record=most), (params, x, valid), 1
        yield f"{width}, training, bfloat16 currents", gradients, (params, half), 1


def many_devices(n: int) -> Iterator[Program]:
    params = make_params(4096, slif.arctan(), True)
    for what, spec in (("batch", P(None, "x")), ("units", P(None, None, "x"))):
        x = jax.ShapeDtypeStruct((T, 8, 4096), jnp.float32)
        for kind, function in (("forward", lambda params, x: run(params, x)), ("training", gradients)):
            function = function if kind == "forward" else (lambda params, x: gradients(params, x)[1])
            yield f"{n} devices, {what}, {kind}", function, (params, (x, spec)), n
    taus = (jax.ShapeDtypeStruct((65536,), jnp.float32), P("x"))
    one = make_params(1, slif.arctan(), False)
    x = jax.ShapeDtypeStruct((T, 1), jnp.float32)

    def sweep(params, x, taus):
        return jax.vmap(lambda tau: run(params.replace(tau_m=tau), x)[1]["s"].sum(0))(taus)

    def trained(params, x, taus):
        return jax.vmap(jax.grad(lambda tau: run(params.replace(tau_m=tau), x)[1]["s"].sum()))(taus)

    yield f"{n} devices, points, forward", sweep, (one, x, taus), n
    yield f"{n} devices, points, training", trained, (one, x, taus), n


def points() -> Program:
    """100,000 points of one unit over 1000 steps."""

    def sweep(params, x, taus):
        return jax.vmap(lambda tau: run(params.replace(tau_m=tau), x)[1]["s"])(taus)

    x, taus = jax.ShapeDtypeStruct((1000, 1), jnp.float32), jax.ShapeDtypeStruct((100_000,), jnp.float32)
    return "100,000 points of 1 unit", sweep, (make_params(1, slif.secant(), False), x, taus), 1


def compile_for(card: str, function: Callable, args: tuple[Any, ...], n_devices: int) -> Any:
    topology = topologies.get_topology_desc(platform="cuda", target_config=CARDS[card][0], topology=f"1x1x{n_devices}")
    mesh = topologies.make_mesh(topology, (n_devices,), ("x",))

    def placed(x: Any) -> Any:
        x, spec = x if isinstance(x, tuple) else (x, P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    args = jax.tree.map(placed, args, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], P))
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", choices=CARDS)
    parser.add_argument("--only", default="", help="programs whose name has this in it")
    options = parser.parse_args()
    # Mosaic asks the default device for its architecture, and there is none.
    from jax.experimental.pallas import mosaic_gpu  # noqa: F401

    for module in list(sys.modules.values()):
        if "mosaic" in module.__name__ and hasattr(module, "_infer_arch"):
            module._infer_arch = lambda: CARDS[options.card][1]  # pyright: ignore[reportAttributeAccessIssue]

    failed, alone = 0, {}
    for name, function, args, n_devices in (*programs(), *(p for n in (1, 4, 8) for p in many_devices(n)), points()):
        if options.only not in name:
            continue
        for file in glob.glob(f"{DUMP}/*"):
            os.remove(file)
        compiled = compile_for(options.card, function, args, n_devices)
        reports = "".join(Path(file).read_text() for file in sorted(glob.glob(f"{DUMP}/*.ptxas")))
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", reports)]
        spilt = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", reports))
        text = compiled.as_text()
        moved = sorted(set(re.findall(r"all-gather|all-reduce|collective-permute|all-to-all", text)))
        memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
        more = memory > 0.1 + 1.1 * alone.setdefault(name.partition(", ")[2], memory) / n_devices
        bad = "mosaic_gpu" not in text or spilt or moved or (n_devices > 1 and more)
        failed += bool(bad)
        print(
            f"{options.card:8}{name:50}registers {registers}, spilt {spilt} bytes, {memory:.2f} MB"
            + (f", {moved}" if moved else "") + ("  FAILED" if bad else ""), flush=True,
        )  # fmt: skip
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
