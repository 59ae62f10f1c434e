"""The example of many hosts, as two processes on this one: the same numbers, and what happens when one dies."""

import importlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import BAD_NUMBERS

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older versions name the timeouts differently")
EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed_sweep.py"
SMALL = ["--side", "5", "--steps", "200", "--shards", "8"]

# The example, which prints a line and waits for a signal at its third shard.
WAITS = """
import itertools, runpy, signal, sys, time
import slif

def sweep_or_wait(*arguments, number=itertools.count(), sweep=slif.sweep, **options):
    if next(number) < 2:
        return sweep(*arguments, **options)
    print("waits", flush=True)
    while True:
        time.sleep(0.1)

slif.sweep = sweep_or_wait
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background is started without
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    return importlib.import_module("distributed_sweep")


@pytest.fixture
def start():
    """A function that starts a process of the example; none outlives the test."""
    started = []

    def start(out, *options, code=None):
        script = [str(EXAMPLE)] if code is None else ["-c", code, str(EXAMPLE)]
        # Connections show the end of a process at once; the time-out is for processes that only fall silent.
        command = [sys.executable, "-u", *script, "--out", str(out), "--timeout", "3600", *SMALL, *options]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def pool():
    """The options of two processes, at a port that nobody else gets while this socket holds it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("localhost", 0))
        address = f"localhost:{held.getsockname()[1]}"
        yield [["--coordinator", address, "--processes", "2", "--process", str(process)] for process in range(2)]


def until_it_waits(process):
    lines = []
    for line in process.stdout:
        if line == "waits\n":
            return [line.strip() for line in lines if line.startswith("shard")]
        lines.append(line)
    pytest.fail(f"it ended instead: {process.communicate()}")


def content(out):
    with np.load(out / "sweep.npz") as file:
        return dict(file)


def shards(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob("shard_*.npz")}


def run_alone(example, out, capsys):
    """Runs in this process; returns what is printed about the shards."""
    with jax.default_device(jax.devices("cpu")[0]):
        example.main(["--out", str(out), *SMALL])
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("shard")]


def test_two_processes_are_one_and_a_rerun_goes_on(example, start, pool, tmp_path, capsys):
    processes = [start(tmp_path / "two", *options) for options in pool]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    run_alone(example, tmp_path / "one", capsys)
    alone, together = content(tmp_path / "one"), content(tmp_path / "two")
    assert alone["spike_count"].shape == (125, 100)
    assert alone["spike_count"].sum() > 0
    jax.tree.map(np.testing.assert_array_equal, together, alone)

    (tmp_path / "two" / "shard_00002.npz").unlink()
    (tmp_path / "two" / "sweep.npz").unlink()
    lines = run_alone(example, tmp_path / "two", capsys)
    assert lines == [f"shard {k} {'done' if k == 2 else 'already finished'}" for k in range(8)]
    jax.tree.map(np.testing.assert_array_equal, content(tmp_path / "two"), alone)


def test_a_killed_process_ends_the_run_and_a_rerun_goes_on(example, start, pool, tmp_path, capsys):
    first, second = start(tmp_path, *pool[0]), start(tmp_path, *pool[1], code=WAITS)
    assert until_it_waits(second) == ["shard 1 done", "shard 3 done"]
    second.kill()
    _, stderr = first.communicate()
    assert first.returncode == 1
    assert "A process was lost; its shards are missing." in stderr
    there = shards(tmp_path)
    assert sorted(there) == [f"shard_{k:05}.npz" for k in (0, 1, 2, 3, 4, 6)]
    assert not (tmp_path / "sweep.npz").exists()

    assert [line for line in run_alone(example, tmp_path, capsys) if "done" in line] == ["shard 5 done", "shard 7 done"]
    assert content(tmp_path)["spike_count"].shape == (125, 100)
    assert shards(tmp_path).items() > there.items()


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


def test_an_interrupt_ends_in_one_line_and_keeps_the_shards(start, tmp_path):
    process = start(tmp_path, code=WAITS)
    assert until_it_waits(process) == ["shard 0 done", "shard 1 done"]
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr == "distributed_sweep.py: interrupted; the files written so far are kept\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard_00000.npz", "shard_00001.npz"]
