"""A whole sequence through the cell: one scan over time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from slif import _check, kernels
from slif.cell import advance, drive, prepare
from slif.raster import pack_spikes
from slif.surrogate import Surrogate, emit
from slif.types import SLIFParams, SLIFState

RECORDS = (*_check.FIELDS, "s_packed", "spike_count", "first_spike_time")


def simulate(
    params: SLIFParams,
    state: SLIFState,
    currents: Array,
    *,
    dt: ArrayLike,
    t0: ArrayLike = 0.0,
    record: tuple[str, ...] = ("s",),
    spike_dtype: DTypeLike | None = None,
    valid: Array | None = None,
    checkpoint_every: int | None = None,
    implementation: str | None = None,
) -> tuple[SLIFState, dict[str, Array]]:
    """Runs the cell over a sequence of currents.

        state = step(params, state, currents[k], t0 + k dt, dt)   for k = 0 .. T - 1

    Args:
        params: the parameters.
        state: the state before the first step, fields [..., N].
        currents: input currents [T, ..., N]; another dtype is cast to that of params inside the loop.
        dt: the length of a step, ms, positive.
        t0: the time of the first step, ms.
        record: what to return of every step: any field of `SLIFState` or "s_packed" (8 spikes a byte), each
            [T, ..., N]; and summaries [..., N] that take no memory in T: "spike_count" and "first_spike_time" (ms, inf
            where there is none). Both count what "s" shows, a sticky spike carried in included.
        spike_dtype: dtype of the recorded "s"; None for that of params. bool and integers carry no gradient.
        valid: boolean [T, ...] over the batch shape. Where False, the row's state is frozen and its "s" is 0; the
            clock runs on.
        checkpoint_every: in the backward pass of a voltage surrogate, keep the state of every so many steps only and
            run the steps between again; fewer, down to half as many, where that divides T. About sqrt(T) saves the
            most memory.
        implementation: "xla"; "pallas", one fused kernel for NVIDIA GPUs from compute capability 9.0 on, which runs in
            Pallas' slow interpreter where there is no GPU; or None for the best for the platform and the arguments. The
            kernel's gradients for a voltage surrogate are reverse mode only.

    Returns:
        The state after the last step, and a dict of what was recorded.

    Raises:
        TypeError: an argument is not of its kind, or its dtype is not that of params.
        ValueError: a shape does not fit, a name is not known, or a Python or NumPy value is out of range.
        NotImplementedError: the implementation asked for cannot do this.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); ngc-learn's `SLIFCell.advance_state`.

    Example:
        >>> from slif import init_params, init_state
        >>> params = init_params(jax.random.key(0), 1, tau_m=16.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
        >>> state, out = simulate(params, init_state(params), jnp.full((4, 1), 4.0), dt=1.0, record=("s", "v"))
        >>> out["s"].ravel(), out["v"].ravel()
        (Array([0., 1., 0., 1.], dtype=float32), Array([0.25, 0.  , 0.25, 0.  ], dtype=float32))
    """
    params = _check.params(params)
    state, dtype = _check.state(params, state), params.thr.dtype
    currents = _check.current("currents", currents, (None, *state.v.shape))
    if valid is not None:
        valid = _check.mask("valid", valid, currents.shape[:-1])
    if checkpoint_every is not None:
        checkpoint_every = _check.size("checkpoint_every", checkpoint_every, 1)
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation: expected None, 'xla' or 'pallas', got {implementation!r}")
    spike_dtype = dtype if spike_dtype is None else _check_spike_dtype(spike_dtype)
    return _simulate(
        params,
        state,
        currents,
        valid,
        _check.scalar("dt", dt, dtype),
        _check.scalar("t0", t0, dtype),
        record=_check_record(record),
        spike_dtype=spike_dtype,
        checkpoint_every=checkpoint_every,
        fused=_fuses(implementation, params, state, currents, valid, spike_dtype),
    )


def _fuses(
    implementation: str | None,
    params: SLIFParams,
    state: SLIFState,
    currents: Array,
    valid: Array | None,
    spike_dtype: np.dtype,
) -> bool:
    """Whether a kernel runs the loop: when asked for, or on a GPU when it can."""
    if implementation == "xla":
        return False
    missing, gpu = kernels.missing(params, state, currents, valid, spike_dtype), kernels.gpu(currents)
    if implementation is None:
        own = params.surrogate.slope.__module__ == Surrogate.__module__  # who knows what a custom one is made of
        return missing is None and gpu is True and own
    if gpu is False:
        missing = "this GPU: it takes one of NVIDIA's of compute capability 9.0 or later"
    if missing is not None:
        raise NotImplementedError(f"implementation: 'pallas' cannot do {missing}; use None or 'xla'")
    return True


def _check_record(record: Any) -> tuple[str, ...]:
    if not isinstance(record, tuple | list | set | frozenset) or not all(isinstance(name, str) for name in record):
        raise TypeError(f"record: expected a tuple of names, got {record!r}")
    unknown = sorted(set(record) - set(RECORDS))
    if unknown:
        raise ValueError(f"record: expected names among {', '.join(RECORDS)}, got {', '.join(unknown)}")
    return tuple(name for name in RECORDS if name in record)


def _check_spike_dtype(dtype: Any) -> np.dtype:
    try:
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"spike_dtype: expected a dtype, got {dtype!r}") from None
    if not (_check.is_real(dtype) or dtype == np.dtype(bool)):
        raise TypeError(f"spike_dtype: expected bool, an integer or a floating dtype, got {dtype}")
    return dtype


@functools.partial(jax.jit, static_argnames=("record", "spike_dtype", "checkpoint_every", "fused"))
def _simulate(
    params: SLIFParams,
    state: SLIFState,
    currents: Array,
    valid: Array | None,
    dt: Array,
    t0: Array,
    *,
    record: tuple[str, ...],
    spike_dtype: np.dtype,
    checkpoint_every: int | None,
    fused: bool,
) -> tuple[SLIFState, dict[str, Array]]:
    dtype = params.thr.dtype
    params, dt, t0 = prepare(params, state.v.ndim), dt.astype(dtype), t0.astype(dtype)
    if params.surrogate.wrt == "current" and currents.shape[0] > 0:
        state = lax.stop_gradient(state).replace(s=state.s, j=state.j)  # a frozen row would pass the others through
    arguments = (params, state, currents, valid, dt, t0)
    elementwise = currents.shape[0] > 0 and params.surrogate.wrt == "current" and params.resist_inh is None
    if fused:
        from slif.kernels.fused import run  # where it is used, since importing Pallas takes longer than JAX itself

        loop = functools.partial(run, record=record, spike_dtype=spike_dtype)
    else:
        every = None if elementwise else checkpoint_every
        loop = functools.partial(
            _run, record=record, spike_dtype=spike_dtype, every=every, differentiated=not elementwise
        )
    if not elementwise:
        return loop(*arguments)
    # The spike's derivative is a function of the current alone: the loop runs on constants, keeping nothing for the
    # backward pass, and the derivative is attached to what it returns.
    final, out = loop(*lax.stop_gradient(arguments))
    return _attach(params, state, currents, valid, final, out)


def _carried(params: SLIFParams, record: tuple[str, ...], valid: Array | None) -> tuple[str, ...]:
    """The fields that go round the loop: what a later step reads, or what nothing tells after the loop."""
    adapts = any(x is not None for x in (params.thr_gain, params.thr_leak, params.rho_b))
    coupled = params.resist_inh is not None or params.surrogate.wrt == "voltage"
    needed = {
        "v": True,
        "rfr": True,
        "thr": adapts,
        "s": coupled or valid is not None or "s" not in record,
        "j": coupled,
        "surrogate": coupled or (valid is not None and "surrogate" in record),
        "tols": True,
    }
    return tuple(name for name, carry in needed.items() if carry)


def _pack(fields: dict[str, Array], paired: bool) -> list[Array]:
    """The carry: one array a field, or one complex array for two fields."""
    arrays = list(fields.values())
    if not paired:
        return arrays
    real = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    pairs = [real[k : k + 2] for k in range(0, len(real), 2)]
    return [lax.complex(*pair) if len(pair) == 2 else pair[0] for pair in pairs] + arrays[len(real) :]


def _unpack(names: tuple[str, ...], carry: list[Array]) -> dict[str, Array]:
    parts = [(lax.real(x), lax.imag(x)) if jnp.iscomplexobj(x) else (x,) for x in carry]
    return dict(zip(names, [part for pair in parts for part in pair], strict=True))


def _run(
    params: SLIFParams,
    state: SLIFState,
    currents: Array,
    valid: Array | None,
    dt: Array,
    t0: Array,
    *,
    record: tuple[str, ...],
    spike_dtype: np.dtype,
    every: int | None,
    differentiated: bool,
) -> tuple[SLIFState, dict[str, Array]]:
    """The scan; the final state's fields that it does not carry are left as they were."""
    carried = _carried(params, record, valid)
    # Inside shard_map a carry has to differ between devices from the start if it does so at the end.
    for x in jax.tree.leaves((params, currents, valid, dt, t0)):
        if _check.varying(x) and x.size > 0:
            state = jax.tree.map(lambda y, x=x: jnp.where(False, x.ravel()[0].astype(y.dtype), y), state)
    # On CPUs XLA runs one kernel a step for each array that the loop carries, and each computes the step anew: with v
    # and rfr in one, float32 rasters of (100, 250, 1000) take 0.8 of the time, bool ones 0.6, smaller problems as long
    # as before. Under differentiation it costs more than it saves, up to 1.3 times the time.
    paired = not differentiated and params.thr.dtype in (jnp.float32, jnp.float64)
    # So would the spikes that it writes out. Compared with the step of the last spike instead, behind a barrier lest
    # XLA undo it, they save a tenth of the time, and 0.3 of it with bool rasters of (100, 250, 1000). It is an integer,
    # since a time could also be that of a spike carried in.
    stepped = not differentiated and "tols" not in record
    # At least float32: bfloat16 cannot count past 256 steps.
    wide = jnp.promote_types(params.thr.dtype, jnp.float32)
    steps = jnp.arange(currents.shape[0], dtype=jnp.int32)
    times = t0.astype(wide) + steps.astype(wide) * dt.astype(wide)
    summaries = {
        "spike_count": jnp.zeros_like(state.v, wide),
        "first_spike_time": jnp.full_like(state.v, jnp.inf, wide),
    }

    def body(carry, x):
        fields, summary = carry
        j, k, t, live = x
        old = state.replace(**_unpack(carried, fields))
        # A frozen row's current never reaches the equations, so that no NaN in it reaches a gradient.
        j = j if live is None else jnp.where(live[..., None], j, 0)
        new = advance(params, old, j, k if stepped else t.astype(old.v.dtype), dt)
        s = new.s
        if live is not None:
            new = jax.tree.map(lambda n, o: jnp.where(live[..., None], n, o), new, old)
            s = jnp.where(live[..., None], s, 0)
        if stepped:
            new = new.replace(tols=lax.optimization_barrier(new.tols))
            s = (new.tols == k).astype(s.dtype)
        summary = _summarise(summary, s, t)
        out = {name: _observe(name, new, s, spike_dtype) for name in record if name not in summaries}
        return (_pack({name: getattr(new, name) for name in carried}, paired), summary), out

    begin = state.replace(tols=jnp.full_like(state.v, -1, jnp.int32)) if stepped else state
    start = (
        _pack({name: getattr(begin, name) for name in carried}, paired),
        {name: x for name, x in summaries.items() if name in record},
    )
    (fields, summary), out = _scan(body, start, (currents, steps, times, valid), currents.shape[0], every)
    final = state.replace(**_unpack(carried, fields))
    if stepped:
        last = final.tols
        final = final.replace(tols=jnp.where(last < 0, state.tols, times[jnp.maximum(last, 0)].astype(state.v.dtype)))
    return final, out | summary


def _summarise(summary: dict[str, Array], s: Array, t: Array) -> dict[str, Array]:
    new = {}
    if "spike_count" in summary:
        new["spike_count"] = summary["spike_count"] + s.astype(summary["spike_count"].dtype)
    if "first_spike_time" in summary:
        first = summary["first_spike_time"]
        new["first_spike_time"] = jnp.where((s > 0) & (first == jnp.inf), lax.stop_gradient(t), first)
    return new


def _observe(name: str, state: SLIFState, s: Array, spike_dtype: np.dtype) -> Array:
    if name == "s":
        return s.astype(spike_dtype)
    return pack_spikes(s) if name == "s_packed" else getattr(state, name)


def _scan(body: Callable, carry: Any, xs: Any, length: int, every: int | None) -> tuple[Any, Any]:
    """`lax.scan`, keeping the carry of every `every` steps or so only for the backward pass."""
    if every is None or every >= length:
        return lax.scan(body, carry, xs)
    # A ragged last block copies the sequences to take them apart, which costs more memory than it saves: at T = 1000
    # 25 steps a block take a sixth of the memory, 32 with a tail of 8 twice as much.
    every = next((k for k in range(every, every // 2, -1) if length % k == 0), every)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(carry, xs):
        return lax.scan(body, carry, xs)

    whole = length - length % every
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, every, *x.shape[1:]), xs)
    carry, ys = lax.scan(block, carry, blocks)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole < length:
        carry, tail = block(carry, jax.tree.map(lambda x: x[whole:], xs))
        ys = jax.tree.map(lambda y, z: jnp.concatenate([y, z]), ys, tail)
    return carry, ys


def _attach(
    params: SLIFParams,
    state: SLIFState,
    currents: Array,
    valid: Array | None,
    final: SLIFState,
    out: dict[str, Array],
) -> tuple[SLIFState, dict[str, Array]]:
    """What depends on the current alone, for an estimator with respect to it and without inhibition: the derivative of
    the spikes, and the fields of the final state that the loop did not carry."""
    if valid is not None:
        currents = jnp.where(valid[..., None], currents, 0)  # as in the loop, for the same reason
    i = jax.vmap(lambda j: drive(params, state.s, j.astype(state.v.dtype)))(currents)
    attach = jax.vmap(functools.partial(emit, params.surrogate))
    if "s" in out and jnp.issubdtype(out["s"].dtype, jnp.floating):
        out["s"] = attach(i, out["s"])
    if "spike_count" in out:
        nothing = jnp.zeros_like(i, out["spike_count"].dtype)
        out["spike_count"] = out["spike_count"] + attach(i, nothing).sum(0)
    if valid is None:
        if "j" in out:
            out["j"] = i
        j, s = i[-1], out["s"][-1].astype(i.dtype) if "s" in out else final.s
        h = lax.stop_gradient(params.surrogate(j))
        return final.replace(j=j, s=emit(params.surrogate, j, s), surrogate=h), out

    steps = jnp.arange(len(i)).reshape(-1, *(1,) * (valid.ndim - 1))
    last = jnp.where(valid, steps, -1)
    if "j" in out:
        out["j"] = _held(i, lax.cummax(last), state.j)
    last = last.max(0, keepdims=True)
    j = _held(i, last, state.j)[0]
    never = last[0, ..., None] < 0
    s = jnp.where(never, state.s, emit(params.surrogate, j, final.s))
    h = jnp.where(never, state.surrogate, params.surrogate(j))
    return final.replace(j=j, s=s, surrogate=lax.stop_gradient(h)), out


def _held(i: Array, last: Array, before: Array) -> Array:
    """The current of the step `last`, or `before` where that is negative: no step has been live yet."""
    held = jnp.take_along_axis(i, jnp.maximum(last, 0)[..., None], axis=0)
    return jnp.where(last[..., None] < 0, before[None], held)
