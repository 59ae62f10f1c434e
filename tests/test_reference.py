"""Side by side with the reference cell, over random configurations: spike for spike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIELDS, assert_agree

import slif

N_STEPS = 200


pytestmark = pytest.mark.usefixtures("ngclearn")


def pytest_generate_tests(metafunc):
    if "configuration" in metafunc.fixturenames:
        metafunc.parametrize("configuration", range(metafunc.config.getoption("--configurations")))


def draw(rng):
    """Every constructor argument at random; each mechanism is present half of the time."""

    def sometimes(low, high):
        return float(rng.uniform(low, high)) if rng.random() < 0.5 else 0.0

    arguments = {
        "tau_m": float(rng.uniform(5, 60)),
        "resist_m": float(rng.uniform(0.3, 4)),
        "thr": float(rng.uniform(0.05, 0.8)),
        "thr_jitter": sometimes(0, 0.1),
        "refract_time": sometimes(0, 4),
        "sticky_spikes": bool(rng.integers(2)),
        "thr_gain": sometimes(0, 0.1),
        "thr_leak": sometimes(0, 0.02),
        "rho_b": sometimes(0, 0.02) if rng.random() < 0.5 else 0.0,
        "resist_inh": sometimes(0, 1),
        "thr_persist": bool(rng.integers(2)),
    }
    run = {
        "dt": float(rng.choice([0.1, 0.25, 1.0, rng.uniform(0.1, 3), 3.0])),
        "batch_size": int(rng.integers(1, 9)),
        "n_units": int(rng.choice([1, 5, 8, 16])),
        "seed": int(rng.integers(2**31)),
    }
    shape = (N_STEPS, run["batch_size"], run["n_units"])
    # Large enough to move v by about a threshold in ten steps, of both signs.
    scale = 2 * arguments["thr"] * max(1, arguments["tau_m"] / run["dt"] / 10) / arguments["resist_m"]
    currents = scale * (rng.normal(1, 1, shape) * (rng.random(shape) < 0.7))
    return arguments, run, currents.astype(np.float32)


class Reference:
    """The reference cell, driven from outside its training loops; its whole state is a dict, passed in and returned."""

    def __init__(self, name, n_units, batch_size, seed, **arguments):
        from ngclearn import Context, MethodProcess
        from ngclearn.components.neurons.spiking.sLIFCell import SLIFCell
        from ngcsimlib.global_state import stateManager

        with Context(name):
            key = jax.random.PRNGKey(seed)
            self.cell = SLIFCell("cell", n_units, batch_size=batch_size, key=key, **arguments)
            self._advance = MethodProcess("advance") >> self.cell.advance_state
            self._reset = MethodProcess("reset") >> self.cell.reset
        self._names = {field: getattr(self.cell, field).target for field in FIELDS}
        self._shape = (batch_size, n_units)
        self.state = self._full({key: x for key, x in stateManager.state.items() if key.startswith(f"{name}:")})

    def _full(self, state):
        """The thresholds are [1, N] until the first step, which a scan does not allow."""
        return state | {self._names["thr"]: jnp.broadcast_to(state[self._names["thr"]], self._shape)}

    @functools.partial(jax.jit, static_argnums=0)
    def _run(self, state, currents, times, dt):
        def body(state, x):
            j, t = x
            keywords = self._advance.pack_keywords(t=t, dt=dt)
            state, _ = self._advance.run.compiled(state | {self._names["j"]: j}, keywords)
            return state, {field: state[self._names[field]] for field in FIELDS}

        return jax.lax.scan(body, state, (currents, times))

    def run(self, currents, times, dt):
        self.state, out = self._run(self.state, currents, times, np.float32(dt))
        return out

    def reset(self):
        state, _ = self._reset.run.compiled(self.state, [])
        self.state = self._full(state)


@pytest.mark.filterwarnings("ignore:thr_jitter:UserWarning")  # now and then drawn as large as thr
def test_spikes_are_those_of_the_reference(configuration):
    rng = np.random.default_rng([2017, configuration])
    arguments, run, currents = draw(rng)
    dt, batch_size, n_units, seed = (run[name] for name in ("dt", "batch_size", "n_units", "seed"))
    reference = Reference(f"configuration{configuration}", n_units, batch_size, seed, **arguments)
    params = slif.init_params(jax.random.PRNGKey(seed), n_units, **arguments)

    np.testing.assert_array_equal(params.thr, reference.cell.threshold0[0])
    if params.inh_weights is not None:
        np.testing.assert_array_equal(params.inh_weights, reference.cell.inh_weights)

    state = slif.init_state(params, batch_size)
    half = N_STEPS // 2
    for window in (currents[:half], currents[half:]):
        # The clock starts again as well, at the times that `simulate` uses.
        times = np.arange(half, dtype=np.float32) * np.float32(dt)
        expected = reference.run(window, times, dt)
        state, out = slif.simulate(params, state, window, dt=dt, record=FIELDS)
        assert expected["s"].any()
        assert_agree(out, expected)
        reference.reset()
        state = slif.reset(params, state)
        assert_agree(vars(state), {field: reference.state[reference._names[field]] for field in FIELDS})


def test_the_configurations_cover_what_they_should():
    """Otherwise both might agree by being silent."""
    drawn = [draw(np.random.default_rng([2017, n])) for n in range(20)]
    for name in ("thr_jitter", "refract_time", "thr_gain", "thr_leak", "rho_b", "resist_inh", "thr_persist"):
        assert {bool(arguments[name]) for arguments, *_ in drawn} == {True, False}, name
    assert {run["batch_size"] for _, run, _ in drawn} == set(range(1, 9))
    assert min(run["dt"] for _, run, _ in drawn) == 0.1
    assert max(run["dt"] for _, run, _ in drawn) == 3.0
    assert all(currents.min() < 0 for *_, currents in drawn)


def test_hyperparameters_are_those_of_the_reference():
    from ngclearn.components.neurons.spiking.sLIFCell import SLIFCell

    told = SLIFCell.help()
    ours = slif.describe()
    assert ours["hyperparameters"].keys() - {"reset"} == told["hyperparameters"].keys()  # there it always sets v to 0
    assert ours["dynamics"] == told["dynamics"]
    for kind in ("inputs", "states", "outputs"):
        assert ours[kind].keys() == told["compartments"][kind].keys() - {"key"}
