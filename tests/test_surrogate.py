"""The slopes: formula, antiderivative, behaviour at the extremes of the number formats, and no extra compilation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_params
from jax import test_util
from oracle_grad import SLOPES

import slif
from slif._attach import attach
from slif.cell import reset_potential

CONSTRUCTORS = {
    "secant": slif.secant,
    "secant squared": lambda **numbers: slif.secant(**numbers, squared=True),
    "secant scaled": lambda **numbers: slif.secant(**numbers, scaled=True),
    "secant squared scaled": lambda **numbers: slif.secant(**numbers, squared=True, scaled=True),
    "fast_sigmoid": slif.fast_sigmoid,
    "sigmoid": slif.sigmoid,
    "arctan": slif.arctan,
    "triangular": slif.triangular,
    "boxcar": slif.boxcar,
    "gaussian": slif.gaussian,
    "straight_through": slif.straight_through,
}
DEFAULTS = {
    **{name: {"c1": 0.82, "c2": 0.08} for name in SLOPES if name.startswith("secant")},
    "fast_sigmoid": {"slope": 25.0},
    "sigmoid": {"slope": 25.0},
    "arctan": {"alpha": 2.0},
    "triangular": {"width": 1.0},
    "boxcar": {"width": 1.0},
    "gaussian": {"width": 1.0},
    "straight_through": {},
}
# Antiderivatives; that of the secants is 0 up to i = 0.
ANTIDERIVATIVES = {
    "secant": lambda i, c1, c2: 2 / c2 * jnp.arctan(jnp.tanh(c2 * jnp.maximum(i, 0) / 2)),
    "secant squared": lambda i, c1, c2: jnp.tanh(c2 * jnp.maximum(i, 0)) / c2,
    "secant scaled": lambda i, c1, c2: 2 * c1 * jnp.arctan(jnp.tanh(c2 * jnp.maximum(i, 0) / 2)),
    "secant squared scaled": lambda i, c1, c2: jnp.maximum(0, c1 * jnp.tanh(c2 * i)),
    "fast_sigmoid": lambda x, slope: x / (1 + slope * jnp.abs(x)),
    "sigmoid": lambda x, slope: (1 + jnp.tanh(slope * x / 2)) / 2,
    "arctan": lambda x, alpha: jnp.arctan(math.pi * alpha * x / 2) / math.pi,
    "triangular": lambda x, width: jnp.where(
        jnp.abs(x) < width, x - x * jnp.abs(x) / (2 * width), jnp.sign(x) * width / 2
    ),
    "boxcar": lambda x, width: jnp.clip(x, -width, width),
    "gaussian": lambda x, width: jax.scipy.stats.norm.cdf(x, scale=width),
    "straight_through": lambda x: x,
}
every_slope = pytest.mark.parametrize("name", SLOPES)


def other_numbers(name):
    return {number: 0.6 * value for number, value in DEFAULTS[name].items()}


def extremes(dtype):
    info = jnp.finfo(dtype)
    magnitudes = [0.0, float(info.smallest_subnormal), float(info.tiny), float(info.eps), 1.0, 50.0, 1e4]
    magnitudes += [float(info.max) ** 0.5, 1e-3 * float(info.max), float(info.max)]
    return jnp.array([sign * x for x in magnitudes for sign in (-1, 1)], dtype)


@every_slope
def test_defaults_are_the_documented_ones(name):
    assert CONSTRUCTORS[name]().numbers == DEFAULTS[name]
    assert CONSTRUCTORS[name]().wrt == ("current" if name.startswith("secant") else "voltage")
    assert CONSTRUCTORS[name]().detach_reset


@every_slope
@pytest.mark.parametrize("numbers", [DEFAULTS.get, other_numbers], ids=["default", "other"])
def test_slope_is_its_formula(name, numbers):
    # No point on the edge of the rectangle, which float32 and float64 could see on either side.
    x = np.concatenate([np.linspace(-6.03, 6.03, 242), [-30.0, 0.0, 30.0]]).astype(np.float32)
    slope = CONSTRUCTORS[name](**numbers(name))(x)
    np.testing.assert_allclose(slope, SLOPES[name](x.astype(np.float64), **numbers(name)), rtol=2e-5, atol=1e-7)


@every_slope
def test_spike_with_the_antiderivative_as_primal_checks_numerically(name):
    surrogate = CONSTRUCTORS[name](**other_numbers(name))

    @jax.custom_jvp
    def smooth(x):
        return ANTIDERIVATIVES[name](x, **other_numbers(name))

    smooth.defjvps(lambda dx, _, x: surrogate(x) * dx)
    # None of these is within reach of a kink: 0, and 0.6 for the triangle and the rectangle.
    x = jnp.array([-3.0, -0.9, -0.4, -0.13, -0.031, 0.027, 0.11, 0.43, 0.8, 4.0])
    test_util.check_grads(smooth, (x,), order=1, modes=("fwd", "rev"), atol=2e-3, rtol=2e-3, eps=3e-3)


@every_slope
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_derivatives_are_finite_at_the_extremes(name, dtype):
    x = extremes(dtype)

    @jax.jit
    def evaluate(surrogate, x):
        value, pull = jax.vjp(lambda surrogate, x: surrogate(x), surrogate, x)
        return value, pull(jnp.ones_like(value))

    value, derivatives = evaluate(CONSTRUCTORS[name](), x)
    assert value.dtype == dtype
    for leaf in jax.tree.leaves((value, derivatives)):
        assert jnp.isfinite(leaf).all()
    assert (value >= 0).all()


@every_slope
def test_spike_is_finite_where_the_distance_to_the_threshold_overflows(name):
    u = extremes(jnp.float32)

    @jax.jit
    def evaluate(surrogate, u, thr):
        def spike(u, thr):
            return attach((u > thr).astype(u.dtype), u - thr, surrogate(u - thr))

        z, pull = jax.vjp(spike, u, thr)
        return z, pull(jnp.ones_like(z))

    z, gradients = evaluate(CONSTRUCTORS[name](), u, -u)
    np.testing.assert_array_equal(z, u > -u)
    for gradient in gradients:
        assert jnp.isfinite(gradient).all()


def test_a_value_differentiates_by_what_is_attached_to_it_alone():
    value, x, slope = jnp.array([1.0, 0.0, 1.0]), jnp.array([-1.0, 2.0, 30.0]), jnp.array([0.5, 0.25, 2.0])
    out, pull = jax.vjp(attach, value, x, slope)
    of_value, of_x, of_slope = pull(jnp.ones_like(out))
    np.testing.assert_array_equal(out, value)
    np.testing.assert_array_equal(of_x, slope)
    np.testing.assert_array_equal(of_value, 0)
    np.testing.assert_array_equal(of_slope, 0)


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 1, None), (None, None, 0), (0, 1, 0), (1, None, 0)])
def test_what_is_attached_under_vmap(mapped):
    """All examples may share a value but not its derivative."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(3,) if n is None else (4, 3) if n == 0 else (3, 4)).astype(np.float32) for n in mapped]
    grad = jax.grad(lambda x, value, slope: (attach(value, x, slope) ** 2).sum())
    of_one = [a if n is None else np.moveaxis(a, n, 0) for a, n in zip(arrays, mapped, strict=True)]
    value, _, slope = np.broadcast_arrays(*of_one)
    arguments = (arrays[1], arrays[0], arrays[2]), (mapped[1], mapped[0], mapped[2])
    by_map = jax.vmap(grad, arguments[1])(*arguments[0])
    np.testing.assert_allclose(by_map, np.broadcast_to(2 * value * slope, (4, 3)), rtol=1e-6)


@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_reset_through_the_spike_keeps_infinity_out_of_the_value(reset):
    """v' is differentiated as (1 - z) u, or u - z thr, but computed by a select."""
    params = make_params(reset=reset, surrogate=slif.arctan(detach_reset=False))
    u = jnp.array([jnp.inf, 0.5, 0.25, 0.25])
    thr, z = jnp.array([0.25, 0.25, 0.5, jnp.inf]), jnp.array([1.0, 1.0, 0.0, 0.0])

    def run(u, thr, z):
        return reset_potential(params, u, thr, z).sum()

    value = reset_potential(params, u, thr, z)
    np.testing.assert_array_equal(value, [0, 0, 0.25, 0.25] if reset == "zero" else [jnp.inf, 0.25, 0.25, 0.25])
    u_bar, thr_bar, z_bar = jax.grad(run, (0, 1, 2))(u[1:], thr[1:], z[1:])
    np.testing.assert_array_equal(u_bar, [0, 1, 1] if reset == "zero" else 1)
    np.testing.assert_array_equal(thr_bar, 0 if reset == "zero" else -z[1:])
    np.testing.assert_array_equal(z_bar, -u[1:] if reset == "zero" else [-0.25, -0.5, 0])


def rectifier(x):
    return jnp.maximum(x, 0)


MAKERS = {
    **{name: lambda number, name=name: CONSTRUCTORS[name](**dict.fromkeys(DEFAULTS[name], number)) for name in SLOPES},
    "custom": lambda number: slif.custom(rectifier),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_equal_surrogate_or_another_number_does_not_trace_again(name):
    traces = []

    @jax.jit
    def evaluate(surrogate, x):
        traces.append(name)
        return surrogate(x)

    x = jnp.array([0.5])
    evaluate(MAKERS[name](2.0), x)
    evaluate(MAKERS[name](2.0), x)
    annealed = evaluate(MAKERS[name](3.0), x)
    assert len(traces) == 1
    np.testing.assert_array_equal(annealed, MAKERS[name](3.0)(x))


@pytest.mark.parametrize("name", ["secant", "arctan"])
def test_annealing_does_not_compile_simulate_again(name, compilations):
    params = slif.init_params(jax.random.key(0), 2, tau_m=10.0, resist_m=1.0, thr=0.4, surrogate=MAKERS[name](2.0))
    state, currents = slif.init_state(params), jnp.ones((3, 2))
    slif.simulate(params, state, currents, dt=1.0)
    compilations()
    for number in (2.0, 3, np.float64(4.0), np.float32(5.0)):
        slif.simulate(params.replace(surrogate=MAKERS[name](number)), state, currents, dt=1.0)
    assert compilations() == 0


def test_a_number_of_a_slope_can_be_swept():
    x = jnp.linspace(-1, 1, 5)
    swept = jax.vmap(lambda alpha: slif.arctan(alpha)(x))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(swept, [slif.arctan(1.0)(x), slif.arctan(2.0)(x)], rtol=1e-6)


def test_custom_slopes_are_held_to_shape_dtype_and_arguments():
    x = jnp.ones((2, 3), jnp.bfloat16)
    for fn in (lambda x: 1.0, lambda x: jnp.ones(x.shape, jnp.float32), lambda x: x > 0):
        assert (slif.custom(fn)(x).shape, slif.custom(fn)(x).dtype) == (x.shape, x.dtype)
    with pytest.raises(ValueError, match=r"^fn: expected a slope for every element of x, \(2, 3\), got shape \(2, 1\)"):
        slif.custom(lambda x: x[:, :1])(x)
    with pytest.raises(TypeError, match=r"^fn: expected a function of x, b, got .*'a'"):
        slif.custom(lambda x, a: a * x, b=1.0)
