"""The example of many hosts, as two processes on this one: the same numbers, and what happens when one dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older versions name the timeouts differently")
EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed_sweep.py"
SMALL = ["--side", "5", "--steps", "200", "--shards", "7"]


def start(out, options, processes=1, process=0, port=0):
    pool = ["--coordinator", f"localhost:{port}", "--processes", str(processes), "--process", str(process)]
    command = [sys.executable, "-u", str(EXAMPLE), "--out", str(out), "--timeout", "10", *options, *pool]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def pair(out, options):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(out, options, 2, process, port) for process in range(2)]


def finish(processes):
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), results
    return [stdout.splitlines() for stdout, _ in results]


def content(out):
    with np.load(out / "sweep.npz") as file:
        return dict(file)


def test_two_processes_are_one_and_a_rerun_goes_on(tmp_path):
    finish([start(tmp_path / "one", SMALL)])
    finish(pair(tmp_path / "two", SMALL))
    alone, together = content(tmp_path / "one"), content(tmp_path / "two")
    assert alone["spike_count"].shape == (125, 100)
    assert alone["spike_count"].sum() > 0
    jax.tree.map(np.testing.assert_array_equal, together, alone)

    lost = tmp_path / "two" / "shard_00002.npz"
    lost.unlink()
    (tmp_path / "two" / "sweep.npz").unlink()
    (lines,) = finish([start(tmp_path / "two", SMALL)])
    assert [line for line in lines if "shard" in line] == [
        f"shard {k} {'done' if k == 2 else 'is there'}" for k in range(7)
    ]
    jax.tree.map(np.testing.assert_array_equal, content(tmp_path / "two"), alone)


def test_a_killed_process_ends_the_run_and_a_rerun_goes_on(tmp_path):
    options = ["--side", "8", "--steps", "6000", "--shards", "40"]
    processes = pair(tmp_path, options)
    deadline = time.monotonic() + 60
    while not (tmp_path / "shard_00003.npz").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    missing = [k for k in range(40) if not (tmp_path / f"shard_{k:05}.npz").exists()]
    assert any(k % 2 for k in missing), "it had finished before it was killed"
    _, stderr = processes[0].communicate(timeout=90)
    assert processes[0].returncode != 0
    assert "lost" in stderr or "heartbeat" in stderr, stderr
    assert not (tmp_path / "sweep.npz").exists()

    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard_*.npz")}
    finish(pair(tmp_path, options))
    assert content(tmp_path)["spike_count"].shape == (512, 100)
    assert {path: path.stat().st_mtime_ns for path in there} == there


def test_shards_of_another_sweep_are_not_taken(tmp_path):
    finish([start(tmp_path, SMALL)])
    process = start(tmp_path, ["--side", "5", "--steps", "300", "--shards", "7"])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "belongs to another sweep" in stderr
