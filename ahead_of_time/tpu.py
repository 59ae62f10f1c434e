"""Compiles the loop for TPUs that this machine does not have.

    python ahead_of_time/tpu.py v4|v5e|v6e [--only TEXT]

It needs `pip install "jax[tpu]"`, but no TPU. It prints a line per program: temporary memory, and for every time loop

- waits per iteration: the "dma.done.wait" instructions for a number in its own machine code, apart from those inside
  the kernels that it calls. Each stops the core until one number has come from the device's memory, most often a scalar
  parameter. Those for arrays, which were copied while the core went on, are not counted.
- cycles per step: XLA's own estimate, the sum of the "estimated_cycles" of its body, which leaves out those waits.

It fails on a wait, and if a forward program takes temporary memory for a whole sequence.
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

DUMP = tempfile.mkdtemp()
TARGETS = {"v4": ("v4:1x1x1", "v4-8"), "v5e": ("v5e:1x1", "v5litepod-1"), "v6e": ("v6e:1x1", "v6e-1")}  # topology, type
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("target", choices=TARGETS)
parser.add_argument("--only", default="", help="only programs whose name contains this")
OPTIONS = parser.parse_args()
# The compiler's library reads these once, when it is loaded; ALLOW_MULTIPLE_LIBTPU_LOAD is for two processes at a time.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": TARGETS[OPTIONS.target][1],
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

import slif  # noqa: E402
from slif import _device  # noqa: E402

BATCH, N_UNITS, DT = 64, 1024, 0.25
NUMBER = 16  # the size that a wait names for a number, which is copied as 512 bytes; for an f32[1024] it is 128

Program = tuple[str, Callable, tuple[Any, ...]]  # name, function, arguments


def make_params(surrogate: Any = None, **options: Any) -> slif.SLIFParams:
    options = {"refract_time": 1.0, "sticky_spikes": True} | options
    return slif.init_params(
        jax.random.key(0), N_UNITS, tau_m=20.0, resist_m=1.0, thr=0.4, surrogate=surrogate, **options
    )


def forward(params: slif.SLIFParams, x: Any, valid: Any = None) -> Any:
    return slif.simulate(params, None, x, dt=DT, valid=valid)[1]["s"]


def training(params: slif.SLIFParams, x: Any, valid: Any = None) -> Any:
    return jax.grad(lambda x: (forward(params, x, valid) ** 2).sum())(x)


def programs() -> Iterator[Program]:
    cells = {
        "secant": make_params(),
        "arctan": make_params(slif.arctan()),
        "arctan, adaptive": make_params(slif.arctan(), thr_gain=0.1, thr_leak=0.01),
        "inhibition": make_params(resist_inh=0.01),
    }
    for name, params in cells.items():
        for n_steps in (104, 101):
            x = jax.ShapeDtypeStruct((n_steps, BATCH, N_UNITS), jnp.float32)
            for function in (forward, training):
                yield f"{function.__name__}, {name}, T = {n_steps}", function, (params, x)
        valid = jax.ShapeDtypeStruct((n_steps, BATCH), bool)
        yield f"training, {name}, valid", training, (params, x, valid)


def loops(text: str, n_steps: int) -> Iterator[tuple[int, int]]:
    """Steps per iteration and estimated cycles per step of every loop in the compiled text."""
    computations = dict(re.findall(r"^%(\S+) \(.*\{\n((?:.*\n)*?)\}$", text, re.MULTILINE))
    for condition, body in re.findall(r" while\(.*condition=%([^,\s]+), body=%([^,\s]+)", text):
        turns = max(map(int, re.findall(r" constant\((\d+)\)", computations[condition])))
        cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', computations[body])))
        yield n_steps // turns, cycles * turns // n_steps


def waits() -> list[int]:
    """The waits for a number per iteration of every loop in the machine code of the program that was compiled last."""
    (file,) = glob.glob(f"{DUMP}/*-TLP-[0-9]*-final_bundles.txt")
    found, inside = [], False
    # A bundle of instructions comes after its address and, in loops, ">".
    for nested, bundle in re.findall(r"^ *0x\w+ .*?:( >)?[> ]*\{(.*)", Path(file).read_text(), re.MULTILINE):
        if nested and not inside:
            found.append(0)
        inside = bool(nested)
        if inside:
            found[-1] += sum(int(size) <= NUMBER for size in re.findall(r"dma\.done\.wait \[\S+\], (\d+)", bundle))
    return found


def compile_for(device: Any, function: Callable, args: tuple[Any, ...]) -> Any:
    for file in glob.glob(f"{DUMP}/*"):
        os.remove(file)
    place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    args = jax.tree.map(lambda x: place(x.shape, x.dtype), args)
    return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).compile()


def main() -> None:
    topology = topologies.get_topology_desc(TARGETS[OPTIONS.target][0], platform="tpu", chips_per_host_bounds=[1, 1, 1])
    device = topology.devices[0]
    _device.default = lambda: device  # as on a machine that has one
    failed = 0
    for name, function, args in programs():
        if OPTIONS.only not in name:
            continue
        compiled = compile_for(device, function, args)
        memory, sequence = compiled.memory_analysis().temp_size_in_bytes, args[1].size * 4
        found = list(loops(compiled.as_text(), args[1].shape[0]))
        waited = waits()
        bad = any(waited) or (function is forward and memory >= sequence)
        failed += bad
        listed = "; ".join(f"{steps} steps per iteration, {cycles} cycles per step" for steps, cycles in found)
        print(
            f"{OPTIONS.target:4}{name:36}{memory / 1e6:8.2f} MB, waits {waited}, {listed}{'  FAILED' * bad}", flush=True
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
