"""A whole sequence through the cell: the entry, and the derivative of the secant."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from slif import _check, _warn
from slif._attach import attach
from slif._mesh import alike, follow
from slif.cell import adapts, drive, prepare, take_thresholds
from slif.loops.choose import choose
from slif.request import RECORDS, Request
from slif.types import SLIFParams, SLIFState


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
    """Runs the cell over a sequence of currents, by forward Euler.

        state = step(params, state, currents[k], t0 + k dt, dt)   for k = 0 .. T - 1

    Args:
        params: the parameters.
        state: the state before the first step, fields [..., N].
        currents: input currents [T, ..., N]; another dtype is cast to that of params inside the loop, one of 64 bits
            from NumPy before it, where JAX has none.
        dt: the length of a step, ms, positive. Above 2 tau_m forward Euler diverges: a UserWarning where both are known
            as Python or NumPy values.
        t0: the time of the first step, ms.
        record: what to return of every step: any field of `SLIFState`, "u" (the potential before the reset, with a
            gradient where v has one) or "s_packed" (8 spikes a byte), each [T, ..., N]; and summaries [..., N] that
            take no memory in T: "spike_count" and "first_spike_time" (ms, inf where there is none). Both count what "s"
            shows, a sticky spike carried in included.
        spike_dtype: dtype of the recorded "s"; None for that of params. bool and integers carry no gradient.
        valid: boolean [T, ...] over the batch shape. Where False, the row's state is frozen and its "s" is 0; the
            clock runs on.
        checkpoint_every: in the backward pass of a voltage surrogate, keep the state of every so many steps only and
            run the steps between again; fewer, down to half as many, where that divides T. About sqrt(T) saves the
            most memory.
        implementation: "xla"; "pallas", one fused kernel for NVIDIA GPUs from compute capability 8.0 on (9.0 with jax
            0.10), which runs in Pallas' slow interpreter where there is no GPU; or None for the best for the platform
            and the arguments. The kernel's gradients for a voltage surrogate are reverse mode only.

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
    params, state = _check.values(params), _check.fields(state)
    dtype = params.thr.dtype
    if valid is not None:
        _check.array("valid", valid, "a boolean array")
    request = Request(
        dt=_check.number("dt", dt, dtype),
        t0=_check.number("t0", t0, dtype),
        valid=valid,
        record=_check.names("record", record, RECORDS),
        spike_dtype=_check.spike_dtype(spike_dtype, dtype),
        checkpoint_every=None if checkpoint_every is None else _check.size("checkpoint_every", checkpoint_every, 1),
    )
    _warn.euler(params.tau_m, request.dt)
    _warn.clock(params.refract_time, request.dt, dtype)
    currents = _check.currents("currents", currents, dtype)
    with _check.transfers():
        return _simulate(params, state, currents, request, _check.implementation(implementation))


@functools.partial(jax.jit, static_argnames="implementation")
def _simulate(
    params: SLIFParams, state: SLIFState, currents: Array, request: Request, implementation: str | None
) -> tuple[SLIFState, dict[str, Array]]:
    _check.signature(params, state)
    _check.current("currents", currents, (None, *state.v.shape))
    _check.scalars(dt=request.dt, t0=request.t0)
    if request.valid is not None:
        _check.mask("valid", request.valid, currents.shape[:-1])
    params, state, currents, valid = follow(params, state, currents, request.valid)
    params, dt, t0 = prepare(params, state.v.ndim, request.dt, request.t0)
    request = request.replace(dt=dt, t0=t0, valid=None if valid is None else valid[..., None])
    if currents.shape[0] == 0:
        return choose(implementation, params, currents, request, constant=False)(params, state, currents, request)
    frozen, state = state, take_thresholds(params, state)
    params, state, frozen, currents, request = alike((params, state, frozen, currents, request))
    final, out = _run(params, state, currents, request, implementation)
    if valid is not None and not adapts(params):  # until its first step a frozen row holds the thresholds it was given
        seen = lax.cummax(valid.astype(jnp.int8))[..., None] > 0
        final = final.replace(thr=jnp.where(seen[-1], final.thr, frozen.thr))
        out |= {"thr": jnp.where(seen, out["thr"], frozen.thr)} if "thr" in out else {}
    return final, out


def _run(
    params: SLIFParams, state: SLIFState, currents: Array, request: Request, implementation: str | None
) -> tuple[SLIFState, dict[str, Array]]:
    estimated = params.surrogate.wrt == "current"
    elementwise = estimated and params.resist_inh is None
    # A frozen row would pass on gradients of fields that have none.
    having = ("s", "j") if estimated else ("s", "j", "v", "thr")
    state = lax.stop_gradient(state).replace(**{name: getattr(state, name) for name in having})
    if request.checkpoint_every is not None and not elementwise and not isinstance(currents.shape[0], int):
        raise ValueError(f"checkpoint_every: expected None, or currents of a known length, got T = {currents.shape[0]}")
    loop = choose(implementation, params, currents, request, constant=elementwise)
    if not elementwise:
        return loop(params, state, currents, request)
    # The spike's derivative is a function of the current alone: the loop runs on constants, keeping nothing for the
    # backward pass, and the derivative is attached to what it returns.
    request = request.replace(checkpoint_every=None)
    final, out = loop(*lax.stop_gradient((params, state, currents, request)))
    return _attach(params, state, currents, request.valid, final, out)


def _attach(
    params: SLIFParams, state: SLIFState, currents: Array, valid: Array | None, final: SLIFState, out: dict[str, Array]
) -> tuple[SLIFState, dict[str, Array]]:
    """The derivative of the spikes, and of the currents that are told, for what the loop gave as constants."""
    if valid is not None:
        currents = jnp.where(valid, currents, 0)  # as in the loop, for the same reason
    i = jax.vmap(lambda j: drive(params, state.s, j.astype(state.v.dtype)))(currents)
    slope = jax.vmap(params.surrogate)(i)
    if "s" in out and jnp.issubdtype(out["s"].dtype, jnp.floating):
        out["s"] = attach(out["s"], i, slope)
    if "spike_count" in out:
        out["spike_count"] = out["spike_count"] + attach(jnp.zeros_like(i, out["spike_count"].dtype), i, slope).sum(0)
    if valid is None:
        s = out["s"][-1].astype(i.dtype) if "s" in out else final.s
        final = final.replace(j=i[-1], s=attach(s, i[-1], slope[-1]))
        return final, out | ({"j": i} if "j" in out else {})

    def hold(j, x):
        i, live = x
        j = jnp.where(live, i, j)
        return j, j

    j, held = lax.scan(hold, state.j, (i, valid))
    s = jnp.where(valid.any(0), attach(final.s, j, params.surrogate(j)), state.s)
    return final.replace(j=j, s=s), out | ({"j": held} if "j" in out else {})
