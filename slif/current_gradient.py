"""The derivative under a surrogate with respect to the current, for a whole sequence at once.

Under such a surrogate d s' = h(i) di, and all else counts as constant (`cell.fire` does this for one step). If i
depends on the input alone, so does the derivative: the loop runs on constants and keeps nothing for the backward pass,
and its results get their derivative here.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from slif._attach import attach
from slif.cell import drive
from slif.types import SLIFParams, SLIFState

Result = tuple[SLIFState, dict[str, Array]]


def attach_gradient(
    params: SLIFParams, state: SLIFState, currents: Array, valid: Array | None, final: SLIFState, out: dict[str, Array]
) -> Result:
    """The final state and the records of a loop on constants, with the derivative of spikes, counts and currents."""
    if valid is not None:  # nothing that is not finite in a frozen row may reach a gradient, neither current nor slope
        currents = jnp.where(valid, currents, 0)
    i = jax.vmap(lambda j: drive(params, state.s, j.astype(state.v.dtype)))(currents)
    slope = jax.vmap(params.surrogate)(i)
    slope = slope if valid is None else jnp.where(valid, slope, 0)
    if "s" in out and jnp.issubdtype(out["s"].dtype, jnp.floating):
        out["s"] = attach(out["s"], i, slope)
    if "spike_count" in out:
        out["spike_count"] = out["spike_count"] + attach(jnp.zeros_like(i, out["spike_count"].dtype), i, slope).sum(0)
    if valid is None:
        s = out["s"][-1].astype(i.dtype) if "s" in out else final.s
        final = final.replace(j=i[-1], s=attach(s, i[-1], slope[-1]))
        return final, out | ({"j": i} if "j" in out else {})

    def hold(j, x):
        i, valid = x
        j = jnp.where(valid, i, j)
        return j, j

    j, held = lax.scan(hold, state.j, (i, valid))
    begun = valid.any(0)
    s = jnp.where(begun, attach(final.s, j, jnp.where(begun, params.surrogate(j), 0)), state.s)
    return final.replace(j=j, s=s), out | ({"j": held} if "j" in out else {})
