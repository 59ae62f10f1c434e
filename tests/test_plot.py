"""Plots: records are drawn on the given Axes, in their colours, and nothing else changes."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DT, N_UNITS, make_currents, make_params

import slif

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from slif import plot  # noqa: E402


@pytest.fixture(autouse=True)
def close():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    plt.close("all")


@pytest.fixture(scope="module")
def recorded():
    params = make_params("everything")
    record = ("j", "v", "thr", "s", "rfr", "s_packed")
    return params, slif.simulate(params, slif.init_state(params, 3), make_currents(), dt=DT, record=record)[1]


def ticks(ax):
    """The points (t, n) of the ticks."""
    (lines,) = ax.collections
    return {(round(float(x[0, 0]), 6), round(float(x[:, 1].mean()))) for x in lines.get_segments()}


def pixels(ax):
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())[..., :3].astype(int)


# --- raster ---


def test_a_tick_for_each_spike(recorded):
    s = np.asarray(recorded[1]["s"])[:, 1]
    expected = {(round(2 + k * DT, 6), n) for k, n in zip(*np.nonzero(s), strict=True)}
    of_bits = {"s_packed": recorded[1]["s_packed"]}
    for given, arguments in (
        (s, {}),
        (jnp.asarray(s, jnp.bfloat16), {}),
        (s.astype(bool), {}),
        (s.astype(np.uint8)[::1], {}),
        (recorded[1], {"row": 1}),
        (of_bits, {"row": (1,), "n_units": N_UNITS}),
    ):
        ax = plot.raster(given, dt=DT, t0=2.0, **arguments)
        assert ticks(ax) == expected
        assert ax.get_xlim() == (2, 2 + len(s) * DT)
        assert ax.get_ylim() == (-0.5, N_UNITS - 0.5)


@pytest.mark.parametrize("shape", [(400, 10_000), (100_000, 10), (3, 151), (601, 301)])
def test_many_become_an_image(shape):
    s = np.random.default_rng(0).random(shape) < np.linspace(0, 0.4, shape[1])
    (image,) = plot.raster(s, dt=0.5).images
    alpha = image.get_array()[..., 3]
    bins = min(shape[0], 600)
    assert alpha.shape == (min(shape[1], 300), bins * -(-600 // bins))  # a few steps are repeated, so as not to blur
    assert image.get_extent() == [0, shape[0] * 0.5, -0.5, shape[1] - 0.5]
    assert image.origin == "lower"
    # The last units fire the most, and the bins keep their share of it.
    thirds = np.array_split(alpha.mean(1), 3)
    assert thirds[0].mean() < thirds[1].mean() < thirds[2].mean()
    assert 0.5 < alpha.max() <= 1


@pytest.mark.parametrize("n", [151, 299, 300, 301, 10_000])
def test_a_single_spike_is_seen_among_many_units(n):
    s = np.zeros((50, n), bool)
    s[20, n // 2] = True
    alpha = plot.raster(s).images[0].get_array()[..., 3]
    assert np.count_nonzero(alpha) == 12
    assert (alpha[n // 2 * min(n, 300) // n, 20 * 12 : 21 * 12] == 1).all()


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 0), (0, 200), (7, 200)])
def test_an_empty_raster(shape):
    assert plot.raster(np.zeros(shape)).get_xlabel() == "time, ms"


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("n", [10, 10_000])
def test_spikes_stand_out_from_the_background(style, n):
    s = np.random.default_rng(0).random((200, n)) < 0.02
    with plt.style.context(style):
        ax = plot.raster(s)
        image = pixels(ax)
    inside = ax.get_window_extent()
    height = image.shape[0]
    inside = image[height - int(inside.y1) + 3 : height - int(inside.y0) - 3, int(inside.x0) + 3 : int(inside.x1) - 3]
    background = np.array(matplotlib.colors.to_rgb(ax.get_facecolor())) * 255
    contrast = np.abs(inside - background).max(-1)
    assert contrast.max() > 200
    assert 0.003 < (contrast > 60).mean() < 0.9


# --- traces ---


def test_traces_are_what_was_recorded(recorded):
    params, out = recorded
    axes = plot.traces(out, params=params, units=[4, 0], row=2, dt=DT, t0=1.0)
    assert [ax.get_ylabel() for ax in axes] == ["current", "unit 4", "unit 0"]
    for line, unit in zip(axes[0].lines, (4, 0), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), out["j"][:, 2, unit])
    for ax, unit in zip(axes[1:], (4, 0), strict=True):
        v, thr = ax.lines
        np.testing.assert_array_equal(v.get_xdata(), 1 + np.arange(len(out["v"])) * DT)
        np.testing.assert_array_equal(v.get_ydata(), out["v"][:, 2, unit])
        np.testing.assert_array_equal(thr.get_ydata(), out["thr"][:, 2, unit])
        spikes, shades = ax.collections
        times = [segment[0, 0] for segment in spikes.get_segments()]
        np.testing.assert_allclose(times, 1 + np.flatnonzero(out["s"][:, 2, unit]) * DT)
        assert min(segment[0, 1] for segment in spikes.get_segments()) > v.get_ydata().max()
        # With sticky spikes the output is up from the raw spike on until the refractory period ends.
        raw = np.flatnonzero(np.asarray(out["rfr"])[:, 2, unit] == np.float32(DT))
        starts = [round(float(path.vertices[:, 0].min()), 6) for path in shades.get_paths()]
        assert set(starts) <= {round(1 + (k + 1) * DT, 6) for k in raw}
        assert len(starts) > 2


@pytest.mark.parametrize("names", [("v",), ("s",), ("j",), ("v", "s"), ("thr",), ("j", "s", "thr")])
def test_traces_of_what_there_is(names, recorded):
    axes = plot.traces({name: recorded[1][name] for name in names}, row=0)
    assert len(axes) == 3 + ("j" in names)
    assert all(ax.lines or ax.collections for ax in axes[: 1 if names == ("j",) else None])
    pixels(axes[0])


def test_traces_of_an_array():
    v = np.random.default_rng(0).random((20, 2))
    axes = plot.traces(v)
    assert [ax.get_ylabel() for ax in axes] == ["unit 0", "unit 1"]
    np.testing.assert_array_equal(axes[1].lines[0].get_ydata(), v[:, 1])


def test_traces_with_what_is_not_finite():
    v = np.full((20, 1), np.nan)
    pixels(plot.traces({"v": v, "s": np.ones((20, 1)), "thr": v})[0])
    pixels(plot.traces({"v": np.zeros((0, 1)), "s": np.zeros((0, 1))})[0])


# --- surrogates ---


def test_surrogates_are_the_slopes():
    x = np.linspace(-2, 2, 9)
    ax = plot.surrogates({"a": slif.arctan(3.0), "b": slif.secant()}, x=x)
    for line, surrogate in zip(ax.lines, (slif.arctan(3.0), slif.secant()), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), surrogate(x.astype(np.float32)))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b (current)"]
    assert ax.get_xlabel() == "u - thr, or i"
    assert plot.surrogates(slif.boxcar()).get_legend() is None
    everything = plot.surrogates()
    constructors = {name for name in slif.__all__ if isinstance(getattr(slif, name), type(slif.secant))}
    known = {name for name in constructors if name in vars(slif.surrogate)} - {"custom"}
    drawn = {text.get_text().split()[0] for text in everything.get_legend().get_texts()}
    assert drawn == known


# --- the Axes ---


def test_given_axes_are_used(recorded):
    _, (one, *several) = plt.subplots(4, 1)
    count = len(plt.get_fignums())
    assert plot.raster(np.eye(3), ax=one) is one
    assert plot.surrogates(ax=one) is one
    assert list(plot.traces(recorded[1], units=[0, 1], row=0, ax=several)) == several
    assert plot.traces(np.eye(3), units=1, ax=one)[0] is one
    assert len(plt.get_fignums()) == count


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda out: plot.raster(out), ValueError, r"recorded: expected shape \[T, N\].*row"),
        (lambda out: plot.raster(out, row=3), ValueError, "row: expected an index into"),
        (lambda out: plot.raster(out, row=(0, 0)), ValueError, "row"),
        (lambda out: plot.raster(np.ones(3)), ValueError, "recorded: expected shape"),
        (lambda out: plot.raster({"v": np.ones((3, 3))}), ValueError, "'s' or 's_packed'"),
        (lambda out: plot.raster(np.array([["a"]])), TypeError, "recorded: expected numbers"),
        (lambda out: plot.raster(np.eye(3), dt=0.0), ValueError, "dt"),
        (lambda out: plot.raster(np.eye(3), t0="a"), TypeError, "t0"),
        (lambda out: plot.traces(out, units=[0, N_UNITS], row=0), ValueError, "units: expected units below 11, got 11"),
        (lambda out: plot.traces(out, units=-1, row=0), ValueError, "units"),
        (lambda out: plot.traces(out, units=[], row=0), ValueError, "units"),
        (lambda out: plot.traces(np.zeros((2, 30)), units=range(30)), ValueError, "raster"),
        (lambda out: plot.traces({"a": np.ones((3, 3))}), ValueError, "recorded: expected some of j"),
        (lambda out: plot.traces({"v": np.eye(3), "s": np.eye(4)}), ValueError, "one shape"),
        (lambda out: plot.traces(np.eye(3), ax=[3]), ValueError, "ax: expected 3 Axes"),
        (lambda out: plot.traces(out, row=0, params=3), TypeError, "params"),
        (lambda out: plot.surrogates({"a": 3}), TypeError, "which"),
        (lambda out: plot.surrogates(x=[np.nan]), ValueError, "x"),
    ],
)
def test_bad_input(call, error, message, recorded):
    with pytest.raises(error, match=message):
        call(recorded[1])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.delitem(sys.modules, "slif.plot")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        importlib.import_module("slif.plot")
