"""Compiles every kernel for GPUs that this machine does not have, and executes the compiled code.

    python ahead_of_time/gpu.py a100|l4|h100|b200|rtx5090|t4 [--only TEXT]

It needs the CUDA wheels of the same version as jax, but no driver; `ahead_of_time/run` installs them and runs this once
per card, each in a separate process, since the compiler keeps the first card's limits. It prints a line per program:
registers per thread, temporary memory per device, and the findings of `execute.py`. It fails on a spilt register, on
communication between devices, if one of several devices takes more memory than its share, and if the compiled code
differs from the scan.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ |= dict.fromkeys(("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_HOST_LLVM"), "1")

import execute
import jax
import programs
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# From NVIDIA's and XLA's own descriptions of these cards.
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
COLUMNS = "{:8} {:44} {:>9} {:>8} {:>12} {:>10} {:>10} {:>9} {:>8}"


def compile_for(card: str, function: Callable, args: tuple[Any, ...], n_devices: int) -> Any:
    topology = topologies.get_topology_desc(platform="cuda", target_config=CARDS[card][0], topology=f"1x1x{n_devices}")
    mesh = topologies.make_mesh(topology, (n_devices,), ("x",))

    def placed(x: Any) -> Any:
        x, spec = x if isinstance(x, tuple) else (x, P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    args = jax.tree.map(placed, args, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], P))
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()


@contextlib.contextmanager
def printed() -> Iterator[list[str]]:
    """Captures what is printed inside, by the compiler too."""
    text: list[str] = []
    sys.stdout.flush()
    terminal = os.dup(1)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 1)
            try:
                yield text
            finally:
                os.dup2(terminal, 1)
                file.seek(0)
                text.append(file.read().decode())
    finally:
        os.close(terminal)


def kernels_of(hlo: str, dump: str, known: dict[str, execute.Kernel]) -> list[execute.Kernel]:
    """The kernels that a compiled program calls; those compiled before are not printed again, but are in `known`."""
    found = []
    for line in hlo.splitlines():
        if 'custom_call_target="mosaic_gpu' in line:
            name = re.search(r"slif_(?:forward|reverse)", line)[0]
            key = re.search(r'kernel_hash = "([^"]*)"', line)[1]
            if key not in known:
                known[key] = execute.Kernel.of(name, dump)
            found.append(known[key])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", choices=CARDS)
    parser.add_argument("--only", default="", help="only programs whose name contains this")
    options = parser.parse_args()
    # Mosaic asks the default device for its architecture, and there is no such device.
    from jax.experimental.pallas import mosaic_gpu  # noqa: F401

    for module in list(sys.modules.values()):
        if "mosaic" in module.__name__ and hasattr(module, "_infer_arch"):
            module._infer_arch = lambda: CARDS[options.card][1]  # pyright: ignore[reportAttributeAccessIssue]

    failed, alone, known = 0, {}, {}
    print(COLUMNS.format("card", "program", "registers", "MB", "instructions", "bytes", "sectors", "bits", "rest"))
    several = (p for n in (1, 4, 8) for p in programs.many_devices(n))
    for name, function, args, n_devices in (*programs.programs(), *several, programs.points()):
        if options.only not in name:
            continue
        with printed() as dump:
            compiled = compile_for(options.card, function, args, n_devices)
        text = compiled.as_text()
        kernels = kernels_of(text, dump[0], known)
        moved = sorted(set(re.findall(r"all-gather|all-reduce|collective-permute|all-to-all", text)))
        memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
        of_one = alone.setdefault(name.removeprefix(f"{n_devices} devices, "), memory * n_devices)
        spilt = sum(kernel.spilt for kernel in kernels)
        found = {
            f"{spilt} bytes spilt": spilt > 0,
            f"{', '.join(moved)} between devices": bool(moved),
            "more memory than its share": memory > 0.1 + 1.1 * of_one / n_devices,
            "no kernel": not kernels,
        }
        faults = [fault for fault, so in found.items() if so]
        seen = ("", "", "", "", "")
        if name.startswith(tuple(programs.WIDTHS)):
            seen, wrong = execute.compare(kernels, function, args)
            faults += wrong
        failed += bool(faults)
        registers = " ".join(str(kernel.registers) for kernel in kernels)
        print(COLUMNS.format(options.card, name, registers, f"{memory:.2f}", *seen), *faults, flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
