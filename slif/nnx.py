"""The cell as Flax NNX modules: `SLIFCell` for `nnx.RNN`, and `SLIF` for whole sequences."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from slif import _layers
from slif._check import FLAGS, LEAVES, flag
from slif._host import shown, transfers
from slif.cell import init_params
from slif.surrogate import Surrogate
from slif.types import SLIFParams, SLIFState

__all__ = ["SLIF", "Fixed", "SLIFCell"]


class Fixed(nnx.Variable):
    """Parameters that are not trained: state of the module, saved with it, but no `nnx.Param`."""


_NUMBER = "fixed_surrogate_"


class _Neurons(nnx.Module):
    def __init__(
        self,
        features: int,
        *,
        dt: float,
        tau_m: ArrayLike,
        resist_m: ArrayLike,
        thr: ArrayLike,
        resist_inh: ArrayLike = 0.0,
        thr_persist: bool = False,
        thr_gain: ArrayLike = 0.0,
        thr_leak: ArrayLike = 0.0,
        rho_b: ArrayLike = 0.0,
        refract_time: ArrayLike = 0.0,
        sticky_spikes: bool = False,
        thr_jitter: ArrayLike = 0.05,
        surrogate: Surrogate | None = None,
        dtype: DTypeLike = jnp.float32,
        learn: tuple[str, ...] = (),
        rngs: nnx.Rngs,
    ):
        hyper = {
            "tau_m": tau_m,
            "resist_m": resist_m,
            "thr": thr,
            "resist_inh": resist_inh,
            "thr_persist": thr_persist,
            "thr_gain": thr_gain,
            "thr_leak": thr_leak,
            "rho_b": rho_b,
            "refract_time": refract_time,
            "sticky_spikes": sticky_spikes,
            "thr_jitter": thr_jitter,
            "surrogate": surrogate,
            "dtype": dtype,
        }
        hyper = _layers.switch_on(hyper, learn)
        hyper["dtype"] = _layers.watch(features, hyper, dt)
        key = _key(rngs)
        params, names = init_params(key, features, **hyper), _layers.stored_names(hyper, learn)
        self.features, self.dt, self.dtype = features, dt, params.thr.dtype
        self.static = tuple(getattr(params, name) for name in FLAGS), params.surrogate.replace(numbers={})
        self.learned = tuple(name for name in names if not name.startswith("fixed_"))
        for name, value in _layers.stored_values(key, features, hyper, self.learned).items():
            setattr(self, name, nnx.Param(value))
        # One array a variable, so that a module can be restored from a pure dict, as Orbax gives it back.
        given = {f"fixed_{name}": getattr(params, name) for name in LEAVES if f"learned_{name}" not in self.learned}
        given |= {f"{_NUMBER}{name}": jnp.asarray(x, self.dtype) for name, x in params.surrogate.numbers.items()}
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


def _params(module: _Neurons) -> SLIFParams:
    # No method, which `nnx.tabulate` would show as a layer of its own.
    given = {name: jax.lax.stop_gradient(getattr(module, name)[...]) for name in module.given}
    learned = {name: getattr(module, name)[...] for name in module.learned}
    flags, surrogate = module.static
    numbers = {name.removeprefix(_NUMBER): given.pop(name) for name in module.given if name.startswith(_NUMBER)}
    leaves = {name.removeprefix("fixed_"): x for name, x in given.items()}
    leaves |= {name.removeprefix("learned_"): x for name, x in learned.items() if name.startswith("learned_")}
    params = SLIFParams(
        **{name: x.astype(module.dtype) for name, x in leaves.items()},
        surrogate=surrogate.replace(numbers=numbers),
        **dict(zip(FLAGS, flags, strict=True)),
    )
    return _layers.assemble(params, learned)


class SLIFCell(_Neurons, nnx.RNNCellBase):
    """The sLIF cell as a recurrent cell: one step of `slif.step`, run over time by `nnx.RNN`.

        (state, k), s = cell((state, k), j)   with   state = step(params, state, j, k dt, dt)

    Thresholds with jitter and the inhibition matrix are those of `slif.init_params` with the key `rngs.params()`. What
    is not learned is held in `Fixed` variables, saved with the module but no `nnx.Param`: optimisers and weight decay
    leave it alone.

    Args:
        features: the number of units, N.
        dt: the length of a step, ms; a UserWarning where it is above 2 tau_m, as forward Euler diverges.
        tau_m, resist_m, thr, resist_inh, thr_persist, thr_gain, thr_leak, rho_b, refract_time, sticky_spikes,
            thr_jitter, surrogate, dtype: as in `slif.init_params`.
        learn: names of the parameters to train, as in `slif.linen.SLIFCell`.
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
        return _layers.run_cell(_params(self), self.dt, carry, inputs)

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None) -> _layers.Carry:
        """The cell at rest, with the thresholds of the module; `rngs` is not used."""
        del rngs
        if carry_init is not None:
            raise ValueError(f"carry_init: expected None, since parameters tell the state at rest, got {carry_init!r}")
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
        time_major: inputs and outputs are [T, ..., N]; if False, [..., T, N].
        **hyper: dt, the hyperparameters, learn and rngs, as in `SLIFCell`.

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

    def __init__(self, features: int, *, time_major: bool = True, **hyper: Any):
        super().__init__(features, **hyper)
        self.time_major = flag("time_major", time_major)

    def __call__(
        self,
        x: Array,
        *,
        initial_state: SLIFState | None = None,
        valid: Array | None = None,
        record: tuple[str, ...] = ("s",),
        return_state: bool = False,
        t0: ArrayLike = 0.0,
        spike_dtype: DTypeLike | None = None,
        checkpoint_every: int | None = None,
        implementation: str | None = None,
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
        )
