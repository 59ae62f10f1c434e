"""Every loop equals the plain one: values, final states, records, masks and gradients; and which one runs."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    BATCH,
    DT,
    N_UNITS,
    RECORDS,
    assert_agree,
    enable_x64,
    make_currents,
    make_params,
    make_state,
)

import slif
from slif import _device, kernels, simulation
from slif.loops import blocks, choose, cpu, gpu, plain, tpu
from slif.request import Request
from slif.rounding import as_runtime_values
from slif.surrogate import BUILT_IN

LOOPS = {"cpu": cpu.run, "cpu, constant": functools.partial(cpu.run, constant=True), "gpu": gpu.run, "tpu": tpu.run}
N_STEPS = 9  # not a multiple of the steps per iteration
VALID = {
    "all": None,
    "padded": np.arange(N_STEPS)[:, None] < np.array([N_STEPS, 7, 0]),
    "gaps": np.random.default_rng(0).random((N_STEPS, BATCH)) < 0.6,
}


def inputs(mechanism, dtype=jnp.float32, **overrides):
    """Params, a state in the middle of a run, and currents."""
    params = make_params(mechanism, dtype=dtype, **overrides)
    return params, make_state(params), jnp.asarray(make_currents((N_STEPS, BATCH, N_UNITS)), dtype)


def run(loop, params, state, currents, *, valid=None, record=RECORDS, every=None, dt=DT):
    params, dt, t0 = as_runtime_values(params, state.v.ndim, jnp.asarray(dt), jnp.asarray(3.0))
    valid = None if valid is None else jnp.asarray(valid)[..., None]
    dtype = np.dtype(params.thr.dtype)
    request = Request(dt=dt, t0=t0, valid=valid, record=record, spike_dtype=dtype, checkpoint_every=every)
    return loop(params, state, currents, request)


def run_both(loop, *arguments, **options):
    """The results of this loop and the plain one, as one program, which XLA compiles faster than two."""
    return jax.jit(lambda *x: [run(f, *x, **options) for f in (LOOPS[loop], plain.run)])(*arguments)


def assert_plain(actual, expected, case=""):
    assert_agree(vars(actual[0]), vars(expected[0]), case)
    assert_agree(actual[1], expected[1], case)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), actual) == kinds


# test_golden.py runs every mechanism alone through the loop of this device. The loop for GPUs, which is the plain one
# with more steps per iteration, takes long to compile.
@pytest.mark.parametrize(
    ("loop", "mechanism", "valid", "record"),
    [
        ("cpu", "everything", "gaps", RECORDS),
        ("cpu", "sparse_everything", "all", ("s", "thr")),
        ("cpu", "soft", "padded", ("s", "v")),
        ("cpu", "voltage", "gaps", ("s", "surrogate")),
        ("cpu, constant", "sticky", "all", RECORDS),
        ("cpu, constant", "plain", "gaps", ("s", "j")),
        ("cpu, constant", "leak", "padded", ("s", "thr")),
        ("gpu", "gain", "gaps", ("s", "v", "spike_count")),
        ("tpu", "sticky", "padded", ("s", "v", "spike_count")),
    ],
)
def test_values(loop, mechanism, valid, record):
    actual, expected = run_both(loop, *inputs(mechanism), valid=VALID[valid], record=record)
    assert_plain(actual, expected)
    assert expected[1]["s"].any()


@pytest.mark.parametrize(
    ("loop", "mechanism", "n_steps"),
    [("cpu", "everything", 1), ("cpu", "plain", 2), ("cpu, constant", "sticky", 1), ("gpu", "everything", 2)],
)
def test_short_runs(loop, mechanism, n_steps):
    params, state, currents = inputs(mechanism)
    assert_plain(*run_both(loop, params, state, currents[:n_steps], record=("s", "v")))


@pytest.mark.parametrize(
    ("loop", "record"), [("cpu", "s"), ("cpu, constant", "tols"), ("cpu", "surrogate"), ("cpu, constant", "s")]
)
def test_a_record_alone(loop, record):
    assert_plain(*run_both(loop, *inputs("sticky"), record=(record,)))


@pytest.mark.parametrize(
    ("loop", "mechanism", "dtype"),
    [("cpu", "gain", "bfloat16"), ("cpu", "everything", "float64"), ("cpu, constant", "sticky", "float64")],
)
def test_dtypes(loop, mechanism, dtype):
    with enable_x64():
        arguments = inputs(mechanism, dtype=jnp.dtype(dtype))
        kinds = [jax.eval_shape(functools.partial(run, f), *arguments) for f in (LOOPS[loop], plain.run)]
        assert kinds[0] == kinds[1]
        spikes = jax.jit(lambda *x: [run(f, *x, record=("s",))[1]["s"] for f in (LOOPS[loop], plain.run)])
        np.testing.assert_array_equal(*spikes(*arguments))


# The loop on constants gets nothing to differentiate.
@pytest.mark.parametrize(
    ("loop", "mechanism", "surrogate", "valid", "n_steps"),
    [
        ("cpu", "inhibition", slif.secant(), "gaps", N_STEPS),
        ("cpu", "sparse_everything", slif.arctan(), "all", N_STEPS),
        ("cpu", "everything", slif.arctan(detach_reset=False), "gaps", N_STEPS),
        ("gpu", "leak", slif.arctan(), "padded", 3),
        ("tpu", "sparse_everything", slif.arctan(detach_reset=False), "gaps", 3),
    ],
)
def test_gradients(loop, mechanism, surrogate, valid, n_steps):
    """Gradients of a sum over everything that has one, with random weights."""
    params, state, currents = inputs(mechanism, surrogate=surrogate)
    primals, mask = (params, state, currents[:n_steps], jnp.float32(DT)), VALID[valid]
    mask = None if mask is None else mask[:n_steps]

    def loss(loop, params, state, currents, dt):
        record = ("s", "v", "thr", "j", "spike_count")
        final, out = run(loop, params, state, currents, valid=mask, record=record, dt=dt)
        bars = np.random.default_rng(2)
        terms = [*vars(final).values(), *out.values()]
        return sum(jnp.vdot(x, bars.normal(size=x.shape).astype(np.float32)) for x in terms)

    @jax.jit
    def gradients(*primals):
        return [jax.grad(functools.partial(loss, f), (0, 1, 2, 3))(*primals) for f in (LOOPS[loop], plain.run)]

    actual, expected = gradients(*primals)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * scale), actual, expected)


def scans(function, *arguments):
    return [e for e in jax.make_jaxpr(function)(*arguments).eqns if e.primitive.name == "scan"]


def test_the_gradient_keeps_a_slope_and_a_bool_of_each_step():
    params, state, currents = inputs("plain", surrogate=slif.arctan())
    pull = functools.partial(jax.vjp, lambda x: slif.simulate(params, state, x, dt=DT)[1]["s"])
    with jax.default_device(jax.devices("cpu")[0]):
        (call,) = jax.make_jaxpr(pull)(currents).eqns
    (scan,) = [e for e in call.params["jaxpr"].eqns if e.primitive.name == "scan"]
    kept = [x.aval.dtype.name for x in scan.outvars if x.aval.shape == currents.shape]
    assert sorted(kept) == ["bool", "float32", "float32"]  # the second are the spikes


def test_turns_leave_no_step_over():
    """JAX would copy whole sequences for them."""
    for length in range(1, 20):
        found = [
            e.params for e in scans(lambda xs: blocks.scan(lambda c, x: (c + x, c), 0.0, xs, None, 8), np.ones(length))
        ]
        assert sum(scan["length"] for scan in found) == length
        assert [scan["length"] % scan["unroll"] for scan in found] == [0] * len(found)


def test_the_loop_for_tpus_reads_no_scalar_but_dt():
    params, state, currents = inputs("everything")

    def scalars(loop):
        (scan,) = scans(functools.partial(run, loop, record=("s",)), params, state, currents)
        return sum(x.aval.shape == () and x.aval.dtype == jnp.float32 for x in scan.invars)

    assert scalars(plain.run) > 1
    assert scalars(tpu.run) == 1


# --- which one runs ---

with_kernels = pytest.mark.skipif(jax.__version_info__ < kernels.OLDEST_JAX, reason="the kernels need a newer jax")


def device(platform, kind="", capability=None):
    return SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


CPU, GPU, TPU = device("cpu"), device("gpu", "NVIDIA H100", "9.0"), device("tpu", "TPU v4")


def on(monkeypatch, default, first=None, version=(0, 12, 0)):
    """As on a machine whose default backend has the first device, with this default device."""
    first = first or default
    monkeypatch.setattr(_device, "default", lambda: default)
    monkeypatch.setattr(jax, "default_backend", lambda: first.platform)
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(jax, "__version__", ".".join(map(str, version)))


def chosen(implementation=None, surrogate=None, constant=None, **overrides):
    """The name of the chosen loop; not through `simulate`, whose traces outlive a stand-in."""
    surrogate = slif.secant() if surrogate is None else surrogate
    params = make_params(surrogate=surrogate, **overrides)
    request = Request(dt=jnp.float32(DT), t0=jnp.float32(0))
    constant = surrogate.wrt == "current" if constant is None else constant
    loop = choose.choose(implementation, params, jnp.ones((3, BATCH, N_UNITS)), request, constant=constant)
    loop = getattr(loop, "func", loop)
    return f"{loop.__module__.rpartition('.')[2]}.{loop.__name__}"


ON_PLATFORM = "choose.<lambda>"  # the platform decides which one when the program is lowered


@pytest.mark.parametrize(
    ("default", "first", "secant", "arctan"),
    [
        (CPU, CPU, "cpu.run", "cpu.run"),
        (CPU, GPU, ON_PLATFORM, "cpu.run"),
        (CPU, TPU, ON_PLATFORM, "cpu.run"),
        (GPU, GPU, ON_PLATFORM, "gpu.run"),
        (TPU, TPU, ON_PLATFORM, "tpu.run"),
    ],
)
def test_the_scan_is_that_of_the_device(monkeypatch, default, first, secant, arctan):
    on(monkeypatch, default, first)
    assert chosen("xla", slif.secant()) == secant
    assert chosen("xla", slif.arctan()) == arctan
    assert chosen("xla", slif.secant(), rho_b=0.1, constant=True) == ("plain.run" if first is CPU else ON_PLATFORM)
    if default is not GPU:
        assert chosen(None, slif.secant()) == secant
        assert chosen(None, slif.arctan()) == arctan


@with_kernels
@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_surrogate_of_the_package_takes_a_kernel_by_itself(monkeypatch, kind):
    surrogates = [BUILT_IN[kind], BUILT_IN[kind].replace(detach_reset=False)]
    surrogates.append(BUILT_IN[kind].replace(numbers={name: jnp.float32(3) for name in BUILT_IN[kind].numbers}))
    on(monkeypatch, GPU)
    assert {chosen(None, surrogate) for surrogate in surrogates} == {"fused.run"}
    on(monkeypatch, CPU, GPU)
    assert "fused.run" not in {chosen(None, surrogate) for surrogate in surrogates}


@with_kernels
@pytest.mark.parametrize("wrt", ["current", "voltage"])
def test_a_custom_surrogate_takes_a_kernel_by_name_only(monkeypatch, wrt):
    surrogate = slif.custom(lambda x: 1 / (1 + x * x), wrt)
    on(monkeypatch, GPU)
    assert chosen(None, surrogate) != "fused.run"
    assert chosen("pallas", surrogate) == "fused.run"


@with_kernels
def test_releases_of_jax(monkeypatch):
    for version, by_itself in (((0, 9, 9), False), ((0, 10, 0), True), ((0, 12, 7), True), ((0, 13, 0), False)):
        on(monkeypatch, GPU, version=version)
        assert (chosen() == "fused.run") == by_itself
    assert chosen("pallas") == "fused.run"
    on(monkeypatch, GPU, version=(0, 7, 0))
    with pytest.raises(NotImplementedError, match=r"implementation: 'pallas' cannot do jax 0\.7\.0, which is too old"):
        chosen("pallas")


@pytest.mark.skipif(jax.__version_info__ >= kernels.OLDEST_JAX, reason="this jax has the kernels")
def test_an_old_release_refuses_the_kernels():
    params = make_params()
    with pytest.raises(NotImplementedError, match=f"cannot do jax {jax.__version__}, which is too old"):
        slif.simulate(params, slif.init_state(params), make_currents((3, N_UNITS)), dt=DT, implementation="pallas")


@with_kernels
@pytest.mark.parametrize(
    ("default", "wanted"),
    [
        (TPU, "TPU v4: it takes NVIDIA's of compute capability 8.0 or later"),
        (device("gpu", "AMD Instinct MI300X", "gfx942"), "AMD Instinct MI300X: it takes NVIDIA's"),
        (device("METAL", "Apple M4"), "Apple M4: it takes NVIDIA's"),
    ],
)
def test_by_name_other_devices_are_refused(monkeypatch, default, wanted):
    on(monkeypatch, default)
    assert chosen() == ON_PLATFORM
    with pytest.raises(NotImplementedError, match=f"implementation: 'pallas' cannot do {wanted}"):
        chosen("pallas")
    on(monkeypatch, CPU, default)
    assert chosen("pallas") == "fused.run"  # in the interpreter


def test_an_empty_sequence_takes_the_plain_loop():
    params, _, currents = inputs("sticky")
    request = Request(dt=jnp.float32(DT), t0=jnp.float32(0))
    assert choose.choose(None, params, currents[:0], request, constant=True) is plain.run


def test_the_default_device(monkeypatch):
    here = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [here if backend == "cpu" else GPU])
    assert _device.default() is GPU
    for name in (here, "cpu"):
        with jax.default_device(name):
            assert _device.default() is here
    assert _device.default() is GPU


def test_the_choice_for_one_default_device_does_not_stay_for_another(monkeypatch):
    arguments, made = inputs("plain", tau_m=21.0), []

    def noted(*args, **options):
        made.append(args)
        return choose.choose(*args, **options)

    monkeypatch.setattr(simulation, "choose", noted)
    for _ in range(2):
        for device in (None, jax.devices("cpu")[0]):
            with jax.default_device(device):
                jax.eval_shape(functools.partial(slif.simulate, dt=DT), *arguments)
    assert len(made) == 2
