"""Gradients of `step` and `simulate` against loops by hand, closed forms and numerical derivatives; their memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle_grad
import pytest
from conftest import FIELDS, MECHANISMS, enable_x64, jit_quickly, make_params

import slif
from slif.cell import adapts

N_STEPS, BATCH, N_UNITS, DT = 24, 3, 5, 0.5
NUMERIC = (
    *("tau_m", "resist_m", "thr", "refract_time", "thr_gain", "thr_leak"),
    *("rho_b", "resist_inh", "inh_weights"),
)
DIFFERENTIATED = ("s", "v", "thr", "j")
CASES = {name: MECHANISMS[name] for name in ("plain", "sticky", "gain", "sparsity", "inhibition", "soft")}
CASES |= {name: MECHANISMS[name] for name in ("everything", "sparse_everything")}
CASES["leak"] = {"thr_leak": 0.01, "refract_time": 1.0}  # with a period but without sticky spikes
CASES["floor"] = {"rho_b": 0.06}  # thresholds reach it
KINDS = {"secant": slif.secant(), "detached reset": slif.arctan(1.5), "reset": slif.arctan(1.5, detach_reset=False)}
SLOPES = {"secant": "secant", "detached reset": "arctan", "reset": "arctan"}

# Every mechanism, alone or with another, through one of the backward passes; combinations through the longest.
every_case = pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, "reset") for case in ("plain", "leak", "soft", "everything", "sparse_everything")),
        *((case, "secant") for case in ("sticky", "inhibition", "everything")),
        *((case, "detached reset") for case in ("gain", "floor", "sparsity", "soft")),
    ],
)
# With lateral inhibition, the secant takes another path through the code.
every_path = pytest.mark.parametrize(
    ("case", "kind"), [("sticky", "secant"), ("everything", "secant"), ("everything", "reset")]
)


def make(case, kind, dtype=jnp.float32):
    """Params, most of them [N] and unequal, a state in the middle of a run, and currents."""
    rng = np.random.default_rng(1)
    arguments = {
        "tau_m": rng.uniform(8, 20, N_UNITS),
        "resist_m": rng.uniform(0.8, 1.6, N_UNITS),
        "thr": 0.4,
        **CASES[case],
    }
    if "resist_inh" in arguments:
        arguments["resist_inh"] = np.array([0.3, 0.2, 0.0, 0.4, -0.1])  # active where positive
    if "thr_gain" in arguments:
        arguments["thr_gain"] = rng.uniform(0.01, 0.08, N_UNITS)
    params = slif.init_params(jax.random.key(3), N_UNITS, **arguments, surrogate=KINDS[kind], dtype=dtype)
    shape = (BATCH, N_UNITS)
    fields = dict.fromkeys(FIELDS, np.zeros(shape)) | {
        "v": rng.uniform(-0.2, 0.35, shape),
        "s": rng.integers(0, 2, shape),
        "thr": rng.uniform(0.3, 0.5, shape),
        "rfr": rng.integers(0, 5, shape) * DT,
    }
    state = slif.SLIFState(**{name: jnp.asarray(x, dtype) for name, x in fields.items()})
    return params, state, jnp.asarray(rng.uniform(-3, 10, (N_STEPS, *shape)), dtype)


def draw_like(tree, seed=2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def draw_bars(inputs, names=DIFFERENTIATED):
    """Cotangents of the final state [B, N] and of the records [T, B, N] with these names."""
    return draw_like((dict.fromkeys(names, inputs[1].v), dict.fromkeys(names, inputs[2])))


def by_simulate(params, state, currents, names, **options):
    final, out = slif.simulate(params, state, currents, dt=DT, record=names, **options)
    return {name: getattr(final, name) for name in names if hasattr(final, name)}, out


def by_step(params, state, currents, names):
    def body(state, x):
        state = slif.step(params, state, *x, DT)
        return state, {name: getattr(state, name) for name in names}

    final, out = jax.lax.scan(body, state, (currents, jnp.arange(len(currents)) * jnp.asarray(DT, currents.dtype)))
    return {name: getattr(final, name) for name in names}, out


def pull_through(forward, inputs, bars):
    """The records, and the gradients of params, state and currents for the cotangents."""
    (_, out), transpose = jax.vjp(lambda *inputs: forward(*inputs, tuple(bars[1])), *inputs)
    return out, transpose(bars)


@functools.partial(jit_quickly, static_argnames="checkpoint_every")
def pull(inputs, bars, valid=None, checkpoint_every=None):
    forward = functools.partial(by_simulate, valid=valid, checkpoint_every=checkpoint_every)
    return pull_through(forward, inputs, bars)


@jit_quickly
def pull_steps(inputs, bars):
    return pull_through(by_step, inputs, bars)


@jit_quickly
def push(inputs, dots):
    """Forward mode: the tangents of the final state and of the records, including spike counts."""
    return jax.jvp(lambda *inputs: by_simulate(*inputs, (*DIFFERENTIATED, "spike_count")), inputs, dots)[1]


def dot(a, b):
    return sum(float((np.asarray(x) * y).sum()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def by_hand(inputs, bars, kind):
    """The raster and the gradients from the loops in NumPy."""

    def wide(tree):
        return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items() if leaf is not None}

    params, state, currents = inputs
    surrogate = params.surrogate
    cell = oracle_grad.Cell(
        slope=functools.partial(oracle_grad.SLOPES[SLOPES[kind]], **wide(surrogate.numbers)),
        **wide({name: getattr(params, name) for name in NUMERIC if name != "thr"}),
        sticky_spikes=params.sticky_spikes,
        reset=params.reset,
        detach_reset=surrogate.detach_reset,
    )
    start = wide({name: getattr(state, name) for name in ("v", "s", "thr", "rfr")})
    if not adapts(params):
        start["thr"] = np.broadcast_to(np.asarray(params.thr, np.float64), start["v"].shape)
    steps, raster = oracle_grad.run(cell, start, np.asarray(currents, np.float64), DT)
    of_final, bars = map(wide, bars)
    bars = {name: np.concatenate([bar[:-1], bar[-1:] + of_final[name]]) for name, bar in bars.items()}
    if kind == "secant":
        return raster, oracle_grad.backward_current(cell, steps, bars)
    return raster, oracle_grad.backward_voltage(cell, steps, bars, DT)


def assert_gradients(actual, expected, rtol):
    """Each gradient as expected, and exactly zero where none is expected."""
    params, state, currents = actual
    leaves = {name: getattr(params, name) for name in NUMERIC} | {name: getattr(state, name) for name in FIELDS}
    # A step compares with the thresholds of the state if something adapts them, else with those of params.
    leaves["thr"], unread = (state.thr, params.thr) if adapts(params) else (params.thr, state.thr)
    np.testing.assert_array_equal(unread, 0)
    for name, leaf in (leaves | {"currents": currents}).items():
        if leaf is None:
            continue
        bar = np.asarray(expected.get(name, 0.0))
        bar = bar.sum(tuple(range(bar.ndim - leaf.ndim)))
        if bar.any():
            np.testing.assert_allclose(leaf, bar, rtol=rtol, atol=rtol * np.abs(bar).max(), err_msg=name)
        else:
            np.testing.assert_array_equal(leaf, 0, err_msg=name)
    for number in params.surrogate.numbers.values():
        assert number == 0


def assert_close(actual, expected, rtol=1e-5):
    """Equality of every leaf to within rounding of its largest element."""

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(initial=0))

    jax.tree.map(check, actual, expected)


def assert_zero(tree):
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), tree)


@every_case
def test_gradients_are_those_of_the_loop_by_hand(case, kind):
    with enable_x64():
        inputs = make(case, kind, jnp.float64)
        bars = draw_bars(inputs)
        out, gradients = pull(inputs, bars)
        raster, expected = by_hand(inputs, bars, kind)
        np.testing.assert_array_equal(out["s"], raster)
        assert 0.03 < raster.mean() < 0.97
        assert_gradients(gradients, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["secant", "reset"])
def test_float32_gradients_are_those_of_the_loop_by_hand(kind):
    inputs = make("everything", kind)
    bars = draw_bars(inputs)
    out, gradients = jax.jit(functools.partial(pull_through, by_simulate))(inputs, bars)
    raster, expected = by_hand(inputs, bars, kind)
    np.testing.assert_array_equal(out["s"], raster)
    assert_gradients(gradients, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "kind"), [("sticky", "secant"), ("everything", "reset"), ("sparse_everything", "reset")]
)
def test_step_differentiates_like_simulate(case, kind):
    with enable_x64():
        inputs = make(case, kind, jnp.float64)
        bars = draw_bars(inputs, FIELDS)
        out, through_steps = pull_steps(inputs, bars)
        # The other fields pass on no gradient.
        expected, through_simulate = pull(inputs, tuple({name: bar[name] for name in DIFFERENTIATED} for bar in bars))
        assert_close({name: out[name] for name in DIFFERENTIATED}, expected, rtol=1e-12)
        assert_close(through_steps, through_simulate, rtol=1e-12)


@every_path
def test_jvp_equals_vjp(case, kind):
    with enable_x64():
        inputs = make(case, kind, jnp.float64)
        dots, bars = draw_like(inputs), draw_bars(inputs)
        final, out = push(inputs, dots)
        assert_close(out.pop("spike_count"), np.sum(out["s"], 0), rtol=1e-12)
        pulled = pull(inputs, bars)[1]
        assert dot((final, out), bars) == pytest.approx(dot(pulled, dots), rel=1e-9)
        assert abs(dot(pulled, dots)) > 1e-3


def test_secant_is_the_three_factor_rule_of_a_layer():
    params, state, x = make("sticky", "secant")
    weights = draw_like(np.zeros((N_UNITS, N_UNITS), np.float32))
    delta = draw_like(x, seed=3)

    def loss(weights):
        return (by_simulate(params, state, x @ weights, ("s",))[1]["s"] * delta).sum()

    resist_m = np.asarray(params.resist_m)
    h = oracle_grad.SLOPES["secant"](np.asarray(x) @ np.asarray(weights) * resist_m, c1=0.82, c2=0.08)
    rule = np.einsum("tbi,tbj->ij", x, np.asarray(delta) * h * resist_m)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(weights), rule, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("case", "kind"), [("sticky", "secant"), ("gain", "detached reset")])
def test_a_custom_slope_differentiates_like_the_same_formula(case, kind):
    with enable_x64():
        params, state, currents = inputs = make(case, kind, jnp.float64)
        custom = slif.custom(KINDS[kind], wrt=KINDS[kind].wrt)
        bars = draw_bars(inputs)
        expected = pull(inputs, bars)[1]
        actual = pull((params.replace(surrogate=custom), state, currents), bars)[1]
        # A custom slope has no numbers.
        assert_close(actual, (expected[0].replace(surrogate=custom), *expected[1:]))


@pytest.mark.parametrize("case", ["sticky", "everything"])
def test_secant_gives_all_but_spikes_and_currents_no_gradient(case):
    inputs = make(case, "secant")

    @jax.jit
    def gradients(inputs):
        def loss(inputs):
            final, out = by_simulate(*inputs, ("v", "thr", "rfr", "tols", "surrogate", "first_spike_time"))
            return sum(leaf.sum() for leaf in jax.tree.leaves((final, out)))

        return jax.grad(loss)(inputs)

    assert_zero(gradients(inputs))


def test_voltage_gives_clocks_and_slope_no_gradient():
    inputs = make("everything", "reset")
    assert_zero(pull(inputs, draw_bars(inputs, ("rfr", "tols", "surrogate")))[1])


@pytest.mark.parametrize("kind", ["secant", "reset"])
def test_base_threshold_differentiates_through_the_state_at_rest(kind):
    with enable_x64():
        params, _, currents = inputs = make("gain", kind, jnp.float64)
        bars = draw_bars(inputs)

        def forward(params):
            return by_simulate(params, slif.init_state(params, BATCH), currents, DIFFERENTIATED)

        (actual,) = jax.jit(lambda params, bars: jax.vjp(forward, params)[1](bars))(params, bars)
        _, expected = by_hand((params, slif.init_state(params, BATCH), currents), bars, kind)
        assert_close(actual.thr, np.sum(expected.get("thr", np.zeros((1, N_UNITS))), 0))
        assert np.asarray(actual.thr).any() == (kind != "secant")


@pytest.mark.parametrize(("case", "kind"), [("sticky", "secant"), ("inhibition", "secant"), ("sticky", "reset")])
def test_summaries_and_rasters_differentiate_as_told(case, kind):
    inputs = make(case, kind)
    delta = draw_like(inputs[1].v)

    @jit_quickly
    def gradients(inputs):
        def of(name, weight, **options):
            return jax.grad(lambda inputs: (by_simulate(*inputs, (name,), **options)[1][name] * weight).sum())(inputs)

        constant = (of("first_spike_time", 1.0), of("s", 1.0, spike_dtype=bool), of("s", 1.0, spike_dtype=jnp.uint8))
        return of("s", delta[None]), of("spike_count", delta), of("s", delta[None], spike_dtype=jnp.bfloat16), constant

    of_raster, of_count, of_bfloat16, constant = gradients(inputs)
    assert np.any(of_raster[2])
    assert_close(of_count, of_raster)
    assert_close(of_bfloat16[2], of_raster[2], rtol=2e-2)  # the cotangent is rounded to 8 bits
    assert_zero(constant)


def test_subthreshold_cell_checks_numerically():
    """Below threshold the cell is smooth, and finite differences give its derivative."""
    with enable_x64():
        params, state, currents = make("plain", "detached reset", jnp.float64)
        params = params.replace(thr=np.full(N_UNITS, 50.0))
        inputs = params.tau_m, params.resist_m, state.v, currents
        dots, eps = draw_like(inputs, seed=4), 1e-5
        bar = np.random.default_rng(5).normal(size=currents.shape)
        bars = jax.tree.map(np.zeros_like, draw_bars((params, state, currents)))
        bars[1]["v"] = bar

        def run(sign):
            tau_m, resist_m, v, j = jax.tree.map(lambda x, dx: np.asarray(x) + sign * eps * dx, inputs, dots)
            out, gradients = pull((params.replace(tau_m=tau_m, resist_m=resist_m), state.replace(v=v), j), bars)
            assert not np.any(out["s"])
            return np.asarray(out["v"]), gradients

        (before, _), (_, (of_params, of_state, of_currents)), (after, _) = (run(sign) for sign in (-1, 0, 1))
        numerical = float(((after - before) * bar).sum() / (2 * eps))
        analytical = dot((of_params.tau_m, of_params.resist_m, of_state.v, of_currents), dots)
        assert analytical == pytest.approx(numerical, rel=1e-6)


@pytest.mark.parametrize("detached", [False, True])
def test_a_detached_state_cuts_the_graph(detached):
    params, state, currents = make("plain", "reset")

    def loss(currents):
        middle = slif.simulate(params, state, currents[:12], dt=DT)[0]
        middle = slif.detach(middle) if detached else middle
        return by_simulate(params, middle, currents[12:], ("v",))[1]["v"].sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(currents))
    assert gradient[:12].any() != detached
    assert gradient[12:].any()


@pytest.mark.parametrize(
    ("case", "kind"), [("sticky", "secant"), ("everything", "secant"), ("sticky", "detached reset"), ("gain", "reset")]
)
def test_padding_has_no_gradient_and_changes_none(case, kind):
    with enable_x64():
        params, state, currents = make(case, kind, jnp.float64)
        lengths = [N_STEPS, 9, 0]
        valid = np.arange(N_STEPS)[:, None] < np.array(lengths)
        padded = np.where(valid[..., None], currents, np.nan)
        inputs = params, state, padded
        # A frozen row repeats its last v, thr and j, so only its spikes get a cotangent, and not its last state.
        of_final, bars = draw_bars(inputs)
        of_final = {name: 0 * np.asarray(bar) for name, bar in of_final.items()}
        bars = {name: np.where(valid[..., None] | (name == "s"), bar, 0) for name, bar in bars.items()}
        _, actual = pull(inputs, (of_final, bars), valid)

        expected = {"currents": np.zeros(padded.shape)} | {name: np.zeros(state.v.shape) for name in ("v", "s", "thr")}
        for row, length in enumerate(lengths[:2]):
            one = jax.tree.map(lambda leaf, row=row: np.asarray(leaf)[row : row + 1], state)
            cut = {name: bar[:length, row : row + 1] for name, bar in bars.items()}
            none = {name: bar[row : row + 1] for name, bar in of_final.items()}
            _, of_row = by_hand((params, one, padded[:length, row : row + 1]), (none, cut), kind)
            expected["currents"][:length, row] = of_row.pop("currents")[:, 0]
            for name, bar in of_row.items():
                if name in ("v", "s", "thr"):
                    expected[name][row] = bar[0]
                else:
                    expected[name] = expected.get(name, 0.0) + bar
        np.testing.assert_array_equal(np.asarray(actual[2])[~valid], 0)
        assert_gradients(actual, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("wrt", "mechanism"),
    [("current", "plain"), ("current", "inhibition"), ("current", "feedback"), ("voltage", "feedback")],
)
def test_padding_passes_on_no_gradient_where_a_slope_is_infinite(wrt, mechanism):
    """At i = 0, where frozen rows stand, and at u = thr, where a row at rest stands with thr = 0."""
    singular = slif.custom(lambda x: jax.lax.rsqrt(jnp.abs(x)), wrt)
    resist_inh = 0.01 if mechanism == "inhibition" else 0.0
    params = make_params(n_units=4, surrogate=singular, resist_inh=resist_inh, thr=0.0, thr_jitter=0.0)
    weights = np.full((4, 4), 0.01, np.float32) if mechanism == "feedback" else None
    currents, lengths = np.random.default_rng(0).uniform(1, 3, (6, 2, 4)).astype("f4"), np.array([3, 0])
    valid = np.arange(6)[:, None] < lengths

    def loss(params, x, valid, final):
        state, out = slif.simulate(params, None, x, dt=1.0, valid=valid, feedback=weights)
        return out["s"].sum() + (state.s * final).sum()

    gradient = jit_quickly(jax.grad(loss, argnums=(0, 1)))
    padded, of_padded = gradient(params, currents, valid, jnp.ones((2, 1)))
    alone, of_alone = gradient(params, currents[:3, :1], np.ones((3, 1), bool), jnp.ones((1, 1)))
    assert np.isfinite(alone.resist_m)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), padded, alone)
    np.testing.assert_allclose(of_padded[:3, :1], of_alone, rtol=1e-5)
    assert not np.any(of_padded[3:])
    assert not np.any(of_padded[:, 1])


@pytest.mark.parametrize(("n_steps", "every"), [(N_STEPS, 1), (N_STEPS, 7), (N_STEPS - 1, 7), (N_STEPS, N_STEPS + 6)])
def test_checkpointed_gradients_are_the_plain_ones(n_steps, every):
    """24 steps are run in blocks of 6 if 7 are requested; 23, a prime, in three of 7 and a tail of 2."""
    with enable_x64():
        params, state, currents = make("plain", "reset", jnp.float64)
        inputs = params, state, np.asarray(currents)[:n_steps]
        bars = draw_bars(inputs)
        out, gradients = pull(inputs, bars, checkpoint_every=every)
        raster, expected = by_hand(inputs, bars, "reset")
        np.testing.assert_array_equal(out["s"], raster)
        assert_gradients(gradients, expected, rtol=1e-9)


def compile_pull(params, n_steps, raster=True, checkpoint_every=None):
    """Compiles the gradient of the currents [T, 4, 64] for a cotangent of the raster, with the raster or alone."""

    def both(params, state, currents, bar):
        def run(currents):
            return by_simulate(
                params, state, currents, ("s",), checkpoint_every=checkpoint_every, implementation="xla"
            )[1]["s"]

        out, transpose = jax.vjp(run, currents)
        return (out, transpose(bar)) if raster else transpose(bar)

    currents = jax.ShapeDtypeStruct((n_steps, 4, 64), jnp.float32)
    return jax.jit(both).lower(params, slif.init_state(params, 4), currents, currents).compile()


@functools.cache
def compile_secant(mechanism, n_steps, raster=True):
    """With all mechanisms but inhibition, so that the loop runs on constants."""
    return compile_pull(make_params(mechanism, n_units=64, resist_inh=0.0), n_steps, raster)


def temporary_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


every_loop_on_constants = pytest.mark.parametrize("mechanism", ["everything", "sparse_everything"])


@every_loop_on_constants
def test_secant_keeps_no_state_for_the_backward_pass(mechanism):
    one_field = 200 * 4 * 64 * 4
    twice, once = (temporary_bytes(compile_secant(mechanism, n_steps)) for n_steps in (400, 200))
    assert twice - once < 0.5 * one_field


@every_loop_on_constants
def test_secant_gradient_needs_no_loop(mechanism):
    loop = re.compile(r"\bwhile\(")
    assert loop.search(compile_secant(mechanism, 200).as_text())
    assert not loop.search(compile_secant(mechanism, 200, raster=False).as_text())


def test_checkpoints_cut_the_memory_of_the_voltage_kind_to_a_fifth():
    params = make_params("plain", n_units=64, surrogate=slif.arctan())
    best = temporary_bytes(compile_pull(params, 1000, checkpoint_every=25))
    assert 5 * best <= temporary_bytes(compile_pull(params, 1000))
