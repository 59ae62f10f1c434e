"""The example of firing rates, and its point: as dt falls, the cell fires as theory says."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from conftest import BAD_NUMBERS

pytest.importorskip("matplotlib")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    return importlib.import_module("fi_curve")


def test_rates_converge_to_theory_in_first_order(example):
    currents = np.random.default_rng(0).uniform(0.6, 4, 200).astype(np.float32)
    over = {"tau_m": [10.0, 20.0, 30.0], "thr": [0.4, 0.5, 0.3], "refract_time": [0.0, 2.0, 5.0]}
    expected = example.analytic(currents, *(np.array(x)[:, None] for x in over.values()))
    steps = np.array([0.4, 0.2, 0.1, 0.05])
    errors = [np.abs(example.simulated(over, dt, 600.0, currents) / expected - 1).mean() for dt in steps]
    order = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.85 < order < 1.15
    assert errors[-1] < 0.01


def test_no_current_below_threshold_fires(example):
    over = {"thr": [0.5]}
    rates = example.simulated(over, 0.1, 300.0, np.array([0.1, 0.5, 0.52, 1.0], np.float32))
    np.testing.assert_array_equal(rates[0] > 0, [False, False, True, True])


def test_the_papers_curve_is_near_its_tanh(example):
    difference = example.paper_curve() - 0.82 * np.tanh(0.08 * example.PAPER_CURRENTS)
    assert np.abs(difference).max() < 0.2
    assert np.abs(difference).mean() < 0.06


def test_the_example_runs(example, tmp_path, capsys):
    example.main(["--dt", "0.2", "--duration", "100", "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "largest" in out
    assert "--duration 100 is too short: " in out
    assert (tmp_path / "out" / "fi_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flag", ["--dt", "--duration"])
def test_numbers_have_bounds(example, flag, refused):
    for text in BAD_NUMBERS:
        assert f"argument {flag}: expected a number" in refused(example.main, [flag, text])
    assert "--duration: expected 10 to 1000000 steps" in refused(example.main, ["--duration", "1", "--dt", "0.2"])


def test_a_folder_to_write_to_is_tried_before_the_work(example, bad_folder, monkeypatch, refused):
    monkeypatch.setattr(example, "simulated", None)
    assert f"--out: cannot write to {bad_folder}: " in refused(example.main, ["--out", bad_folder])
