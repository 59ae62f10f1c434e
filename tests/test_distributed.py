"""The example of many hosts, as two processes on this one: the same numbers, and what happens when one dies."""

import importlib
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
from conftest import BAD_NUMBERS

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


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    return importlib.import_module("distributed_sweep")


def test_shards_of_another_sweep_or_cut_off_are_not_taken(example, tmp_path, refused, monkeypatch, capsys):
    tiny = ["--side", "2", "--steps", "20", "--out", str(tmp_path)]
    example.main([*tiny, "--shards", "3"])
    expected = content(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(example, "counts", None)
    for other in (["--shards", "2"], ["--shards", "3", "--steps", "21"]):
        assert "shard_00000.npz belongs to another sweep" in refused(example.main, [*tiny, *other])

    # One that this run would have come to last.
    shard = tmp_path / "shard_00002.npz"
    whole = shard.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-1], b"", whole.replace(b"\x00\x00", b"\x01\x01")):
        shard.write_bytes(broken)
        error = refused(example.main, [*tiny, "--shards", "3"])
        assert "shard_00002.npz: not an .npz" in error
        assert "delete it" in error

    monkeypatch.undo()
    shard.unlink()
    example.main([*tiny, "--shards", "3"])
    jax.tree.map(np.testing.assert_array_equal, content(tmp_path), expected)


NUMBERS = ["--side", "--steps", "--shards", "--processes", "--process", "--timeout"]


@pytest.mark.parametrize("flag", NUMBERS)
def test_numbers_have_bounds(example, flag, refused):
    for text in BAD_NUMBERS:
        assert f"argument {flag}: expected a whole number" in refused(example.main, [flag, text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--process 0", "--process: give --processes too"),
        ("--processes 2", "--processes: give --process too"),
        ("--processes 2 --process 2", "--process: expected 0 to 1, got 2"),
        ("--cluster --processes 2 --process 0", "leave out --processes and --process"),
    ],
)
def test_a_process_is_one_of_a_number(example, options, message, tmp_path, refused):
    assert message in refused(example.main, [*options.split(), "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_a_folder_to_write_to_is_tried_before_the_work(example, bad_folder, monkeypatch, refused):
    monkeypatch.setattr(example, "counts", None)
    assert f"--out: cannot write to {bad_folder}: " in refused(example.main, ["--out", bad_folder])


def test_an_interrupt_ends_in_one_line_and_keeps_the_shards(tmp_path):
    process = start(tmp_path, ["--side", "8", "--steps", "6000", "--shards", "512"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "shard_00001.npz").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "distributed_sweep.py: interrupted; the files written so far are kept\n"
    done = [f"shard_{int(line.split()[1]):05}.npz" for line in stdout.splitlines()]
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there[: len(done)] == done
    assert len(there) - len(done) in (0, 1)  # the line of the last may not have been printed
