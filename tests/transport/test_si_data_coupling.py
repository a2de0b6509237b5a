"""Sources made from the data: in-painting of a Gaussian has the exact conditional law, visible coordinates stay, the coupling is cheaper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.testing import assert_covariance, assert_mean, z_scores
from ergodax.transport import LinearInterpolant, TrigonometricInterpolant, VelocityLoss, ZeroGamma
from ergodax.transport.si_data_coupling import CoupledLoss, Degradation, Inpainting, MaskedVelocity, Pooled, TileMask
from ergodax.transport.straightness import path_cost


MEAN = jnp.array([0.5, -1.0, 0.8])
FACTOR = jnp.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.4, 0.9]])
COVARIANCE = FACTOR @ FACTOR.T
MASKS = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
LOSS = VelocityLoss(LinearInterpolant(ZeroGamma()), antithetic=False)
TIMES = jnp.linspace(0.0, 1.0, 51)


def draw(key, n):
    return MEAN + jax.random.normal(key, (n, 3)) @ FACTOR.T


def conditional(x, mask):
    """Mean and covariance of the hidden coordinates given the visible ones, in all three coordinates (0 where visible)."""
    gain = jnp.linalg.inv(mask[:, None] * COVARIANCE * mask + jnp.diag(1 - mask)) * mask[:, None] * mask
    hidden = 1 - mask
    mean = hidden * (MEAN + COVARIANCE @ gain @ (mask * (x - MEAN)))
    return mean, hidden[:, None] * (COVARIANCE - COVARIANCE @ gain @ COVARIANCE) * hidden


def exact_velocity(t, x, args):
    """E[x₁ - ζ | x_t] on the hidden coordinates: there x_t ~ N(t m, t² C + (1 - t)² I) given the visible ones."""
    mask, _ = args
    hidden = 1 - mask
    mean, covariance = conditional(x, mask)
    total = t**2 * covariance + (1 - t) ** 2 * jnp.diag(hidden) + jnp.diag(mask)
    return mean + (t * covariance - (1 - t) * jnp.diag(hidden)) @ jnp.linalg.solve(total, hidden * (x - t * mean))


def one_of_the_masks(key, x1):
    return MASKS[jax.random.randint(key, (), 0, 2)]


def test_loss_is_least_at_the_exact_conditional_velocity():
    """d/dθ at f + Σ θ_k φ_k is 0 for the exact f and E|f|² > 0 along φ = f for 1.1 f; masks differ from example to example."""
    loss = CoupledLoss(LOSS, Inpainting(one_of_the_masks))

    def model(scale, theta):
        def call(t, x, args):
            f = exact_velocity(t, x, args)
            return scale * f + theta @ jnp.stack([f, (1 - args[0]) * x, jnp.sin(2 * x) * t])

        return call

    @jax.jit
    @jax.vmap
    def gradients(key):
        key_data, key_loss = jax.random.split(key)
        at = lambda scale: jax.grad(lambda theta: loss(model(scale, theta), draw(key_data, 256), key_loss)[0])(jnp.zeros(3))  # noqa: E731
        return at(1.0), at(1.1)

    right, wrong = gradients(jax.random.split(jax.random.key(0), 64))
    assert np.abs(z_scores(right, 0.0)).max() < 4
    assert z_scores(wrong, 0.0)[0] > 5


@jax.jit
def trajectory(x0, mask):
    return path_cost(MaskedVelocity(exact_velocity), x0, (mask, None), times=TIMES)


def test_inpainted_coordinates_have_the_conditional_law():
    """The flow is affine in ζ, x₁ = A ζ + c: c is the conditional mean and A Aᵀ the conditional covariance, up to Heun's (1/50)²."""
    for mask, x in zip(MASKS, (jnp.array([1.3, jnp.nan, jnp.nan]), jnp.array([jnp.nan, 0.4, -1.1]))):
        offset, *moved = (trajectory(jnp.where(mask > 0, x, noise), mask).end for noise in jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3)]))
        matrix = jnp.stack(moved, 1) - offset[:, None]
        mean, covariance = conditional(jnp.where(mask > 0, x, 0), mask)
        np.testing.assert_allclose((1 - mask) * offset, mean, atol=5e-4)
        np.testing.assert_allclose(matrix @ matrix.T, covariance, atol=5e-4)
        np.testing.assert_array_equal(offset[mask > 0], x[mask > 0])
    filled = Inpainting().fill(jax.random.key(0), x, mask)
    np.testing.assert_array_equal(filled[1:], x[1:])
    assert bool(jnp.isfinite(filled).all())


def test_kinetic_energy_is_lower_than_of_the_independent_source():
    """A direction from N(0, 1) to N(c, v) costs c² + ∫ s'² with s² = (1 - t)² + v t²; from N(0, I) in all coordinates the visible one moves too, to a
    point (v = 0), which costs its square and 1 more.
    """
    mask, x1 = MASKS[0], jnp.array([1.3, 0.0, 0.0])
    mean, covariance = conditional(x1, mask)
    variance = jnp.linalg.eigvalsh(covariance[1:, 1:])
    t = (jnp.arange(10_000.0) + 0.5) / 10_000
    std = lambda v: jnp.sqrt((1 - t) ** 2 + v * t**2)  # noqa: E731
    energy = lambda v: jnp.mean(((v * t - (1 - t)) / std(v)) ** 2)  # noqa: E731
    dependent = jnp.sum(mean**2) + energy(variance[0]) + energy(variance[1])
    independent = dependent + x1[0] ** 2 + energy(0.0)

    noise = jax.random.normal(jax.random.key(0), (128, 3))
    costs = jax.jit(jax.vmap(trajectory, in_axes=(0, None)))(jnp.where(mask > 0, x1, noise), mask)
    # the energy of a mirrored pair of noises has no term linear in them
    mirrored = jax.jit(jax.vmap(trajectory, in_axes=(0, None)))(jnp.where(mask > 0, x1, -noise), mask)
    assert_mean((costs.energy + mirrored.energy) / 2, dependent)
    assert float(jnp.mean(costs.energy)) < 0.8 * independent
    assert bool(jnp.all(costs.curvature >= 0))


def test_product_coupling_is_the_independent_interpolant():
    """x₀ = noise whatever x₁: the loss is that of (noise, x₁) to the bit; args travel beside ξ."""
    loss = VelocityLoss(TrigonometricInterpolant())
    noise = lambda key, x1, args: (jax.random.normal(key, x1.shape), (jnp.zeros(3), args))  # noqa: E731
    model = lambda t, x, args: jnp.sin(t) * x + (0 if args is None else args[1])  # noqa: E731
    x1, labels, key = draw(jax.random.key(0), 8), jnp.arange(8.0), jax.random.key(1)
    key_corruption, key_loss = jax.random.split(key)
    x0 = jax.vmap(lambda key: jax.random.normal(key, (3,)))(jax.random.split(key_corruption, 8))
    expected = loss(model, (x0, x1, (labels, labels)), key_loss)
    assert CoupledLoss(loss, noise)(model, (x1, labels), key) == expected


def test_super_resolution_source():
    image = jax.random.normal(jax.random.key(0), (2, 4, 6))
    pooled = Pooled(2)(image)
    for i, j in ((0, 0), (1, 2)):
        block = np.s_[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(pooled[block], jnp.broadcast_to(image[block].mean((1, 2), keepdims=True), (2, 2, 2)), rtol=1e-12)
    draws = jax.vmap(lambda key: Degradation(Pooled(2), 0.3)(key, image)[0])(jax.random.split(jax.random.key(1), 2000))
    assert_mean(draws, pooled)
    assert_covariance(draws[:, 0, 0, :2], 0.09 * jnp.eye(2))
    x0, (known, label) = Degradation(Pooled(2), 0.0)(jax.random.key(0), image, 7)
    np.testing.assert_array_equal(x0, known)
    assert label == 7
    with pytest.raises(ValueError, match="must divide"):
        Pooled(4)(image)


def test_tiles():
    masks = jax.vmap(lambda key: TileMask(2, 0.3)(key, jnp.zeros((3, 4, 6))))(jax.random.split(jax.random.key(0), 2000))
    assert_mean(masks[:, 0, ::2, ::3], jnp.full((2, 2), 0.7))
    np.testing.assert_array_equal(masks, jnp.repeat(jnp.repeat(masks[:, :1, ::2, ::3], 2, 2), 3, 3).repeat(3, 1))
    assert_covariance(masks[:, 0, ::2, ::3].reshape(-1, 4), 0.21 * jnp.eye(4))
    with pytest.raises(ValueError, match="equal tiles"):
        TileMask(8)(jax.random.key(0), jnp.zeros((3, 4, 6)))


def test_float32_stays():
    x1 = draw(jax.random.key(0), 4).astype(jnp.float32)
    loss = CoupledLoss(LOSS, Inpainting(lambda key, x1: MASKS[0].astype(x1.dtype)))
    value, _ = jax.eval_shape(lambda key: loss(MaskedVelocity(lambda t, x, args: t * x), x1, key), jax.random.key(0))
    assert value.dtype == jnp.float32
