"""The conventions of the public surface, as tests that walk it."""

import contextlib
import dataclasses
import importlib
import inspect
import operator
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest

import slif


class Contract:
    """What other code relies on: the names, order, kinds and defaults of the arguments."""

    def init_params(
        key,
        n_units,
        *,
        tau_m,
        resist_m,
        thr,
        resist_inh=0.0,
        thr_persist=False,
        thr_gain=0.0,
        thr_leak=0.0,
        rho_b=0.0,
        refract_time=0.0,
        sticky_spikes=False,
        thr_jitter=0.05,
        surrogate=None,
        dtype=jnp.float32,
        reset="zero",
    ): ...

    def init_state(params, batch_shape=()): ...
    def step(params, state, j, t, dt): ...
    def reset(params, state, *, where=None, fields=None): ...
    def detach(state): ...
    def simulate(
        params,
        state,
        currents,
        *,
        dt,
        t0=0.0,
        record=("s",),
        spike_dtype=None,
        valid=None,
        checkpoint_every=None,
        implementation=None,
        feedback=None,
    ): ...
    def grid(**axes): ...
    def sweep(
        params,
        currents,
        *,
        over,
        dt=None,
        state=None,
        t0=0.0,
        record=("s",),
        batch_size=None,
        spike_dtype=None,
        valid=None,
        implementation=None,
        progress=None,
        feedback=None,
    ): ...
    def point(params, over, k): ...
    def pack_spikes(s): ...
    def unpack_spikes(packed, n_units): ...
    def describe(): ...
    def secant(c1=0.82, c2=0.08, squared=False, scaled=False): ...
    def fast_sigmoid(slope=25.0, *, detach_reset=True): ...
    def sigmoid(slope=25.0, *, detach_reset=True): ...
    def arctan(alpha=2.0, *, detach_reset=True): ...
    def triangular(width=1.0, *, detach_reset=True): ...
    def boxcar(width=1.0, *, detach_reset=True): ...
    def gaussian(width=1.0, *, detach_reset=True): ...
    def straight_through(*, detach_reset=True): ...
    def custom(fn, wrt="voltage", *, detach_reset=True, **numbers): ...

    class checkpoint:
        def save(path, params, state): ...
        def load(path): ...
        def save_ngclearn(directory, name, params, state): ...
        def load_ngclearn(directory, name, params, state): ...
        def from_ngclearn(cell): ...

    class nir:
        def to_nir(params, *, dt, strict=True): ...
        def from_nir(node, *, dt, n_units=None): ...

    class plot:
        def raster(recorded, *, dt=1.0, t0=0.0, row=None, n_units=None, ax=None): ...
        def traces(recorded, *, params=None, units=None, dt=1.0, t0=0.0, row=None, ax=None): ...
        def surrogates(which=None, *, x=None, ax=None): ...


FUNCTIONS = {name: x for name in slif.__all__ if inspect.isfunction(x := getattr(slif, name))}
for module in ("checkpoint", "nir", "plot"):
    with contextlib.suppress(ImportError):  # an extra that is not installed
        opt_in = importlib.import_module(f"slif.{module}")
        FUNCTIONS |= {f"{module}.{name}": getattr(opt_in, name) for name in opt_in.__all__}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_all_is_the_public_surface():
    public = {name for name, x in vars(slif).items() if not name.startswith("_") and not inspect.ismodule(x)}
    assert set(slif.__all__) == public | {"__version__"}
    assert list(slif.__all__) == sorted(slif.__all__)


@functions
def test_signature(name):
    assert parameters(FUNCTIONS[name]) == parameters(operator.attrgetter(name)(Contract))


@functions
def test_signature_is_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    annotations = [p.annotation for p in signature.parameters.values()]
    assert inspect.Signature.empty not in (*annotations, signature.return_annotation)


@functions
def test_key_comes_first(name):
    names = list(inspect.signature(FUNCTIONS[name]).parameters)
    assert "key" not in names[1:]


@functions
def test_the_docstring_tells_every_argument(name):
    doc, names = inspect.getdoc(FUNCTIONS[name]), list(inspect.signature(FUNCTIONS[name]).parameters)
    section = re.search(r"^Args:\n(.*?)(?=^\w+:|\Z)", doc, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^    \**(\w+): ", section[1] if section else "", re.MULTILINE) == names


def test_fields():
    def fields(cls):
        return [field.name for field in dataclasses.fields(cls)]

    numbers = ["tau_m", "resist_m", "thr", "refract_time", "thr_gain", "thr_leak", "rho_b", "resist_inh", "inh_weights"]
    assert fields(slif.SLIFParams) == [*numbers, "surrogate", "sticky_spikes", "thr_persist", "reset"]
    assert fields(slif.SLIFState) == ["j", "v", "s", "thr", "rfr", "tols", "surrogate"]


def test_describe_agrees_with_init_params():
    told = slif.describe()["hyperparameters"]
    arguments = inspect.signature(slif.init_params).parameters
    assert told.keys() == arguments.keys() - {"key", "surrogate", "dtype"}
    for name, hyperparameter in told.items():
        assert hyperparameter.get("default", inspect.Parameter.empty) == arguments[name].default
        assert hyperparameter["description"]
        assert "unit" in hyperparameter
    told["tau_m"]["unit"] = "s"
    assert slif.describe()["hyperparameters"]["tau_m"]["unit"] == "ms"


def test_describe_names_the_fields_of_the_state():
    told = slif.describe()
    names = {*told["inputs"], *told["states"], *told["outputs"]}
    assert names == {field.name for field in dataclasses.fields(slif.SLIFState)}


def test_import_brings_no_opt_in_module():
    """The layers, checkpoints and plots cost nothing unless imported, nor do the kernels."""
    code = "import sys, slif; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    opt_in = {f"slif.{name}" for name in ("linen", "nnx", "checkpoint", "nir", "plot")}
    assert "slif.cell" in modules
    assert not {*opt_in, "jax.experimental.pallas", "matplotlib", "ngclearn"} & set(modules)
