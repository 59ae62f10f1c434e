"""Agreement with the float64 NumPy oracle, with JAX in float64 as well, so that rounding cannot hide a mistake."""

import jax
import numpy as np
import oracle
import pytest
from conftest import (
    BATCH,
    DT,
    FIELDS,
    MECHANISMS,
    N_UNITS,
    enable_x64,
    jit_quickly,
    make_currents,
    make_params,
)

import slif
from slif.hyperparameters import STATIC

# The oracle only has the secant's slope.
MECHANISMS_OF_THE_ORACLE = [name for name, arguments in MECHANISMS.items() if "surrogate" not in arguments]


@jit_quickly
def simulate(params, currents, dt, t0=0.0):
    return slif.simulate(params, slif.init_state(params, BATCH), currents, dt=dt, t0=t0, record=FIELDS)


step = jit_quickly(slif.step)


@pytest.fixture(autouse=True)
def x64():
    with enable_x64():
        yield


def cell_of(params):
    numbers = {name: np.float64(x) for name, x in vars(params).items() if isinstance(x, jax.Array)}
    return oracle.Cell(**numbers, **{name: getattr(params, name) for name in STATIC})


def assert_close(actual, expected):
    for name in FIELDS:
        assert actual[name].dtype == np.float64
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-12, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("mechanism", MECHANISMS_OF_THE_ORACLE)
def test_simulate(mechanism):
    params = make_params(mechanism, dtype=np.float64)
    cell, currents, dt, t0 = cell_of(params), make_currents().astype(np.float64), 0.3, 1.7
    expected = oracle.run(cell, currents, dt, t0)
    assert 0.02 < expected["s"].mean() < 0.98
    state, out = simulate(params, currents, dt, t0)
    assert_close(out, expected)
    assert_close(vars(state), {name: expected[name][-1] for name in FIELDS})


@pytest.mark.parametrize("mechanism", ["plain", "everything", "sparse_everything", "soft"])
def test_step_and_reset(mechanism):
    params = make_params(mechanism, dtype=np.float64)
    cell, currents = cell_of(params), make_currents().astype(np.float64)
    expected = oracle.run(cell, currents, DT, reset_at=20)
    state = slif.init_state(params, BATCH)
    for k, j in enumerate(currents):
        if k == 20:
            state = slif.reset(params, state)
        state = step(params, state, j, k * DT, DT)
        assert_close(vars(state), {name: expected[name][k] for name in FIELDS})


def test_random_parameters():
    """Every number at random, per unit where allowed; one structure, so that one compilation serves all."""
    rng = np.random.default_rng(0)
    highest = {"thr_gain": 0.1, "thr_leak": 0.02, "resist_inh": 1.0, "refract_time": 3.0}
    for _ in range(30):
        numbers = {name: rng.uniform(-high / 2, high, N_UNITS).clip(0) for name, high in highest.items()}
        numbers |= {"tau_m": rng.uniform(5, 60, N_UNITS), "resist_m": rng.uniform(0.5, 3, N_UNITS)}
        numbers |= {"thr": rng.uniform(0.1, 0.6, N_UNITS), "rho_b": rng.uniform(-0.02, 0.02, ())}
        params = make_params(**numbers, sticky_spikes=True, dtype=np.float64)
        currents, dt = make_currents(seed=rng.integers(2**31)).astype(np.float64), rng.uniform(0.1, 3)
        _, out = simulate(params, currents, dt)
        assert_close(out, oracle.run(cell_of(params), currents, dt))
