"""Matrix products of the cell are in full precision: by default GPUs and TPUs multiply in fewer bits."""

import jax
import jax.numpy as jnp
import pytest
from conftest import BATCH, DT, assert_same, make_currents, make_params
from jax import lax

import slif

SURROGATES = {"current": slif.secant(), "voltage": slif.arctan()}


def products(jaxpr):
    """The precision of every matrix product in it, inner functions included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def run(params, currents):
    state = slif.init_state(params, BATCH)
    return slif.step(params, state, currents[0], 0, DT).v, slif.simulate(params, state, currents, dt=DT)[1]["s"]


@pytest.mark.parametrize("kind", SURROGATES)
def test_every_product_is_of_the_highest_precision(kind):
    params, currents = make_params("inhibition", surrogate=SURROGATES[kind]), jnp.asarray(make_currents())
    gradient = jax.grad(lambda params, currents: sum(x.sum() for x in run(params, currents)), (0, 1))
    found = [*products(jax.make_jaxpr(gradient)(params, currents).jaxpr)]
    assert len(found) >= 4  # forwards and backwards, of the step and of the sequence
    assert {str(precision) for precision in found} == {str((lax.Precision.HIGHEST, lax.Precision.HIGHEST))}


def test_what_jax_does_by_default_changes_no_spike():
    params, currents = make_params("inhibition"), make_currents()
    expected = run(params, currents)
    with jax.default_matmul_precision("bfloat16"):
        assert_same(run(params, currents), expected)
