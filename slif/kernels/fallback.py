"""The scan that replaces the kernels in a program for any platform other than an NVIDIA GPU.

On a machine with a GPU, a program's platform is known only once it is lowered.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from slif._mesh import broadcast_like, match_varying_axes
from slif.kernels.loop import KEPT, Cotangents, Inputs, Plan, trained
from slif.loops import plain
from slif.types import FIELDS, SLIFState


def forward(plan: Plan, args: tuple[Inputs]) -> dict[str, Any]:
    """The same as the kernel, but in place of the states that it keeps, the first one, from which they follow."""
    (inputs,) = match_varying_axes(args)
    n_steps, *shape = inputs.currents.shape
    zeros = broadcast_like(0 * inputs.dt, inputs.currents[0])  # varying between devices as the others do
    request = plan.request.replace(
        dt=inputs.dt.reshape(()),
        t0=inputs.t0.reshape(()),
        valid=None if inputs.valid_bits is None else _valid(inputs.valid_bits, n_steps),
        record=(*plan.record, *plan.summaries),
        spike_dtype=plan.spike_dtype,
    )
    state = SLIFState(**dict.fromkeys(FIELDS, zeros) | inputs.state)
    final, out = plain.run(inputs.params, state, inputs.currents, request)
    summaries = {name: out.pop(name) for name in plan.summaries}
    kept = {
        name: jnp.broadcast_to(x, (plan.n_blocks + 1, *shape))
        for name, x in inputs.state.items()
        if plan.keep and name in KEPT
    }
    return {"record": out, "final": vars(final) | summaries, "kept": kept}


def _valid(bits: Array, n_steps: int) -> Array:
    return jnp.unpackbits(bits, axis=0, count=n_steps, bitorder="little").astype(bool)


def reverse(plan: Plan, args: tuple[Inputs, Cotangents]) -> dict[str, Any]:
    """The derivative of `forward`, which is run again for it."""
    inputs, cotangents = match_varying_axes(args)
    units = inputs.currents[0]
    zeros = broadcast_like(0 * inputs.dt, units)
    first = dict.fromkeys(plan.carried, zeros) | {name: x[0] for name, x in inputs.state.items()}
    # One number per unit, as in the kernel: their cotangents are summed outside.
    per_unit = {name: broadcast_like(getattr(inputs.params, name), units) for name in trained(inputs.params)}

    def outputs(per_unit, differentiated, currents, dt):
        params, state = inputs.params.replace(**per_unit), first | differentiated
        given = inputs._replace(params=params, state=state, currents=currents, dt=dt)
        outs = forward(plan, (given,))
        record, final = outs["record"], outs["final"]
        return Cotangents(
            record={name: record[name] for name in cotangents.record},
            final={name: final[name] for name in cotangents.final},
            spike_count=final.get("spike_count"),
        )

    differentiated = {name: first[name] for name in plan.differentiated}
    pull = jax.vjp(outputs, per_unit, differentiated, inputs.currents, inputs.dt)[1]
    d_per_unit, d_state, d_currents, d_dt = pull(cotangents)
    first_unit = broadcast_like(jnp.zeros(units.shape, bool).at[(0,) * units.ndim].set(True), units)
    d_dt = jnp.where(first_unit, d_dt.sum(), zeros)
    return {"currents": d_currents, "inputs": d_state | d_per_unit | {"dt": d_dt}}
