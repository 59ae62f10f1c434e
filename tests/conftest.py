"""Options, fixtures and cases shared by the tests."""

import functools
import os
from importlib.util import find_spec
from pathlib import Path

import chex
import errors
import jax
import jax.monitoring
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import slif

# For the whole suite: the package aligns every [N] with [..., N] itself.
jax.config.update("jax_numpy_rank_promotion", "raise")
# On a GPU the scan rounds every product, and the kernels contract them as a CPU does.
ON_GPU = jax.default_backend() == "gpu"
if ON_GPU:  # for the tests' own products, for which GPUs use TF32
    jax.config.update("jax_default_matmul_precision", "highest")
# A busy machine must not fail a test.
settings.register_profile("slif", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slif")

FIELDS = ("j", "v", "s", "thr", "rfr", "tols", "surrogate")
RECORDS = (*FIELDS, "s_packed", "spike_count", "first_spike_time")
N_STEPS, BATCH, N_UNITS, DT = 40, 3, 11, 0.25

# Every mechanism alone, and those that interact; the voltage surrogate takes another path through the code.
MECHANISMS = {
    "plain": {},
    "refractory": {"refract_time": 1.0},
    "sticky": {"refract_time": 1.0, "sticky_spikes": True},
    "gain": {"thr_gain": 0.05},
    "leak": {"thr_leak": 0.01},
    "sparsity": {"rho_b": 0.01},
    "inhibition": {"resist_inh": 0.3},
    "everything": {
        "resist_inh": 0.3,
        "refract_time": 0.75,
        "sticky_spikes": True,
        "thr_gain": 0.02,
        "thr_leak": 0.005,
        "thr_persist": True,
    },
    "sparse_everything": {"resist_inh": 0.3, "refract_time": 0.75, "sticky_spikes": True, "rho_b": 0.005},
    "soft": {"reset": "subtract", "refract_time": 0.75, "sticky_spikes": True, "thr_gain": 0.02},
    "voltage": {"refract_time": 0.75, "thr_gain": 0.02, "surrogate": slif.arctan()},
}


def make_params(mechanism="plain", n_units=N_UNITS, **overrides):
    arguments = {"tau_m": 20.0, "resist_m": 1.5, "thr": 0.4, **MECHANISMS[mechanism], **overrides}
    return slif.init_params(jax.random.PRNGKey(7), n_units, **arguments)


def make_currents(shape=(N_STEPS, BATCH, N_UNITS), seed=0):
    """Strong enough that most units fire within a few steps, now and then negative."""
    return np.random.default_rng(seed).uniform(-3, 12, shape).astype(np.float32)


def make_state(params, batch=(BATCH,), seed=5):
    """As in the middle of a run: units far from or near their thresholds, refractory or not, fired or not."""
    rng, shape = np.random.default_rng(seed), (*batch, params.n_units)
    fields = {
        "j": rng.uniform(-3, 12, shape),
        "v": rng.uniform(-0.5, 0.6, shape),
        "s": rng.integers(0, 2, shape),
        "thr": rng.uniform(0.3, 0.5, shape),
        "rfr": DT * rng.integers(1, 8, shape),
        "tols": DT * rng.integers(0, 8, shape),
        "surrogate": rng.uniform(0, 1, shape),
    }
    return slif.SLIFState(**{name: jax.numpy.asarray(x, params.thr.dtype) for name, x in fields.items()})


def assert_same(actual, expected):
    """Equality of structure and of every leaf, bit for bit except the payload of NaN."""
    if ON_GPU:
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    else:
        chex.assert_trees_all_equal(actual, expected)


def assert_agree(actual, expected, case=""):
    """Two ways to the same numbers: spikes and times are equal, the rest to within rounding."""
    assert actual.keys() == expected.keys()
    for name in actual:
        if name in ("u", "v", "thr", "j", "surrogate") or (ON_GPU and name in ("tols", "first_spike_time")):
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6, atol=1e-6, err_msg=f"{case} {name}")
        else:
            np.testing.assert_array_equal(actual[name], expected[name], err_msg=f"{case} {name}")


# LLVM takes half the time of a compilation; only for results compared to within rounding.
jit_quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Not accepted as a number by any option of an example.
BAD_NUMBERS = ("inf", "nan", "1e30", f"{10**30}", "-1", "x", "")


def enable_x64():
    """The context in which JAX has float64, under the name that the installed JAX uses."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def pytest_addoption(parser):
    parser.addoption("--configurations", type=int, default=20, help="random configurations to run by the reference")
    parser.addoption("--require-reference", action="store_true", help="fail, not skip, where ngclearn is absent")
    parser.addoption("--errors", action="store_true", help="print how far apart the compared numbers were")


def pytest_configure(config):
    if config.getoption("--errors"):
        config.pluginmanager.register(errors.Errors())
    keep_programs(config)


def keep_programs(config):
    """Keeps what XLA compiles in pytest's cache, for other workers and the next run; `compilations` still counts it.

    Not if the user has set a folder, nor if no file can be made.
    """
    if not hasattr(config, "cache") or jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = config.cache.mkdir("xla")
    except OSError:
        return
    if os.access(folder, os.W_OK):
        # About an entry that another worker is writing, or was when it was killed; the program is compiled again.
        config.addinivalue_line(
            "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning"
        )
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def ngclearn(request):
    """Skips if the reference is not installed, unless it is required."""
    if find_spec("ngclearn") is None:
        if request.config.getoption("--require-reference"):
            pytest.fail("--require-reference: ngclearn is not installed")
        pytest.skip("ngclearn is not installed")


@pytest.fixture
def refused(capsys):
    """A function that runs an example's main, asserts that it ends with code 2 and one line, and returns that line."""

    def run(main, arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
        return err

    return run


@pytest.fixture(params=["read-only", "a file", "under a file"])
def bad_folder(request, tmp_path):
    """A folder in which no file can be made."""
    if request.param == "read-only":
        folder = tmp_path / "folder"
        folder.mkdir(0o555)
        if not os.access(folder, os.W_OK):
            return folder
        if not Path("/proc/self").is_dir():
            pytest.skip("for root every folder is writable, but for those of /proc")
        return Path("/proc/self")
    (tmp_path / "file").write_text("mine")
    return tmp_path / ("file" if request.param == "a file" else "file/folder")


_compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: event == "/jax/core/compile/backend_compile_duration" and _compiled.append(duration)
)


@pytest.fixture
def compilations():
    """A function that returns how many programs XLA has compiled since the last call."""
    seen = len(_compiled)

    def count():
        nonlocal seen
        new, seen = len(_compiled) - seen, len(_compiled)
        return new

    return count
