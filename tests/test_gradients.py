"""Gradients of `step` and `simulate` against loops by hand, closed forms and numerical derivatives; their memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle_grad
import pytest
from conftest import FIELDS, MECHANISMS, enable_x64, make_params
from jax import test_util

import slif
from slif.cell import adapts

N_STEPS, BATCH, N_UNITS, DT = 24, 3, 5, 0.5
NUMERIC = (
    *("tau_m", "resist_m", "thr", "refract_time", "thr_gain", "thr_leak"),
    *("rho_b", "resist_inh", "inh_weights"),
)
# The mechanisms but for the one whose point is its surrogate, and the sparsity rule where thresholds meet their floor.
CASES = {name: arguments for name, arguments in MECHANISMS.items() if "surrogate" not in arguments}
CASES["floor"] = {"rho_b": 0.06}
KINDS = {"secant": slif.secant(), "detached reset": slif.arctan(1.5), "reset": slif.arctan(1.5, detach_reset=False)}
SLOPES = {"secant": "secant", "detached reset": "arctan", "reset": "arctan"}

# Every mechanism by the longest way back, and by the others what they meet.
every_case = pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, "reset") for case in CASES),
        *((case, "secant") for case in ("plain", "sticky", "inhibition", "everything", "sparse_everything")),
        *((case, "detached reset") for case in ("gain", "floor", "everything", "sparsity", "soft")),
    ],
)
every_kind = pytest.mark.parametrize("kind", KINDS)
# Without and with lateral inhibition, the secant takes another way through the code.
both_ways = pytest.mark.parametrize("case", ["sticky", "everything"])
every_path = pytest.mark.parametrize(
    ("case", "kind"),
    [("sticky", "secant"), ("everything", "secant"), ("everything", "reset"), ("sparse_everything", "detached reset")],
)


def make(case, kind, dtype=jnp.float32):
    """Params of which most are [N] and unequal, a state in the middle of a run, and currents."""
    rng = np.random.default_rng(1)
    arguments = {
        "tau_m": rng.uniform(8, 20, N_UNITS),
        "resist_m": rng.uniform(0.8, 1.6, N_UNITS),
        "thr": 0.4,
        **CASES[case],
    }
    if "resist_inh" in arguments:
        arguments["resist_inh"] = np.array([0.3, 0.2, 0.0, 0.4, -0.1])  # acts where it is positive
    if "thr_gain" in arguments:
        arguments["thr_gain"] = rng.uniform(0.01, 0.08, N_UNITS)
    params = slif.init_params(jax.random.key(3), N_UNITS, **arguments, surrogate=KINDS[kind], dtype=dtype)
    shape = (BATCH, N_UNITS)
    state = slif.init_state(params, BATCH).replace(
        v=jnp.asarray(rng.uniform(-0.2, 0.35, shape), dtype),
        s=jnp.asarray(rng.integers(0, 2, shape), dtype),
        thr=jnp.asarray(rng.uniform(0.3, 0.5, shape), dtype),
        rfr=jnp.asarray(rng.integers(0, 5, shape) * DT, dtype),
    )
    return params, state, jnp.asarray(rng.uniform(-3, 10, (N_STEPS, *shape)), dtype)


def draw_like(tree, seed=2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def draw_bars(names, inputs):
    """Cotangents [T, B, N] of what is recorded under these names."""
    return draw_like(dict.fromkeys(names, inputs[2]))


def by_simulate(params, state, currents, names, **options):
    return slif.simulate(params, state, currents, dt=DT, record=names, **options)[1]


def by_step(params, state, currents, names):
    def body(state, x):
        state = slif.step(params, state, *x, DT)
        return state, {name: getattr(state, name) for name in names}

    return jax.lax.scan(body, state, (currents, jnp.arange(len(currents)) * jnp.asarray(DT, currents.dtype)))[1]


def pull_through(forward, inputs, bars):
    """What is recorded, and the gradients of params, state and currents for its cotangents."""
    out, transpose = jax.vjp(lambda *inputs: forward(*inputs, tuple(bars)), *inputs)
    return out, transpose(bars)


@functools.partial(jax.jit, static_argnames="checkpoint_every")
def pull(inputs, bars, valid=None, checkpoint_every=None):
    forward = functools.partial(by_simulate, valid=valid, checkpoint_every=checkpoint_every)
    return pull_through(forward, inputs, bars)


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
    if kind == "secant":
        return raster, oracle_grad.backward_current(cell, steps, wide(bars))
    return raster, oracle_grad.backward_voltage(cell, steps, wide(bars), DT)


def assert_gradients(actual, expected, rtol):
    """Each gradient as expected, and exactly zero where none is."""
    params, state, currents = actual
    leaves = {name: getattr(params, name) for name in NUMERIC} | {name: getattr(state, name) for name in FIELDS}
    # A step compares with the thresholds of the state where something adapts them, and with those of params elsewhere.
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
    """Equality of every leaf to rounding of its largest element."""

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max(initial=0)))

    jax.tree.map(check, actual, expected)


def assert_zero(tree):
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), tree)


@every_case
def test_gradients_are_those_of_the_loop_by_hand(case, kind):
    with enable_x64():
        inputs = make(case, kind, jnp.float64)
        bars = draw_bars(("s", "v", "thr", "j"), inputs)
        out, gradients = pull(inputs, bars)
        raster, expected = by_hand(inputs, bars, kind)
        np.testing.assert_array_equal(out["s"], raster)
        assert 0.03 < raster.mean() < 0.97
        assert_gradients(gradients, expected, rtol=1e-9)


@every_kind
def test_float32_gradients_are_those_of_the_loop_by_hand(kind):
    inputs = make("everything", kind)
    bars = draw_bars(("s", "v", "thr", "j"), inputs)
    out, gradients = pull(inputs, bars)
    raster, expected = by_hand(inputs, bars, kind)
    np.testing.assert_array_equal(out["s"], raster)
    assert_gradients(gradients, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "kind"), [("everything", "secant"), ("everything", "reset"), ("sparse_everything", "detached reset")]
)
def test_step_differentiates_like_simulate(case, kind):
    with enable_x64():
        inputs = make(case, kind, jnp.float64)
        bars = draw_bars(FIELDS, inputs)
        through_steps = jax.jit(functools.partial(pull_through, by_step))(inputs, bars)
        assert_close(through_steps, pull(inputs, bars), rtol=1e-12)


@every_path
def test_jvp_equals_vjp(case, kind):
    with enable_x64():
        inputs = make(case, kind, jnp.float64)

        @jax.jit
        def both_products(inputs, dots, final_bars, out_bars):
            def forward(params, state, currents):
                record = ("s", "v", "thr", "j", "spike_count")
                return slif.simulate(params, state, currents, dt=DT, record=record)

            pushed = jax.jvp(forward, inputs, dots)[1]
            pulled = jax.vjp(forward, *inputs)[1]((final_bars, out_bars))
            return pushed, pulled

        final, out = slif.simulate(*inputs, dt=DT, record=("s", "v", "thr", "j", "spike_count"))
        dots, bars = draw_like(inputs), (draw_like(final), draw_like(out))
        pushed, pulled = both_products(inputs, dots, *bars)

        def dot(a, b):
            return sum(float((x * y).sum()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

        assert dot(pushed, bars) == pytest.approx(dot(pulled, dots), rel=1e-9)
        assert abs(dot(pulled, dots)) > 1e-3


def test_secant_is_the_three_factor_rule_of_a_layer():
    params, state, x = make("sticky", "secant")
    weights = draw_like(jnp.zeros((N_UNITS, N_UNITS)))
    delta = draw_like(x, seed=3)

    def loss(weights):
        return (by_simulate(params, state, x @ weights, ("s",))["s"] * delta).sum()

    resist_m = np.asarray(params.resist_m)
    h = oracle_grad.SLOPES["secant"](np.asarray(x @ weights) * resist_m, c1=0.82, c2=0.08)
    rule = np.einsum("tbi,tbj->ij", x, np.asarray(delta) * h * resist_m)
    np.testing.assert_allclose(jax.grad(loss)(weights), rule, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["secant", "detached reset"])
def test_a_custom_slope_differentiates_like_the_same_formula(kind):
    params, state, currents = inputs = make("everything", kind)
    custom = slif.custom(KINDS[kind], wrt=KINDS[kind].wrt)
    bars = draw_bars(("s", "v"), inputs)
    expected = pull(inputs, bars)[1]
    actual = pull((params.replace(surrogate=custom), state, currents), bars)[1]
    # A custom slope has no numbers.
    assert_close(actual, (expected[0].replace(surrogate=custom), *expected[1:]))


@both_ways
def test_secant_gives_all_but_spikes_and_currents_no_gradient(case):
    params, state, currents = make(case, "secant")

    @jax.jit
    def gradients(params, state, currents):
        def loss(params, state, currents):
            names = ("v", "thr", "rfr", "tols", "surrogate")
            final, out = slif.simulate(params, state, currents, dt=DT, record=(*names, "first_spike_time"))
            return sum(getattr(final, name).sum() + out[name].sum() for name in names) + out["first_spike_time"].sum()

        return jax.grad(loss, (0, 1, 2))(params, state, currents)

    assert_zero(gradients(params, state, currents))


@both_ways
def test_voltage_gives_clocks_and_slope_no_gradient(case):
    inputs = make(case, "reset")
    assert_zero(pull(inputs, draw_bars(("rfr", "tols", "surrogate"), inputs))[1])


@pytest.mark.parametrize("kind", ["secant", "reset"])
def test_base_threshold_differentiates_through_the_state_at_rest(kind):
    params, _, currents = inputs = make("gain", kind)
    bars = draw_bars(("s", "v"), inputs)

    def loss(params):
        out = by_simulate(params, slif.init_state(params, BATCH), currents, ("s", "v"))
        return sum((out[name] * bars[name]).sum() for name in bars)

    actual = np.asarray(jax.jit(jax.grad(loss))(params).thr)
    _, (_, of_state, _) = pull((params, slif.init_state(params, BATCH), currents), bars)
    assert_close(actual, of_state.thr.sum(0))
    assert actual.any() == (kind != "secant")


@every_path
def test_summaries_and_rasters_differentiate_as_told(case, kind):
    inputs = make(case, kind)
    delta = draw_like(inputs[1].v)

    @jax.jit
    def gradients(inputs):
        def of(name, weight, **options):
            return jax.grad(lambda inputs: (by_simulate(*inputs, (name,), **options)[name] * weight).sum())(inputs)

        constant = (of("first_spike_time", 1.0), of("s", 1.0, spike_dtype=bool), of("s", 1.0, spike_dtype=jnp.uint8))
        return of("s", delta[None]), of("spike_count", delta), of("s", delta[None], spike_dtype=jnp.bfloat16), constant

    of_raster, of_count, of_bfloat16, constant = gradients(inputs)
    assert of_raster[2].any()
    assert_close(of_count, of_raster)
    assert_close(of_bfloat16[2], of_raster[2], rtol=2e-2)  # the cotangent is rounded to 8 bits
    assert_zero(constant)


def test_subthreshold_cell_checks_numerically():
    params, state, currents = make("plain", "reset")
    params = params.replace(surrogate=slif.boxcar(0.5), thr=jnp.full_like(params.thr, 50.0))
    currents = currents[:6]

    def final_v(tau_m, resist_m, v, currents):
        new = params.replace(tau_m=tau_m, resist_m=resist_m)
        return slif.simulate(new, state.replace(v=v), currents, dt=DT, implementation="xla")[0].v

    inputs = (params.tau_m, params.resist_m, state.v, currents)
    assert not by_simulate(params, state, currents, ("s",))["s"].any()
    test_util.check_grads(final_v, inputs, order=1, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2, eps=1e-2)


@pytest.mark.parametrize("detached", [False, True])
def test_a_detached_state_cuts_the_graph(detached):
    params, state, currents = make("everything", "reset")

    def loss(currents):
        middle = slif.simulate(params, state, currents[:12], dt=DT)[0]
        middle = slif.detach(middle) if detached else middle
        return by_simulate(params, middle, currents[12:], ("s", "v"))["v"].sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(currents))
    assert gradient[:12].any() != detached
    assert gradient[12:].any()


@pytest.mark.parametrize(
    ("case", "kind"),
    [("sticky", "secant"), ("everything", "secant"), ("sticky", "detached reset"), ("everything", "reset")],
)
def test_padding_has_no_gradient_and_changes_none(case, kind):
    with enable_x64():
        params, state, currents = inputs = make(case, kind, jnp.float64)
        lengths = [N_STEPS, 9, 0]
        valid = np.arange(N_STEPS)[:, None] < np.array(lengths)
        padded = jnp.where(valid[..., None], currents, jnp.nan)
        # A frozen row goes on telling its last v, thr and j, so only its spikes are asked for.
        bars = draw_bars(("s", "v", "thr", "j"), inputs)
        bars = {name: jnp.where(valid[..., None] | (name == "s"), bar, 0) for name, bar in bars.items()}
        _, actual = pull((params, state, padded), bars, jnp.asarray(valid))

        expected = {"currents": np.zeros(padded.shape)} | {name: np.zeros(state.v.shape) for name in ("v", "s", "thr")}
        for row, length in enumerate(lengths[:2]):
            one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], state)
            cut = {name: bar[:length, row : row + 1] for name, bar in bars.items()}
            _, of_row = by_hand((params, one, currents[:length, row : row + 1]), cut, kind)
            expected["currents"][:length, row] = of_row.pop("currents")[:, 0]
            for name, bar in of_row.items():
                if name in ("v", "s", "thr"):
                    expected[name][row] = bar[0]
                else:
                    expected[name] = expected.get(name, 0.0) + bar
        np.testing.assert_array_equal(actual[2][~valid], 0)
        assert_gradients(actual, expected, rtol=1e-9)


@pytest.mark.parametrize(("n_steps", "every"), [(N_STEPS, 1), (N_STEPS, 7), (N_STEPS - 1, 7), (N_STEPS, N_STEPS + 6)])
def test_checkpointed_gradients_are_the_plain_ones(n_steps, every):
    """24 steps fall into blocks of 6 where 7 are asked for; 23, a prime, into three of 7 and a tail of 2."""
    params, state, currents = make("gain", "reset")
    inputs = params, state, currents[:n_steps]
    bars = draw_bars(("s", "v", "thr", "j"), inputs)
    assert_close(pull(inputs, bars, checkpoint_every=every), pull(inputs, bars))


def compile_pull(mechanism, n_steps, raster=True, checkpoint_every=None):
    """Compiles the gradient of the currents [T, 4, 64] for a cotangent of the raster, beside the raster or alone."""
    params = make_params(mechanism, n_units=64)

    def both(params, state, currents, bar):
        run = functools.partial(
            by_simulate, params, state, names=("s",), checkpoint_every=checkpoint_every, implementation="xla"
        )
        out, transpose = jax.vjp(run, currents)
        gradient = transpose({"s": bar})
        return (out, gradient) if raster else gradient

    currents = jax.ShapeDtypeStruct((n_steps, 4, 64), jnp.float32)
    return jax.jit(both).lower(params, slif.init_state(params, 4), currents, currents).compile()


def temporary_bytes(mechanism, n_steps, checkpoint_every=None):
    compiled = compile_pull(mechanism, n_steps, checkpoint_every=checkpoint_every)
    return compiled.memory_analysis().temp_size_in_bytes


every_loop_on_constants = pytest.mark.parametrize("mechanism", ["plain", "sticky", "gain", "sparsity"])


@every_loop_on_constants
def test_secant_keeps_no_state_for_the_backward_pass(mechanism):
    one_field = 200 * 4 * 64 * 4
    assert temporary_bytes(mechanism, 400) - temporary_bytes(mechanism, 200) < 0.5 * one_field


@every_loop_on_constants
def test_secant_gradient_needs_no_loop(mechanism):
    loop = re.compile(r"\bwhile\(")
    assert loop.search(compile_pull(mechanism, 50).as_text())
    assert not loop.search(compile_pull(mechanism, 50, raster=False).as_text())


def test_checkpoints_cut_the_memory_of_the_voltage_kind_to_a_fifth():
    best = min(temporary_bytes("voltage", 1000, checkpoint_every) for checkpoint_every in (25, 50))
    assert 5 * best <= temporary_bytes("voltage", 1000)
