"""Traces of the reference cell itself, one configuration a file: spike for spike, by `step` and by `simulate`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import FIELDS, assert_agree, assert_same

import slif
from slif.kernels import OLDEST_JAX

TRACES = sorted((Path(__file__).parent / "data").glob("*.npz"))
# In the kernels' interpreter, whose programs take long to compile: a clock without dyadic fractions with sticky spikes,
# adaptation with a reset in between, jittered thresholds below 0. test_kernels.py compares the rest with the scan.
BY_KERNEL = ("nondyadic_dt", "persistent_reset", "negative_threshold")
# One of the traces has thresholds below 0.
pytestmark = pytest.mark.filterwarnings("ignore:thr_jitter:UserWarning")

BOOKKEEPING = ("name", "seed", "dt", "t0", "batch_size", "n_units", "reset_at")


def arguments(config):
    return {name: value for name, value in config.items() if name not in BOOKKEEPING}


def load(path):
    with np.load(path) as file:
        config = json.loads(str(file["config"]))
        trace = {name: file[name] for name in file.files if name != "config"}
    params = slif.init_params(jax.random.PRNGKey(config["seed"]), config["n_units"], **arguments(config))
    return config, params, trace


@pytest.fixture(params=TRACES, ids=lambda path: path.stem)
def golden(request):
    return load(request.param)


def test_there_are_traces():
    assert len(TRACES) == 19


def test_the_same_key_gives_the_same_thresholds_and_inhibition(golden):
    config, params, trace = golden
    assert_same(params.thr, trace["threshold0"][0])
    if params.inh_weights is not None:
        assert_same(params.inh_weights, trace["inh_weights"])
    with_inhibition = arguments(config) | {"resist_inh": jnp.float32(0)}
    drawn = slif.init_params(jax.random.PRNGKey(config["seed"]), config["n_units"], **with_inhibition)
    assert_same(drawn.inh_weights, trace["inh_weights"])
    np.testing.assert_array_equal(drawn.thr, params.thr)


def test_step(golden):
    config, params, trace = golden
    state = slif.init_state(params, config["batch_size"])
    for k, j in enumerate(trace["current"]):
        if k == config["reset_at"]:
            state = slif.reset(params, state)
        t = np.float32(config["t0"] + k * config["dt"])
        state = slif.step(params, state, j, t, config["dt"])
        assert_agree(vars(state), {name: trace[name][k] for name in FIELDS})


@pytest.mark.parametrize(
    ("path", "implementation"),
    [
        *(pytest.param(path, "xla", id=path.stem) for path in TRACES),
        *(pytest.param(TRACES[0].with_stem(name), "pallas", id=f"{name}-pallas") for name in BY_KERNEL),
    ],
)
def test_simulate(path, implementation):
    if implementation == "pallas" and jax.__version_info__ < OLDEST_JAX:
        pytest.skip("the fused kernels need a newer jax")
    config, params, trace = load(path)
    state, dt = slif.init_state(params, config["batch_size"]), config["dt"]
    windows = np.split(trace["current"], [config["reset_at"]] if config["reset_at"] else [])
    outs, k = [], 0
    for window in windows:
        if k:
            state = slif.reset(params, state)
        t0 = config["t0"] + k * dt
        state, out = slif.simulate(params, state, window, dt=dt, t0=t0, record=FIELDS, implementation=implementation)
        outs.append(out)
        k += len(window)
    out = {name: np.concatenate([out[name] for out in outs]) for name in FIELDS}
    assert_agree(vars(state), {name: out[name][-1] for name in FIELDS})
    # The clock t0 + k dt of `simulate` is float32: one rounding from the time that the reference was given.
    np.testing.assert_array_max_ulp(out.pop("tols"), trace["tols"], maxulp=1)
    assert_agree(out, {name: trace[name] for name in out})


def test_the_oracle_is_of_the_same_mind(golden):
    """In float64, spikes and thresholds are as recorded in float32, so that the oracle can be trusted elsewhere."""
    config, _, trace = golden
    if not (8 * config["dt"]).is_integer():
        pytest.skip("the refractory clock sums dt: where that is no dyadic fraction, float32 and float64 part")
    cell = oracle.Cell(
        thr=trace["threshold0"][0],
        inh_weights=trace["inh_weights"],
        **{name: x for name, x in arguments(config).items() if name not in ("thr", "thr_jitter")},
    )
    out = oracle.run(cell, trace["current"], config["dt"], config["t0"], reset_at=config["reset_at"])
    np.testing.assert_array_equal(out["s"], trace["s"])
    for name in FIELDS:
        np.testing.assert_allclose(out[name], trace[name], rtol=1e-5, atol=1e-5, err_msg=name)
