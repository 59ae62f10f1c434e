"""Feedback: the spikes of a step add to the currents of the next, through a matrix."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_grad
import pytest
from conftest import BATCH, DT, FIELDS, N_UNITS, assert_agree, assert_same, enable_x64, make_currents, make_params
from flax import nnx
from jax import export

import slif
import slif.linen
import slif.nnx
from slif.hyperparameters import STATIC

T = 18
CASES = {
    "plain": {"surrogate": slif.secant()},
    "everything": {
        **{"surrogate": slif.secant(), "resist_inh": 0.3, "thr_gain": 0.02, "thr_leak": 0.01},
        **{"refract_time": 0.75, "sticky_spikes": True},
    },
    "voltage": {"surrogate": slif.arctan(1.5), "refract_time": 0.75, "sticky_spikes": True},
    "soft": {
        "surrogate": slif.arctan(1.5, detach_reset=False),
        "reset": "subtract",
        "resist_inh": 0.3,
        "thr_gain": 0.02,
    },
}
cases = pytest.mark.parametrize("case", CASES)


def make(case, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = make_params(**CASES[case], tau_m=8.0, dtype=dtype)
    weights = jnp.asarray(rng.normal(0, 2, (N_UNITS, N_UNITS)), dtype)
    return params, jnp.asarray(make_currents((T, BATCH, N_UNITS)), dtype), weights


def by_steps(params, currents, weights, state=None, valid=None):
    """The loop that a user writes around `step`: its final state and every field."""
    state = slif.init_state(params, currents.shape[1:-1]) if state is None else state

    def body(state, given):
        k, j, valid = given
        j = j + jnp.dot(state.s, weights, precision="highest")
        new = slif.step(params, state, j, k * DT, DT)
        new = new if valid is None else jax.tree.map(lambda n, o: jnp.where(valid[:, None], n, o), new, state)
        return new, vars(new)

    return jax.lax.scan(body, state, (jnp.arange(len(currents)).astype(jnp.float32), currents, valid))


@functools.cache
def run_with_gradients(case):
    """In float64: params, currents and weights, the results of `simulate`, and the gradients of a weighted sum."""
    with enable_x64():
        arguments = make(case, np.float64)
        rng = np.random.default_rng(1)
        bars = {name: rng.normal(size=arguments[1].shape) for name in ("s", "v", "thr", "j")}

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
        def pull(params, currents, weights):
            out = slif.simulate(params, None, currents, dt=DT, record=FIELDS, feedback=weights)[1]
            return sum((out[name] * bar).sum() for name, bar in bars.items()), out

        gradients, out = jax.device_get(pull(*arguments))
        return *arguments, bars, out, gradients


def numbers_of(params):
    return {name: np.float64(x) for name, x in vars(params).items() if isinstance(x, jax.Array)}


@cases
def test_values_are_those_of_a_loop_in_numpy(case):
    params, currents, weights, _, out, _ = run_with_gradients(case)
    static = {name: getattr(params, name) for name in STATIC}
    cell = oracle.Cell(**numbers_of(params), **static, feedback=np.asarray(weights))
    expected = oracle.run(cell, currents, DT)
    for name in set(FIELDS) - ({"surrogate"} if params.surrogate.wrt == "voltage" else set()):
        np.testing.assert_allclose(out[name], expected[name], rtol=1e-12, atol=1e-13, err_msg=name)
    assert 0.05 < out["s"].mean() < 0.9
    assert (out["s"] != oracle.run(dataclasses.replace(cell, feedback=None), currents, DT)["s"]).any()


@cases
def test_gradients_are_those_of_the_loop_by_hand(case):
    params, currents, weights, bars, _, (of_params, of_currents, of_weights) = run_with_gradients(case)
    numbers = numbers_of(params)
    thr, kind = numbers.pop("thr"), "secant" if params.surrogate.wrt == "current" else "arctan"
    slopes = {name: np.float64(x) for name, x in params.surrogate.numbers.items()}
    cell = oracle_grad.Cell(
        slope=functools.partial(oracle_grad.SLOPES[kind], **slopes),
        **numbers,
        sticky_spikes=params.sticky_spikes,
        reset=params.reset,
        detach_reset=params.surrogate.detach_reset,
        feedback=np.asarray(weights),
    )
    rest = oracle.rest(oracle.Cell(1, 1, thr, refract_time=cell.refract_time), currents.shape[1:])
    steps, _ = oracle_grad.run(cell, rest, np.asarray(currents), DT)
    if kind == "secant":
        expected = oracle_grad.backward_current(cell, steps, bars)
    else:
        expected = oracle_grad.backward_voltage(cell, steps, bars, DT)
    np.testing.assert_allclose(of_weights, expected["feedback"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(of_currents, expected["currents"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(of_params.resist_m, np.sum(expected["resist_m"]), rtol=1e-9)
    assert np.abs(expected["feedback"]).max() > 0.1


@pytest.mark.parametrize(("case", "masked"), [("plain", True), ("everything", False), ("soft", True)])
def test_simulate_is_a_loop_of_step(case, masked):
    params, currents, weights = make(case)
    mask = np.arange(T)[:, None] < [T, 11, 0] if masked else None
    final, out = slif.simulate(params, None, currents, dt=DT, record=FIELDS, feedback=weights, valid=mask)
    expected_final, expected = jax.jit(by_steps)(params, currents, weights, valid=mask)
    shown = expected | ({"s": np.where(mask[..., None], expected["s"], 0)} if masked else {})
    assert_agree(out, shown)
    assert_agree(vars(final), vars(expected_final))


def test_every_way_of_calling_is_the_same():
    params, currents, weights = make("soft")
    final, out = slif.simulate(params, None, currents, dt=DT, feedback=weights)
    run = functools.partial(slif.simulate, dt=DT)
    literal = jax.jit(lambda: run(params, None, currents, feedback=np.asarray(weights)))()
    assert_agree(literal[1], out)
    middle, first = run(params, None, currents[:7], feedback=weights)
    end, second = run(params, middle, currents[7:], feedback=weights, t0=7 * DT)
    assert_same(jnp.concatenate([first["s"], second["s"]]), out["s"])
    assert_agree(vars(end), vars(final))
    mapped = jax.vmap(lambda x: run(params, None, x, feedback=weights)[1]["s"], 1, 1)(currents)
    assert_same(mapped, out["s"])
    weights_of_points = jnp.stack([weights, 0 * weights, -weights])
    _, swept = slif.sweep(params, currents, over={"feedback": weights_of_points, "thr": [0.4, 0.4, 0.4]}, dt=DT)
    _, shared = slif.sweep(params, currents, over={"thr": [0.4]}, dt=DT, feedback=weights)
    own = params.replace(thr=jnp.full(N_UNITS, 0.4, jnp.float32))
    for k in range(3):
        assert_same(swept["s"][k], run(own, None, currents, feedback=weights_of_points[k])[1]["s"])
    assert_same(shared["s"][0], swept["s"][0])
    arguments = params, currents, weights
    exported = export.export(jax.jit(lambda p, x, w: run(p, None, x, feedback=w)[1]["s"]))(*arguments)
    assert_same(export.deserialize(exported.serialize()).call(*arguments), out["s"])


def test_checkpoints_and_remat_change_no_gradient():
    params, currents, weights = make("soft")

    def loss(weights, **options):
        return (slif.simulate(params, None, currents, dt=DT, feedback=weights, **options)[1]["s"] ** 2).sum()

    gradients = jax.jit(
        lambda w: (jax.grad(loss)(w), jax.grad(loss)(w, checkpoint_every=6), jax.grad(jax.checkpoint(loss))(w))
    )(weights)
    for gradient in gradients[1:]:
        np.testing.assert_allclose(gradient, gradients[0], rtol=1e-5, atol=1e-5)


def test_kernels_leave_it_to_the_scan():
    params, currents, weights = make("plain")
    with pytest.raises(NotImplementedError, match="feedback"):
        slif.simulate(params, None, currents, dt=DT, feedback=weights, implementation="pallas")


@pytest.mark.parametrize(
    ("feedback", "error", "message"),
    [
        (np.ones((N_UNITS, 2)), ValueError, r"^feedback: expected shape \(11, 11\), got shape \(11, 2\)"),
        (1.0, ValueError, r"^feedback: expected shape \(11, 11\), got shape \(\)"),
        ("w", TypeError, "^feedback: expected a real number or array"),
        (np.full((N_UNITS, N_UNITS), np.nan), ValueError, "^feedback: expected finite values"),
        (jnp.ones((N_UNITS, N_UNITS), complex), TypeError, "^feedback: expected real numbers"),
    ],
)
def test_bad_matrices(feedback, error, message):
    with pytest.raises(error, match=message):
        slif.simulate(make_params(), None, make_currents(), dt=DT, feedback=feedback)


HYPER = {"dt": 1.0, "tau_m": 7.3, "thr": 0.8, "surrogate": slif.arctan(), "refract_time": 2.0, "reset": "subtract"}


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_recurrent_layers_and_cells_are_simulate_with_feedback(framework):
    x = jnp.asarray(make_currents((T, BATCH, N_UNITS))) / 4
    options = {"recurrent": True, "learn": ("tau_m",), **HYPER}
    if framework == "linen":
        layer, cell = slif.linen.SLIF(N_UNITS, **options), slif.linen.SLIFCell(N_UNITS, **options)
        variables = layer.init(jax.random.key(3), x)
        params, weights = layer.apply(variables, method="slif_params"), variables["params"]["recurrent_kernel"]
        s, state = layer.apply(variables, x, return_state=True)
        rnn = nn.RNN(cell, time_major=True, return_carry=True)
        (cell_state, _), by_cell = rnn.apply({"params": {"cell": variables["params"]}}, x)
    else:
        layer, cell = (make(N_UNITS, **options, rngs=nnx.Rngs(3)) for make in (slif.nnx.SLIF, slif.nnx.SLIFCell))
        params, weights = layer.slif_params(), layer.recurrent_kernel[...]
        s, state = layer(x, return_state=True)
        (cell_state, _), by_cell = nnx.RNN(cell, time_major=True, return_carry=True)(x)
    np.testing.assert_allclose(weights @ weights.T, np.eye(N_UNITS), atol=1e-5)
    expected_state, out = slif.simulate(params, None, x, dt=1.0, feedback=weights)
    assert_same(s, out["s"])
    assert_same(by_cell, out["s"])
    assert_agree(vars(state), vars(expected_state))
    assert_agree(vars(cell_state), vars(expected_state))
    assert 0.02 < s.mean() < 0.9


def test_a_resistance_that_follows_tau_m():
    """A current j moves v by j, whatever tau_m is learned; and the gradient passes through it."""
    for tau_m in (2.0, 7.3, np.linspace(2, 9, N_UNITS)):
        options = {**HYPER, "tau_m": tau_m, "thr_jitter": 0.0}
        fixed, learned = (slif.linen.SLIF(N_UNITS, **options, learn=learn) for learn in ((), ("tau_m",)))
        modules = {
            learn: slif.nnx.SLIF(N_UNITS, **options, learn=learn, rngs=nnx.Rngs(0)) for learn in ((), ("tau_m",))
        }
        expected = np.float32(np.asarray(tau_m) / 1.0)
        for factor in (1.0, 1.7):
            stored = {"logscale_tau_m": jnp.full(np.shape(tau_m), np.log(factor), jnp.float32)}
            params = learned.apply({"params": stored}, method="slif_params")
            modules["tau_m",].logscale_tau_m[...] = stored["logscale_tau_m"]
            np.testing.assert_allclose(params.resist_m, expected * factor, rtol=1e-6)
            assert_same(params.resist_m, params.tau_m)  # dt is 1
            assert_same(modules["tau_m",].slif_params(), params)
        assert_same(fixed.apply({}, method="slif_params").resist_m, expected)
        assert_same(modules[()].slif_params(), fixed.apply({}, method="slif_params"))
    slope = jax.grad(lambda x: learned.apply({"params": {"logscale_tau_m": x}}, method="slif_params").resist_m.sum())
    np.testing.assert_allclose(slope(jnp.zeros(N_UNITS)), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^resist_m: expected a value to start learning from, got None"):
        slif.linen.SLIF(N_UNITS, **HYPER, learn=("resist_m",))
    own = slif.linen.SLIF(N_UNITS, **HYPER, resist_m=1.5, thr_jitter=0.0).apply({}, method="slif_params")
    assert own.resist_m == np.float32(1.5)


@pytest.mark.parametrize(("framework", "time_major"), [("linen", True), ("nnx", False)])
def test_leaky_integrators(framework, time_major):
    x = jnp.asarray(make_currents((T, BATCH, N_UNITS)))
    options = {"dt": 0.5, "tau_m": 6.0, "learn": ("tau_m",), "time_major": time_major}
    if framework == "linen":
        module = slif.linen.LeakyIntegrator(N_UNITS, **options)
        variables = module.init(jax.random.key(0), x)
        call, params = functools.partial(module.apply, variables), module.apply(variables, method="slif_params")
    else:
        call = slif.nnx.LeakyIntegrator(N_UNITS, **options)
        params = call.slif_params()
    given = x if time_major else jnp.moveaxis(x, 0, 1)
    lengths = np.array([T, 5, 0])
    valid = np.arange(T)[:, None] < lengths
    v, state = call(given, valid=valid if time_major else valid.T, return_state=True)
    v = v if time_major else jnp.moveaxis(v, 1, 0)
    expected, now = [], np.zeros((BATCH, N_UNITS))
    for j, mask in zip(np.asarray(x, np.float64), valid, strict=True):
        now = np.where(mask[:, None], now + (j * 12 - now) / 6 * 0.5, now)
        expected.append(now)
    np.testing.assert_allclose(v, np.stack(expected), rtol=1e-5, atol=1e-5)
    assert_same(v[-1], state.v)
    assert params.thr[0] == jnp.inf
    gradient = jax.grad(lambda x: (call(x) ** 2).sum())(given)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient) > 0).all()
    assert (call(given, initial_state=state, t0=9.0) != call(given)).any()
    with pytest.raises(ValueError, match=r"^learn: expected names among tau_m, resist_m"):
        slif.nnx.LeakyIntegrator(3, dt=1.0, tau_m=4.0, learn=("thr_gain",))


def test_numbers_of_a_custom_slope_are_leaves():
    def bump(x, height, width):
        return height * jnp.exp(-((x / width) ** 2))

    params, currents, _ = make("voltage")
    params = params.replace(surrogate=slif.custom(bump, height=2.0, width=np.float32(0.5)))
    x = np.linspace(-1, 1, 7, dtype=np.float32)
    np.testing.assert_allclose(params.surrogate(x), 2 * np.exp(-((x / 0.5) ** 2)), rtol=1e-6)
    over = {"surrogate.width": [0.3, 0.6], "surrogate.height": [1.0, -1.0]}  # for a custom slope, any number

    def loss(currents):
        return slif.sweep(params, currents, over=over, dt=DT)[1]["s"].sum((1, 2, 3))

    swept = jax.jacrev(loss)(currents)
    for k, (width, height) in enumerate(zip(*over.values(), strict=True)):
        own = params.replace(surrogate=slif.custom(bump, height=jnp.float32(height), width=jnp.float32(width)))
        alone = jax.grad(lambda x, own=own: slif.simulate(own, None, x, dt=DT)[1]["s"].sum())(currents)
        np.testing.assert_allclose(swept[k], alone, rtol=1e-5, atol=1e-5)
    assert slif.custom(bump, height=2.0, width=0.5) == slif.custom(bump, width=0.5, height=2.0)
    listed = slif.custom(bump, height=2.0, width=[0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert jax.tree.map(np.shape, listed).numbers == {"height": (), "width": (7,)}
    np.testing.assert_allclose(jax.jit(lambda surrogate, x: surrogate(x))(listed, x), listed(x), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^width: expected finite"):
        slif.custom(bump, height=1.0, width=np.nan)
    with pytest.raises(TypeError, match=r"^width: expected a real number"):
        slif.custom(bump, height=1.0, width="wide")


@pytest.mark.parametrize("kind", ["SLIF", "SLIFCell"])
def test_initialisers_of_recurrent_kernels_are_held_to_the_shape(kind):
    numbers = {"dt": 1.0, "tau_m": 4.0, "thr": 0.4, "recurrent": True}
    cases = [
        (
            lambda key, shape, dtype: np.ones(shape[0], dtype),
            ValueError,
            r"expected one that gives \(3, 3\), got shape",
        ),
        (None, TypeError, "expected an initialiser, got None"),
    ]
    for init, error, message in cases:
        with pytest.raises(error, match=f"^recurrent_kernel_init: {message}"):
            getattr(slif.nnx, kind)(3, **numbers, rngs=nnx.Rngs(0), recurrent_kernel_init=init)
        layer = getattr(slif.linen, kind)(3, **numbers, recurrent_kernel_init=init)
        arguments = (
            (np.ones((2, 3)),)
            if kind == "SLIF"
            else ((slif.init_state(make_params(n_units=3)), np.zeros((), np.int32)), np.ones(3))
        )
        with pytest.raises(error, match=f"^recurrent_kernel_init: {message}"):
            layer.init(jax.random.key(0), *arguments)


def test_kernels_that_were_put_in_later_are_held_to_the_shape():
    cell = slif.nnx.SLIFCell(3, dt=1.0, tau_m=4.0, thr=0.4, recurrent=True, rngs=nnx.Rngs(0))
    cell.recurrent_kernel = nnx.Param(np.ones((3, 1), np.float32))
    with pytest.raises(ValueError, match=r"^recurrent_kernel: expected shape .*, got shape \(3, 1\)"):
        cell(cell.initialize_carry((2, 3)), np.ones((2, 3)))
