"""The likelihood bounds of linear diffusions: their gap in closed cases, their agreement with each other, and gradients to the process."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from ergodax.core import VPPath
from ergodax.data import GaussianMixture
from ergodax.diffusion import (
    PSLD,
    CompleteRecipe,
    DenoisingBound,
    ImplicitBound,
    LikelihoodLoss,
    LinearBeta,
    LinearMixtureScore,
    NoiseScore,
    alda,
    denoising_integrand,
    implicit_integrand,
    malda,
    random_recipe,
)
from ergodax.diffusion.multivariate_diffusion_models import entropy, prior_term
from ergodax.testing import z_scores


DATA = GaussianMixture.isotropic(jnp.ones(1), jnp.array([[0.6]]), 0.5)
X = jnp.array([1.1])
LOG_PROB = float(scipy.stats.norm(0.6, 0.5).logpdf(1.1))
NODES, WEIGHTS = (jnp.asarray(a) for a in np.polynomial.hermite_e.hermegauss(3))
# exact for the quadratics that a linear score makes
GRID = jnp.stack([a.ravel() for a in jnp.meshgrid(NODES, NODES)])[:, :, None].swapaxes(0, 1)
GRID_WEIGHTS = jnp.outer(WEIGHTS, WEIGHTS).ravel() / (2 * jnp.pi)


def langevin(horizon, friction=2.0, initial=0.04):
    """Q = [[0, -1], [1, 0]], D = diag(0, friction), β = 1 over [0, T]."""
    root = jnp.diag(jnp.array([0.0, jnp.sqrt(friction)]))
    return CompleteRecipe(root, jnp.array([[0.0, -1.0], [0.0, 0.0]]), jnp.ones(2), jnp.array([initial]), LinearBeta(horizon, horizon))


@eqx.filter_jit
def integrands(model, t, x, noise):
    z = model.process.perturb(t, x, noise)
    return implicit_integrand(model, t, z), denoising_integrand(model, t, x, noise)


@eqx.filter_jit
def gap(horizon):
    """log p(x) less the implicit bound with the exact score, all expectations by quadrature."""
    model = LinearMixtureScore(DATA, langevin(horizon))
    nodes, w = (jnp.asarray(a) for a in np.polynomial.legendre.leggauss(60))
    v = (1 + nodes) / 2
    mean = jax.vmap(lambda u: jnp.dot(GRID_WEIGHTS, jax.vmap(lambda e: integrands(model, 1 - u, X, e)[0])(GRID)))(v**3)
    return LOG_PROB - (prior_term(model.process, X) + jnp.dot(w / 2 * 3 * v**2, mean) + entropy(model.process.initial_covariance[1:, 1:], X))


def test_bound_tends_to_the_likelihood():
    """The gap is that of the end alone, KL(p_T || π) of the posterior: the card's four numbers."""
    gaps = [float(gap(jnp.asarray(horizon))) for horizon in (1.0, 2.0, 4.0, 8.0)]
    np.testing.assert_allclose(gaps, [0.4955, 0.1358, 0.00669, 7.8e-6], rtol=5e-3)


def test_both_forms_agree_in_the_mean():
    """At every t > 0, for a score that is NOT the exact one."""
    process = langevin(2.0)

    class Wrong(eqx.Module):
        process: CompleteRecipe

        def __call__(self, t, z, args=None):
            return -z @ jnp.array([[1.3]]) + 0.4 * z[::-1] - 0.2

    for t in (0.2, 0.9):
        implicit, denoising = jax.vmap(lambda e, t=t: integrands(Wrong(process), t, X, e))(GRID)
        np.testing.assert_allclose(jnp.dot(GRID_WEIGHTS, implicit), jnp.dot(GRID_WEIGHTS, denoising), rtol=1e-10)


@pytest.mark.parametrize("bound", [ImplicitBound(), DenoisingBound(1e-2)], ids=("implicit", "denoising"))
def test_estimates_are_unbiased(bound):
    """With the exact score the means are log p(x) less the gap at T = 2 (the second form's decoder costs less than 1e-3)."""
    n, model = 8000, LinearMixtureScore(DATA, langevin(2.0))
    estimate = jax.jit(jax.vmap(lambda r, key: bound(model, r, X, key)))
    # stratified times: the standard error of independent ones is an upper bound
    r = (jnp.arange(n, dtype=float) + 0.5) / n
    values = np.asarray(estimate(r, jax.random.split(jax.random.key(0), n)))
    assert abs(float(z_scores(values[:, None], LOG_PROB - 0.1358)[0])) < 4
    assert values.std() / np.sqrt(n) < 0.15


def test_instances():
    """One variable with D = ½ is VP, two with Q = [[0, -1], [1, 0]], D = diag(0, γ) are CLD; A + Aᵀ + 2D = 0 for all of them."""
    path = VPPath()
    vp = CompleteRecipe(jnp.full((1, 1), jnp.sqrt(0.5)), jnp.zeros((1, 1)), jnp.ones(1), jnp.zeros(0))
    phi, sigma = vp.moments(0.4)
    np.testing.assert_allclose([phi[0], sigma[0, 0]], [path.alpha(0.4), path.sigma(0.4) ** 2], rtol=1e-12)
    # CLD in its own units: mass 1, β_c = 1, Γ_c = γ
    cld = PSLD(0.0, 2.0, 1.0, initial_scale=0.04, beta=LinearBeta(2.0, 2.0))
    for name in ("drift_matrix", "diffusion_matrix"):
        np.testing.assert_allclose(getattr(langevin(1.0), name), 2 * getattr(cld, name), atol=1e-14)
    for process in (alda(1.5, 0.7), malda(), *(random_recipe(jax.random.key(i), i) for i in (1, 2, 4))):
        a = process.drift_matrix
        np.testing.assert_allclose(a + a.T + process.diffusion_matrix, 0 * a, atol=1e-12)
        assert float(jnp.linalg.eigvalsh(process.diffusion_matrix)[0]) > -1e-12
    np.testing.assert_allclose(alda(1.5, 0.7).drift_matrix, [[0, 1, 0], [-1, 0, 0.7], [0, -0.7, -1.5]], atol=1e-14)
    np.testing.assert_allclose(malda().drift_matrix, [[0, 1, 1], [-1, -2, 1], [-1, -1, -2]], atol=1e-14)


@pytest.mark.parametrize("process", [alda(), malda()], ids=("ALDA", "MALDA"))
def test_covariance_is_the_block_exponential(process):
    """The paper's Σ_t = C H⁻¹, exp([[A, G], [0, -Aᵀ]]) [Σ_0; I] = [C; H]."""
    a, q = (np.asarray(m) * float(process.elapsed(0.5)) for m in (process.drift_matrix, process.diffusion_matrix))
    stack = scipy.linalg.expm(np.block([[a, q], [np.zeros((3, 3)), -a.T]])) @ np.vstack([process.initial_covariance, np.eye(3)])
    phi, sigma = eqx.filter_jit(lambda p: p.moments(0.5))(process)
    np.testing.assert_allclose(sigma, stack[:3] @ np.linalg.inv(stack[3:]), atol=1e-9)
    np.testing.assert_allclose(phi, scipy.linalg.expm(a)[:, 0], atol=1e-12)


def network(t, z, args):
    return jnp.tanh(z) + t


@pytest.mark.parametrize("bound", [ImplicitBound(), DenoisingBound()], ids=("implicit", "denoising"))
def test_loss_reaches_the_process(bound):
    """Its gradient to Q, D, Σ_0 and β is that of central differences."""
    process = random_recipe(jax.random.key(3), 2, initial=0.1)
    process = eqx.tree_at(lambda p: (p.beta.beta_min, p.beta.beta_max), process, (jnp.asarray(1.0), jnp.asarray(3.0)))
    data = jax.random.normal(jax.random.key(0), (8, 2))
    loss = jax.jit(jax.value_and_grad(lambda p: LikelihoodLoss(bound)(NoiseScore(network, p), data, jax.random.key(1))[0]))
    gradient = loss(process)[1]
    leaves, tree = jax.tree.flatten(process)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    step = [1e-6 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)]
    ends = [loss(jax.tree.unflatten(tree, [a + s * b for a, b in zip(leaves, step)]))[0] for s in (1, -1)]
    slopes = [float(jnp.vdot(b, g)) for b, g in zip(step, jax.tree.leaves(gradient))]
    assert all(slope != 0 for slope in slopes)
    np.testing.assert_allclose((ends[0] - ends[1]) / 2, sum(slopes), rtol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="margin"):
        DenoisingBound(0.0)
    with pytest.raises(ValueError, match="num_variables"):
        random_recipe(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="friction"):
        malda(-1.0)
    with pytest.raises(ValueError, match="batch"):
        LikelihoodLoss()(NoiseScore(network, malda()), jnp.zeros(3), jax.random.key(0))
