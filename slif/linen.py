"""The cell as Flax Linen modules: `SLIFCell` for `nn.RNN`, and `SLIF` and `LeakyIntegrator` for whole sequences."""

import dataclasses
from typing import Any, Literal, Unpack, overload

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from slif import _check, _layers
from slif._host import transfers
from slif.hyperparameters import MechanismFields, Numbers
from slif.request import Records
from slif.types import SLIFParams, SLIFState

__all__ = ["SLIF", "LeakyIntegrator", "SLIFCell", "trainable"]


class _Layer(nn.Module):
    features: int
    _: dataclasses.KW_ONLY
    dt: float
    tau_m: Numbers
    resist_m: Numbers | None = None
    learn: tuple[str, ...] = ()
    dtype: DTypeLike = "float32"

    @nn.nowrap  # otherwise `tabulate` shows this call in place of the layer's own
    def _given(self) -> dict[str, Any]:
        """The hyperparameters as given."""
        return _layers.integrator(self.tau_m, self.resist_m, self.dtype)

    @nn.nowrap
    def _hyper(self) -> dict[str, Any]:
        return _layers.complete(self._given(), self.learn, self.dt)

    def __post_init__(self):
        super().__post_init__()
        _layers.check_made(self.features, self._hyper(), self.dt)

    def setup(self):
        hyper = self._hyper()
        names = _layers.stored_names(hyper, self.learn)
        old = {name: self.get_variable("params", name) for name in names if self.has_variable("params", name)}
        _layers.check_stored(self.features, hyper, old)
        # One key for all draws, as in `init_params`; `param` would make another for each name.
        new = self.is_mutable_collection("params") and not any(self.has_variable("params", name) for name in names)

        def init(own_key: Array, name: str) -> Array:
            return _layers.stored_values(own_key if key is None else key, self.features, hyper, names)[name]

        with transfers():  # Flax counts on the host the keys it has made
            key = self.make_rng("params") if names and new else None
            self.stored = {name: self.param(name, init, name) for name in names}

    @nn.nowrap
    def slif_params(self) -> SLIFParams:
        """The current parameters of the cell, for `slif.simulate` and the other functions."""
        return _layers.assemble(_layers.given_params(self.features, self._hyper()), self.stored, self.dt)


class _Neurons(_Layer, MechanismFields):
    _: dataclasses.KW_ONLY
    thr: Numbers
    recurrent: bool = False
    recurrent_kernel_init: nn.initializers.Initializer = nn.initializers.orthogonal()

    @nn.nowrap
    def _given(self) -> dict[str, Any]:
        names = ("tau_m", "resist_m", "thr", *MechanismFields.__annotations__)
        return {name: getattr(self, name) for name in names}

    def __post_init__(self):
        super().__post_init__()
        _check.as_flag("recurrent", self.recurrent)

    def setup(self):
        super().setup()
        self.feedback = None
        if self.recurrent:
            shape, dtype = (self.features, self.features), _layers.wide(self.dtype)
            with transfers():
                init = _layers.recurrent_init(self.recurrent_kernel_init)
                self.feedback = self.param("recurrent_kernel", init, shape, dtype)


class SLIFCell(nn.RNNCellBase, _Neurons):
    """The sLIF cell as a recurrent cell: each call is one `slif.step`, run over time by `nn.RNN`.

        (state, k), s = cell((state, k), j)   with   state = step(params, state, j, k dt, dt)

    Jittered thresholds and the inhibition matrix are drawn at `init` by `slif.init_params`, with the key from
    `make_rng("params")`. They are stored in "params" as "fixed_thr" and "fixed_inh_weights", behind `stop_gradient`;
    `trainable` exempts them from weight decay. Anything neither drawn nor learned stays in the module.

    Args:
        features: the number of units, N.
        dt: the length of a step, ms; a UserWarning above 2 tau_m, where forward Euler diverges.
        tau_m, thr: as in `slif.init_params`.
        resist_m: as in `slif.init_params`; None, the default, means tau_m / dt, also while tau_m is learned, so that a
            current j moves v by j in a step, as the usual weight initialisers expect.
        refract_time, thr_gain, thr_leak, rho_b, resist_inh: as in `slif.init_params`.
        reset, sticky_spikes, thr_persist, thr_jitter, surrogate, dtype: as in `slif.init_params`.
        learn: names of the parameters to train. "tau_m", "resist_m", "rho_b" and "resist_inh" are stored as the
            logarithm of a factor on the given value, so they keep its sign (tau_m stays positive) and stay finite;
            "thr", "thr_gain", "thr_leak" and "inh_weights" as they are. A scalar is one parameter for all units, an
            array [N] one per unit; thr is always [N]. All steps share one set of parameters, the default of `nn.RNN`
            ("params" in its `variable_broadcast`). With a surrogate with respect to the current, only resist_m,
            resist_inh and inh_weights can be trained.
        recurrent: add s @ recurrent_kernel to the inputs, with s the spikes of the previous step.
        recurrent_kernel_init: initialiser of the "recurrent_kernel" [N, N], which is trained.

    Returns:
        From a call with a carry and inputs [..., N]: the new carry and the spikes [..., N]. The carry is a pair of an
            `SLIFState` and the count of steps [...]; the time is count * dt.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a name in `learn` cannot be learned, at all or with this surrogate, or
            the inputs do not match.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); the interface of `flax.linen.RNNCellBase`.

    Example:
        >>> rnn = nn.RNN(SLIFCell(3, dt=1.0, tau_m=20.0, resist_m=1.0, thr=0.4), time_major=True)
        >>> x = jax.numpy.ones((10, 2, 3))
        >>> variables = rnn.init(jax.random.key(0), x)
        >>> rnn.apply(variables, x).shape
        (10, 2, 3)
    """

    def __call__(self, carry: _layers.Carry, inputs: Array) -> tuple[_layers.Carry, Array]:
        """Runs one step on inputs [..., N] and returns the new carry and the spikes [..., N]."""
        return _layers.run_cell(self.slif_params(), self.dt, carry, inputs, self.feedback)

    def initialize_carry(self, rng: Array | None, input_shape: tuple[int, ...]) -> _layers.Carry:
        """The carry of a cell at rest, with the stored thresholds; `rng` is not used."""
        del rng
        if self.scope is not None:
            return _layers.initial_carry(self.slif_params(), input_shape)
        hyper = self._hyper()
        if {"fixed_thr", "learned_thr"} & set(_layers.stored_names(hyper, self.learn)):
            raise ValueError(
                "initialize_carry: the thresholds are stored in the variables, which an unbound cell does not have; "
                "use cell.apply(variables, rng, input_shape, method='initialize_carry') or nn.RNN"
            )
        given = _layers.given_params(self.features, {**hyper, "resist_m": 1.0, "resist_inh": 0.0})
        return _layers.initial_carry(given, input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class SLIF(_Neurons):
    """A layer of sLIF units, run over whole sequences by `slif.simulate`.

        s = simulate(params, initial_state, x, dt=dt)

    It stores, draws and learns its parameters as `SLIFCell` does.

    Args:
        features: the number of units, N.
        dt: the length of a step, ms; a UserWarning above 2 tau_m, where forward Euler diverges.
        tau_m, thr: as in `slif.init_params`.
        resist_m: as in `slif.init_params`; None, the default, means tau_m / dt, also while tau_m is learned, so that a
            current j moves v by j in a step, as the usual weight initialisers expect.
        refract_time, thr_gain, thr_leak, rho_b, resist_inh: as in `slif.init_params`.
        reset, sticky_spikes, thr_persist, thr_jitter, surrogate, dtype: as in `slif.init_params`.
        learn, recurrent, recurrent_kernel_init: as in `SLIFCell`.
        time_major: inputs and outputs are [T, ..., N]; if False, [..., T, N].

    Returns:
        From a call with currents x: the spikes, in the shape of x; see `__call__`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a name in `learn` cannot be learned, at all or with this surrogate, or
            the inputs do not match.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3).

    Example:
        >>> layer = SLIF(3, dt=1.0, tau_m=20.0, resist_m=1.0, thr=0.4, learn=("resist_m",))
        >>> x = jax.numpy.ones((10, 2, 3))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> sorted(variables["params"])
        ['fixed_thr', 'logscale_resist_m']
        >>> layer.apply(variables, x, record=("spike_count",))["spike_count"].shape
        (2, 3)
    """

    _: dataclasses.KW_ONLY
    time_major: bool = True

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
            self.slif_params(),
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
            feedback=self.feedback,
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

    Returns:
        From a call with currents x: v at every step, in the shape of x.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a name in `learn` cannot be learned, or the inputs do not match.

    Source: the subthreshold equation of `slif.step`.

    Example:
        >>> readout = LeakyIntegrator(2, dt=1.0, tau_m=4.0)
        >>> readout.apply({}, jax.numpy.ones((3, 2)))[:, 0]
        Array([1.    , 1.75  , 2.3125], dtype=float32)
    """

    _: dataclasses.KW_ONLY
    time_major: bool = True

    def __post_init__(self):
        super().__post_init__()
        _check.as_names("learn", self.learn, ("tau_m", "resist_m"))

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
            self.slif_params(),
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


def trainable(params: Any) -> Any:
    """Marks which parameters of a model are trained: all but the thresholds and inhibition that layers only store.

        optax.adamw(1e-3, mask=trainable)   exempts those from weight decay

    Args:
        params: the "params" of a model.

    Returns:
        A pytree of bools in the structure of `params`.

    Source: `optax.masked`.

    Example:
        >>> trainable({"Dense_0": {"bias": 0.0}, "SLIF_0": {"fixed_thr": 0.4, "learned_thr_gain": 0.1}})
        {'Dense_0': {'bias': True}, 'SLIF_0': {'fixed_thr': False, 'learned_thr_gain': True}}
    """
    stored_only = ("fixed_thr", "fixed_inh_weights")
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) not in stored_only, params)
