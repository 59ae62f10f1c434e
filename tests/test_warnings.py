"""Numbers that are valid but hardly intended: a warning at the line that passed them, none if they are unknown."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import slif
import slif.linen
import slif.nnx
from slif import _warn

N = 3
KEY = jax.random.key(0)
NUMBERS = {"tau_m": 0.5, "resist_m": 1.0, "thr": 0.4}
PARAMS = slif.init_params(KEY, N, **NUMBERS)
STATE = slif.init_state(PARAMS)
X = jnp.ones((2, N))
many = settings(max_examples=50, derandomize=True, deadline=None, database=None)


TOO_LONG = {
    "step": lambda: slif.step(PARAMS, STATE, X[0], 0.0, 1.01),
    "simulate": lambda: slif.simulate(PARAMS, STATE, X, dt=np.float32(1.01)),
    "replaced": lambda: slif.simulate(PARAMS.replace(tau_m=0.4), STATE, X, dt=1),
    "one unit": lambda: slif.step(PARAMS.replace(tau_m=np.array([9.0, 9.0, 0.4])), STATE, X[0], 0.0, 1.0),
    "others replaced": lambda: slif.simulate(PARAMS.replace(resist_m=2.0), STATE, X, dt=1.01),
    "sweep": lambda: slif.sweep(PARAMS, X, over={"resist_m": [1.0, 2.0]}, dt=1.01),
    "sweep over tau_m": lambda: slif.sweep(PARAMS, X, over={"tau_m": [9.0, 0.4]}, dt=1.0),
    "sweep over units": lambda: slif.sweep(PARAMS, X, over={"tau_m": [[9.0, 9.0, 0.4]]}, dt=1.0),
    "sweep over dt": lambda: slif.sweep(PARAMS, X, over={"dt": (0.5, 1.01)}),
    "sweep over a grid": lambda: slif.sweep(PARAMS, X, over=slif.grid(tau_m=[9.0, 0.4], dt=[0.5, 1.0])),
    "linen": lambda: slif.linen.SLIF(N, dt=1.01, **NUMBERS),
    "linen cell": lambda: slif.linen.SLIFCell(N, dt=1.01, **NUMBERS),
    "nnx": lambda: slif.nnx.SLIF(N, dt=1.01, **NUMBERS, rngs=nnx.Rngs(0)),
    "nnx cell": lambda: slif.nnx.SLIFCell(N, dt=1.01, **NUMBERS, rngs=nnx.Rngs(0)),
}
JITTERED = {
    "jitter": lambda: slif.init_params(KEY, N, **NUMBERS | {"thr": 0.04}),
    "jitter as large": lambda: slif.init_params(KEY, N, **NUMBERS, thr_jitter=0.4),
    "jitter of one unit": lambda: slif.init_params(KEY, N, **NUMBERS | {"thr": [0.4, np.inf, 0.0]}),
    "jitter, linen": lambda: slif.linen.SLIF(N, dt=0.5, **NUMBERS | {"thr": 0.04}).init(KEY, X),
    "jitter, nnx": lambda: slif.nnx.SLIF(N, dt=0.5, **NUMBERS | {"thr": 0.04}, rngs=nnx.Rngs(0)),
}
HALF = slif.init_params(KEY, N, **NUMBERS, dtype="bfloat16", refract_time=[1.0, 200.0, 1.0])
HALF_STATE = slif.init_state(HALF)
SLOW = NUMBERS | {"refract_time": 200.0, "dtype": "bfloat16"}
CLOCKS = {
    "step": lambda: slif.step(HALF, HALF_STATE, X[0], 0.0, 0.25),
    "simulate": lambda: slif.simulate(HALF, HALF_STATE, X, dt=np.float32(0.25)),
    "replaced": lambda: slif.simulate(PARAMS.replace(refract_time=1e7), STATE, X, dt=0.25),
    "sweep": lambda: slif.sweep(HALF, X, over={"resist_m": [1.0, 2.0]}, dt=0.25),
    "sweep over dt": lambda: slif.sweep(HALF, X, over={"dt": [1.0, 0.25]}),
    "sweep over a grid": lambda: slif.sweep(HALF, X, over=slif.grid(refract_time=[1, 200], dt=[0.25])),
    "linen": lambda: slif.linen.SLIF(N, dt=0.25, **SLOW),
    "linen cell": lambda: slif.linen.SLIFCell(N, dt=0.25, **SLOW),
    "nnx": lambda: slif.nnx.SLIF(N, dt=0.25, **SLOW, rngs=nnx.Rngs(0)),
    "nnx cell": lambda: slif.nnx.SLIFCell(N, dt=0.25, **SLOW, rngs=nnx.Rngs(0)),
}
NARROWED = {
    "init_params": lambda: slif.init_params(KEY, N, **NUMBERS, dtype="float64"),
    "spike_dtype": lambda: slif.simulate(PARAMS, STATE, X, dt=0.5, spike_dtype=np.int64),
    "sweep, spike_dtype": lambda: slif.sweep(PARAMS, X, over={"thr": [1.0]}, dt=0.5, spike_dtype="uint64"),
    "linen, dtype": lambda: slif.linen.SLIF(N, dt=0.5, **NUMBERS, dtype=jnp.float64),
    "nnx, dtype": lambda: slif.nnx.SLIF(N, dt=0.5, **NUMBERS, dtype=np.dtype("float64"), rngs=nnx.Rngs(0)),
}
WARNED = {name: (call, "^dt: forward Euler diverges") for name, call in TOO_LONG.items()}
WARNED |= {name: (call, "^thr_jitter: units with a threshold below 0") for name, call in JITTERED.items()}
WARNED |= {f"clock, {name}": (call, "^refract_time: a unit that has fired never") for name, call in CLOCKS.items()}
WARNED |= {name: (call, "^(spike_)?dtype: u?(float|int)64 needs jax_enable_x64") for name, call in NARROWED.items()}
STABLE = {
    "at the bound": lambda: slif.step(PARAMS, STATE, X[0], 0.0, 1.0),
    "dt on the device": lambda: slif.step(PARAMS, STATE, X[0], 0.0, jnp.float32(2)),
    "tau_m on the device": lambda: slif.simulate(PARAMS.replace(tau_m=jnp.float32(0.4)), STATE, X, dt=1.0),
    "traced": lambda: jax.jit(lambda p, s: slif.step(p, s, X[0], 0.0, 2.0))(PARAMS, STATE),
    "made inside jit": lambda: jax.jit(lambda s: slif.step(slif.init_params(KEY, N, **NUMBERS), s, X[0], 0.0, 2.0))(
        STATE
    ),
    "each point by itself": lambda: slif.sweep(PARAMS, X, over={"tau_m": [9.0, 0.4], "dt": [9.0, 0.4]}),
    "sweep at the bound": lambda: slif.sweep(PARAMS, X, over=slif.grid(tau_m=[9.0, 0.5], dt=[1.0])),
    "leaky integrator": lambda: slif.init_params(KEY, N, **NUMBERS | {"thr": np.inf}),
    "no jitter": lambda: slif.init_params(KEY, N, **NUMBERS | {"thr": 0.0, "thr_jitter": 0.0}),
    "negative on purpose": lambda: slif.init_params(KEY, N, **NUMBERS | {"thr": -0.01}),
    "jitter on the device": lambda: slif.init_params(KEY, N, **NUMBERS | {"thr_jitter": jnp.float32(0.4)}),
    "clock, float32": lambda: slif.simulate(PARAMS.replace(refract_time=200.0), STATE, X, dt=0.25),
    "clock, short": lambda: slif.simulate(HALF, HALF_STATE, X, dt=1.0),
    "clock, on the device": lambda: slif.step(HALF.replace(refract_time=HALF.tau_m * 400), HALF_STATE, X[0], 0.0, 0.25),
    "clock, each point by itself": lambda: slif.sweep(HALF, X, over={"refract_time": [1, 200], "dt": [0.25, 1]}),
    "whatever float there is": lambda: slif.init_params(KEY, N, **NUMBERS, dtype=float),
    "thr on the device": lambda: slif.init_params(KEY, N, **NUMBERS | {"thr": jnp.float32(0.01)}),
}


@pytest.mark.parametrize("name", WARNED)
def test_a_warning(name):
    call, message = WARNED[name]
    with pytest.raises(UserWarning, match=message):
        call()


@pytest.mark.parametrize(
    "name",
    [
        *("step", "simulate", "sweep", "linen", "nnx", "jitter", "jitter, linen", "jitter, nnx"),
        *("clock, simulate", "clock, nnx", "init_params", "spike_dtype", "linen, dtype", "nnx, dtype"),
    ],
)
def test_a_warning_names_the_line_of_the_caller(name):
    call, message = WARNED[name]
    with pytest.warns(UserWarning, match=message) as warned:
        call()
    assert {(warning.filename, warning.lineno) for warning in warned} == {(__file__, call.__code__.co_firstlineno)}


@pytest.mark.parametrize("name", STABLE)
def test_nothing_is_said_of_what_is_stable_or_unknown(name):
    STABLE[name]()  # a warning is an error


def test_once_a_line():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for _ in range(3):
            slif.step(PARAMS, STATE, X[0], 0.0, 2.0)
        slif.simulate(PARAMS, STATE, X, dt=2.0)
    assert len(warned) == 2


@many
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([float, np.float32, np.float64, np.array]))
def test_the_bound_is_that_of_euler(tau_m, dt, form):
    """A deviation from rest grows at each step exactly where there is a warning."""
    tau_m, dt = form(tau_m), float(form(dt))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _warn.euler(tau_m, dt)
    assert bool(warned) == (dt / float(tau_m) > 2)


@many
@given(st.floats(1e-3, 1e3), st.floats(0, 11), st.sampled_from(["bfloat16", "float16"]), st.booleans())
def test_the_clock_stops_where_it_is_told_so(dt, binades, dtype, dyadic):
    dtype = jnp.dtype(dtype)
    dt = 2.0 ** round(np.log2(dt)) if dyadic else dt
    refract_time = min(dt * 2**binades, 6e4)
    step, period = dtype.type(dt), dtype.type(refract_time)
    clock = step
    while clock < period and clock + step != clock:
        clock += step
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _warn.clock(refract_time, dt, dtype)
    assert bool(warned) == (clock < period)


def test_a_unit_that_is_warned_of_fires_once():
    states = {dtype: slif.init_params(KEY, N, **SLOW | {"dtype": dtype}) for dtype in ("bfloat16", "float32")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = {
            dtype: slif.simulate(
                params, slif.init_state(params), 9 * jnp.ones((1700, N)), dt=0.25, record=("spike_count",)
            )[1]["spike_count"].max()
            for dtype, params in states.items()
        }
    assert counts == {"bfloat16": 1, "float32": 3}


def test_what_an_array_was_made_from_is_forgotten_with_it():
    params = slif.init_params(KEY, N, **NUMBERS)
    kept = len(_warn._MADE_FROM)
    assert _warn.known(params.tau_m) == 0.5
    assert _warn.known(params.tau_m + 0) is None
    del params
    assert len(_warn._MADE_FROM) == kept - 1
