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
    """A parameter that is not trained: state of the module, saved with it, but not an `nnx.Param`."""


class _Layer(nnx.Module):
    def __init__(self, features: int, *, dt: float, hyper: dict[str, Any], learn: tuple[str, ...], rngs: nnx.Rngs):
        hyper = _layers.complete(hyper, learn, dt)
        dtype = _layers.check_made(features, hyper, dt)
        key, names = _key(rngs), _layers.stored_names(hyper, learn)
        params = _layers.draw(key, features, hyper, dtype)
        self.features, self.dt, self.dtype = features, dt, params.thr.dtype
        self.static = tuple(getattr(params, name) for name in STATIC), params.surrogate.replace(numbers={})
        self.learned = tuple(name for name in names if not name.startswith("fixed_"))
        if self.learned:
            for name, value in _layers.stored_values(key, features, hyper, self.learned).items():
                setattr(self, name, nnx.Param(value))
        # One array per variable, so that a module can be restored from a pure dict, such as Orbax returns.
        given = {f"fixed_{name}": getattr(params, name) for name in NUMERIC if f"learned_{name}" not in self.learned}
        given |= {f"{_NUMBER}{name}": jnp.asarray(x, self.dtype) for name, x in params.surrogate.numbers.items()}
        if hyper["resist_m"] is None:  # then it follows tau_m
            del given["fixed_resist_m"]
        self.given = tuple(name for name, value in given.items() if value is not None)
        for name in self.given:
            setattr(self, name, Fixed(given[name]))

    def slif_params(self) -> SLIFParams:
        """The current parameters of the cell, for `slif.simulate` and the other functions."""
        return _params(self)


def _key(rngs: Any) -> Array:
    try:
        with transfers():
            return rngs.params()
    except AttributeError:
        raise TypeError(f"rngs: expected nnx.Rngs with a stream for params, got {shown(rngs)}") from None


def _params(module: _Layer) -> SLIFParams:
    # Not a method, which `nnx.tabulate` would show as a separate layer.
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
    """The sLIF cell as a recurrent cell: each call is one `slif.step`, run over time by `nnx.RNN`.

        (state, k), s = cell((state, k), j)   with   state = step(params, state, j, k dt, dt)

    Jittered thresholds and the inhibition matrix are drawn by `slif.init_params` with the key `rngs.params()`. Anything
    not learned is held in `Fixed` variables, saved with the module but not an `nnx.Param`: optimisers and weight decay
    leave it alone.

    Args:
        features: the number of units, N.
        dt: the length of a step, ms; a UserWarning above 2 tau_m, where forward Euler diverges.
        tau_m, thr: as in `slif.init_params`.
        resist_m: as in `slif.init_params`; None, the default, means tau_m / dt, also while tau_m is learned, so that a
            current j moves v by j in a step, as the usual weight initialisers expect.
        refract_time, thr_gain, thr_leak, rho_b, resist_inh: as in `slif.init_params`.
        reset, sticky_spikes, thr_persist, thr_jitter, surrogate, dtype: as in `slif.init_params`.
        learn: names of the parameters to train, stored as in `slif.linen.SLIFCell`: any of "tau_m", "resist_m", "thr",
            "thr_gain", "thr_leak", "rho_b", "resist_inh" and "inh_weights"; with a surrogate with respect to the
            current, only "resist_m", "resist_inh" and "inh_weights".
        recurrent: add s @ recurrent_kernel to the inputs, with s the spikes of the previous step.
        recurrent_kernel_init: initialiser of `recurrent_kernel` [N, N], an `nnx.Param`.
        rngs: random streams; only "params" is used.

    Returns:
        From a call with a carry and inputs [..., N]: the new carry and the spikes [..., N]. The carry is a pair of an
            `SLIFState` and the count of steps [...]; the time is count * dt.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a name in `learn` cannot be learned, at all or with this surrogate, or
            the inputs do not match.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); the interface of `flax.nnx.RNNCellBase`.

    Example:
        >>> cell = SLIFCell(3, dt=1.0, tau_m=20.0, resist_m=1.0, thr=0.4, rngs=nnx.Rngs(0))
        >>> nnx.RNN(cell, time_major=True)(jnp.ones((10, 2, 3))).shape
        (10, 2, 3)
    """

    def __call__(self, carry: _layers.Carry, inputs: Array) -> tuple[_layers.Carry, Array]:
        """Runs one step on inputs [..., N] and returns the new carry and the spikes [..., N]."""
        return _layers.run_cell(_params(self), self.dt, carry, inputs, _feedback(self))

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None) -> _layers.Carry:
        """The carry of a cell at rest, with the thresholds of the module; `rngs` is not used."""
        del rngs
        if carry_init is not None:
            raise ValueError(
                f"carry_init: expected None, since the parameters give the state at rest, got {shown(carry_init)}"
            )
        return _layers.initial_carry(_params(self), input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class SLIF(_Neurons):
    """A layer of sLIF units, run over whole sequences by `slif.simulate`.

        s = simulate(params, initial_state, x, dt=dt)

    It holds, draws and learns its parameters as `SLIFCell` does.

    Args:
        features: the number of units, N.
        dt, tau_m, thr, resist_m, learn, recurrent, recurrent_kernel_init, rngs: as in `SLIFCell`.
        refract_time, thr_gain, thr_leak, rho_b, resist_inh: as in `slif.init_params`.
        reset, sticky_spikes, thr_persist, thr_jitter, surrogate, dtype: as in `slif.init_params`.
        time_major: inputs and outputs are [T, ..., N]; if False, [..., T, N].

    Returns:
        From a call with currents x: the spikes, in the shape of x; see `__call__`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a name in `learn` cannot be learned, at all or with this surrogate, or
            the inputs do not match.

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
            return_state: also return the state after the last step, from which the next window starts, at its `t0`.
            t0, spike_dtype, checkpoint_every, implementation: as in `slif.simulate`.

        Returns:
            The spikes, or a dict of the records if `record` is not ("s",). With `return_state`, a pair of that and the
                state.
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
    """A layer of leaky integrators, units that never fire: a read-out, or a synapse in front of another layer.

        v = v + ((x resist_m - v) / tau_m) dt

    Args:
        features: the number of units, N.
        dt: the length of a step, ms; a UserWarning above 2 tau_m, where forward Euler diverges.
        tau_m: time constant, ms; a scalar or [N].
        resist_m: what a constant current of 1 brings v to; None, the default, means tau_m / dt, with which x moves v by
            x in a step.
        learn: names of the parameters to train, "tau_m" and "resist_m", as in `SLIFCell`.
        dtype: dtype of v.
        time_major: inputs and outputs are [T, ..., N]; if False, [..., T, N].
        rngs: not used, since nothing is drawn.

    Returns:
        From a call with currents x: v at every step, in the shape of x.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a name in `learn` cannot be learned, or the inputs do not match.

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
            valid: boolean [T, ...] (or [..., T]): where False, the row's v is frozen.
            return_state: also return the state after the last step.
            t0: the time of the first step, ms.

        Returns:
            v, in the shape of x; with `return_state`, a pair of that and the state.
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
