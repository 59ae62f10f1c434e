"""The cell as Flax NNX modules: `SLIFCell` for `nnx.RNN`, and `SLIF` and `LeakyIntegrator` for whole sequences."""

from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from slif import _check, _layers
from slif._host import shown, transfers
from slif.hyperparameters import NUMERIC, STATIC, Mechanisms, Numbers, with_defaults
from slif.request import Records
from slif.types import SLIFParams, SLIFState

__all__ = ["SLIF", "Fixed", "LeakyIntegrator", "SLIFCell"]

_NUMBER = "fixed_surrogate_"


class Fixed(nnx.Variable):
    """Parameters that are not trained: state of the module, saved with it, but no `nnx.Param`."""


class _Layer(nnx.Module):
    def __init__(self, features: int, *, dt: float, hyper: dict[str, Any], learn: tuple[str, ...], rngs: nnx.Rngs):
        hyper = _layers.complete(hyper, learn, dt)
        dtype = _layers.check_made(features, hyper, dt)
        key, names = _key(rngs), _layers.stored_names(hyper, learn)
        params = _layers.draw(key, features, hyper, dtype)
        self.features, self.dt, self.dtype = features, dt, params.thr.dtype
        self.static = tuple(getattr(params, name) for name in STATIC), params.surrogate.replace(numbers={})
        self.learned = tuple(name for name in names if not name.startswith("fixed_"))
        for name, value in _layers.stored_values(key, features, hyper, self.learned).items():
            setattr(self, name, nnx.Param(value))
        # One array a variable, so that a module can be restored from a pure dict, as Orbax gives it back.
        given = {f"fixed_{name}": getattr(params, name) for name in NUMERIC if f"learned_{name}" not in self.learned}
        given |= {f"{_NUMBER}{name}": jnp.asarray(x, self.dtype) for name, x in params.surrogate.numbers.items()}
        if hyper["resist_m"] is None:  # then it follows tau_m
            del given["fixed_resist_m"]
        self.given = tuple(name for name, value in given.items() if value is not None)
        for name in self.given:
            setattr(self, name, Fixed(given[name]))

    def slif_params(self) -> SLIFParams:
        """The parameters of the cell now, for `slif.simulate` and its like."""
        return _params(self)


def _key(rngs: Any) -> Array:
    try:
        with transfers():
            return rngs.params()
    except AttributeError:
        raise TypeError(f"rngs: expected nnx.Rngs with a stream for params, got {shown(rngs)}") from None


def _params(module: _Layer) -> SLIFParams:
    # No method, which `nnx.tabulate` would show as a layer of its own.
    given = {name: jax.lax.stop_gradient(getattr(module, name)[...]) for name in module.given}
    learned = {name: getattr(module, name)[...] for name in module.learned}
    static, surrogate = module.static
    numbers = {name.removeprefix(_NUMBER): given.pop(name) for name in module.given if name.startswith(_NUMBER)}
    leaves: dict[str, Any] = {"resist_m": None} | {name.removeprefix("fixed_"): x for name, x in given.items()}
    leaves |= {name.removeprefix("learned_"): x for name, x in learned.items() if name.startswith("learned_")}
    params = SLIFParams(
        **{name: x if x is None else x.astype(module.dtype) for name, x in leaves.items()},
        surrogate=surrogate.replace(numbers=numbers),
        **dict(zip(STATIC, static, strict=True)),
    )
    return _layers.assemble(params, learned, module.dt)


ORTHOGONAL = nnx.initializers.orthogonal()


class _Neurons(_Layer):
    @with_defaults
    def __init__(
        self,
        features: int,
        *,
        dt: float,
        tau_m: Numbers,
        thr: Numbers,
        resist_m: Numbers | None = None,
        learn: tuple[str, ...] = (),
        recurrent: bool = False,
        recurrent_kernel_init: Callable[..., Array] = ORTHOGONAL,
        rngs: nnx.Rngs,
        **mechanisms: Unpack[Mechanisms],
    ):
        hyper = {"tau_m": tau_m, "resist_m": resist_m, "thr": thr, **mechanisms}
        super().__init__(features, dt=dt, hyper=hyper, learn=learn, rngs=rngs)
        self.recurrent = _check.as_flag("recurrent", recurrent)
        if recurrent:
            init = _layers.recurrent_init(recurrent_kernel_init)
            kernel = init(_key(rngs), (features, features), _layers.wide(self.dtype))
            self.recurrent_kernel = nnx.Param(kernel)


def _feedback(module: _Neurons) -> Array | None:
    return module.recurrent_kernel[...] if module.recurrent else None


class SLIFCell(_Neurons, nnx.RNNCellBase):
    """The sLIF cell as a recurrent cell: one step of `slif.step`, run over time by `nnx.RNN`.

        (state, k), s = cell((state, k), j)   with   state = step(params, state, j, k dt, dt)

    Thresholds with jitter and the inhibition matrix are those of `slif.init_params` with the key `rngs.params()`. What
    is not learned is held in `Fixed` variables, saved with the module but no `nnx.Param`: optimisers and weight decay
    leave it alone.

    Args:
        features: the number of units, N.
        dt: the length of a step, ms; a UserWarning where it is above 2 tau_m, as forward Euler diverges.
        tau_m, thr: as in `slif.init_params`.
        resist_m: as in `slif.init_params`; None, the default, is tau_m / dt at every value of tau_m, so that a current
            j moves v by j in a step, which is what the usual initialisers of weights are made for.
        refract_time, thr_gain, thr_leak, rho_b, resist_inh, reset, sticky_spikes, thr_persist: as in
            `slif.init_params`; so are thr_jitter, surrogate and dtype.
        learn: names of the parameters to train, as in `slif.linen.SLIFCell`.
        recurrent: add s @ recurrent_kernel, of the spikes of the step before, to the inputs.
        recurrent_kernel_init: initialiser of `recurrent_kernel` [N, N], an `nnx.Param`.
        rngs: random streams, of which "params" is used.

    Returns:
        Of a call with a carry and inputs [..., N]: the new carry and the spikes [..., N]. The carry is the `SLIFState`
        and the count of steps [...]; the clock is count * dt.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: an argument is out of range, a name in `learn` cannot be learned, with this surrogate or any, or the
            inputs do not fit.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); the contract of `flax.nnx.RNNCellBase`.

    Example:
        >>> cell = SLIFCell(3, dt=1.0, tau_m=20.0, resist_m=1.0, thr=0.4, rngs=nnx.Rngs(0))
        >>> nnx.RNN(cell, time_major=True)(jnp.ones((10, 2, 3))).shape
        (10, 2, 3)
    """

    def __call__(self, carry: _layers.Carry, inputs: Array) -> tuple[_layers.Carry, Array]:
        """One step: the carry after it, and the spikes [..., N] that the inputs [..., N] bring about."""
        return _layers.run_cell(_params(self), self.dt, carry, inputs, _feedback(self))

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None) -> _layers.Carry:
        """The cell at rest, with the thresholds of the module; `rngs` is not used."""
        del rngs
        if carry_init is not None:
            raise ValueError(
                f"carry_init: expected None, as parameters tell the state at rest, got {shown(carry_init)}"
            )
        return _layers.initial_carry(_params(self), input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class SLIF(_Neurons):
    """A layer of sLIF cells over whole sequences: `slif.simulate`.

        s = simulate(params, initial_state, x, dt=dt)

    It holds, draws and learns its parameters as `SLIFCell` does.

    Args:
        features: the number of units, N.
        dt, tau_m, thr, resist_m, learn, recurrent, recurrent_kernel_init, rngs: as in `SLIFCell`.
        refract_time, thr_gain, thr_leak, rho_b, resist_inh, reset, sticky_spikes, thr_persist: as in
            `slif.init_params`; so are thr_jitter, surrogate and dtype.
        time_major: inputs and outputs are [T, ..., N]; if False, [..., T, N].

    Returns:
        Of a call with currents x: the spikes, in the shape of x; see `__call__`.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: an argument is out of range, a name in `learn` cannot be learned, with this surrogate or any, or the
            inputs do not fit.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3).

    Example:
        >>> layer = SLIF(3, dt=1.0, tau_m=20.0, resist_m=1.0, thr=0.4, learn=("resist_m",), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((10, 2, 3)), record=("spike_count",))["spike_count"].shape
        (2, 3)
        >>> list(nnx.state(layer, nnx.Param))
        ['logscale_resist_m']
    """

    @with_defaults
    def __init__(
        self,
        features: int,
        *,
        dt: float,
        tau_m: Numbers,
        thr: Numbers,
        resist_m: Numbers | None = None,
        learn: tuple[str, ...] = (),
        recurrent: bool = False,
        recurrent_kernel_init: Callable[..., Array] = ORTHOGONAL,
        time_major: bool = True,
        rngs: nnx.Rngs,
        **mechanisms: Unpack[Mechanisms],
    ):
        super().__init__(
            features,
            dt=dt,
            tau_m=tau_m,
            resist_m=resist_m,
            thr=thr,
            learn=learn,
            recurrent=recurrent,
            recurrent_kernel_init=recurrent_kernel_init,
            rngs=rngs,
            **mechanisms,
        )
        self.time_major = time_major

    @overload
    def __call__(
        self, x: Array, *, return_state: Literal[False] = False, **options: Unpack[_layers.CallOptions]
    ) -> Array: ...
    @overload
    def __call__(
        self, x: Array, *, return_state: Literal[True], **options: Unpack[_layers.CallOptions]
    ) -> tuple[Array, SLIFState]: ...
    @overload
    def __call__(
        self, x: Array, *, record: Records, return_state: Literal[False] = False, **options: Unpack[_layers.CallOptions]
    ) -> dict[str, Array]: ...
    @overload
    def __call__(
        self, x: Array, *, record: Records, return_state: Literal[True], **options: Unpack[_layers.CallOptions]
    ) -> tuple[dict[str, Array], SLIFState]: ...
    def __call__(
        self,
        x: Array,
        *,
        initial_state: SLIFState | None = None,
        valid: Array | np.ndarray | None = None,
        record: Records = ("s",),
        return_state: bool = False,
        t0: ArrayLike = 0.0,
        spike_dtype: DTypeLike | None = None,
        checkpoint_every: int | None = None,
        implementation: Literal["xla", "pallas"] | None = None,
    ) -> Any:
        """Runs the layer over a sequence.

        Args:
            x: currents [T, ..., N], or [..., T, N] if not `time_major`.
            initial_state: the state before the first step; None for rest.
            valid: boolean [T, ...] (or [..., T]): where False, the row's state is frozen and its spikes are 0.
            record: what to return, as in `slif.simulate`.
            return_state: return the state after the last step as well. A second window goes on from it with `t0`.
            t0, spike_dtype, checkpoint_every, implementation: as in `slif.simulate`.

        Returns:
            The spikes, or a dict of what was recorded if `record` is not ("s",). With `return_state` a pair of that
            and the state.
        """
        return _layers.run_sequence(
            _params(self),
            self.dt,
            x,
            time_major=self.time_major,
            initial_state=initial_state,
            valid=valid,
            record=record,
            return_state=return_state,
            t0=t0,
            spike_dtype=spike_dtype,
            checkpoint_every=checkpoint_every,
            implementation=implementation,
            feedback=_feedback(self),
        )


class LeakyIntegrator(_Layer):
    """A layer of leaky integrators, cells that never fire: a read-out, or a synapse in front of another layer.

        v = v + ((x resist_m - v) / tau_m) dt

    Args:
        features: the number of units, N.
        dt: the length of a step, ms; a UserWarning where it is above 2 tau_m, as forward Euler diverges.
        tau_m: time constant, ms; a scalar or [N].
        resist_m: what a lasting current of 1 takes v to; None, the default, is tau_m / dt, with which x moves v by x in
            a step.
        learn: names of the parameters to train, "tau_m" and "resist_m", as in `SLIFCell`.
        dtype: dtype of v.
        time_major: inputs and outputs are [T, ..., N]; if False, [..., T, N].
        rngs: not used, since nothing is drawn.

    Returns:
        Of a call with currents x: v at every step, in the shape of x.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: an argument is out of range, a name in `learn` cannot be learned, or the inputs do not fit.

    Source: the subthreshold equation of `slif.step`.

    Example:
        >>> readout = LeakyIntegrator(2, dt=1.0, tau_m=4.0)
        >>> readout(jnp.ones((3, 2)))[:, 0]
        Array([1.    , 1.75  , 2.3125], dtype=float32)
    """

    def __init__(
        self,
        features: int,
        *,
        dt: float,
        tau_m: Numbers,
        resist_m: Numbers | None = None,
        learn: tuple[str, ...] = (),
        dtype: DTypeLike = "float32",
        time_major: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        learn = _check.as_names("learn", learn, ("tau_m", "resist_m"))
        super().__init__(
            features, dt=dt, hyper=_layers.integrator(tau_m, resist_m, dtype), learn=learn, rngs=nnx.Rngs(0)
        )
        self.time_major = time_major

    @overload
    def __call__(
        self, x: Array, *, return_state: Literal[False] = False, **options: Unpack[_layers.IntegratorOptions]
    ) -> Array: ...
    @overload
    def __call__(
        self, x: Array, *, return_state: Literal[True], **options: Unpack[_layers.IntegratorOptions]
    ) -> tuple[Array, SLIFState]: ...
    def __call__(
        self,
        x: Array,
        *,
        initial_state: SLIFState | None = None,
        valid: Array | np.ndarray | None = None,
        return_state: bool = False,
        t0: ArrayLike = 0.0,
    ) -> Any:
        """Runs the layer over a sequence.

        Args:
            x: currents [T, ..., N], or [..., T, N] if not `time_major`.
            initial_state: the state before the first step; None for rest.
            valid: boolean [T, ...] (or [..., T]): where False, the row's v stands still.
            return_state: return the state after the last step as well.
            t0: the time of the first step, ms.

        Returns:
            v, in the shape of x; with `return_state` a pair of that and the state.
        """
        return _layers.run_sequence(
            _params(self),
            self.dt,
            x,
            time_major=self.time_major,
            initial_state=initial_state,
            valid=valid,
            record=("v",),
            alone="v",
            return_state=return_state,
            t0=t0,
        )
