"""The fused kernels against the scan: values, final states and gradients in the interpreter, and code for a GPU.

The interpreter's programs take long to compile, once for each step of a block. So tests that are not about blocks run
for a step or two, from a state in the middle of a run. Code for GPUs is made from shapes alone.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    DT,
    MECHANISMS,
    RECORDS,
    assert_agree,
    enable_x64,
    make_currents,
    make_params,
    make_state,
)
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slif
from slif import _device, kernels
from slif._attach import attach
from slif.kernels import OLDEST_JAX, inline
from slif.kernels.inline import inline_jaxpr, obstacle
from slif.loops import choose
from slif.request import SUMMARIES, Request
from slif.rounding import nearest_reciprocal, reciprocal
from slif.surrogate import BUILT_IN

pytestmark = pytest.mark.skipif(jax.__version_info__ < OLDEST_JAX, reason="the fused kernels need a newer jax")
FUSED = [name for name in MECHANISMS if name not in ("sparsity", "inhibition", "everything", "sparse_everything")]
MIXED = [name for name in MECHANISMS if name not in FUSED]
UNITS = {"tau_m": np.linspace(5, 30, 50), "resist_m": np.linspace(1, 2, 50), "refract_time": np.linspace(0, 2, 50)}
EVERYTHING = {"thr_gain": 0.02, "thr_leak": 0.01, "sticky_spikes": True, **UNITS}
VOLTAGE = [surrogate for surrogate in BUILT_IN.values() if surrogate.wrt == "voltage"]
ENDS = np.linspace(-0.7, 0.3, len(VOLTAGE) - 1, dtype=np.float32).tolist()


def each_in_turn(x):
    """The slopes of all kinds in one program, each between two distances of its own."""
    h, *others = (surrogate.slope(x, **surrogate.numbers) for surrogate in VOLTAGE)
    for end, other in zip(ENDS, others, strict=True):
        h = jnp.where(x < end, h, other)
    return h


def run(params, currents, implementation="pallas", state=None, **options):
    state = make_state(params, currents.shape[1:-1]) if state is None else state
    return slif.simulate(params, state, currents, dt=DT, implementation=implementation, **options)


def assert_like_the_scan(*cases):
    """Each case: params, currents, valid and options. All are one program, which XLA compiles faster."""

    @jax.jit
    def run_each(arrays):
        return [
            [run(params, x, name, valid=valid, **options) for name in ("pallas", "xla")]
            for (params, x, valid), (*_, options) in zip(arrays, cases, strict=True)
        ]

    for (actual, expected), (*_, options) in zip(run_each([case[:3] for case in cases]), cases, strict=True):
        assert_agree(vars(actual[0]), vars(expected[0]), options)
        assert_agree(actual[1], expected[1], options)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), actual) == jax.tree.map(
            lambda x: (x.shape, x.dtype), expected
        )


def weights(tree, seed=1):
    """A cotangent for every leaf that can have one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def values_and_gradients(params, currents, implementation, **options):
    """The results of `simulate`, and the gradients of a sum over them with respect to everything that can have one."""

    def loss(params, state, currents, dt):
        final, out = slif.simulate(params, state, currents, dt=dt, implementation=implementation, **options)
        terms = {**vars(final), **{"out_" + name: x for name, x in out.items() if x.dtype == jnp.float32}}
        terms.pop("out_first_spike_time", None)
        bars = weights(jax.eval_shape(lambda: terms))
        return sum(jnp.vdot(x, bar) for x, bar in ((terms[name], bars[name]) for name in terms)), (vars(final), out)

    state = make_state(params, currents.shape[1:-1])
    bars, values = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(params, state, currents, jnp.float32(DT))
    return values, bars


def assert_values_and_gradients_are_those_of_the_scan(params, currents, **options):
    both = jax.jit(lambda *x: [values_and_gradients(*x, which, **options) for which in ("pallas", "xla")])
    (values, actual), (expected_values, expected) = both(params, jnp.asarray(currents))
    for value, expected_value in zip(values, expected_values, strict=True):
        assert_agree(value, expected_value)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4), actual, expected)
    assert all(jnp.any(x) for x in (expected[0].tau_m, expected[1].v, *expected[2:]))


def masks(currents, seed=3):
    """Rows that end, pause, or never start."""
    valid = np.random.default_rng(seed).random(currents.shape[:-1]) < 0.8
    valid[len(valid) // 2 :, 0] = False
    valid[:, -1] = False
    return valid


def test_all_that_the_scan_gives():
    currents, options = make_currents((2, 3, 11)), {"record": ("u", *RECORDS), "t0": 3.0}
    assert_like_the_scan(
        (make_params("plain"), currents, None, options),
        (make_params("sticky", thr_gain=0.02, thr_leak=0.01), currents, masks(currents), options),
    )


def test_any_shape():
    """Lengths around that of a block, and widths around that of a tile."""
    shapes = [(1, 1), (8, 1, 128), (9, 257)]
    assert_like_the_scan(*((make_params(n_units=s[-1]), make_currents(s), None, {}) for s in shapes))


def test_any_dtype():
    x, record = make_currents((1, 50)).round(), ("s", "s_packed", "spike_count")  # exact in every dtype
    params = make_params("sticky", 50)
    dtypes = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bool")]
    dtypes += [("bfloat16", "uint8"), ("float16", "int8"), ("float32", "int32")]

    @jax.jit
    def run_each(params, x):
        return {
            (currents, spikes): run(params, x.astype(currents), record=record, spike_dtype=spikes)
            for currents, spikes in dtypes
        }

    expected_state, expected = run(params, x, "xla", record=record)
    for case, (state, out) in run_each(params, x).items():
        assert out["s"].dtype == jnp.dtype(case[1])
        assert_agree(vars(state), vars(expected_state), case)
        assert_agree(out | {"s": np.asarray(out["s"], np.float32)}, expected, case)


def test_values_and_gradients_of_the_voltage_surrogate():
    params = make_params("plain", 50, surrogate=slif.arctan(), reset="subtract", **EVERYTHING)
    record = ("u", *RECORDS)
    assert_values_and_gradients_are_those_of_the_scan(params, make_currents((2, 3, 50)), record=record, t0=3.0)


def test_values_and_gradients_of_blocks():
    params = make_params("refractory", 33, surrogate=slif.arctan(detach_reset=False), thr_gain=0.02)
    currents = make_currents((17, 2, 2, 33))
    record = ("s", "u", *SUMMARIES)
    assert_values_and_gradients_are_those_of_the_scan(params, currents, record=record, valid=masks(currents))


def test_rows_of_whole_tiles():
    """Their tiles read what all rows share from one row."""
    units = {"tau_m": np.linspace(5, 30, 256), "refract_time": np.linspace(0, 2, 256)}
    params = make_params("plain", 256, surrogate=slif.arctan(), thr_jitter=0.05, **units)
    assert_values_and_gradients_are_those_of_the_scan(params, make_currents((2, 3, 256)))


@pytest.mark.parametrize(("name", "n_steps"), [("currents", 9), ("thr", 2), ("dt", 2)])
def test_the_gradient_of_one_thing_alone(name, n_steps):
    """The backward loop computes no other, and starts a block from v alone if nothing else changes."""
    params, currents = make_params("plain", surrogate=slif.arctan()), jnp.asarray(make_currents((n_steps, 11)))
    given = {"currents": currents, "thr": params.thr, "dt": jnp.float32(DT)}

    @jax.jit
    def gradients(given):
        def loss(x, implementation):
            now = given | {name: x}
            cell = params.replace(thr=now["thr"])
            final, out = slif.simulate(cell, None, now["currents"], dt=now["dt"], implementation=implementation)
            terms = [out["s"], *(getattr(final, field) for field in ("v", "thr", "s", "j"))]
            return sum(jnp.vdot(term, weights(term)) for term in terms)

        return [jax.grad(loss)(given[name], which) for which in ("pallas", "xla")]

    actual, expected = gradients(given)
    assert jnp.any(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_cell_at_rest(masked):
    currents = make_currents((1, 3, 50))
    params = make_params("plain", 50, surrogate=slif.arctan(), **EVERYTHING)
    valid = masks(currents) if masked else None

    def value_and_gradient(params, state_of):
        def loss(params):
            state = state_of(params)
            final, out = slif.simulate(params, state, currents, dt=DT, valid=valid, implementation="pallas")
            return (final.v**2).sum() + out["s"].sum(), (final, out)

        return jax.grad(loss, has_aux=True)(params)

    states = (lambda params: None, lambda params: slif.init_state(params, 3))
    (actual_bar, actual), (expected_bar, expected) = jax.jit(
        lambda params: [value_and_gradient(params, state_of) for state_of in states]
    )(params)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7), actual_bar, expected_bar)


def test_the_gradient_of_a_step_is_the_slope():
    """Independent of the scan: d s/d j = g(u - thr) resist_m dt / tau_m."""
    params, currents = (
        make_params("plain", 50, surrogate=slif.custom(each_in_turn)),
        jnp.asarray(make_currents((1, 50))),
    )
    state = make_state(params, ())

    @jax.jit
    def value_and_pull(x):
        (final, out), pull = jax.vjp(lambda x: run(params, x, state=state, record=("s", "u")), x)
        bar = jax.tree.map(jnp.zeros_like, (final, out))
        bar[1]["s"] = jnp.ones_like(out["s"])
        return final, out["u"][0] - final.thr, *pull(bar)

    final, distances, d_currents = value_and_pull(currents)
    slope = np.array(jax.jit(each_in_turn)(distances))
    assert len(np.unique(np.digitize(distances[slope > 0], ENDS))) == len(VOLTAGE)
    np.testing.assert_allclose(final.surrogate, slope, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(d_currents[0], slope * 1.5 * DT / 20, rtol=1e-5, atol=1e-30)


def test_gradients_of_the_secant_are_those_of_the_scan():
    params, currents = make_params("sticky"), jnp.asarray(make_currents((2, 2, 11)))

    @jax.jit
    def both_modes(params, currents):
        def of(implementation):
            along = jax.jvp(lambda x: run(params, x, implementation)[1]["s"], (currents,), (weights(currents),))
            return along, values_and_gradients(params, currents, implementation)[1]

        return of("pallas"), of("xla")

    (along, actual), (expected_along, expected) = both_modes(params, currents)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), actual, expected)
    jax.tree.map(np.testing.assert_array_equal, along, expected_along)


def test_voltage_kernels_refuse_forward_mode():
    params, currents = make_params("voltage"), jnp.asarray(make_currents((2, 11)))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: run(params, x)[1]["s"], (currents,), (currents,))


@jax.custom_jvp
def by_a_jvp(x):
    return 1 / (1 + x * x)


@jax.custom_vjp
def by_a_vjp(x):
    return jnp.exp(-x * x)


by_a_jvp.defjvp(lambda primals, tangents: (by_a_jvp(*primals), 3 * tangents[0]))
by_a_vjp.defvjp(lambda x: (by_a_vjp(x), x), lambda x, bar: (3 * x * bar,))
CALLS = {
    "jit": jax.jit(lambda x: 1 / (1 + jnp.abs(x))),
    "nested jit": jax.jit(lambda x: jax.jit(jnp.cos)(jax.jit(jnp.sin)(x)) ** 2),
    "jax.nn": lambda x: jax.nn.sigmoid(x) * jax.nn.hard_tanh(x) + jax.nn.silu(x) + jax.nn.relu(x),
    "custom_jvp": by_a_jvp,
    "custom_vjp": by_a_vjp,
    "checkpoint": jax.checkpoint(lambda x: jnp.tanh(x) + 2),
    "jit of a checkpoint of a custom_jvp": jax.jit(jax.checkpoint(lambda x: 2 * by_a_jvp(x))),
    "derivative": lambda x: jax.grad(lambda x: jnp.tanh(x).sum())(x),
    "vmap": jax.vmap(lambda x: x**-2 + lax.integer_pow(x, 0)),
    "constant": lambda x: jnp.copy(x) * np.float32(2) + jnp.ones_like(x),
}


def quadruple(double, x):
    return lax.fori_loop(0, 2, lambda _, x: double(x), x)


@jax.custom_vjp
def loop_in_its_derivative(x):
    return 4 * x


loop_in_its_derivative.defvjp(lambda x: (quadruple(lambda x: 2 * x, x), None), lambda _, bar: (4 * bar,))
LOOPS = {
    "fori_loop": (lambda x: quadruple(lambda x: 2 * x, x), "scan"),
    "while_loop": (lambda x: lax.while_loop(lambda x: jnp.all(x < 9), lambda x: x + 1, x), "while"),
    "scan": (lambda x: lax.scan(lambda x, _: (2 * x, None), x, length=3)[0], "scan"),
    "cond": (lambda x: lax.cond(True, jnp.sin, jnp.cos, x), "cond"),
    "switch": (lambda x: lax.switch(1, [jnp.sin, lambda x: 3 * x], x), "cond"),
    "map": (lambda x: lax.map(jnp.sin, x), "scan"),
    "solve": (lambda x: lax.custom_linear_solve(lambda y: 2 * y, x, lambda _, b: b / 2), "custom_linear_solve"),
    "of a derivative": (loop_in_its_derivative, "scan"),
    "within calls": (jax.jit(jax.checkpoint(lambda x: quadruple(jax.jit(jnp.sin), x))), "scan"),
}
# Slopes that mix units, or depend on position: a kernel's tiles know neither rows nor their ends.
MIXING = {
    "sum": (lambda x: x / x.sum(), "reduce_sum"),
    "cumsum": (lambda x: jnp.cumsum(x, -1), "cumsum"),
    "sort": (lambda x: jnp.sort(x), "sort"),
    "reverse": (lambda x: x[..., ::-1], "rev"),
    "place": (lambda x: x * lax.broadcasted_iota(x.dtype, x.shape, 0), "iota"),
    "callback": (lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x), "pure_callback"),
    "no code on GPUs": (jax.nn.softplus, "log1p"),
}


def test_slopes_that_call_functions():
    x = jnp.linspace(0.5, 3, 7)
    assert {name: obstacle(slope, x) for name, slope in CALLS.items()} == dict.fromkeys(CALLS)
    both = jax.jit(lambda x: {name: (inline_jaxpr(slope)(x), slope(x)) for name, slope in CALLS.items()})(x)
    for name, (apart, whole) in both.items():
        np.testing.assert_allclose(apart, whole, rtol=1e-6, err_msg=name)
    slope = slif.custom(lambda x: sum(slope(x) for slope in CALLS.values()))
    assert_values_and_gradients_are_those_of_the_scan(make_params(surrogate=slope), make_currents((1, 2, 11)))


@pytest.mark.parametrize("name", [*LOOPS, *MIXING])
def test_slopes_of_anything_else_are_refused_by_name_and_scanned_otherwise(monkeypatch, name):
    slope, primitive = (LOOPS | MIXING)[name]
    message = f"cannot do the primitive `{primitive}` in the surrogate's slope"
    currents = make_currents((2, 11))
    of_current, of_voltage = (make_params(surrogate=slif.custom(slope, wrt)) for wrt in ("current", "voltage"))
    for params in (of_voltage,) if slope is loop_in_its_derivative else (of_current, of_voltage):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(lambda x, p=params: run(p, x), currents)
    on_a_gpu(monkeypatch, "NVIDIA H100", "9.0", (0, 12, 0))
    assert not fuses(of_current, currents)
    assert not fuses(of_voltage, currents)


def test_a_slope_with_a_loop_is_scanned_where_nobody_asks():
    looped, _ = LOOPS["fori_loop"]

    def gradient(slope, x):
        params = make_params("sticky", surrogate=slif.custom(slope))
        return jax.grad(lambda x: run(params, x, None)[1]["s"].sum())(x)

    both = jax.jit(lambda x: [gradient(slope, x) for slope in (looped, lambda x: 4 * x)])
    actual, expected = both(make_currents((2, 11)))
    assert expected.any()
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("array", [jnp.float32(2), np.ones(11, np.float32)])
def test_slopes_that_close_over_arrays_are_refused(array):
    params = make_params(surrogate=slif.custom(jax.jit(lambda x: x * array)))
    with pytest.raises(NotImplementedError, match="cannot do a closed-over array in the surrogate's slope"):
        run(params, make_currents((2, 11)))


def test_inlining_leaves_loops_and_branches_whole():
    both = jax.jit(lambda x: {name: (inline_jaxpr(slope)(x), slope(x)) for name, (slope, _) in LOOPS.items()})
    for name, (apart, whole) in both(jnp.linspace(0.5, 3, 7)).items():
        np.testing.assert_allclose(apart, whole, rtol=1e-6, err_msg=name)


def test_a_slope_taken_apart_is_the_slope():
    def value_and_pull(surrogate, x, bar):
        return surrogate(x), jax.vjp(lambda x: attach(jnp.isfinite(x).astype(x.dtype), x, surrogate(x)), x)[1](bar)

    x, bar = jnp.linspace(-3, 3, 65), jnp.linspace(1, 2, 65)
    for surrogate in BUILT_IN.values():
        assert obstacle(lambda surrogate, x: surrogate(x), surrogate, x) is None

    @jax.jit
    def both(surrogates, x, bar):
        return {
            kind: [f(surrogate, x, bar) for f in (inline_jaxpr(value_and_pull), value_and_pull)]
            for kind, surrogate in surrogates.items()
        }

    for kind, (actual, expected) in both(BUILT_IN, x, bar).items():
        jax.tree.map(
            lambda a, e, kind=kind: np.testing.assert_allclose(a, e, rtol=1e-6, err_msg=kind), actual, expected
        )


def test_vmaps_are_loops():
    """Over parameters and, within, over currents and masks; values and gradients."""
    kinds, x = (
        [make_params("sticky", surrogate=make()) for make in (slif.secant, slif.arctan)],
        make_currents((1, 2, 11)),
    )
    taus, scales, valid = np.float32([5, 10, 20]), np.float32([1, 0.5]), np.array([[True, False]])
    state = make_state(kinds[0], ())

    @jax.jit
    def one(tau, x, valid):
        def rasters(x):
            return [run(params.replace(tau_m=tau), x, state=state, valid=valid)[1]["s"] for params in kinds]

        s, pull = jax.vjp(rasters, x)
        return s, *pull(jax.tree.map(jnp.ones_like, s))

    def scaled(tau, scale):
        return jax.vmap(one, (None, 1, 1))(tau, scale * x, valid)

    s, bar = jax.jit(jax.vmap(lambda tau: jax.vmap(lambda scale: scaled(tau, scale))(scales)))(taus)
    for n, tau in enumerate(taus):
        for k, scale in enumerate(scales):
            for row in range(2):
                expected, expected_bar = one(tau, scale * x[:, row], valid[:, row])
                jax.tree.map(lambda a, e, at=(n, k, row): np.testing.assert_array_equal(a[at], e), s, expected)
                np.testing.assert_allclose(bar[n, k, row], expected_bar, rtol=1e-5)
    assert bar[:, :, 0].any()
    assert not bar[:, :, 1].any()


def on_a_gpu(monkeypatch, kind, capability, version):
    """As on a machine with that card and that release of JAX."""
    device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(_device, "default", lambda: device)
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(jax, "__version__", ".".join(map(str, version)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def fuses(params, currents, spike_dtype="float32"):
    """Whether a kernel runs it by default; not through `simulate`, whose traces outlive the stand-in."""
    request = Request(dt=jnp.float32(DT), t0=jnp.float32(0), spike_dtype=np.dtype(spike_dtype))
    return choose.fuses(None, params, currents, request)


@pytest.mark.parametrize(
    ("kind", "capability", "version", "why"),
    [
        ("NVIDIA A100", "8.0", (0, 11, 2), None),
        ("NVIDIA L4", "8.9", (0, 12, 0), None),
        ("NVIDIA H100", "9.0", (0, 10, 2), None),
        ("NVIDIA B200", "10.0", (0, 10, 2), None),
        ("NVIDIA A100", "8.0", (0, 10, 2), r"NVIDIA A100 \(compute capability 8.0\).* 9.0 or later.* from jax 0.11 on"),
        ("Tesla T4 of NVIDIA", "7.5", (0, 12, 0), r".*compute capability 7.5.* 8.0 or later with jax 0.12.0"),
        ("AMD Instinct MI300X", "gfx942", (0, 12, 0), r"AMD Instinct MI300X: it takes NVIDIA's"),
    ],
)
def test_cards_and_releases(monkeypatch, kind, capability, version, why):
    on_a_gpu(monkeypatch, kind, capability, version)
    params, currents = make_params(), make_currents((3, 2, 11))
    assert fuses(params, currents) == (why is None)
    if why is None:
        assert kernels.unfit() is None
    else:
        with pytest.raises(NotImplementedError, match=f"cannot do {why}"):
            run(params, currents)


def test_what_stands_in_for_the_kernels_under_x64(monkeypatch):
    """Params in float32 stay float32, although JAX's own arrays would be float64."""
    on_a_gpu(monkeypatch, "NVIDIA H100", "9.0", (0, 12, 0))
    params, x = make_params("gain", surrogate=slif.arctan()), make_currents((3, 11))
    with enable_x64():
        gradient, state = jax.grad(lambda x: (lambda r: (r[1]["s"].sum(), r[0]))(run(params, x, None)), has_aux=True)(x)
        expected = run(params, x, "xla")[0]
    assert_agree(vars(state), vars(expected))
    assert gradient.dtype == state.v.dtype == jnp.float32


def test_a_cpu_beside_a_gpu_scans(monkeypatch):
    """With a GPU by default, a program for the CPU takes the scan: nothing of it runs in the interpreter."""
    x = make_currents((9, 3, 11))
    valid, record = masks(x), ("s", "u", "spike_count", "s_packed")
    secant, arctan = (make_params("sticky", surrogate=make(), thr_gain=0.1) for make in (slif.secant, slif.arctan))

    def both(implementation):
        def raster(x):
            return run(arctan, x, implementation, valid=valid)[1]["s"]

        def values_and_gradient(x):
            s, pull = jax.vjp(raster, x)
            return run(secant, x, implementation, valid=valid, record=record), pull(weights(s))

        return jax.jit(values_and_gradient)

    expected = both("xla")(x)
    on_a_gpu(monkeypatch, "NVIDIA H100", "9.0", (0, 12, 0))
    lowered = both(None).lower(x)
    assert "interpret" not in lowered.as_text("hlo", debug_info=True)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4), lowered.compile()(x), expected)


def test_shapes_that_jax_export_names_are_scanned(monkeypatch):
    on_a_gpu(monkeypatch, "NVIDIA H100", "9.0", (0, 12, 0))
    params, shape = make_params(), jax.export.symbolic_shape("T, B")

    def raster(x):
        return slif.simulate(params, slif.init_state(params, x.shape[1:-1]), x, dt=DT)[1]["s"]

    for lead, fused_too in (((5, 2), True), (shape, False)):
        x = jax.ShapeDtypeStruct((*lead, 11), jnp.float32)
        module = jax.export.export(jax.jit(raster), platforms=["cuda"])(x).mlir_module()
        assert ("mosaic_gpu" in module) == fused_too


def test_what_it_cannot_do_is_refused_by_name_and_scanned_otherwise(monkeypatch):
    currents = jnp.asarray(make_currents((3, 2, 11)))
    cases = [({"mechanism": name}, currents, {}, "mixes units") for name in MIXED]
    cases += [
        ({"dtype": jnp.bfloat16}, currents, {}, "params of dtype bfloat16"),
        ({}, currents.astype(int), {}, "currents of dtype int"),
        ({}, currents, {"spike_dtype": "int16"}, "spike_dtype int16"),
        ({}, currents[:0], {}, "empty"),
    ]
    cases = [(make_params(**arguments), *rest) for arguments, *rest in cases]
    for params, x, options, message in cases:
        with pytest.raises(NotImplementedError, match=message):
            run(params, x, **options)
    on_a_gpu(monkeypatch, "NVIDIA H100", "9.0", (0, 12, 0))
    assert fuses(make_params(), currents)
    for params, x, options, _ in cases:
        assert not fuses(params, x, **options)


def shape_of_params(*arguments, **overrides):
    return jax.eval_shape(lambda: make_params(*arguments, **overrides))


class TestCode:
    """Code for NVIDIA GPUs, made on a machine without one."""

    def lower(self, function, *arguments):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("mosaic_gpu_v2")

    def run(self, params, currents, **options):
        return run(params, currents, state=slif.init_state(params, currents.shape[1:-1]), **options)[1]

    def lower_gradient(self, params, x):
        return self.lower(jax.grad(lambda p, x: self.run(p, x)["s"].sum(), argnums=(0, 1)), params, x)

    def test_other_platforms_are_refused_by_name_when_the_program_is_made_for_them(self):
        params, x = shape_of_params("plain", 3), jax.ShapeDtypeStruct((2, 3), jnp.float32)
        for platform in ("tpu", "rocm"):
            with pytest.raises(NotImplementedError, match=f"an NVIDIA GPU for 'pallas', got platform {platform}"):
                jax.jit(self.run).trace(params, x).lower(lowering_platforms=(platform,))

    # With blocks and without, and both widths of a tile.
    @pytest.mark.parametrize(
        ("mechanism", "n_units", "n_steps"),
        [
            *((name, 111, 1) for name in FUSED if name not in ("sticky", "voltage")),
            *((name, 2**17, 9) for name in ("sticky", "voltage")),
            ("voltage", 2**17 + 1, 1),
        ],
    )
    def test_forwards_and_backwards(self, mechanism, n_units, n_steps):
        params, currents = shape_of_params(mechanism, n_units), jax.ShapeDtypeStruct((n_steps, n_units), jnp.float32)
        bar = jax.ShapeDtypeStruct(currents.shape, jnp.float32)

        def both(params, currents, bar):
            s, pull = jax.vjp(lambda x: self.run(params, x)["s"], currents)
            return s, pull(bar)

        assert self.lower(both, params, currents, bar) == (2 if mechanism == "voltage" else 1)

    @pytest.mark.parametrize(
        ("currents", "spikes", "n_steps"),
        [("float32", "float32", 1), ("bfloat16", "bfloat16", 9), ("float16", "bool", 1), ("bfloat16", "uint8", 1)],
    )
    def test_dtypes(self, currents, spikes, n_steps):
        x = jax.ShapeDtypeStruct((n_steps, 2, 50), currents)
        assert self.lower(lambda p, x: self.run(p, x, spike_dtype=spikes), shape_of_params("sticky", 50), x) == 1

    def test_records(self):
        x = jax.ShapeDtypeStruct((2, 2, 50), jnp.float32)
        params = shape_of_params("voltage", 50, **UNITS)
        assert self.lower(lambda p, x: self.run(p, x, record=RECORDS), params, x) == 1

    def test_surrogates(self):
        """All voltage surrogates; that of the mechanism "voltage" keeps its reset detached."""
        surrogate = slif.custom(each_in_turn, detach_reset=False)
        params = shape_of_params("sticky", 50, surrogate=surrogate, thr_gain=0.1, thr_leak=0.1)
        assert self.lower_gradient(params, jax.ShapeDtypeStruct((2, 50), jnp.float32)) == 2

    def test_every_operation_of_a_slope(self):
        def slope(x):
            y = sum(f(x) for f in (jnp.abs, jnp.sign, jnp.cos, jnp.sin, jnp.exp, jnp.exp2, jnp.square, jax.nn.sigmoid))
            y += jnp.log(1 + x * x) + lax.rsqrt(1 + x * x) + lax.round(x) + x**3 + jnp.copy(x)
            y = lax.clamp(-1.0, jnp.maximum(y, -x), 1.0) / jnp.minimum(x - 3, 2)
            y += jax.grad(lambda x: (x * x).sum())(x) + jax.jvp(jnp.tanh, (x,), (jnp.full_like(x, 2),))[1]
            y += lax.stop_gradient(x).astype(jnp.bfloat16).astype(x.dtype) + jnp.isfinite(x)
            return jnp.where((x > 0) | (y >= 1) ^ (x == y), jnp.where((x < 1) & (y <= 0) & (x != y), x, y), 0)

        def operations(jaxpr):
            for eqn in jaxpr.eqns:
                inner, _ = inline._called(eqn)
                yield from [eqn.primitive.name] if inner is None else operations(inner)

        # Part of the derivative of tanh only since jax 0.11.
        assert inline.ELEMENTWISE - {*operations(jax.make_jaxpr(slope)(jnp.ones(3)).jaxpr)} <= {"one_minus_square"}
        params = shape_of_params(n_units=50, surrogate=slif.custom(slope))
        assert self.lower_gradient(params, jax.ShapeDtypeStruct((1, 50), jnp.float32)) == 2

    def test_arrays_on_a_mesh(self):
        """Their sharding is part of every reshape, which a kernel does not support."""
        on_mesh = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("batch",)), P())
        params = shape_of_params("voltage", 50, thr_gain=0.1, thr_leak=0.1)
        x = jax.ShapeDtypeStruct((2, 50), jnp.float32, sharding=on_mesh)
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=on_mesh), params)
        assert self.lower_gradient(params, x) == 2

    def test_vmap_and_shard_map(self):
        params = shape_of_params("voltage", 50)
        taus, x = jax.ShapeDtypeStruct((5,), jnp.float32), jax.ShapeDtypeStruct((1, 4, 50), jnp.float32)

        def loss(params, tau, x):
            return self.run(params.replace(tau_m=tau), x)["s"].sum()

        assert self.lower(jax.vmap(jax.grad(loss, 1), (None, 0, None)), params, taus, x) == 2
        mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
        spec = P(None, "batch")

        def sharded(check_vma):
            def raster(params, x):
                return self.run(params, x)["s"]

            return jax.shard_map(raster, mesh=mesh, in_specs=(P(), spec), out_specs=spec, check_vma=check_vma)

        for check_vma in (False, True):
            assert self.lower(sharded(check_vma), params, x) == 1

    def test_a_sweep_is_one_launch_with_its_points_side_by_side(self):
        params, n_points = shape_of_params("plain", 1), 70_000
        taus, x = jax.ShapeDtypeStruct((n_points,), jnp.float32), jax.ShapeDtypeStruct((9, 1), jnp.float32)

        def sweep(params, taus, x):
            return jax.vmap(lambda tau: self.run(params.replace(tau_m=tau), x)["s"])(taus)

        text = jax.jit(sweep).trace(params, taus, x).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu_v2") == 1
        assert f"tensor<9x{n_points}xf32>" in text
        assert f"{n_points}x128x" not in text  # no array of a tile's width for every point


def test_reciprocals_are_the_nearest_floats():
    """From a quotient that is off by up to two ulps, as a GPU's may be."""
    powers = 2.0 ** np.arange(-100, 100, dtype=np.float32)
    random = np.exp(np.random.default_rng(0).uniform(-80, 80, 10**5)).astype(np.float32)
    x = np.concatenate([powers, np.nextafter(powers, np.float32(0)), random])
    expected = 1 / x
    for ulps in range(-2, 3):
        y = (expected.view(np.int32) + np.int32(ulps)).view(np.float32)
        np.testing.assert_array_equal(jax.jit(nearest_reciprocal)(x, y), expected)
    np.testing.assert_array_equal(jax.jit(reciprocal)(x), expected)
