"""Cold diffusion: exactness on first-order degradations, DDIM as its case with noise, the heat kernel, the loss, and the digits of the card."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from ergodax.core import DenoiserTerm, FlowMatchingPath, VPPath, integrate, uniform_times
from ergodax.data import GaussianMixture, digits
from ergodax.diffusion import DDIM, uniform_grid
from ergodax.diffusion.cold_diffusion import (
    DeterministicDegradation,
    GaussianBlur,
    NaiveRestoration,
    PathDegradation,
    Restoration,
    RestorationLoss,
    constant_image_prior,
)
from ergodax.testing import assert_covariance, assert_mean, convergence_order


MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3]))


def wrong(t, x, args):
    """A restorer that knows nothing."""
    return jnp.sin(3 * x) + t


def test_first_order_degradation_is_undone_by_any_restorer():
    e, x1 = jnp.array([0.7, -2.0]), jnp.array([0.3, 1.1])
    term = Restoration(wrong, DeterministicDegradation(lambda t, x: x + (1 - t) * e))
    improved, naive = (integrate(term, solver, x1 + e, times=uniform_grid(9)) for solver in (dfx.Euler(), NaiveRestoration()))
    np.testing.assert_allclose(improved, x1, atol=1e-12)
    assert jnp.abs(naive - x1).max() > 0.3


def test_one_step_of_each():
    """Both algorithms, written out for a degradation that is nonlinear in t."""
    term = Restoration(wrong, DeterministicDegradation(lambda t, x: x * t**2 + jnp.cos(x) * (1 - t)))
    x, times = jnp.array([0.4, -0.8]), jnp.array([0.3, 0.5])
    guess = wrong(0.3, x, None)
    at = [guess * t**2 + jnp.cos(guess) * (1 - t) for t in (0.3, 0.5)]
    np.testing.assert_allclose(integrate(term, dfx.Euler(), x, times=times), x - at[0] + at[1], atol=1e-15)
    np.testing.assert_allclose(integrate(term, NaiveRestoration(), x, times=times), at[1], atol=1e-15)


def test_with_noise_it_is_ddim():
    """Step by step, for both samplers; by both drivers."""
    path, grid, y0 = VPPath(), uniform_grid(8), jax.random.normal(jax.random.key(1), (16, 2))
    ddim = integrate(DenoiserTerm(MIXTURE.denoiser(path), path, grid), DDIM(), y0, save=lambda t, x: x)[1]
    term = Restoration(MIXTURE.denoiser(path), PathDegradation(path))
    for solver in (dfx.Euler(), NaiveRestoration()):
        np.testing.assert_allclose(integrate(term, solver, y0, times=grid, save=lambda t, x: x)[1], ddim, atol=1e-11)
    solution = dfx.diffeqsolve(term, NaiveRestoration(), 0.0, 1.0, None, y0, stepsize_controller=dfx.StepTo(grid))
    np.testing.assert_allclose(solution.ys[0], ddim[-1], atol=1e-11)


def test_higher_order_solvers_run_on_the_term():
    """Heun's method keeps order 2 on the flow with the exact denoiser, where cold sampling has order 1."""
    path, y0, counts = VPPath(), jax.random.normal(jax.random.key(0), (32, 2)), (32, 64, 128)
    term = Restoration(MIXTURE.denoiser(path), PathDegradation(path))
    solve = jax.jit(lambda solver, n: integrate(term, solver, y0, times=uniform_grid(n, 0.1, 0.9)), static_argnums=(0, 1))
    exact = solve(dfx.Heun(), 1024)
    for solver, order in ((dfx.Euler(), 1), (dfx.Heun(), 2)):
        errors = [float(jnp.sqrt(jnp.mean((solve(solver, n) - exact) ** 2))) for n in counts]
        assert abs(convergence_order(counts, errors) - order) < 0.15, errors


def test_blur():
    """Against scipy's discrete kernel; a semigroup in std²; full blur leaves the mean; nothing at t = 1."""
    image, blur = jax.random.normal(jax.random.key(0), (2, 16, 12, 3)), GaussianBlur(3.0)
    expected = scipy.ndimage.gaussian_filter(np.asarray(image), 2.0, mode="wrap", axes=(1, 2), truncate=8)
    # a sampled kernel differs by what is left at the highest frequency, exp(-π² 2²/2) = 3e-9
    np.testing.assert_allclose(GaussianBlur(4.0)(0.5, image, image), expected, atol=1e-7)
    twice = GaussianBlur(2.4)(0.0, GaussianBlur(1.8)(0.0, image, image), image)
    np.testing.assert_allclose(twice, blur(0.0, image, image), atol=1e-12)
    np.testing.assert_allclose(blur(1.0, image, image), image, atol=1e-12)
    np.testing.assert_allclose(GaussianBlur(3.0, 2.0)(0.5, image, image), GaussianBlur(0.75)(0.0, image, image), atol=1e-12)
    mean = jnp.mean(image, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(GaussianBlur(16.0)(0.0, image, image), jnp.broadcast_to(mean, image.shape), atol=1e-8)  # exp(-2π²)


def test_loss():
    """E|m - α x - σ z + x| of a restorer that returns its input plus m: a folded normal, for one x and t."""
    path, t, shift, x = FlowMatchingPath(), 0.6, 0.3, 0.5
    loss = RestorationLoss(PathDegradation(path), times=lambda key, n: jnp.full(n, t))
    value = jax.jit(lambda key: loss(lambda t, x, args: x + shift, jnp.full((64, 4), x), key)[0])
    mean, std = shift + (t - 1) * x, 1 - t
    expected = std * np.sqrt(2 / np.pi) * np.exp(-(mean**2) / (2 * std**2)) + mean * (1 - 2 * scipy.stats.norm.cdf(-mean / std))
    assert_mean(jax.vmap(value)(jax.random.split(jax.random.key(0), 200))[:, None], expected, z=4)
    paired = RestorationLoss(GaussianBlur(2.0), uniform_times)
    images, labels = jnp.ones((3, 4, 4, 1)), jnp.arange(3.0)
    np.testing.assert_allclose(paired(lambda t, x, c: x + c, (images, labels), jax.random.key(0))[0], 1.0, atol=1e-12)


@pytest.fixture(scope="module")
def ridge():
    """The card's restorer: one ridge regression per severity, 8 of them, trained on 1442 digits; (solve, test images, blurred test images)."""
    data, severities = digits(), 8
    train, test = (np.asarray(images, float) / 2 + 0.5 for images in (data.train_x, data.test_x))
    blur = GaussianBlur(2.5)
    weights = []
    for s in range(severities + 1):
        blurred = np.asarray(blur(1 - s / severities, train, train)).reshape(len(train), -1)
        blurred = np.hstack([blurred, np.ones((len(train), 1))])
        weights.append(np.linalg.solve(blurred.T @ blurred + np.eye(65), blurred.T @ train.reshape(len(train), -1)))
    weights = jnp.asarray(np.array(weights))

    def restore(t, x, args):
        rows = x.reshape(len(x), -1)
        weight = weights[jnp.round((1 - t) * severities).astype(int)]
        return (rows @ weight[:-1] + weight[-1]).reshape(x.shape)

    return Restoration(restore, blur), test, uniform_grid(severities)


def test_improved_sampling_beats_direct_beats_naive(ridge):
    term, test, grid = ridge
    start = term.degradation(0.0, test, test)
    results = {
        "improved": integrate(term, dfx.Euler(), start, times=grid),
        "direct": term.restorer(jnp.asarray(0.0), start, None),
        "naive": integrate(term, NaiveRestoration(), start, times=grid),
    }
    psnr = {name: -10 * np.log10(np.mean((np.asarray(x) - test) ** 2, axis=(1, 2, 3))) for name, x in results.items()}
    for better, worse in (("improved", "direct"), ("direct", "naive")):
        gain = psnr[better] - psnr[worse]
        assert gain.mean() > 4 * gain.std() / np.sqrt(len(gain)), (better, gain.mean())


def test_prior():
    colours = GaussianMixture([1.0], [[0.5, -0.2]], [[[0.3, 0.1], [0.1, 0.2]]])
    x = jax.jit(lambda key: constant_image_prior(key, colours, (1000, 2, 3, 2), 0.1))(jax.random.key(0))
    assert_mean(x[:, 0, 0], jnp.array([0.5, -0.2]))
    assert_covariance(x[:, 0, 0], jnp.array([[0.31, 0.1], [0.1, 0.21]]))
    assert_covariance(jnp.stack([x[:, 0, 0, 0], x[:, 1, 2, 0]], 1), jnp.array([[0.31, 0.3], [0.3, 0.31]]))
    for shape, match in (((4, 2, 2), "shape"), ((4, 3, 3, 3), "colours")):
        with pytest.raises(ValueError, match=match):
            constant_image_prior(jax.random.key(0), colours, shape)


def test_dtype_and_bad_arguments():
    x = jnp.ones((4, 4, 1), jnp.float32)
    y = integrate(Restoration(lambda t, x, args: x * t, GaussianBlur(2.0)), dfx.Euler(), x, times=uniform_grid(3).astype(jnp.float32))
    assert y.dtype == jnp.float32
    with pytest.raises(ValueError, match="max_std"):
        GaussianBlur(-1.0)
