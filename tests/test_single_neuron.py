"""The single-neuron example: its table and its picture are those of the cell."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from conftest import BAD_NUMBERS

pytest.importorskip("matplotlib")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    return importlib.import_module("single_neuron")


def test_the_example_runs(example, tmp_path, capsys):
    example.main(["--out", str(tmp_path / "out")])
    told = capsys.readouterr().out.splitlines()
    assert told[2].split() == ["t,", "ms", "j", "u", "v", "thr", "rfr", "s"]
    rows = np.array([line.split() for line in told[3:27]], float)
    t, j, u, v, thr, rfr, s = rows.T
    assert (j[1:] == 1.2).all()
    k = int(np.flatnonzero(s)[0])
    # The equations, from one row to the next.
    np.testing.assert_allclose(v[1:k], v[: k - 1] + (1.2 - v[: k - 1]) / 20 * 0.5, atol=2e-3)
    np.testing.assert_allclose(thr[k] - thr[k - 1], 0.05, atol=2e-3)
    assert u[k] > thr[k - 1]
    assert v[k] == 0
    np.testing.assert_array_equal(u[:k], v[:k])
    assert (v[k : k + 6] == 0).all()
    assert v[k + 6] > 0
    np.testing.assert_array_equal(rfr[k : k + 7], 0.5 * np.arange(1, 8))
    assert f"the first at {t[k]:g} ms" in told[27]
    assert Path(told[28]).read_bytes().startswith(b"\x89PNG")


def test_too_little_current(example, tmp_path, capsys):
    example.main(["--current", "0.1", "--out", str(tmp_path)])
    assert "0 steps with the output at 1 in 300 ms; more current" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--current", "--refract-time", "--dt", "--duration"])
def test_numbers_have_bounds(example, flag, refused):
    for text in BAD_NUMBERS:
        assert f"argument {flag}: expected a number" in refused(example.main, [flag, text])
    assert "--duration: expected 10 to 1000000 steps" in refused(example.main, ["--duration", "1", "--dt", "0.2"])


def test_a_folder_to_write_to_is_tried_before_the_work(example, bad_folder, monkeypatch, refused):
    monkeypatch.setattr(example, "simulate", None)
    assert f"--out: cannot write to {bad_folder}: " in refused(example.main, ["--out", bad_folder])
