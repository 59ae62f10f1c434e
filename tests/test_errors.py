"""Bad input: the error says which argument, what was expected and what it got, also while tracing."""

import decimal
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slif
import slif.linen
import slif.nnx

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
    """Values that no number of the cell may have."""
    bad_values = [NAN, INF, np.array([1.0, NAN, 1.0, 1.0]), *([0, -1.0] if positive else []), *([low] if low else [])]
    return [
        *(init_case(TypeError, **{name: value}) for value in ("0.5", None, True, 1j, np.array("a"), jnp.ones(N, bool))),
        *(init_case(ValueError, **{name: value}) for value in bad_values),
        *(init_case(ValueError, **{name: value}) for value in (np.ones(shape), jnp.ones(shape))),
    ]


class Untold:
    def __repr__(self):
        raise RuntimeError


INIT_PARAMS = [
    *(init_case(TypeError, key=value) for value in (0, None, np.zeros(2), jax.random.split(jax.random.key(0), 3))),
    *(init_case(TypeError, key=np.zeros(words, np.uint32)) for words in (0, 3, 5)),
    *(init_case(TypeError, n_units=value) for value in (4.0, "4", None, True)),
    *(init_case(ValueError, n_units=value) for value in (0, -1, 10**30, 2**62, 2**30)),
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
    *(init_case(TypeError, tau_m=x) for x in (decimal.Decimal(1), {1.0}, b"1", np.longdouble(1))),
    *(init_case(TypeError, tau_m=x) for x in ([None] * N, ["a"] * N, [True] * N, [[[[[[[[[1.0]]]]]]]]])),
    *(init_case(TypeError, tau_m=x) for x in (np.timedelta64(1, "s"), np.datetime64(1, "s"), np.ma.masked)),
    pytest.param(lambda *_: init(tau_m=Untold()), "tau_m", TypeError, id="init_params-tau_m-untold"),
    pytest.param(lambda *_: init(tau_m=iter([1.0])), "tau_m", TypeError, id="init_params-tau_m-iterator"),
    *(init_case(ValueError, tau_m=x) for x in ([[1.0], [1.0, 2.0]], 10**39, [10**400] * N, 2e-39, 1e-320)),
    pytest.param(lambda *_: init(tau_m=10**5000), "tau_m", ValueError, id="init_params-tau_m-of-5000-digits"),
    pytest.param(lambda *_: init(n_units=-(10**5000)), "n_units", ValueError, id="init_params-n_units-of-5000-digits"),
    *(init_case(ValueError, **{name: 1e-40}) for name in ("rho_b", "resist_inh")),
    init_case(ValueError, thr_jitter=2e38),
    pytest.param(lambda *_: init(thr=6e4, thr_jitter=1e4, dtype="float16"), "thr_jitter", ValueError, id="jitter-16"),
    *(init_case(TypeError, thr_persist=value) for value in (1, "yes", None)),
    *(init_case(TypeError, sticky_spikes=value) for value in (1, "yes", None)),
    *(init_case(TypeError, surrogate=value) for value in ("secant", max, 0.5)),
    *(init_case(TypeError, dtype=value) for value in (np.int32, "no dtype", complex, bool, ">f4", "f4,,", [], object)),
    *(init_case(TypeError, dtype=value) for value in (jnp.float8_e4m3fn, np.longdouble, [("a", "f4")], KEY.dtype)),
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
    """Values that neither dt nor a time may have."""
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
    case("implementation-list", "implementation", TypeError, simulate(implementation=[])),
    case("implementation-array", "implementation", TypeError, simulate(implementation=np.ones(2))),
    case("spike_dtype-key", "spike_dtype", TypeError, simulate(spike_dtype=jax.random.key(0).dtype)),
    case("spike_dtype-no-zero", "spike_dtype", TypeError, simulate(spike_dtype="float8_e8m0fnu")),
    case("spike_dtype-time", "spike_dtype", TypeError, simulate(spike_dtype="m8[s]")),
    case("record-nested", "record", TypeError, simulate(record=[["s"]])),
]


def bad_states():
    """A wrong leaf of the state, in every function that takes one."""
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
    """Params built by hand, in every function that takes them."""
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
    case("batch_shape-huge", "batch_shape", ValueError, init_state(batch_shape=(2**40, 2**40))),
    case("batch_shape-huge-and-empty", "batch_shape", ValueError, init_state(batch_shape=(0, 2**60))),
    case("params-without-thr", "thr", TypeError, lambda p, *_: slif.init_state(p.replace(thr=None))),
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


LINEN = slif.linen.SLIF(N, dt=1.0, **NUMBERS, thr_jitter=0.0)
LINEN_CELL = slif.linen.SLIFCell(N, dt=1.0, **NUMBERS, thr_jitter=0.0)
NNX, NNX_CELL = (
    kind(N, dt=1.0, **NUMBERS, thr_jitter=0.0, rngs=nnx.Rngs(0)) for kind in (slif.nnx.SLIF, slif.nnx.SLIFCell)
)
LAYERS = {"linen": lambda x, **options: LINEN.apply({}, x, **options), "nnx": NNX}
CELLS = {"linen": lambda carry, inputs: LINEN_CELL.apply({}, carry, inputs), "nnx": NNX_CELL}
CARRIES = {
    "linen": lambda input_shape: LINEN_CELL.apply({}, None, input_shape, method="initialize_carry"),
    "nnx": NNX_CELL.initialize_carry,
}
MAKERS = {
    "linen": slif.linen.SLIF,
    "nnx": lambda features, **hyper: slif.nnx.SLIF(features, **{"rngs": nnx.Rngs(0)} | hyper),
}


def bad_layers():
    """Errors name the layer's own arguments."""
    rest, count = NNX_CELL.initialize_carry((B, N))
    masked = rest.replace(v=np.ma.array(np.zeros((B, N), np.float32)))
    other = slif.init_state(slif.init_params(KEY, N, **NUMBERS, dtype="bfloat16"), B)
    for kind in LAYERS:

        def layer(c, kind=kind, **options):
            return LAYERS[kind](options.pop("x", c), **options)

        def cell(c, kind=kind, **options):
            return CELLS[kind](options.get("carry", (rest, count)), options.get("inputs", c[0]))

        def make(_, kind=kind, **hyper):
            return MAKERS[kind](hyper.pop("features", N), **{"dt": 1.0, **NUMBERS} | hyper)

        def at_rest(_, kind=kind, **options):
            return CARRIES[kind](**options)

        cases = (
            ("x", layer, TypeError, {"x": [[[0.0] * N] * B] * T}),
            ("x", layer, TypeError, {"x": np.ones((T, B, N), complex)}),
            ("x", layer, ValueError, {"x": np.ones(N)}),
            ("x", layer, ValueError, {"x": jnp.ones((T, B, N + 1))}),
            ("valid", layer, TypeError, {"valid": [[True] * B] * T}),
            ("valid", layer, TypeError, {"valid": jnp.ones((T, B))}),
            ("valid", layer, ValueError, {"valid": np.ones((B, T), bool)}),
            ("initial_state", layer, TypeError, {"initial_state": 0}),
            ("initial_state", layer, ValueError, {"initial_state": slif.init_state(PARAMS, B + 1)}),
            ("initial_state.v", layer, TypeError, {"initial_state": masked}),
            ("initial_state.j", layer, TypeError, {"initial_state": other}),
            ("return_state", layer, TypeError, {"return_state": 1}),
            ("implementation", layer, TypeError, {"implementation": []}),
            ("inputs", cell, TypeError, {"inputs": [[0.0] * N] * B}),
            ("inputs", cell, ValueError, {"inputs": np.ones((B, N + 1))}),
            ("carry", cell, TypeError, {"carry": None}),
            ("carry", cell, TypeError, {"carry": rest}),
            ("carry", cell, TypeError, {"carry": (rest, count, count)}),
            ("carry", cell, TypeError, {"carry": (count, rest)}),
            ("carry[0].v", cell, TypeError, {"carry": (masked, count)}),
            ("carry[0].j", cell, TypeError, {"carry": (other, count)}),
            ("carry", cell, TypeError, {"carry": (rest, None)}),
            ("carry", cell, TypeError, {"carry": (rest, count * 1.0)}),
            ("carry", cell, ValueError, {"carry": (rest, np.full(B, 2**40))}),
            ("carry", cell, ValueError, {"carry": (rest, count[0])}),
            ("input_shape", at_rest, TypeError, {"input_shape": N}),
            ("input_shape", at_rest, TypeError, {"input_shape": (2.0, N)}),
            ("input_shape", at_rest, ValueError, {"input_shape": (B, N + 1)}),
            ("input_shape", at_rest, ValueError, {"input_shape": (2**40, 2**40, N)}),
            ("features", make, TypeError, {"features": 4.0}),
            ("features", make, ValueError, {"features": 10**30}),
            ("dtype", make, TypeError, {"dtype": "float8"}),
            ("refract_time", make, TypeError, {"refract_time": np.ma.array(1.0)}),
            ("dt", make, ValueError, {"dt": 1e-40}),
        )
        for k, (name, call, error, option) in enumerate(cases):
            yield case(f"{kind}-{name}-{k}", name, error, lambda p, s, c, call=call, option=option: call(c, **option))
    yield case("nnx-rngs", "rngs", TypeError, lambda *_: MAKERS["nnx"](N, dt=1.0, **NUMBERS, rngs=None))
    streams = nnx.Rngs(dropout=0)
    yield case("nnx-rngs-stream", "rngs", TypeError, lambda *_: MAKERS["nnx"](N, dt=1.0, **NUMBERS, rngs=streams))


CASES = [*INIT_PARAMS, *STEP, *SIMULATE, *bad_states(), *bad_params(), *OTHERS, *bad_surrogates(), *bad_layers()]


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
    """Values on a device are not checked: reading them would wait for the device, and fail under jit."""
    params = init(tau_m=jnp.float32(-1), thr_gain=jnp.float32(NAN), refract_time=jnp.float32(-1))
    slif.step(params, slif.init_state(params, B), CURRENTS[0], jnp.float32(NAN), jnp.float32(-1))
    slif.secant(c2=jnp.float32(-1))


# A valid call of each function that takes arrays, what to replace by odd ones, and the names in the message.
ZEROS = np.zeros((T, B, N), np.float32)
TAKES_ARRAYS = {
    "step j": (lambda x: slif.step(PARAMS, STATE, x, 0.0, 1.0), ZEROS[0], "j"),
    "step state": (lambda x: slif.step(PARAMS, STATE.replace(v=x), ZEROS[0], 0.0, 1.0), ZEROS[0], "state.v"),
    "step params": (lambda x: slif.step(PARAMS.replace(tau_m=x), STATE, ZEROS[0], 0.0, 1.0), ZEROS[0, 0] + 9, "tau_m"),
    "reset state": (lambda x: slif.reset(PARAMS, STATE.replace(s=x)), ZEROS[0], "state.s"),
    "reset where": (lambda x: slif.reset(PARAMS, STATE, where=x), ZEROS[0, :, 0] > 0, "where"),
    "detach": (lambda x: slif.detach(STATE.replace(thr=x)), ZEROS[0], "state.thr"),
    "simulate": (lambda x: slif.simulate(PARAMS, STATE, x, dt=1.0), ZEROS, "currents"),
    "simulate valid": (lambda x: slif.simulate(PARAMS, STATE, ZEROS, dt=1.0, valid=x), ZEROS[..., 0] > 0, "valid"),
    "sweep": (lambda x: slif.sweep(PARAMS, x, over={"tau_m": [9.0]}, dt=1.0), ZEROS, "currents"),
    "sweep over": (lambda x: slif.sweep(PARAMS, ZEROS, over={"tau_m": x}, dt=1.0), ZEROS[0, 0] + 9, "tau_m"),
    "point": (lambda x: slif.point(PARAMS, {"thr": x}, 0), ZEROS[0], "thr"),
    "grid": (lambda x: slif.grid(thr=x), ZEROS[0, 0], "thr"),
    "init_params": (lambda x: init(thr_gain=x), ZEROS[0, 0], "thr_gain"),
    "pack_spikes": (slif.pack_spikes, ZEROS[0], "s"),
    "unpack_spikes": (lambda x: slif.unpack_spikes(x, 8), np.zeros((B, 1), np.uint8), "packed"),
    "surrogate": (slif.arctan(), ZEROS[0], "x"),
    "surrogate number": (lambda x: slif.arctan(x), ZEROS[0, 0] + 1, "alpha"),
    "linen": (LAYERS["linen"], ZEROS, "x"),
    "nnx": (LAYERS["nnx"], ZEROS, "x"),
    "linen cell": (lambda x: CELLS["linen"](NNX_CELL.initialize_carry((B, N)), x), ZEROS[0], "inputs"),
    "nnx cell": (lambda x: CELLS["nnx"](NNX_CELL.initialize_carry((B, N)), x), ZEROS[0], "inputs"),
}
ODD = {
    "masked": lambda x: np.ma.array(x, mask=x == 0),
    "with a mask of nothing": np.ma.array,
    "of a subclass": lambda x: x.view(np.recarray),
    "matrix": lambda x: np.matrix(x.reshape(1, -1), copy=False),
    "big-endian": lambda x: x.astype(">f4"),
    "objects": lambda x: x.astype(object),
    "long double": lambda x: x.astype(np.longdouble),
    "complex": lambda x: x.astype(complex),
    "durations": lambda x: x.astype("m8[s]"),
    "dates": lambda x: x.astype("M8[s]"),
    "strings": lambda x: x.astype(str),
    "bytes": lambda x: x.astype(bytes),
    "records": lambda x: np.zeros(x.shape, [("a", "f4")]),
}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # np.matrix
@pytest.mark.parametrize("name", TAKES_ARRAYS)
def test_arrays_that_are_no_plain_numbers_are_refused_whatever_ran_before(name):
    """JAX accepts some of them if a program for the shape and dtype is already compiled."""
    call, good, argument = TAKES_ARRAYS[name]
    odd = {what: make(good) for what, make in ODD.items() if good.dtype != bool or what not in ("durations", "dates")}
    for _ in range(2):
        for what, x in odd.items():
            with pytest.raises(TypeError, match=rf"^{re.escape(argument)}: expected .+, got .+"):
                pytest.fail(f"{what}: {call(x)}")
        call(good)


def test_a_block_of_steps_needs_a_known_number_of_them():
    (steps,) = jax.export.symbolic_shape("T")
    params = PARAMS.replace(surrogate=slif.arctan())
    currents = jax.ShapeDtypeStruct((steps, B, N), jnp.float32)
    run = jax.jit(lambda x: slif.simulate(params, STATE, x, dt=1.0, checkpoint_every=2)[1]["s"])
    with pytest.raises(ValueError, match=r"^checkpoint_every: expected None, or currents of a known length, got T"):
        jax.export.export(run)(currents)
