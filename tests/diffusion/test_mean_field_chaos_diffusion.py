"""Mean-field chaos diffusion on a Gaussian cloud in closed form: x^i = c + y^i with a common c ~ N(0, τ²) and own y^i ~ N(0, v)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import Denoiser, DenoiserTerm, ScorePrediction, VPPath, integrate
from ergodax.diffusion import Ancestral, DenoisingLoss, EulerMaruyama, uniform_grid
from ergodax.diffusion.mean_field_chaos_diffusion import Branching, LangevinShift, MeanFieldNetwork, SubdividedLoss, branching_integrate
from ergodax.testing import assert_covariance, assert_mean, convergence_order


TAU2, V, PATH, T = 0.5, 0.3, VPPath(), 0.8
ALPHA2, SIGMA2 = float(PATH.alpha(T) ** 2), float(PATH.sigma(T) ** 2)


def score(tau2=TAU2, limit=False):
    """The joint score at every particle; its limit for many particles has a gain of 1 on their mean."""

    def value(t, x, args):
        alpha2 = PATH.alpha(t) ** 2
        own = alpha2 * V + PATH.sigma(t) ** 2
        gain = jnp.ones_like(own) if limit else len(x) * alpha2 * tau2 / (own + len(x) * alpha2 * tau2)
        return -(x - gain * jnp.mean(x, axis=0)) / own

    return value


def clouds(key, batch, n, tau2=TAU2):
    first, second = jax.random.split(key)
    own = jax.random.normal(second, (batch * n,)).reshape(batch, n, 1)
    return jnp.sqrt(tau2) * jax.random.normal(first, (batch, 1, 1)) + jnp.sqrt(V) * own


def exact_loss(n, tau2=TAU2):
    """1/σ² less the mean square of the score: its covariance is the inverse of the clouds', with N - 1 equal eigenvalues and one for their mean."""
    own = ALPHA2 * V + SIGMA2
    return 1 / SIGMA2 - ((n - 1) / own + 1 / (own + n * ALPHA2 * tau2)) / n


def network():
    return MeanFieldNetwork(lambda t, x, args: jnp.sin(x) + t, lambda t, r, args: jnp.tanh(2 * r) + jnp.cos(t * r), 1.2)


def test_network():
    """Renumbering; the sum over the neighbours by hand; a particle out of reach; every N and batch size."""
    x, order = jax.random.normal(jax.random.key(0), (7, 2)), jax.random.permutation(jax.random.key(1), 7)
    run = jax.jit(lambda x: network()(0.3, x))
    np.testing.assert_allclose(run(x[order]), run(x)[order], atol=1e-14)
    offset = np.asarray(x[:, None] - x)
    near = np.linalg.norm(offset, axis=2) <= 1.2
    assert 7 < near.sum() < 49
    pull = [(np.tanh(2 * r) + np.cos(0.3 * r))[mask].mean(0) for r, mask in zip(offset, near)]
    np.testing.assert_allclose(run(x), np.sin(x) + 0.3 + np.array(pull), atol=1e-12)
    np.testing.assert_allclose(run(jnp.concatenate([x, x[:1] + 100]))[:7], run(x), atol=1e-12)
    chunked = MeanFieldNetwork(network().own, network().interaction, 1.2, 3)
    np.testing.assert_allclose(chunked(0.3, x), run(x), atol=1e-14)


@pytest.mark.parametrize(("n", "expected"), [(16, 1.17745), (64, 1.10055), (1024, 1.07410)])
def test_loss_per_particle(n, expected):
    """The card's numbers, in closed form and as the stock loss finds them (z-scores over 100 batches)."""
    assert abs(exact_loss(n) - expected) < 5e-6
    loss = DenoisingLoss(PATH, ScorePrediction(), times=lambda key, n: jnp.full(n, T))
    batch = 4096 // n

    def value(key):
        key_data, key_loss = jax.random.split(key)
        return loss(score(), clouds(key_data, batch, n), key_loss)[0]

    assert_mean(jax.jit(jax.vmap(value))(jax.random.split(jax.random.key(0), 100))[:, None], expected, z=4)


def test_chaos_propagates():
    """The loss nears its limit as 1/N, the limiting score the joint one as 1/N² (per particle); independent particles know no N."""
    counts = (64, 256, 1024)
    gaps = [exact_loss(n) - (1 / SIGMA2 - 1 / (ALPHA2 * V + SIGMA2)) for n in counts]
    assert abs(convergence_order(counts, gaps) - 1) < 0.05, gaps

    def error(n):
        x = PATH.alpha(T) * clouds(jax.random.key(0), 400, n)
        x = x + PATH.sigma(T) * jax.random.normal(jax.random.key(1), (400 * n,)).reshape(x.shape)
        return jnp.mean(jax.vmap(lambda x: (score()(T, x, None) - score(limit=True)(T, x, None)) ** 2)(x))

    errors = [float(jax.jit(error, static_argnums=0)(n)) for n in counts]
    assert abs(convergence_order(counts, errors) - 2) < 0.1, errors
    np.testing.assert_allclose([exact_loss(n, 0.0) for n in counts], exact_loss(16, 0.0), rtol=1e-12)


def moments(x):
    """(mean, its variance; the variance within the clouds) with standard errors, of clouds (B, N, 1)."""
    means, within = np.mean(x, axis=(1, 2)), np.var(x, axis=(1, 2), ddof=1)
    return (np.var(means), np.var(means) * np.sqrt(2 / len(x))), (within.mean(), within.std() / np.sqrt(len(x)))


DENOISED = Denoiser(score(), PATH, ScorePrediction())


def test_reverse_sde_recovers_the_cloud():
    """N = 16: variance of the clouds' mean τ² + v/N, and within v."""
    grid = uniform_grid(150, 0.0, 0.999)

    def one(key):
        return integrate(DenoiserTerm(DENOISED, PATH, grid), EulerMaruyama(), PATH.prior(key, (16, 1)), key=key)

    x = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 2000)))
    (mean, mean_error), (within, within_error) = moments(x)
    assert abs(mean - TAU2 - V / 16) < 4 * mean_error, (mean, mean_error)
    assert abs(within - V) < 0.02 * V + 4 * within_error, (within, within_error)  # 2 %: the step's bias, 1/150 of the time


def test_langevin_shift_keeps_the_law():
    """The covariance of the moved cloud is that of the cloud; the particles have moved."""
    shift = LangevinShift(DENOISED, PATH, 0.02, 40)

    def one(key):
        key_cloud, key_noise, key_shift = jax.random.split(key, 3)
        x = PATH.alpha(T) * clouds(key_cloud, 1, 4)[0] + PATH.sigma(T) * jax.random.normal(key_noise, (4, 1))
        return x[:, 0], shift(key_shift, T, x)[:, 0]

    before, after = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 5000))
    expected = ALPHA2 * TAU2 * np.ones((4, 4)) + (ALPHA2 * V + SIGMA2) * np.eye(4)
    for x in (before, after):
        assert_mean(x, 0.0)
        assert_covariance(x, expected)
    assert np.corrcoef(before[:, 0], after[:, 0])[0, 1] < 0.9


def test_branching_sampler():
    """One grid is plain sampling; with branchings the count grows, copies part, and independent particles stay so with their variance."""
    grid, key, x0 = uniform_grid(5, 0.0, 0.999), jax.random.key(3), jnp.linspace(-1.0, 1.0, 4)[:, None]

    @jax.jit
    def both(key):
        plain = branching_integrate(DENOISED, PATH, (grid,), Ancestral(), x0, Branching(LangevinShift(DENOISED, PATH)), key)
        return plain, integrate(DenoiserTerm(DENOISED, PATH, grid), Ancestral(), x0, key=jax.random.split(jax.random.fold_in(key, 0))[1])

    np.testing.assert_allclose(*both(key), atol=1e-12)
    copies = Branching(lambda key, t, x, args: x + 1, 3)(key, 0.5, x0)
    np.testing.assert_array_equal(copies, jnp.concatenate([x0, x0, x0 + 1]))

    independent = Denoiser(score(0.0), PATH, ScorePrediction())
    branching, fine = Branching(LangevinShift(independent, PATH, 0.05, 60)), uniform_grid(150, 0.0, 0.999)

    def one(key):
        return branching_integrate(independent, PATH, (fine[:61], fine[60:106], fine[105:]), EulerMaruyama(), PATH.prior(key, (4, 1)), branching, key)

    x = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(4), 500)))
    assert x.shape == (500, 16, 1)
    assert np.diff(np.sort(x[:, :, 0])).min() > 0
    (mean, mean_error), (within, within_error) = moments(x)
    # Langevin's steps of 0.05 widen the moved half by 1/(1 - 0.05/2); what is left of the copies' correlation, exp(-60 · 0.05 · 0.8), widens the mean
    assert abs(mean - V / 16) < 0.15 * V / 16 + 4 * mean_error, (mean, mean_error)
    assert abs(within - V) < 0.03 * V + 4 * within_error, (within, within_error)


def test_subdivided_loss():
    """Equal cardinalities are the plain loss on the same times; each interval sees its own number of particles, times and weight."""
    seen = []

    def counting(t, x, args):
        seen.append(len(x))
        return len(x) * jnp.ones_like(x)

    def zero_noise(key, data, noise, args):
        return 0 * noise

    base = DenoisingLoss(PATH, ScorePrediction(), coupling=zero_noise)
    data = clouds(jax.random.key(0), 3, 12)
    ends, weights = jnp.array([0.1, 0.4, 0.9]), jnp.array([2.0, 0.5])
    value = SubdividedLoss(base, ends, (4, 12), weights)(counting, data, jax.random.key(1))[0]
    assert seen == [4, 12]
    np.testing.assert_allclose(value, 2.0 * 0.3 / 0.8 * 16 + 0.5 * 0.5 / 0.8 * 144, rtol=1e-12)

    def timed(t, x, args):
        return t * jnp.ones_like(x)

    value = SubdividedLoss(DenoisingLoss(PATH, ScorePrediction(), times=lambda key, n: jnp.linspace(0.0, 1.0, n), coupling=zero_noise), ends, (4, 4))
    expected = 0.3 / 0.8 * np.mean(np.array([0.1, 0.25, 0.4]) ** 2) + 0.5 / 0.8 * np.mean(np.array([0.4, 0.65, 0.9]) ** 2)
    np.testing.assert_allclose(value(timed, data, jax.random.key(1))[0], expected, rtol=1e-12)

    def spread(t, x, args):
        return x - jnp.mean(x)

    whole = DenoisingLoss(PATH, ScorePrediction(), times=lambda key, n: jnp.full(n, 0.5), coupling=zero_noise)
    # all particles, in another order
    divided = SubdividedLoss(whole, jnp.array([0.0, 1.0]), (12,))(spread, data, jax.random.key(2))[0]
    np.testing.assert_allclose(divided, whole(spread, data, jax.random.key(2))[0], rtol=1e-12)


def test_bad_arguments():
    base, data = DenoisingLoss(PATH, ScorePrediction()), clouds(jax.random.key(0), 3, 12)
    x0, branching = jnp.zeros((4, 1)), Branching(lambda key, t, x, args: x)
    for make, match in (
        (lambda: SubdividedLoss(base, jnp.array([0.0, 1.0]), (4, 8)), "intervals"),
        (lambda: SubdividedLoss(base, jnp.array([0.0, 1.0]), (16,))(score(), data, jax.random.key(0)), "particles"),
        (lambda: Branching(branching.shift, 1), "factor"),
        (lambda: MeanFieldNetwork(score(), score(), 0.0), "radius"),
        (lambda: branching_integrate(DENOISED, PATH, (uniform_grid(3), uniform_grid(3)), Ancestral(), x0, branching, jax.random.key(0)), "grids"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
