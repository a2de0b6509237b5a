"""Time predictor: its loss against exact posteriors, and training that reaches them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import EDMPath, VPPath
from ergodax.data import GaussianMixture
from ergodax.diffusion.time_predictor import TimePredictor, TimePredictorLoss
from ergodax.testing import assert_mean


MIXTURE = GaussianMixture.isotropic(jnp.ones(2), jnp.array([[1.0, 0.0], [-1.0, 0.5]]), 0.3)
PATH, TIMES = VPPath(), jnp.linspace(0.3, 0.95, 6)
LOSS = TimePredictorLoss(PATH, TIMES)


def bayes(x):
    return jax.vmap(lambda t: MIXTURE.log_prob_at(PATH, t, x))(TIMES)


def test_loss_is_the_cross_entropy():
    """On Bayes' classifier the mean conditional entropy, by an own sum over draws at every time; on a constant one log K."""
    data = MIXTURE.sample(jax.random.key(0), 4000)
    loss, aux = LOSS(bayes, data, jax.random.key(1))
    assert aux["accuracy"].shape == ()
    rng, values = np.random.default_rng(0), []
    for k, t in enumerate(TIMES):
        x = PATH.alpha(t) * data + PATH.sigma(t) * jnp.asarray(rng.normal(size=data.shape))
        values.append(-jax.nn.log_softmax(jax.vmap(bayes)(x), axis=1)[:, k])
    values = np.concatenate(values)
    assert abs(float(loss) - values.mean()) < 4.5 * values.std() * np.sqrt(1 / 4000 + 1 / len(values))
    np.testing.assert_allclose(LOSS(lambda x: jnp.zeros(6), data, jax.random.key(1))[0], np.log(6), rtol=1e-12)


def test_posterior_is_the_minimiser():
    """At Bayes' logits the gradient is 0 in every direction of a table over k and of one linear in x."""

    def value(shift, slope, data, key):
        return LOSS(lambda x: bayes(x) + shift + slope @ x, data[None], key)[0]

    data, keys = MIXTURE.sample(jax.random.key(0), 4000), jax.random.split(jax.random.key(1), 4000)
    gradients = jax.jit(jax.vmap(jax.grad(value, argnums=(0, 1)), in_axes=(None, None, 0, 0)))(jnp.zeros(6), jnp.zeros((6, 2)), data, keys)
    for gradient in gradients:
        assert_mean(gradient, 0.0)


def test_training_approaches_bayes():
    """400 Adam steps close three quarters of the gap between a fresh network and Bayes' cross-entropy."""
    with jax.numpy_dtype_promotion("standard"):
        model = TimePredictor((2,), 6, 32, key=jax.random.key(2))
        optimiser = optax.adam(1e-2)

        @eqx.filter_jit
        def train(model, key):
            params, static = eqx.partition(model, eqx.is_array)

            def step(carry, key):
                params, state = carry
                data_key, loss_key = jax.random.split(key)
                data = MIXTURE.sample(data_key, 256)
                gradient = jax.grad(lambda p: LOSS(eqx.combine(p, static), data, loss_key)[0])(params)
                updates, state = optimiser.update(gradient, state)
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(key, 400))
            return eqx.combine(params, static)

        trained = train(model, jax.random.key(3))
    data = MIXTURE.sample(jax.random.key(4), 8000)
    loss = eqx.filter_jit(lambda m: LOSS(m, data, jax.random.key(5))[0])
    before, after, best = (float(loss(m)) for m in (model, trained, bayes))
    assert after - best < (before - best) / 4, (before, after, best)


def test_shapes_and_dtype():
    model = TimePredictor((3, 2), 5, 8, key=jax.random.key(0))
    assert model(jnp.zeros((3, 2), jnp.float32)).dtype == jnp.float32
    assert jax.vmap(model)(jnp.zeros((4, 3, 2))).shape == (4, 5)
    assert bool(jnp.isfinite(model(1e6 * jnp.ones((3, 2)))).all())
    # Any path and any order of times.
    loss = TimePredictorLoss(EDMPath(20.0), jnp.array([0.9, 0.0, 0.5, 0.3, 0.1]))
    assert bool(jnp.isfinite(loss(model, jnp.ones((7, 3, 2)), jax.random.key(1))[0]))


def test_parameters_are_checked():
    for make, message in (
        (lambda: TimePredictor((2,), 0, key=jax.random.key(0)), "`num_times` must be an integer of at least 1"),
        (lambda: TimePredictor((2,), 3, key=jax.random.key(0))(jnp.zeros(3)), r"one example of shape \(2,\), got \(3,\)"),
        (lambda: TimePredictorLoss(PATH, jnp.ones(1)), "`times` must be a vector of at least two"),
        (lambda: LOSS(bayes, jnp.ones(3), jax.random.key(0)), r"shape \(batch, \*example\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
