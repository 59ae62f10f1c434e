"""The time loop of a tile of units, forwards and backwards, with the state in registers.

Both bodies are the same Python functions wherever they run; a launcher passes them references to whole arrays, the
place of their tile, and how to load it. They call the step of the plain loop and JAX's derivative of it, and contain no
equations.

Letters: T time steps, M units (over all rows of a batch), K steps per block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.experimental import pallas as pl

from slif._attach import attach
from slif._mesh import varying
from slif.cell import adapts
from slif.hyperparameters import ABOUT, NUMERIC
from slif.kernels.inline import inline_jaxpr
from slif.loops.plain import masked_step
from slif.request import SUMMARIES, Request
from slif.types import FIELDS, SLIFParams, SLIFState

DIFFERENTIATED = ("v", "thr", "s", "j")  # fields that have a gradient
TRAINED = tuple(name for name in NUMERIC if ABOUT[name].shape == "units" and ABOUT[name].stored)
BLOCK = 8  # K: steps that are loaded ahead, and whose states the reverse loop holds in registers


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    n_steps: int  # T
    request: Request  # as passed, without its arrays
    record: tuple[str, ...]  # written at each step, [T, M]
    spike_dtype: Any
    masked: bool  # some rows are frozen at some steps
    slope_carried: bool = True  # it is recorded, or `simulate` could not compute it from the final state
    keep: bool = False  # the state before each block, [ceil(T / K), M], for the reverse loop
    wanted: tuple[str, ...] = ()  # inputs whose gradient the reverse loop returns: "currents", or names of numbers
    n_units: int = 0  # M
    width: int = 0  # units per tile, at most M

    @property
    def carried(self) -> tuple[str, ...]:
        """The fields that the loop carries: those that later steps read, tols, and those that a frozen row repeats."""
        if not self.masked:
            return ("v", "thr", "rfr", "tols")
        return FIELDS if self.slope_carried else tuple(name for name in FIELDS if name != "surrogate")

    def final(self, params: SLIFParams) -> tuple[str, ...]:
        """The fields that the kernel returns; the others follow from its arguments and results."""
        left_out = set() if self.slope_carried else {"surrogate"}
        if not self.masked:
            left_out |= {"j"} | ({"s"} & set(self.record)) | (set() if adapts(params) else {"thr"})
        return tuple(name for name in FIELDS if name not in left_out)

    def differentiated(self, params: SLIFParams) -> tuple[str, ...]:
        """The fields that carry a gradient from step to step."""
        of_thr = ("thr",) if adapts(params) or "thr" in self.wanted else ()
        return ("v", *of_thr, "s", "j") if self.masked else ("v", *of_thr)

    @property
    def summaries(self) -> tuple[str, ...]:
        return tuple(name for name in SUMMARIES if name in self.request.record)

    @property
    def n_tiles(self) -> int:
        return pl.cdiv(self.n_units, self.width)

    @property
    def n_blocks(self) -> int:
        """The number of whole blocks, after which 1 to K steps remain, so that the last step is always separate."""
        return (self.n_steps - 1) // BLOCK


class TimeConstant(struct.PyTreeNode):
    """tau_m with its reciprocal precomputed: a kernel's own would be an approximation."""

    tau_m: Array
    inverse: Array

    def __rtruediv__(self, one: Any) -> Array:
        return attach(self.inverse, self.tau_m, -self.inverse * self.inverse)


class Inputs(NamedTuple):
    """Inputs of both loops; what all units share has a last axis of 1, and what all rows share may have one of N."""

    params: SLIFParams  # [M]
    state: dict[str, Array]  # Plan.carried, [M]; for the reverse loop kept, [ceil(T / K), M], and a constant thr, [M]
    currents: Array  # [T, M]
    valid_bits: Array | None  # [ceil(T / K), M] bit k: whether the row is valid at step k of the block
    dt: Array  # [M]
    t0: Array  # [M]
    inverse_tau: Array  # 1 / tau_m, [M]


def trained(params: SLIFParams) -> tuple[str, ...]:
    """The parameters that have a gradient."""
    return tuple(name for name in TRAINED if getattr(params, name) is not None)


def kept(params: SLIFParams) -> tuple[str, ...]:
    """The fields that the reverse loop starts a block from."""
    of_thr, of_rfr = adapts(params), params.refract_time is not None
    return ("v", *(("thr",) if of_thr else ()), *(("rfr",) if of_rfr else ()))


class Tile(NamedTuple):
    """How a launcher accesses the units of one tile."""

    slice_of: Callable[[int], Any]  # their slice of M, or of the N units of a row
    load: Callable[[Any], Array]  # reads a reference [width] into registers
    fill: Callable[..., Array]  # a number in registers of the same layout, as float32 or the given dtype
    part: Callable[[Any], Any] = lambda carry: carry  # separates steps that the compiler must not merge

    def number(self, ref: Any) -> Array:
        """A number shared by all units, as one; else the tile's share of [M]."""
        return ref[0] if ref.shape[-1] == 1 else self.row(ref)

    def row(self, ref: Any, *k: Any) -> Array:
        """The tile's share of [M], or of row k of [T, M]."""
        if ref.shape[-1] == 1:
            return self.fill(ref[*k, 0])
        x = self.load(ref.at[*k, self.slice_of(ref.shape[-1])])
        # Inside `jax.shard_map` x is typed as varying between devices; the results of Pallas' operations are not.
        return x * 1 if varying(x) else x

    def bits(self, ref: Any, k: Any) -> Array:
        """The tile's share of row k of [T, M], as int32."""
        return self.fill(ref[k, 0], jnp.int32) if ref.shape[-1] == 1 else self.row(ref, k).astype(jnp.int32)


def valid_at(bits: Array | None, k: int) -> Array | None:
    return None if bits is None else (bits & (1 << k)) != 0


def step_of_fields(
    params: SLIFParams, fields: dict[str, Array], j: Array, t: Array, dt: Array, valid: Array | None
) -> tuple[SLIFState, dict[str, Array]]:
    """One step from the carried fields: the state after it, and its records that are not fields."""
    unread: dict[str, Any] = dict.fromkeys(FIELDS)
    if valid is not None:
        unread["surrogate"] = fields["v"]  # any number, for a slope that is not carried to be frozen to
    new, u, s = masked_step(params, SLIFState(**unread | fields), j, t, dt, valid)
    return new, {"u": u, "s": s}


def forward(plan: Plan, tile: Tile, inputs: Inputs, outs: dict[str, Any]) -> None:
    """Runs all T steps of a tile."""
    params = jax.tree.map(tile.number, inputs.params)
    params = params.replace(tau_m=TimeConstant(params.tau_m, tile.number(inputs.inverse_tau)))
    dt, t0, units = tile.number(inputs.dt), tile.number(inputs.t0), tile.slice_of(plan.n_units)
    request = plan.request.replace(dt=dt, t0=t0)

    def step_and_record(params, carry, j, t, dt, valid):
        fields, summaries = carry
        new, shown = step_of_fields(params, fields, j, t, dt, valid)
        summaries = request.summarise(summaries, shown["s"], t)
        record = {name: x for name, x in (vars(new) | shown).items() if name in plan.record}
        return ({name: getattr(new, name) for name in plan.carried}, summaries), record, new

    advance, finish = inline_jaxpr(lambda *args: step_and_record(*args)[:2]), inline_jaxpr(step_and_record)

    def write(k, record):
        for name, x in record.items():
            ref = outs["record"][name]
            # Spikes are selected by predicate: converting float32 to an integer clamps it, and is slow.
            x = (x != 0).astype(jnp.int32) if jnp.issubdtype(ref.dtype, jnp.integer) else x
            ref[k, units] = x.astype(ref.dtype)

    def load(b, n):
        """The currents of the first n steps of a block, and which rows are valid in them."""
        bits = None if inputs.valid_bits is None else tile.bits(inputs.valid_bits, b)
        return [tile.row(inputs.currents, b * BLOCK + k) for k in range(n)], bits

    def block(b, carry):
        carry, (currents, bits) = carry
        next_block = load(jnp.minimum(b + 1, plan.n_blocks - 1), BLOCK)
        keep(b, carry)
        for n, j in enumerate(currents):
            k = b * BLOCK + n
            carry, record = advance(params, tile.part(carry), j, t0 + k.astype(t0.dtype) * dt, dt, valid_at(bits, n))
            write(k, record)
        return carry, next_block

    def keep(b, carry):
        if plan.keep:
            for name, ref in outs["kept"].items():
                ref[b, units] = carry[0][name]

    fields = {name: tile.row(inputs.state[name]) for name in plan.carried}
    carry = (fields, request.start_summaries(tile.fill, differentiable=False))
    if plan.n_blocks:
        carry, _ = lax.fori_loop(0, plan.n_blocks, block, (carry, load(0, BLOCK)))
    keep(plan.n_blocks, carry)
    start, end = plan.n_blocks * BLOCK, plan.n_steps - 1
    (*most, last), bits = load(plan.n_blocks, plan.n_steps - start)
    for n, j in enumerate(most):
        carry, record = advance(params, tile.part(carry), j, t0 + (start + n) * dt, dt, valid_at(bits, n))
        write(start + n, record)
    carry, record, new = finish(params, tile.part(carry), last, t0 + end * dt, dt, valid_at(bits, end - start))
    write(end, record)
    final = request.finish_summaries(carry[1]) | vars(new)
    for name, ref in outs["final"].items():
        ref[units] = final[name]


class Cotangents(NamedTuple):
    """Cotangents of the results of the forward loop; those left out, or None, are zero or reach no gradient wanted."""

    record: dict[str, Array]  # [T, M]
    final: dict[str, Array]  # DIFFERENTIATED, [M]
    spike_count: Array | None  # [M]


def reverse(plan: Plan, tile: Tile, inputs: Inputs, cotangents: Cotangents, outs: dict[str, Any]) -> None:
    """Runs all T steps of a tile backwards; each block first runs forwards again, from the state that was kept."""
    params = jax.tree.map(tile.number, inputs.params)
    zero = tile.fill(0)  # added to a shared number, it makes one per unit: their cotangents are summed outside
    units, blocks, differentiated = tile.slice_of(plan.n_units), kept(params), plan.differentiated(params)
    numbers = {name: getattr(params, name) + zero for name in trained(params) if name in plan.wanted}
    dt, inverse = tile.number(inputs.dt), tile.number(inputs.inverse_tau)
    if "dt" in plan.wanted:
        numbers["dt"] = dt + zero
    if "tau_m" in numbers:
        inverse = inverse + zero
    # No gradient depends on the fields that are set to zero here.
    constant = dict.fromkeys(FIELDS if plan.masked else ("tols", "rfr"), zero)
    constant |= {name: tile.row(x) for name, x in inputs.state.items() if name not in blocks}

    def step(numbers, fields, j, valid):
        dt_of, own = numbers.get("dt", dt), {name: x for name, x in numbers.items() if name != "dt"}
        tau_m = TimeConstant(own.get("tau_m", params.tau_m), inverse)
        return step_of_fields(params.replace(**own | {"tau_m": tau_m}), constant | fields, j, dt_of, dt_of, valid)

    def advance(numbers, fields, j, valid):
        new, _ = step(numbers, fields, j, valid)
        return {name: getattr(new, name) for name in blocks}

    def pull(numbers, fields, j, valid, bar):
        def outputs(numbers, before, j):
            new, shown = step(numbers, fields | before, j, valid)
            return {name: getattr(new, name) for name in bar[0]}, {name: shown[name] for name in bar[1]}

        return jax.vjp(outputs, numbers, {name: (constant | fields)[name] for name in differentiated}, j)[1](bar)

    advance, pull = inline_jaxpr(advance), inline_jaxpr(pull)
    count = None if cotangents.spike_count is None else tile.row(cotangents.spike_count)

    def load(b, n):
        """What the first n steps of a block read."""
        start = b * BLOCK
        return (
            {name: tile.row(inputs.state[name], b) for name in blocks},
            None if inputs.valid_bits is None else tile.bits(inputs.valid_bits, b),
            [tile.row(inputs.currents, start + k) for k in range(n)],
            [{name: tile.row(x, start + k) for name, x in cotangents.record.items()} for k in range(n)],
        )

    def block(b, carry, loaded, last=None):
        bar, total = carry
        fields, bits, currents, rows = loaded
        start, n = b * BLOCK, len(currents)
        states = [fields]
        for k, j in enumerate(currents[:-1]):
            states.append(tile.part(advance(numbers, states[-1], j, valid_at(bits, k))))
        for k in reversed(range(n)):
            of_fields = {"s": zero, "j": zero} | bar
            of_shown = {"s": zero} | ({"u": zero} if "u" in rows[k] else {})
            extra = [(of_shown if name in of_shown else of_fields, name, x) for name, x in rows[k].items()]
            if count is not None:
                extra.append((of_shown, "s", count))
            if last is not None and k == n - 1:
                extra.extend((of_fields, name, x) for name, x in last.items())
            for full, name, x in extra:
                full[name] = full[name] + x.astype(zero.dtype)
            bar = tile.part((of_fields, of_shown))
            d_numbers, bar, d_j = pull(numbers, states[k], currents[k], valid_at(bits, k), bar)
            total = jax.tree.map(jnp.add, total, d_numbers)
            if "currents" in outs:
                ref = outs["currents"]
                ref[start + k, units] = d_j.astype(ref.dtype)
        return bar, total

    last = {name: tile.row(x) for name, x in cotangents.final.items()}
    bar = {name: last.pop(name, zero) for name in differentiated}
    carry = (bar, dict.fromkeys(numbers, zero))
    carry = block(plan.n_blocks, carry, load(plan.n_blocks, plan.n_steps - plan.n_blocks * BLOCK), last)

    def body(n, carry):
        b, (carry, loaded) = plan.n_blocks - 1 - n, carry
        # The loads of a block take as long as its steps: 2^18 units train in 0.66 of the time on an H200.
        next_block = load(jnp.maximum(b - 1, 0), BLOCK)
        return block(b, carry, loaded), next_block

    if plan.n_blocks:
        carry, _ = lax.fori_loop(0, plan.n_blocks, body, (carry, load(plan.n_blocks - 1, BLOCK)))
    bar, total = carry
    for name, ref in outs["numbers"].items():
        ref[units] = (bar | total)[name]
