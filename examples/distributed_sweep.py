"""A sweep split among processes, on one machine or many; each writes its own shards.

    python examples/distributed_sweep.py --out out/sweep                    one process
    python examples/distributed_sweep.py --out out/sweep --coordinator HOST:PORT --processes 2 --process 0   and 1
    srun python examples/distributed_sweep.py --out out/sweep --cluster     JAX finds them: SLURM, Kubernetes

Shard k belongs to process k modulo the number of processes. A shard appears under its name only once it is complete.
So a run that was interrupted, for example because a process died, continues where it stopped when started again, with
any number of processes: finished shards are neither lost nor run again. `--out` must be a folder that all processes
share. At the end process 0 joins the shards in sweep.npz: the parameters of each point and its units' spike counts.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import cli
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import slif

N_UNITS, DT = 100, 0.25


def points(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """All points of the sweep, computed by every process, so that none has to be sent."""
    side = args.side
    axes = {
        "tau_m": np.linspace(5, 40, side),
        "thr": np.linspace(0.2, 0.8, side),
        "refract_time": np.linspace(0, 5, side),
    }
    return {name: np.asarray(x) for name, x in slif.grid(**axes).items()}


def counts(args: argparse.Namespace, over: dict[str, np.ndarray]) -> np.ndarray:
    """The spike count of each unit at each of these points; each unit has its own constant current."""
    params = slif.init_params(jax.random.key(0), N_UNITS, tau_m=20.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
    currents = jnp.broadcast_to(jnp.linspace(0, 4, N_UNITS), (args.steps, N_UNITS))
    _, out = slif.sweep(params, currents, over=over, dt=DT, record=("spike_count",))
    return np.asarray(out["spike_count"])


def fingerprint(args: argparse.Namespace) -> str:
    """A hash of all that determines the numbers, so that shards of another sweep are not taken for this one's."""
    setting = {"side": args.side, "steps": args.steps, "shards": args.shards, "slif": slif.__version__}
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path, mark: str) -> np.ndarray | None:
    """The counts of a finished shard; None if there is none yet."""
    if not path.exists():
        return None
    try:
        shard = cli.read_npz(path, ("fingerprint", "spike_count"))
    except ValueError as error:
        raise ValueError(f"{error}; delete it to have it computed again") from error
    if str(shard["fingerprint"]) != mark:
        raise ValueError(f"{path} belongs to another sweep; choose another --out")
    return shard["spike_count"]


def check_folder(args: argparse.Namespace) -> None:
    """OSError or ValueError for a shard, of any number, that is damaged or belongs to another sweep."""
    for path in sorted(args.out.glob("shard_*.npz")):
        read(path, fingerprint(args))


def run_shards(args: argparse.Namespace) -> list[Path]:
    """Runs the shards of this process that are not finished yet; returns the paths of all shards."""
    over, mark = points(args), fingerprint(args)
    size = -(-(args.side**3) // args.shards)
    paths = [args.out / f"shard_{k:05}.npz" for k in range(args.shards)]
    for k in range(jax.process_index(), args.shards, jax.process_count()):
        if read(paths[k], mark) is not None:
            print(f"shard {k} already finished", flush=True)
            continue
        # The last shard is padded with its last point, so that one compiled program serves all.
        index = np.minimum(np.arange(k * size, (k + 1) * size), args.side**3 - 1)
        kept = max(min((k + 1) * size, args.side**3) - k * size, 0)
        result = counts(args, {name: x[index] for name, x in over.items()})[:kept]
        with cli.saved(paths[k]) as file:
            np.savez(file, fingerprint=mark, spike_count=result)
        print(f"shard {k} done", flush=True)
    return paths


def finish(args: argparse.Namespace, paths: list[Path]) -> None:
    parts = [read(path, fingerprint(args)) for path in paths]
    whole = np.concatenate([part for part in parts if part is not None])
    arrays: dict[str, Any] = {**points(args), "spike_count": whole}
    with cli.saved(args.out / "sweep.npz") as file:
        np.savez(file, **arrays)
    print(f"{args.out / 'sweep.npz'}: {len(whole)} points", flush=True)


def connect(args: argparse.Namespace) -> None:
    timeouts: dict[str, Any] = {"initialization_timeout": args.timeout, "heartbeat_timeout_seconds": args.timeout}
    if args.cluster:
        jax.distributed.initialize(**timeouts)
    elif args.processes > 1:
        jax.distributed.initialize(args.coordinator, args.processes, args.process, **timeouts)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description="A parameter sweep split among processes.")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="folder for the shards and sweep.npz")
    parser.add_argument("--side", type=cli.number(int, 1, 200), default=12, help="values on each of the three axes")
    parser.add_argument("--steps", type=cli.number(int, 1, 1_000_000), default=4000, help="steps of 0.25 ms")
    parser.add_argument(
        "--shards", type=cli.number(int, 1, 99_999), default=16, help="parts that the points are split into"
    )
    parser.add_argument("--coordinator", default="localhost:12355", help="address of process 0")
    parser.add_argument("--processes", type=cli.number(int, 1, 99_999), help="number of processes; 1 if not given")
    parser.add_argument("--process", type=cli.number(int, 0, 99_998), help="index of this process, from 0")
    parser.add_argument("--cluster", action="store_true", help="let JAX find the other processes")
    timeout = cli.number(int, 1, 86_400)
    parser.add_argument(
        "--timeout", type=timeout, default=60, help="seconds after which a silent process counts as lost"
    )
    args = parser.parse_args(arguments)
    if args.cluster and (args.process is not None or args.processes is not None):
        parser.error("--cluster finds the processes itself: leave out --processes and --process")
    if args.processes is None and args.process is not None:
        parser.error("--process: give --processes too, their number")
    args.processes = args.processes or 1
    if args.process is None and args.processes > 1:
        parser.error("--processes: give --process too, the index of this one")
    if args.process is not None and args.process >= args.processes:
        parser.error(f"--process: expected 0 to {args.processes - 1}, got {args.process}")
    if args.shards > args.side**3:
        parser.error(f"--shards: expected at most {args.side**3}, the number of points, got {args.shards}")
    parser.probe(args.out)
    try:
        check_folder(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_options(arguments)
    start = time.perf_counter()
    connect(args)
    multihost_utils.sync_global_devices("start")  # opens the connections while all processes are alive
    paths = run_shards(args)
    try:
        multihost_utils.sync_global_devices("shards")
    except Exception as error:
        print(f"A process was lost; its shards are missing. Run it again to continue. ({error})", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # a normal exit would wait for the lost process
    if jax.process_index() == 0:
        finish(args, paths)
        n = jax.process_count()
        print(f"{time.perf_counter() - start:.1f} s on {n} process{'es' * (n > 1)}")


if __name__ == "__main__":
    main()
