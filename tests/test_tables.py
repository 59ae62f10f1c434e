"""The tables of README and of the guides say what the code does."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIELDS
from pages import ROOT

import slif
from slif.surrogate import kind_of

INPUTS = ("tau_m", "resist_m", "thr", "thr_gain", "thr_leak", "rho_b", "resist_inh", "inh_weights")
OUTPUTS = ("u", *FIELDS, "spike_count", "first_spike_time")


def table(first, page="examples/training.md"):
    """The rows of the page's table with this first heading, headings first."""
    text = (ROOT / page).read_text()
    lines = text[text.index(f"\n| {first} |") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def names(cell):
    return re.findall(r"`(\w+)`", cell)


def test_defaults_of_parameters():
    known = inspect.signature(slif.init_params).parameters
    rows = {names(field)[0]: default for field, default, *_ in table("field", "README.md")[1:]}
    assert rows.keys() | {"key", "n_units"} == known.keys() | {"inh_weights"}
    for name in rows.keys() - {"inh_weights", "surrogate", "dtype"}:
        default = known[name].default
        assert rows[name].strip("`") == ("" if default is inspect.Parameter.empty else repr(default).replace("'", '"'))
    params = slif.init_params(jax.random.key(0), 1, tau_m=1.0, resist_m=1.0, thr=1.0)
    assert rows["surrogate"] == f"`{kind_of(params.surrogate)}()`"
    assert rows["dtype"] == params.thr.dtype
    for field, _, unit, *_ in table("field", "README.md")[1:]:
        told = slif.describe()["hyperparameters"].get(names(field)[0])
        assert told is None or (told["unit"] or "") == unit, field


def test_fields_of_the_state():
    assert tuple(names(field)[0] for field, *_ in table("field", "examples/guides.md")[1:]) == FIELDS


def test_defaults_of_surrogates():
    kinds = set()
    for cell, slope, defaults, _ in table("surrogate")[1:]:
        for name in names(cell):
            assert slope.replace("abs(x)", "|x|") in " ".join(getattr(slif, name).__doc__.split()), name
            parameters = inspect.signature(getattr(slif, name)).parameters.values()
            expected = [f"`{p.name}={p.default}`" for p in parameters if p.name != "detach_reset"]
            assert defaults == ", ".join(expected), name
            kinds.add(name)
    assert kinds == {
        "secant",
        "fast_sigmoid",
        "sigmoid",
        "arctan",
        "triangular",
        "boxcar",
        "gaussian",
        "straight_through",
    }


CASES = {
    "current": ("current", "adaptive", {"rho_b": 0.01}),
    "current, inhibition": ("current", "inhibition adaptive", {"resist_inh": 0.1, "thr_gain": 0.05, "thr_leak": 0.01}),
    "voltage": ("voltage", "", {"refract_time": 1.0, "sticky_spikes": True}),
    "voltage, inhibition": ("voltage", "inhibition", {"resist_inh": 0.1, "thr_leak": 0.01}),
    "voltage, sparse": ("voltage", "adaptive", {"rho_b": 0.01}),
    "voltage, reset": (
        "voltage",
        "adaptive reset",
        {"thr_gain": 0.05, "thr_leak": 0.01, "surrogate": slif.arctan(detach_reset=False)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_has_a_gradient_to_what(case):
    kind, conditions, mechanisms = CASES[case]
    surrogate = slif.secant() if kind == "current" else slif.arctan()
    numbers = {"tau_m": 5.0, "resist_m": 1.5, "thr": 0.4, "refract_time": 0.5, "surrogate": surrogate}
    params = slif.init_params(jax.random.key(0), 3, **numbers | mechanisms)
    x = np.random.default_rng(0).uniform(-3, 12, (12, 3)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)

    def outputs(inputs):
        params, x = inputs
        state, out = slif.simulate(params, slif.init_state(params), x, dt=0.5, record=OUTPUTS)
        out = out | {f"final {name}": x for name, x in vars(state).items()}
        finite = {name: jnp.where(jnp.isinf(x), 0, x) for name, x in out.items()}
        return {name: jnp.vdot(x, weights if x.shape == weights.shape else weights[0]) for name, x in finite.items()}

    found = jax.jit(jax.jacrev(outputs))((params, x))
    header, *rows = table("gradient of")
    told = {name: dict(zip(header[1:], cells, strict=True)) for first, *cells in rows for name in names(first)}
    assert told.keys() == set(OUTPUTS)
    assert {name for cell in header[1:] for name in names(cell)} == {"currents", *INPUTS}

    for name, (gradients, to_currents) in found.items():
        for inputs, cell in told[name.removeprefix("final ")].items():
            kinds, _, needs = cell.partition(", ")
            expected = kinds in ("both", kind) and (not needs or bool(set(needs.split(" or ")) & {*conditions.split()}))
            for input in names(inputs):
                gradient = to_currents if input == "currents" else getattr(gradients, input)
                if gradient is None:
                    continue
                assert np.isfinite(gradient).all()
                nothing = not np.any(gradient)
                # The last step alone need not carry what every step before it may.
                assert nothing or expected, (name, input)
                assert not (nothing and expected) or name.startswith("final "), (name, input)
        rest = (gradients.refract_time, *gradients.surrogate.numbers.values())
        assert not any(np.any(x) for x in rest), name
