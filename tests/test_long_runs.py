"""Runs of tens of millions of steps: what stays exact in float32, up to where, and the way beyond."""

import numpy as np
import pytest
from conftest import make_params

import slif

DT, CHUNK, N_CHUNKS = 0.25, 10**6, 22
LIMIT = 2**24 * DT  # ms
PERIOD = 10  # steps, of the unit that fires; the other one is silent


@pytest.fixture(scope="module")
def example():
    params = make_params(n_units=2, tau_m=16.0, resist_m=1.0, thr_jitter=0.0, refract_time=1.0, thr=0.4)
    currents = np.zeros((CHUNK, 2), np.float32)
    currents[:, 0] = 4.0
    return params, currents


def test_a_run_of_any_length_fires_as_exactly_as_a_short_one(example):
    params, currents = example
    state = slif.init_state(params)
    for chunk in range(N_CHUNKS):
        state, out = slif.simulate(
            params, state, currents, dt=DT, t0=chunk * CHUNK * DT, record=("spike_count", "first_spike_time")
        )
        n_steps = (chunk + 1) * CHUNK
        np.testing.assert_array_equal(out["spike_count"], [CHUNK / PERIOD, 0])
        last = (n_steps - 1 - (n_steps - 1 - 6) % PERIOD) * DT
        np.testing.assert_array_equal(state.rfr, [n_steps * DT - last, min(1 + n_steps * DT, LIMIT)])
        if n_steps * DT <= LIMIT:
            assert float(state.tols[0]) == last
        else:
            assert 0 < abs(float(state.tols[0]) - last) <= 0.25 or float(state.tols[0]) == last
    assert n_steps * DT > LIMIT


def test_past_the_limit_times_are_rounded():
    params = make_params(n_units=1, thr_jitter=0.0, refract_time=0.0, thr=0.01)
    times = []
    state = slif.init_state(params)
    for t0 in (LIMIT - 4 * DT, LIMIT):
        out = slif.simulate(params, state, np.full((4, 1), 40, np.float32), dt=DT, t0=t0, record=("tols", "s"))[1]
        assert out["s"].all()
        times.append(np.asarray(out["tols"][:, 0], np.float64) - LIMIT)
    np.testing.assert_array_equal(times[0], [-1, -0.75, -0.5, -0.25])
    np.testing.assert_array_equal(times[1], [0, 0, 0.5, 1])


def test_the_clock_restarted_with_each_chunk_stays_exact(example):
    params, currents = example
    state, before, span = slif.init_state(params), 0.0, CHUNK * DT
    for _ in range(N_CHUNKS):
        state, _ = slif.simulate(params, state, currents, dt=DT, record=())
        before, state = before + span, state.replace(tols=state.tols - span)
        expected = before - ((before / DT - 1 - 6) % PERIOD + 1) * DT
        assert before + float(state.tols[0]) == expected
    assert before > LIMIT


@pytest.mark.parametrize(("dt", "blocked"), [(0.125, 40), (0.1, 51)])
def test_a_refractory_period_of_5_ms(dt, blocked):
    params = make_params(n_units=1, refract_time=5.0, thr=0.01, thr_jitter=0.0)
    out = slif.simulate(params, slif.init_state(params), np.full((200, 1), 90, np.float32), dt=dt)[1]
    (steps,) = np.nonzero(np.asarray(out["s"])[:, 0])
    assert set(np.diff(steps)) == {blocked}
