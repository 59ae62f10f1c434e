"""The fused kernels against the scan: values, final states and gradients in the interpreter, and code for a GPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DT, MECHANISMS, RECORDS, assert_agree, make_currents, make_params
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slif
from slif import kernels
from slif.kernels import OLDEST_JAX

pytestmark = pytest.mark.skipif(jax.__version_info__ < OLDEST_JAX, reason="the fused kernels need a newer jax")
FUSED = [name for name in MECHANISMS if name not in ("sparsity", "inhibition", "everything", "sparse_everything")]
MIXED = [name for name in MECHANISMS if name not in FUSED]
UNITS = {"tau_m": np.linspace(5, 30, 50), "resist_m": np.linspace(1, 2, 50), "refract_time": np.linspace(0, 2, 50)}
SURROGATES = {
    "fast_sigmoid": slif.fast_sigmoid,
    "sigmoid": slif.sigmoid,
    "arctan": slif.arctan,
    "triangular": slif.triangular,
    "boxcar": slif.boxcar,
    "gaussian": slif.gaussian,
    "straight_through": slif.straight_through,
}
fused = pytest.mark.parametrize("mechanism", FUSED)


def run(params, currents, implementation="pallas", state=None, **options):
    state = slif.init_state(params, currents.shape[1:-1]) if state is None else state
    return slif.simulate(params, state, currents, dt=DT, implementation=implementation, **options)


def assert_like_the_scan(params, currents, **options):
    (state, out), (expected_state, expected) = (run(params, currents, name, **options) for name in ("pallas", "xla"))
    assert_agree(vars(state), vars(expected_state))
    assert_agree(out, expected)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def weights(tree, seed=1):
    """A cotangent for every leaf that can have one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def gradients(params, currents, implementation, **options):
    """Of a sum over everything that has a gradient, with respect to everything that could have one."""
    state = slif.init_state(params, currents.shape[1:-1]).replace(v=0.1 + jnp.zeros(currents.shape[1:]))

    def loss(params, state, currents, dt):
        final, out = slif.simulate(params, state, currents, dt=dt, implementation=implementation, **options)
        terms = {**vars(final), **{"out_" + name: x for name, x in out.items() if x.dtype == jnp.float32}}
        terms.pop("out_first_spike_time", None)
        bars = weights(jax.eval_shape(lambda: terms))
        return sum(jnp.vdot(x, bar) for x, bar in ((terms[name], bars[name]) for name in terms))

    return jax.grad(loss, argnums=(0, 1, 2, 3))(params, state, jnp.asarray(currents), jnp.float32(DT))


def masks(currents, seed=3):
    """Rows that end, pause, or never start."""
    valid = np.random.default_rng(seed).random(currents.shape[:-1]) < 0.8
    valid[len(valid) // 2 :, 0] = False
    valid[:, -1] = False
    return valid


@fused
def test_all_that_the_scan_gives(mechanism):
    currents = make_currents((11, 3, 11))  # a block, and three steps more
    for valid in (None, masks(currents)):
        assert_like_the_scan(make_params(mechanism), currents, record=("u", *RECORDS), t0=3.0, valid=valid)


# Around a block's length, and around a tile's width.
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (8, 1, 128), (9, 129), (16, 2, 2, 33), (17, 130), (33, 1, 257)])
def test_any_shape(shape):
    assert_like_the_scan(make_params("sticky", n_units=shape[-1]), make_currents(shape))


@pytest.mark.parametrize("spikes", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.bool_, jnp.uint8, jnp.int8, jnp.int32])
@pytest.mark.parametrize("currents", [jnp.float32, jnp.bfloat16])
def test_any_dtype(currents, spikes):
    x = jnp.asarray(make_currents((9, 50)), currents)
    assert_like_the_scan(make_params("sticky", 50), x, record=("s", "s_packed", "spike_count"), spike_dtype=spikes)


def test_units_of_their_own():
    params = make_params("sticky", 50, thr_gain=np.linspace(0, 0.1, 50), thr_leak=jnp.zeros(50), **UNITS)
    assert_like_the_scan(params, make_currents((12, 2, 50)), record=("s", "v"))


@pytest.mark.parametrize("mechanism", ["sticky", "voltage"])
def test_a_split_run_is_the_whole_run(mechanism):
    params, currents = make_params(mechanism), make_currents()
    whole_state, whole = run(params, currents)
    state, first = run(params, currents[:13])
    state, second = run(params, currents[13:], state=state, t0=13 * DT)
    assert_agree(vars(state), vars(whole_state))
    np.testing.assert_array_equal(jnp.concatenate([first["s"], second["s"]]), whole["s"])


@pytest.mark.parametrize(("name", "detach_reset"), [("arctan", False), *((name, True) for name in SURROGATES)])
def test_gradients_are_those_of_the_scan(name, detach_reset):
    surrogate = SURROGATES[name](detach_reset=detach_reset)
    everything = {"thr_gain": 0.02, "thr_leak": 0.01, "sticky_spikes": True, **UNITS, "resist_m": 1.5}
    params = make_params("plain", 50, surrogate=surrogate, **everything)
    currents, record = make_currents((11, 3, 50)), ("s", "u", "v", "thr", "j", "spike_count", "first_spike_time")
    options = {"record": record, "valid": masks(currents) if name == "arctan" else None}
    actual, expected = (gradients(params, currents, which, **options) for which in ("pallas", "xla"))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4), actual, expected)


def test_gradients_of_the_secant_are_those_of_the_scan():
    params, currents = make_params("sticky", 50), make_currents((11, 2, 50))
    actual, expected = (gradients(params, currents, which) for which in ("pallas", "xla"))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), actual, expected)
    tangent = weights(currents)
    along = [jax.jvp(lambda x, w=w: run(params, x, w)[1]["s"], (currents,), (tangent,)) for w in ("pallas", "xla")]
    jax.tree.map(np.testing.assert_array_equal, *along)


def test_voltage_kernels_refuse_forward_mode():
    params, currents = make_params("voltage"), jnp.asarray(make_currents())
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: run(params, x)[1]["s"], (currents,), (currents,))


@pytest.mark.parametrize("surrogate", ["secant", "arctan"])
def test_vmap_over_parameters_is_a_loop(surrogate):
    params, currents = make_params("sticky", surrogate=getattr(slif, surrogate)()), jnp.asarray(make_currents((11, 11)))
    taus = jnp.array([5.0, 10.0, 20.0])

    def one(tau):
        value, pull = jax.vjp(lambda x: run(params.replace(tau_m=tau), x)[1]["s"], currents)
        return value, pull(jnp.ones_like(value))[0]

    for k, expected in enumerate(map(one, taus)):
        s, bar = jax.vmap(one)(taus)
        np.testing.assert_array_equal(s[k], expected[0])
        np.testing.assert_allclose(bar[k], expected[1], rtol=1e-5)


def test_nested_vmaps_are_loops():
    params, currents = make_params("sticky"), jnp.asarray(make_currents((11, 2, 11)))
    taus, scales, valid = jnp.array([5.0, 10.0, 20.0]), jnp.array([1.0, 0.5]), masks(currents)

    def one(tau, x, valid):
        return run(params.replace(tau_m=tau), x, valid=valid)[1]["s"]

    def scaled(tau, scale):
        return jax.vmap(one, (None, 1, 1), 2)(tau, scale * currents, valid)

    s = jax.vmap(lambda tau: jax.vmap(lambda scale: scaled(tau, scale))(scales))(taus)
    for n, tau in enumerate(taus):
        for k, scale in enumerate(scales):
            for row in range(2):
                expected = one(tau, scale * currents[:, row], valid[:, row])
                np.testing.assert_array_equal(s[n, k, :, :, row], expected)


def on_a_gpu(monkeypatch, kind, capability, version):
    """As on a machine with that card and that release."""
    device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(kernels, "_device", lambda: device)
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(jax, "__version__", ".".join(map(str, version)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


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
    params, currents = make_params(n_units=7), make_currents((3, 2, 7))
    if why is None:
        assert kernels.unfit() is None
    else:
        with pytest.raises(NotImplementedError, match=f"cannot do {why}"):
            run(params, currents)


@pytest.mark.parametrize("surrogate", ["secant", "arctan"])
def test_a_cpu_beside_a_gpu_scans(monkeypatch, surrogate):
    """With a GPU by default, a program for the CPU takes the scan: nothing of it runs in the interpreter."""
    params = make_params("sticky", 7, surrogate=getattr(slif, surrogate)(), thr_gain=0.1)
    x = make_currents((19, 3, 7))
    options = {"record": ("s", "u", "spike_count", "s_packed"), "valid": masks(x)}
    expected = run(params, x, "xla", **options), gradients(params, x, "xla", **options)
    on_a_gpu(monkeypatch, "NVIDIA H100", "9.0", (0, 12, 0))
    actual = run(params, x, None, **options), gradients(params, x, None, **options)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4), actual, expected)
    text = jax.jit(lambda x: run(params, x, None, **options)).lower(x).as_text("hlo", debug_info=True)
    assert "loops/plain" in text
    assert "interpret" not in text


def test_shapes_that_jax_export_names_are_scanned(monkeypatch):
    on_a_gpu(monkeypatch, "NVIDIA H100", "9.0", (0, 12, 0))
    params, shape = make_params(n_units=7), jax.export.symbolic_shape("T, B")

    def raster(x):
        return run(params, x, None)[1]["s"]

    for lead, fused_too in (((5, 2), True), (shape, False)):
        x = jax.ShapeDtypeStruct((*lead, 7), jnp.float32)
        module = jax.export.export(jax.jit(raster), platforms=["cuda"])(x).mlir_module()
        assert ("mosaic_gpu" in module) == fused_too


def test_what_it_cannot_do_is_refused_by_name_and_scanned_otherwise():
    currents = make_currents()
    cases = [({"mechanism": name}, currents, {}, "mixes units") for name in MIXED]
    cases += [
        ({"dtype": jnp.bfloat16}, currents, {}, "params of dtype bfloat16"),
        ({}, currents.astype(int), {}, "currents of dtype int"),
        ({}, currents, {"spike_dtype": jnp.int16}, "spike_dtype int16"),
        ({}, currents[:0], {}, "empty"),
    ]
    for arguments, x, options, message in cases:
        params = make_params(**arguments)
        with pytest.raises(NotImplementedError, match=message):
            run(params, x, **options)
        run(params, x, None, **options)


class TestCode:
    """For NVIDIA GPUs, made on a machine without one."""

    def lower(self, function, *arguments):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("mosaic_gpu_v2")

    # Both widths of a tile, and both lengths of a block.
    @pytest.mark.parametrize("n_units", [111, 2**17, 2**17 + 1])
    @pytest.mark.parametrize("mechanism", FUSED)
    def test_forwards_and_backwards(self, mechanism, n_units):
        params, currents = make_params(mechanism, n_units), jax.ShapeDtypeStruct((19, n_units), jnp.float32)
        bar = jax.ShapeDtypeStruct(currents.shape, jnp.float32)

        def both(params, currents, bar):
            s, pull = jax.vjp(lambda x: run(params, x)[1]["s"], currents)
            return s, pull(bar)

        assert self.lower(both, params, currents, bar) == (2 if mechanism == "voltage" else 1)

    @pytest.mark.parametrize("spikes", [jnp.float32, jnp.bfloat16, jnp.bool_, jnp.uint8])
    @pytest.mark.parametrize("currents", [jnp.float32, jnp.bfloat16])
    def test_dtypes(self, currents, spikes):
        x = jax.ShapeDtypeStruct((19, 2, 50), currents)
        assert self.lower(lambda p, x: run(p, x, spike_dtype=spikes), make_params("sticky", 50), x) == 1

    def test_records(self):
        x = jax.ShapeDtypeStruct((19, 2, 50), jnp.float32)
        assert self.lower(lambda p, x: run(p, x, record=RECORDS), make_params("voltage", 50, **UNITS), x) == 1

    @pytest.mark.parametrize("detach_reset", [True, False])
    @pytest.mark.parametrize("name", SURROGATES)
    def test_surrogates(self, name, detach_reset):
        surrogate = SURROGATES[name](detach_reset=detach_reset)
        params = make_params("sticky", 50, surrogate=surrogate, thr_gain=0.1, thr_leak=0.1)
        x = jax.ShapeDtypeStruct((19, 50), jnp.float32)
        assert (
            self.lower(jax.grad(lambda p, x: run(p, x)[1]["s"].sum(), argnums=(0, 1), allow_int=True), params, x) == 2
        )

    def test_arrays_on_a_mesh(self):
        """Their sharding goes with every reshape, which a kernel does not take."""
        on_mesh = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("batch",)), P())
        params = jax.device_put(make_params("voltage", 50, thr_gain=0.1, thr_leak=0.1), on_mesh)
        x = jax.ShapeDtypeStruct((19, 50), jnp.float32, sharding=on_mesh)
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=on_mesh), params)
        assert self.lower(jax.grad(lambda p, x: run(p, x)[1]["s"].sum(), argnums=(0, 1)), params, x) == 2

    def test_vmap_and_shard_map(self):
        params = make_params("voltage", 50)
        taus, x = jax.ShapeDtypeStruct((5,), jnp.float32), jax.ShapeDtypeStruct((19, 4, 50), jnp.float32)

        def loss(tau, x):
            return run(params.replace(tau_m=tau), x)[1]["s"].sum()

        assert self.lower(jax.vmap(jax.grad(loss), (0, None)), taus, x) == 2
        mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
        spec = P(None, "batch")

        def sharded(check_vma):
            def raster(x):
                return run(params, x)[1]["s"]

            return jax.shard_map(raster, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)

        for check_vma in (False, True):
            assert self.lower(sharded(check_vma), x) == 1

    def test_a_sweep_is_one_launch_with_its_points_side_by_side(self):
        params, n_points = make_params("plain", 1), 70_000
        taus, x = jax.ShapeDtypeStruct((n_points,), jnp.float32), jax.ShapeDtypeStruct((9, 1), jnp.float32)

        def sweep(taus, x):
            return jax.vmap(lambda tau: run(params.replace(tau_m=tau), x)[1]["s"])(taus)

        text = jax.jit(sweep).trace(taus, x).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu_v2") == 1
        assert f"tensor<9x{n_points}xf32>" in text
        assert f"{n_points}x128x" not in text  # nothing of a tile's width for every point
