"""Two modes at ±2 e₁ of variance 0.1, an encoder N(±b e₁, diag s²) by the mode, and that family's exact velocity: trained, both meet."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

from ergodax.core import fit, integrate, standard_normal_log_prob
from ergodax.testing import assert_mean
from ergodax.transport import LinearInterpolant, VelocityLoss, ZeroGamma
from ergodax.transport.min_curvature_ode import EncodedFlow, EncoderCoupling, MinCurvatureLoss, gaussian_kl
from ergodax.transport.straightness import path_cost


E1, VARIANCE = jnp.array([1.0, 0.0]), 0.1


class Velocity(eqx.Module):
    """E[x₁ - x₀ | x_t]: a posterior of the mode, and a Gaussian one within."""

    shift: jax.Array
    log_std: jax.Array

    def __call__(self, t, x, args=None):
        variance = (1 - t) ** 2 * jnp.exp(2 * self.log_std) + VARIANCE * t**2
        centre = (1 - t) * self.shift + 2 * t
        mode = jnp.tanh(x[0] * centre / variance[0])
        slope = (VARIANCE * t - (1 - t) * jnp.exp(2 * self.log_std)) / variance
        return E1 * mode * (2 - self.shift) + slope * (x - E1 * mode * centre)


class Encoder(eqx.Module):
    shift: jax.Array
    log_std: jax.Array

    def __call__(self, x, args):
        return jnp.sign(x[0]) * self.shift * E1, self.log_std


def flow(shift, std):
    return EncodedFlow(Velocity(shift, jnp.log(std)), Encoder(shift, jnp.log(std)))


def draw(key, n):
    """Half of the rows mirror the other half, so that modes and noises are balanced."""
    x1 = 2 * E1 + VARIANCE**0.5 * jax.random.normal(key, (n // 2, 2))
    return jnp.concatenate([x1, -x1])


@pytest.fixture(scope="module")
def trained():
    """By β: the averaged model, mean curvature from N(0, I), and exact W₂ to the data after 2 and 50 Euler steps."""

    def train(beta):
        start = flow(jnp.array(0.1), jnp.ones(2))
        optimiser, data = optax.adam(5e-2), lambda key, step: draw(key, 128)
        model = fit(MinCurvatureLoss(beta), start, optimiser, data, jax.random.key(0), num_steps=250, every=250, ema_decay=0.97).average
        euler = lambda x, steps: integrate(dfx.ODETerm(model), dfx.Euler(), x, times=jnp.linspace(0.0, 1.0, steps + 1))  # noqa: E731
        evaluate = lambda x: (path_cost(model, x, times=jnp.linspace(0.0, 1.0, 51)).curvature, euler(x, 2), euler(x, 50))  # noqa: E731
        return model, *jax.vmap(evaluate)(NOISE)

    with jax.numpy_dtype_promotion("standard"):
        models, curvature, two, fifty = jax.jit(jax.vmap(train))(BETAS)
    data = draw(jax.random.key(6), len(NOISE))

    def w2(x):
        cost = np.sum((np.asarray(x)[:, None] - np.asarray(data)) ** 2, -1)
        return np.sqrt(cost[linear_sum_assignment(cost)].mean())

    return models, curvature.mean(1), np.array([w2(x) for x in two]), np.array([w2(x) for x in fifty])


BETAS = jnp.array([1.0, 3.0, 10.0, 1e4])
NOISE = jnp.concatenate([jax.random.normal(jax.random.key(5), (200, 2)), -jax.random.normal(jax.random.key(5), (200, 2))])


def test_velocity_and_encoder_meet(trained):
    """The velocity trained with an encoder is that of its own coupling; β → ∞ is independent flow matching."""
    model = trained[0]
    np.testing.assert_allclose(model.velocity.shift, model.encoder.shift, atol=0.06)
    np.testing.assert_allclose(model.velocity.log_std, model.encoder.log_std, atol=0.06)
    np.testing.assert_allclose(model.encoder.shift[-1], 0, atol=0.01)
    np.testing.assert_allclose(model.encoder.log_std[-1], 0, atol=0.01)
    assert np.all(np.diff(model.encoder.shift) < -0.1)


def test_straighter_than_the_independent_coupling(trained):
    """At β = 3: at least 30 % less curvature and 2-step W₂ than at β → ∞; the mismatch of the prior grows as β falls."""
    _, curvature, two, fifty = trained
    assert curvature[1] < 0.7 * curvature[3]
    assert two[1] < 0.7 * two[3]
    assert curvature[1] < curvature[2] < curvature[3]
    assert fifty[0] > fifty[1] > fifty[2]


def test_residual_and_curvature_make_up_the_gain():
    """E‖x₁ - x₀‖² - E‖X₁ - x₀‖² = residual + curvature, the residual being the loss's first term times d: for the exact velocity of any coupling."""
    model = flow(jnp.array(0.7), jnp.array([0.6, 0.9]))

    @jax.jit
    @jax.vmap
    def gap(key):
        key_data, key_loss, key_coupling = jax.random.split(key, 3)
        x1 = draw(key_data, 256)
        x0 = EncoderCoupling(model.encoder)(key_coupling, x1, x1, None)
        costs = jax.vmap(lambda x: path_cost(model, x, times=jnp.linspace(0.0, 1.0, 41)))(x0)
        residual = 2 * MinCurvatureLoss()(model, x1, key_loss)[1]["flow"]
        gain = jnp.sum((x1 - x0) ** 2) - jnp.sum((costs.end - x0) ** 2)
        return gain / 256 - residual - jnp.mean(costs.curvature)

    # 64 × 256 pairs leave a standard error of about 0.01 of a gain of 2, more than the solver's (1/40)²
    assert_mean(gap(jax.random.split(jax.random.key(0), 64)), 0.0)


def test_loss_by_hand():
    """Both terms as written, per entry; the coupling draws from the encoder; with it `VelocityLoss` has the same minimiser."""
    x1, key = draw(jax.random.key(0), 8), jax.random.key(1)
    model, std = flow(jnp.array(0.7), jnp.array([0.6, 0.9])), jnp.array([2.0, 1.0])
    value, aux = MinCurvatureLoss(3.0, std, times=lambda key, n: jnp.linspace(0.1, 0.9, n))(model, x1, key)
    noise = jax.random.normal(jax.random.split(key)[1], x1.shape)
    x0 = jnp.sign(x1[:, :1]) * 0.7 * E1 + jnp.array([0.6, 0.9]) * noise
    t = jnp.linspace(0.1, 0.9, 8)
    predicted = jax.vmap(model)(t, (1 - t[:, None]) * x0 + t[:, None] * x1)
    np.testing.assert_allclose(aux["flow"], jnp.mean((x1 - x0 - predicted) ** 2), rtol=1e-12)
    kl = np.log(std / jnp.array([0.6, 0.9])) + (jnp.array([0.36, 0.81]) + 0.49 * E1) / (2 * std**2) - 0.5
    np.testing.assert_allclose(aux["kl"], jnp.mean(kl), rtol=1e-12)
    np.testing.assert_allclose(value, aux["flow"] + 3 * aux["kl"], rtol=1e-12)

    draws = jax.vmap(lambda key: EncoderCoupling(model.encoder)(key, x1, x1, None))(jax.random.split(key, 2000))
    assert_mean(draws, jnp.sign(x1[:, :1]) * 0.7 * E1)
    assert_mean((draws - jnp.sign(x1[:, :1]) * 0.7 * E1) ** 2, jnp.broadcast_to(jnp.array([0.36, 0.81]), x1.shape))
    loss = VelocityLoss(LinearInterpolant(ZeroGamma()), coupling=EncoderCoupling(model.encoder), antithetic=False)
    assert bool(jnp.isfinite(loss(model, (x1, x1), key)[0]))


def test_gaussian_kl_is_a_mean_of_log_ratios():
    mean, log_std, prior = jnp.array([0.4]), jnp.array([-0.5]), 1.7
    x = mean + jnp.exp(log_std) * jax.random.normal(jax.random.key(0), (4000, 1))
    log_q = jax.vmap(lambda x: standard_normal_log_prob(x - mean, jnp.exp(log_std[0])))(x)
    assert_mean(log_q - jax.vmap(lambda x: standard_normal_log_prob(x, prior))(x), gaussian_kl(mean, log_std, prior)[0])
    assert gaussian_kl(jnp.zeros(1), jnp.zeros(1))[0] == 0


def test_float32_stays_and_bad_values_are_refused():
    x1 = draw(jax.random.key(0), 4).astype(jnp.float32)
    model = EncodedFlow(lambda t, x, args: t * x, lambda x, args: (x / 2, -x))
    value, aux = jax.eval_shape(lambda beta, key: MinCurvatureLoss(beta, 2.0)(model, x1, key), jnp.array(3.0), jax.random.key(0))
    assert value.dtype == aux["kl"].dtype == jnp.float32
    with pytest.raises(ValueError, match="`beta` must lie in"):
        MinCurvatureLoss(-1.0)
    with pytest.raises(ValueError, match="`prior_std` must lie in"):
        MinCurvatureLoss(prior_std=jnp.array([1.0, 0.0]))
