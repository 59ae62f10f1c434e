"""Every loop equals the plain one: values, final states, records, masks and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, DT, MECHANISMS, N_UNITS, RECORDS, assert_agree, enable_x64, make_currents, make_params

import slif
from slif.cell import prepare
from slif.loops import cpu, gpu, plain
from slif.loops.choose import choose
from slif.request import Request

LOOPS = {"cpu": cpu.run, "cpu, constant": functools.partial(cpu.run, constant=True), "gpu": gpu.run}
N_STEPS = 19  # no multiple of the steps of a turn, nor of a block
VALID = {
    "all": None,
    "padded": np.arange(N_STEPS)[:, None] < np.array([N_STEPS, 7, 0]),
    "gaps": np.random.default_rng(0).random((N_STEPS, BATCH)) < 0.6,
}
every_loop = pytest.mark.parametrize("loop", LOOPS)


def inputs(mechanism, dtype=jnp.float32, **overrides):
    """Params, a state in the middle of a run, and currents."""
    params = make_params(mechanism, dtype=dtype, **overrides)
    state = slif.init_state(params, BATCH)
    state, _ = slif.simulate(params, state, make_currents((9, BATCH, N_UNITS), seed=1).astype(dtype), dt=DT)
    return params, state, jnp.asarray(make_currents((N_STEPS, BATCH, N_UNITS)), dtype)


def run(loop, params, state, currents, *, valid=None, record=RECORDS, every=None, dt=DT):
    params, dt, t0 = prepare(params, state.v.ndim, jnp.asarray(dt), jnp.asarray(3.0))
    valid = None if valid is None else jnp.asarray(valid)[..., None]
    dtype = np.dtype(params.thr.dtype)
    request = Request(dt=dt, t0=t0, valid=valid, record=record, spike_dtype=dtype, checkpoint_every=every)
    return loop(params, state, currents, request)


@functools.cache
def expected(mechanism, valid):
    return jax.jit(functools.partial(run, plain.run, valid=VALID[valid]))(*inputs(mechanism))


@every_loop
@pytest.mark.parametrize(
    ("mechanism", "valid"),
    [
        *((name, "all") for name in MECHANISMS),
        ("sticky", "gaps"),
        ("everything", "padded"),
        ("sparse_everything", "gaps"),
    ],
)
def test_values(loop, mechanism, valid):
    state, out = jax.jit(functools.partial(run, LOOPS[loop], valid=VALID[valid]))(*inputs(mechanism))
    expected_state, records = expected(mechanism, valid)
    assert records["s"].any()
    assert_agree(vars(state), vars(expected_state))
    assert_agree(out, records)


@every_loop
@pytest.mark.parametrize("n_steps", [1, 2])
@pytest.mark.parametrize("mechanism", ["plain", "everything"])
def test_short_runs(loop, mechanism, n_steps):
    params, state, currents = inputs(mechanism)
    actual, expected = (
        jax.jit(functools.partial(run, f))(params, state, currents[:n_steps]) for f in (LOOPS[loop], plain.run)
    )
    assert_agree(vars(actual[0]), vars(expected[0]))
    assert_agree(actual[1], expected[1])


@every_loop
@pytest.mark.parametrize("record", ["s", "tols", "surrogate", "spike_count"])
def test_a_record_alone(loop, record):
    arguments = inputs("sticky")
    actual, expected = (
        jax.jit(functools.partial(run, f, record=(record,)))(*arguments) for f in (LOOPS[loop], plain.run)
    )
    assert_agree(vars(actual[0]), vars(expected[0]))
    assert_agree(actual[1], expected[1])


@every_loop
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_dtypes(loop, dtype):
    with enable_x64():
        arguments = inputs("everything", dtype=dtype)
        actual, expected = (jax.jit(functools.partial(run, f))(*arguments) for f in (LOOPS[loop], plain.run))
        kinds = jax.tree.map(lambda x: (x.shape, x.dtype), expected)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), actual) == kinds
        jax.tree.map(np.testing.assert_array_equal, actual[1]["s"], expected[1]["s"])


GRADIENTS = [
    ("everything", slif.secant(), "all"),
    ("everything", slif.secant(), "gaps"),
    ("gain", slif.arctan(), "gaps"),
    ("sparse_everything", slif.arctan(), "all"),
    ("everything", slif.arctan(detach_reset=False), "gaps"),
]


def primals_and_loss(loop, case):
    """Of a sum over all that has a gradient, with random weights."""
    mechanism, surrogate, valid = GRADIENTS[case]

    def loss(params, state, currents, dt):
        record = ("s", "v", "thr", "j", "spike_count")
        final, out = run(loop, params, state, currents, valid=VALID[valid], record=record, dt=dt)
        bars = np.random.default_rng(2)
        terms = [*vars(final).values(), *out.values()]
        return sum(jnp.vdot(x, bars.normal(size=x.shape).astype(np.float32)) for x in terms)

    return (*inputs(mechanism, surrogate=surrogate), jnp.float32(DT)), loss


@functools.cache
def expected_gradient(case):
    primals, loss = primals_and_loss(plain.run, case)
    return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*primals)


# The loop of constants is given none to differentiate.
@pytest.mark.parametrize("loop", ["cpu", "gpu"])
@pytest.mark.parametrize("case", range(len(GRADIENTS)))
def test_gradients(loop, case):
    primals, loss = primals_and_loss(LOOPS[loop], case)
    expected = expected_gradient(case)
    actual = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*primals)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * scale), actual, expected)
    if loop == "gpu":  # which takes long to compile, and is the plain one but for the steps of a turn
        return
    tangents = jax.tree.map(lambda x: jnp.cos(1 + x), primals)
    along = jax.jit(lambda p, t: jax.jvp(loss, p, t))(primals, tangents)[1]
    dots = jax.tree.leaves(jax.tree.map(jnp.vdot, expected, tangents))
    np.testing.assert_allclose(along, sum(dots), atol=1e-4 * sum(map(abs, dots)))


def test_the_choice():
    params, _, currents = inputs("sticky")
    request = Request(dt=jnp.float32(DT), t0=jnp.float32(0))
    if jax.default_backend() != "cpu":
        pytest.skip("of a machine without a GPU")
    assert choose(None, params, currents, request, constant=False).func is cpu.run
    assert choose("xla", params, currents, request, constant=True).keywords == {"constant": True}
    assert choose(None, params, currents[:0], request, constant=True) is plain.run
