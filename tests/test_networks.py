"""The recipes for networks: each runs after the page's first block only, and does what it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same
from flax import nnx
from pages import ROOT, recipes, run_blocks

import slif

PAGE = ROOT / "examples" / "networks.md"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the first block of the page and one recipe."""
    monkeypatch.chdir(tmp_path)
    head = run_blocks(recipes(PAGE)[None], PAGE)

    def run(title):
        names = run_blocks(recipes(PAGE)[title], PAGE, dict(head))
        changed = [name for name in head if name != "__builtins__" and names[name] is not head[name]]
        assert changed == []  # so that the recipes run in any order
        return names

    with jax.numpy_rank_promotion("allow"):  # JAX's default, which readers have
        yield run


def simulate(r, currents, **arguments):
    return slif.simulate(r["params"], None, currents, dt=r["dt"], **arguments)[1]


def test_a_recurrent_layer(run):
    r = run("A recurrent layer")
    alone = simulate(r, r["currents"])["s"]
    assert 0.05 < r["spikes"].mean() < 0.9
    for name in ("linen_spikes", "nnx_spikes", "same"):
        np.testing.assert_array_equal(r[name], r["spikes"], err_msg=name)
    np.testing.assert_array_equal(r["spikes"][0], alone[0])  # the feedback comes a step later
    assert (r["spikes"] != alone).any()


def test_a_layer_that_never_fires(run):
    """The page's table is what its code prints, as far as other versions of JAX round alike."""
    r = run("A layer that never fires")
    rows = [line.split("|")[2:6] for line in PAGE.read_text().splitlines() if re.match(r"\|.*(rate|norm) \|", line)]
    table = np.array(rows, float)
    expected = np.stack([r[name] for name in ("rates", "norms", "silent_rates", "silent_norms")])
    np.testing.assert_allclose(table, expected, rtol=0.1, atol=6e-4)
    assert (table[0] > 0.05).all()
    assert (table[2, 1:] == 0).all()


def test_a_convolutional_network(run):
    r = run("A convolutional network")
    assert r["logits"].shape == (4, 10)
    assert len(np.unique(r["logits"])) > 10
    variables = r["variables"]["params"]["layers_0"]
    shared = jax.jit(r["Layer"](4).apply)({"params": variables}, r["images"])
    thr = np.tile(variables["SLIF_0"]["learned_thr"], 64)
    own = jax.jit(r["Layer"](4, per_pixel=True).apply)
    np.testing.assert_array_equal(own({"params": variables | {"SLIF_0": {"learned_thr": thr}}}, r["images"]), shared)
    assert 0.05 < shared.mean() < 0.9


def test_an_ensemble(run):
    r = run("An ensemble")
    members = [jax.tree.map(lambda x, k=k: x[k], r["members"]) for k in range(5)]
    counts = np.stack([r["run"](*member)["spike_count"] for member in members])
    np.testing.assert_allclose(r["votes"], counts.mean(0), rtol=1e-6)
    assert (counts[1:] != counts[0]).any((1, 2)).all()
    assert_same(r["first"], members[0])


def test_reading_out_membranes(run):
    r = run("Reading out membranes")
    assert r["losses"][-1] < 0.1 * r["losses"][0]
    assert r["plain_losses"][-1] < 0.1 * r["plain_losses"][0]
    before, after = (r[name]["params"]["layers_3"] for name in ("variables", "trained"))
    assert all(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, after, before))))
    r["readout"] = r["readout"].replace(surrogate=slif.secant())
    assert_same(jax.jit(jax.grad(r["plain_loss"]))(r["weights"]), jax.tree.map(jnp.zeros_like, r["weights"]))


def test_losses_on_spike_counts_and_on_first_spikes(run):
    r = run("Losses on spike counts and on first spikes")
    first = simulate(r, r["currents"] @ r["weight"], record=("first_spike_time",))["first_spike_time"]
    np.testing.assert_array_equal(r["first_spike"](r["weight"]), np.minimum(first, 50))
    assert 0.2 < np.isfinite(first).mean() < 0.8
    assert r["losses"][-1] < 0.1 * r["losses"][0]
    np.testing.assert_array_equal(r["first_spike"](r["trained"]).argmin(-1), r["labels"])
    silent = jax.jit(jax.grad(lambda weight: r["first_spike"](weight)[np.isinf(first)].sum()))(r["weight"])
    assert np.abs(silent).max() > 0
    assert np.abs(jax.jit(jax.grad(r["by_count"]))(r["weight"])).max() > 0


def test_keeping_rates_in_a_range(run):
    r = run("Keeping rates in a range")
    before, after = (simulate(r, r["currents"] @ w)["s"].mean((0, 1)) for w in (r["weight"], r["trained"]))
    assert before.min() == 0
    assert before.max() > 0.3
    assert after.min() > 0.04
    assert after.max() < 0.21


def test_encoding_by_rate_latency_and_change(run):
    r = run("Encoding by rate, latency and change")
    x, latency = np.ravel(r["x"]), np.reshape(r["by_latency"].argmax(0), -1)
    np.testing.assert_allclose(r["by_rate"].mean(0).ravel(), x, atol=5 * 0.5 / np.sqrt(50))
    np.testing.assert_array_equal(r["by_latency"].sum(0), 1)
    assert (np.diff(latency[np.argsort(-x)]) >= 0).all()
    assert (latency.min(), latency.max()) < (3, 47)
    np.testing.assert_allclose(0.5 * np.cumsum(r["by_change"], 0), r["signal"], atol=0.25 + 1e-5)
    assert (r["by_change"] == 0).mean() > 0.5
    for name, spikes in r["spikes"].items():
        assert 0.01 < spikes.mean() < 0.5, name


def test_a_synapse_in_front(run):
    r = run("A synapse in front")
    since = np.arange(50)[:, None] - np.arange(50)
    kernel = np.where(since >= 0, (1 - r["dt"] / 5) ** np.maximum(since, 0), 0)
    np.testing.assert_allclose(r["current"], np.einsum("tk,k...->t...", kernel, r["raster"]), rtol=1e-4, atol=1e-5)
    before, middle = r["synapse"].apply({}, r["raster"][:20], return_state=True)
    after = r["synapse"].apply({}, r["raster"][20:], initial_state=middle)
    np.testing.assert_allclose(np.concatenate([before, after]), r["current"], rtol=1e-6)
    assert 0.01 < r["out"]["s"].mean() < 0.5


def test_learning_time_constants_and_thresholds(run):
    r = run("Learning time constants and thresholds")
    assert r["losses"][-1] < 0.05 * r["losses"][0]
    for name in ("log_tau", "thr"):
        before, after = (np.abs(r[which][name] - r["teacher"][name]).mean() for which in ("start", "learned"))
        assert after < 0.5 * before, name


def test_optax_on_the_parameters_themselves(run):
    r = run("Optax on the parameters themselves")
    assert r["losses"][-1] < 0.1 * r["losses"][0]
    changed = {name for name in vars(r["params"]) if not same(vars(r["params"])[name], vars(r["fitted"])[name])}
    assert changed == {"tau_m", "thr"}


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_saving_a_network_and_its_optimiser(run):
    r = run("Saving a network and its optimiser")
    assert_same(r["resumed"], r["uninterrupted"])
    assert not same(r["now"][0], r["weights"])
    assert_same(r["model_spikes"], r["again_spikes"])
    assert_same(nnx.state((r["model"], r["optimiser"])), nnx.state((r["again"], r["optimiser_again"])))


def test_a_cell_inside_equinox(run):
    r = run("A cell inside Equinox")
    assert r["losses"][-1] < 0.5 * r["losses"][0]
    assert (r["gradient"].cell.thr != 0).any()
    assert not np.any(r["gradient"].cell.tau_m)


def test_spike_train_statistics(run):
    r = run("Spike-train statistics")
    train = np.flatnonzero(r["raster"][:, 1, 2])
    assert len(train) > 2
    np.testing.assert_allclose(r["mean_isi"][1, 2], (train[-1] - train[0]) * r["dt"] / (len(train) - 1))
    np.testing.assert_allclose(r["hertz"], simulate(r, 2 * r["currents"])["s"].mean((0, 1)) * 1000 / r["dt"])
    assert 0 <= np.nanmin(r["cv"]) < np.nanmax(r["cv"]) < 2


def test_learning_online_by_e_prop(run):
    """What it learns, and that its update is minus the gradient where there is one step and so nothing to estimate."""
    r = run("Learning online, by e-prop")
    assert r["errors"][-100:].mean() < 0.2 * r["errors"][:100].mean()
    x, weight = r["currents"][:1], r["weight"]

    def loss(weight):
        return 0.5 * jnp.square(0.1 * simulate(r, x @ weight)["s"][0] - r["goal"]).sum(1).mean() / 0.1

    moved, _ = jax.jit(r["eprop"])(weight, x, 1.0)
    np.testing.assert_allclose(weight - moved, jax.jit(jax.grad(loss))(weight), rtol=1e-4, atol=1e-6)


def test_a_whole_network_to_nir_and_back(run):
    r = run("A whole network to NIR and back")
    assert_same(r["again"], r["network"])
    np.testing.assert_array_equal(r["same"], r["spikes"])
    assert 0.05 < r["spikes"].mean() < 0.9
    assert {("cell_1", "feedback_1"), ("feedback_1", "cell_1")} <= set(r["graph"].edges)
    assert len(r["graph"].edges) == 9
