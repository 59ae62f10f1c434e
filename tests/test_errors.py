"""Bad input: the error says which argument, what was expected and what came, also while tracing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slif

N, B, T = 4, 2, 3
KEY = jax.random.PRNGKey(0)
NUMBERS = {"tau_m": 20.0, "resist_m": 1.0, "thr": 0.4}
NAN, INF = float("nan"), float("inf")


def init(**arguments):
    key, n_units = arguments.pop("key", KEY), arguments.pop("n_units", N)
    return slif.init_params(key, n_units, **NUMBERS | {"resist_inh": 0.5} | arguments)


PARAMS = init()
STATE = slif.init_state(PARAMS, B)
CURRENTS = jnp.zeros((T, B, N))


def init_case(exception, **argument):
    ((name, value),) = argument.items()
    return pytest.param(lambda *_: init(**argument), name, exception, id=f"init_params-{name}={value!r}"[:60])


def real_cases(name, *, shape=(2,), positive=False, low=None):
    """What no number of the cell may be."""
    bad_values = [NAN, INF, np.array([1.0, NAN, 1.0, 1.0]), *([0, -1.0] if positive else []), *([low] if low else [])]
    return [
        *(init_case(TypeError, **{name: value}) for value in ("0.5", None, True, 1j, np.array("a"), jnp.ones(N, bool))),
        *(init_case(ValueError, **{name: value}) for value in bad_values),
        *(init_case(ValueError, **{name: value}) for value in (np.ones(shape), jnp.ones(shape))),
    ]


INIT_PARAMS = [
    *(init_case(TypeError, key=value) for value in (0, None, np.zeros(2), jax.random.split(jax.random.key(0), 3))),
    *(init_case(TypeError, n_units=value) for value in (4.0, "4", None, True)),
    *(init_case(ValueError, n_units=value) for value in (0, -1)),
    *real_cases("tau_m", positive=True),
    *real_cases("resist_m"),
    *(case for case in real_cases("thr") if case.id != "init_params-thr=inf"),
    init_case(ValueError, thr=-INF),
    *real_cases("refract_time", low=-0.1),
    *real_cases("thr_gain"),
    *real_cases("thr_leak"),
    *real_cases("resist_inh"),
    *real_cases("rho_b", shape=(N,)),
    *real_cases("thr_jitter", shape=(N,), low=-0.1),
    *(init_case(TypeError, thr_persist=value) for value in (1, "yes", None)),
    *(init_case(TypeError, sticky_spikes=value) for value in (1, "yes", None)),
    *(init_case(TypeError, surrogate=value) for value in ("secant", max, 0.5)),
    *(init_case(TypeError, dtype=value) for value in (np.int32, "no dtype", complex, bool)),
]


def case(name, argument, exception, call):
    return pytest.param(call, argument, exception, id=name)


def step(params=None, state=None, j=None, t=0.0, dt=1.0):
    def call(p, s, currents):
        return slif.step(params or p, state or s, currents[0] if j is None else j, t, dt)

    return call


def simulate(params=None, state=None, currents=None, dt=1.0, **arguments):
    def call(p, s, c):
        return slif.simulate(params or p, state or s, c if currents is None else currents, dt=dt, **arguments)

    return call


def clocks(name, call, *, positive):
    """What neither dt nor a time may be."""
    values = [NAN, INF, np.ones(1), jnp.ones(N), *((0, -1.0, np.float32(0)) if positive else ())]
    return [
        *(case(f"{name}={value!r}"[:60], name, ValueError, call(**{name: value})) for value in values),
        *(case(f"{name}={value!r}", name, TypeError, call(**{name: value})) for value in ("1", None, True, 1j)),
    ]


STEP = [
    case("step-params", "params", TypeError, step(params={"tau_m": 20.0})),
    case("step-state", "state", TypeError, step(state={"v": 0.0})),
    case("step-j-list", "j", TypeError, step(j=[[0.0] * N] * B)),
    case("step-j-complex", "j", TypeError, step(j=np.ones((B, N), complex))),
    case("step-j-batch", "j", ValueError, step(j=jnp.ones((B + 1, N)))),
    case("step-j-units", "j", ValueError, step(j=jnp.ones((B, N + 1)))),
    case("step-j-unbatched", "j", ValueError, step(j=jnp.ones(N))),
    *clocks("t", step, positive=False),
    *clocks("dt", step, positive=True),
]

SIMULATE = [
    case("simulate-params", "params", TypeError, simulate(params=STATE)),
    case("simulate-state", "state", TypeError, simulate(state=PARAMS)),
    case("currents-without-time", "currents", ValueError, simulate(currents=jnp.zeros((B, N)))),
    case("currents-batch", "currents", ValueError, simulate(currents=jnp.zeros((T, B + 1, N)))),
    case("currents-batch-first", "currents", ValueError, simulate(currents=jnp.zeros((B, T, N)))),
    case("currents-units", "currents", ValueError, simulate(currents=jnp.zeros((T, B, N + 1)))),
    case("currents-list", "currents", TypeError, simulate(currents=[[[0.0] * N] * B] * T)),
    *clocks("dt", simulate, positive=True),
    *clocks("t0", simulate, positive=False),
    case("record-unknown", "record", ValueError, simulate(record=("s", "spikes"))),
    case("record-string", "record", TypeError, simulate(record="s")),
    case("record-none", "record", TypeError, simulate(record=None)),
    case("record-number", "record", TypeError, simulate(record=(0,))),
    case("spike_dtype-complex", "spike_dtype", TypeError, simulate(spike_dtype=complex)),
    case("spike_dtype-name", "spike_dtype", TypeError, simulate(spike_dtype="spikes")),
    case("valid-dtype", "valid", TypeError, simulate(valid=jnp.ones((T, B)))),
    case("valid-list", "valid", TypeError, simulate(valid=[[True] * B] * T)),
    case("valid-shape", "valid", ValueError, simulate(valid=np.ones((T, B, N), bool))),
    case("valid-batch", "valid", ValueError, simulate(valid=np.ones((T, B + 1), bool))),
    case("valid-time", "valid", ValueError, simulate(valid=np.ones((T + 1, B), bool))),
    case("checkpoint_every=0", "checkpoint_every", ValueError, simulate(checkpoint_every=0)),
    case("checkpoint_every=1.5", "checkpoint_every", TypeError, simulate(checkpoint_every=1.5)),
    case("checkpoint_every=True", "checkpoint_every", TypeError, simulate(checkpoint_every=True)),
    case("implementation-unknown", "implementation", ValueError, simulate(implementation="cuda")),
]


def bad_states():
    """A wrong leaf of the state, by every function that takes one."""
    leaves = {
        "shape": (ValueError, "thr", jnp.zeros(N)),
        "units": (ValueError, "rfr", jnp.zeros((B, N + 1))),
        "dtype": (TypeError, "s", jnp.zeros((B, N), jnp.bfloat16)),
        "bool": (TypeError, "s", jnp.zeros((B, N), bool)),
        "float": (TypeError, "tols", 0.0),
        "none": (TypeError, "j", None),
    }
    for what, (exception, field, leaf) in leaves.items():
        state = STATE.replace(**{field: leaf})
        for name, call in (("step", step), ("simulate", simulate), ("reset", reset)):
            yield case(f"{name}-state.{field}-{what}", f"state.{field}", exception, call(state=state))
    other = slif.init_state(slif.init_params(KEY, N + 1, **NUMBERS), B)
    for name, call in (("step", step), ("simulate", simulate), ("reset", reset)):
        yield case(f"{name}-state-of-other-params", "state.j", ValueError, call(state=other))


def bad_params():
    """Params put together by hand, by every function that takes them."""
    replacements = [
        (ValueError, "tau_m", -1.0),
        (ValueError, "tau_m", 0),
        (ValueError, "tau_m", np.array([1.0, 2.0])),
        (ValueError, "resist_m", NAN),
        (ValueError, "thr", 0.4),
        (ValueError, "refract_time", -1),
        (ValueError, "thr_gain", jnp.ones((N, N))),
        (ValueError, "thr_leak", INF),
        (ValueError, "rho_b", jnp.ones(N)),
        (ValueError, "resist_inh", jnp.ones((B, N))),
        (ValueError, "inh_weights", jnp.ones(N)),
        (ValueError, "inh_weights", None),
        (TypeError, "tau_m", None),
        (TypeError, "tau_m", "20"),
        (TypeError, "resist_m", True),
        (TypeError, "thr", jnp.zeros(N, jnp.int32)),
        (TypeError, "surrogate", None),
        (TypeError, "sticky_spikes", 1),
        (TypeError, "thr_persist", "no"),
    ]
    calls = {"step": step, "simulate": simulate, "reset": reset, "init_state": init_state}
    for exception, field, value in replacements:
        params = PARAMS.replace(**{field: value})
        for name, call in calls.items():
            yield case(f"{name}-params.{field}={value!r}"[:60], field, exception, call(params=params))
    slopes = PARAMS.replace(surrogate=slif.arctan(alpha=jnp.ones(N + 1)))
    for name, call in calls.items():
        yield case(f"{name}-params.surrogate-shape", "surrogate alpha", ValueError, call(params=slopes))


def reset(params=None, state=None, where=None):
    return lambda p, s, _: slif.reset(params or p, state or s, where=where)


def init_state(params=None, batch_shape=B):
    return lambda p, *_: slif.init_state(params or p, batch_shape)


OTHERS = [
    case("reset-params", "params", TypeError, reset(params={"tau_m": 20.0})),
    case("reset-state", "state", TypeError, reset(state=PARAMS)),
    case("reset-where-dtype", "where", TypeError, reset(where=jnp.ones(B))),
    case("reset-where-list", "where", TypeError, reset(where=[True, False])),
    case("reset-where-shape", "where", ValueError, reset(where=np.ones(B + 1, bool))),
    case("reset-where-units", "where", ValueError, reset(where=np.ones((B, N), bool))),
    case("detach-state", "state", TypeError, lambda p, *_: slif.detach(p)),
    case("init_state-params", "params", TypeError, lambda *_: slif.init_state(None)),
    case("batch_shape=-1", "batch_shape", ValueError, init_state(batch_shape=-1)),
    case("batch_shape=(2, -1)", "batch_shape", ValueError, init_state(batch_shape=(2, -1))),
    case("batch_shape=1.5", "batch_shape", TypeError, init_state(batch_shape=1.5)),
    case("batch_shape=(2.0,)", "batch_shape", TypeError, init_state(batch_shape=(2.0,))),
    case("batch_shape='2'", "batch_shape", TypeError, init_state(batch_shape="2")),
    case("batch_shape-none", "batch_shape", TypeError, init_state(batch_shape=None)),
    case(
        "batch_shape-of-batched-thresholds",
        "batch_shape",
        ValueError,
        lambda p, *_: slif.init_state(p.replace(thr=jnp.ones((3, N))), 2),
    ),
    case("pack_spikes-list", "s", TypeError, lambda *_: slif.pack_spikes([1, 0])),
    case("pack_spikes-complex", "s", TypeError, lambda *_: slif.pack_spikes(np.ones(3, complex))),
    case("pack_spikes-scalar", "s", ValueError, lambda *_: slif.pack_spikes(jnp.float32(1))),
    case("unpack_spikes-list", "packed", TypeError, lambda *_: slif.unpack_spikes([1], 8)),
    case("unpack_spikes-dtype", "packed", TypeError, lambda *_: slif.unpack_spikes(jnp.ones(1), 8)),
    case("unpack_spikes-scalar", "packed", ValueError, lambda *_: slif.unpack_spikes(jnp.zeros((), jnp.uint8), 8)),
    case("unpack_spikes-few", "packed", ValueError, lambda *_: slif.unpack_spikes(jnp.ones(1, jnp.uint8), 9)),
    case("unpack_spikes-many", "packed", ValueError, lambda *_: slif.unpack_spikes(jnp.ones(2, jnp.uint8), 8)),
    case("unpack_spikes-zero", "n_units", ValueError, lambda *_: slif.unpack_spikes(jnp.ones(1, jnp.uint8), 0)),
    case("unpack_spikes-float", "n_units", TypeError, lambda *_: slif.unpack_spikes(jnp.ones(1, jnp.uint8), 8.0)),
]


def bad_surrogates():
    numbers = {
        "secant": ("c1", "c2"),
        "fast_sigmoid": ("slope",),
        "sigmoid": ("slope",),
        "arctan": ("alpha",),
        "triangular": ("width",),
        "boxcar": ("width",),
        "gaussian": ("width",),
    }
    for name, arguments in numbers.items():
        make = getattr(slif, name)
        for argument in arguments:
            for exception, value in [
                *((ValueError, x) for x in (0, -1.0, NAN, INF, np.array([1.0, -1.0]))),
                *((TypeError, x) for x in ("25", None, True, 1j)),
            ]:
                yield case(
                    f"{name}-{argument}={value!r}",
                    argument,
                    exception,
                    lambda *_, make=make, argument=argument, value=value: make(**{argument: value}),
                )
    flags = {name: "detach_reset" for name in (*numbers, "straight_through") if name != "secant"}
    for name, flag in [*flags.items(), ("secant", "squared"), ("secant", "scaled")]:
        make = getattr(slif, name)
        yield case(f"{name}-{flag}", flag, TypeError, lambda *_, make=make, flag=flag: make(**{flag: 1}))
    yield case("custom-detach_reset", "detach_reset", TypeError, lambda *_: slif.custom(jnp.cos, detach_reset=None))
    yield case("custom-fn", "fn", TypeError, lambda *_: slif.custom(25.0))
    yield case("custom-wrt", "wrt", ValueError, lambda *_: slif.custom(jnp.cos, wrt="thr"))


CASES = [*INIT_PARAMS, *STEP, *SIMULATE, *bad_states(), *bad_params(), *OTHERS, *bad_surrogates()]


@pytest.mark.parametrize(("call", "argument", "exception"), CASES)
def test_bad_input(call, argument, exception):
    message = re.compile(rf"^{re.escape(argument)}: expected .+, got .+", re.DOTALL)
    with pytest.raises(exception, match=message):
        call(PARAMS, STATE, CURRENTS)
    with pytest.raises(exception, match=message):
        jax.eval_shape(call, PARAMS, STATE, CURRENTS)


def test_an_unknown_record_lists_the_known_ones():
    known = "j, v, s, thr, rfr, tols, surrogate, s_packed, spike_count, first_spike_time"
    with pytest.raises(ValueError, match=f"{known}, got spikes"):
        slif.simulate(PARAMS, STATE, CURRENTS, dt=1.0, record=("s", "spikes"))


def test_an_array_on_the_device_is_never_read_back():
    """What a device holds is the caller's business: reading it would wait for the device, and break under jit."""
    params = init(tau_m=jnp.float32(-1), thr_gain=jnp.float32(NAN), refract_time=jnp.float32(-1))
    slif.step(params, slif.init_state(params, B), CURRENTS[0], jnp.float32(NAN), jnp.float32(-1))
    slif.secant(c2=jnp.float32(-1))
