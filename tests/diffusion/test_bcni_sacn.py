"""Noise on conditioning: BCNI's radius and variance, SACN's directions and their variances, and the loss that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import VPPath, VPrediction
from ergodax.diffusion import DenoisingLoss
from ergodax.diffusion.bcni_sacn import BatchCentredNoise, CorruptedConditionLoss, SpectrumAwareNoise
from ergodax.testing import assert_mean


Z = jax.random.normal(jax.random.key(0), (4, 3, 5)) * jnp.array([3.0, 1.5, 1.0, 0.5, 0.2]) + 0.4
DRAWS = 20000


def noises(corrupt, z, n=DRAWS):
    keys = jax.random.split(jax.random.key(1), n)
    return np.asarray(jax.jit(jax.vmap(lambda key: corrupt(key, z) - z))(keys))


def test_batch_centred_noise():
    """Entries uniform within ρ d, d the distance from the batch's mean at the same token; nothing for a batch of equal rows."""
    rho = 0.1
    noise = noises(BatchCentredNoise(rho), Z)
    centre = np.asarray(Z).mean(0)
    radius = rho * np.linalg.norm(np.asarray(Z) - centre, axis=-1)[..., None]
    scaled = noise / radius
    assert np.all(np.abs(scaled) <= 1 + 1e-12)
    assert np.abs(scaled).max() > 0.999
    assert_mean(scaled, 0.0)
    assert_mean(scaled**2, 1 / 3)
    np.testing.assert_array_equal(noises(BatchCentredNoise(rho), jnp.ones((4, 3, 5)), 2), 0.0)
    gradient = jax.grad(lambda z: jnp.sum(BatchCentredNoise(rho)(jax.random.key(0), z)))(jnp.ones((4, 3, 5)))
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize("weighted", [True, False])
def test_spectrum_aware_noise(weighted):
    """In the basis of the SVD the noise, less the scale of its row, is diagonal with variances e^{-2k/K} (times s_k)."""
    rho = 0.15
    rows = np.asarray(Z).reshape(12, 5)
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    noise = noises(SpectrumAwareNoise(rho, weighted), Z).reshape(DRAWS, 12, 5)
    scale = np.sqrt(np.mean(rows**2, axis=1))[:, None]
    coefficients = np.einsum("nk,dnm,jm->dkj", left, noise / (rho * scale), right)
    diagonal = np.diagonal(coefficients, axis1=1, axis2=2)
    np.testing.assert_allclose(coefficients, diagonal[:, :, None] * np.eye(5), atol=1e-12)
    expected = np.exp(-2 * np.arange(5) / 5) * (values if weighted else 1.0)
    assert_mean(diagonal, 0.0)
    assert_mean(diagonal**2, expected)
    products = diagonal[:, :, None] * diagonal[:, None, :]
    assert_mean(products[:, *np.triu_indices(5, 1)], 0.0)
    # Nothing outside the span: with fewer rows than columns too.
    wide = np.asarray(noises(SpectrumAwareNoise(rho, weighted), Z[:1], 3))[:, 0]
    basis = np.linalg.svd(np.asarray(Z[0]))[2][:3]
    np.testing.assert_allclose(wide - wide @ basis.T @ basis, 0, atol=1e-12)


@pytest.mark.parametrize("weighted", [True, False])
def test_rank_is_kept(weighted):
    low = jnp.einsum("br,rd->bd", jax.random.normal(jax.random.key(2), (6, 2)), jax.random.normal(jax.random.key(3), (2, 5)))
    noise = noises(SpectrumAwareNoise(0.1, weighted), low, 3)
    singular = np.linalg.svd(noise, compute_uv=False)
    assert np.all(singular[:, 2:] < 1e-7 * singular[:, :1])
    assert np.all(singular[:, 1] > 1e-3 * singular[:, 0])
    assert np.all(np.isfinite(noises(SpectrumAwareNoise(0.1, weighted), jnp.zeros((3, 4)), 2)))


def test_loss():
    """Strength 0 is the loss on clean conditions; integer labels pass through; data and diffusion noise are those of the clean loss."""
    loss = DenoisingLoss(VPPath(), VPrediction(), null={"text": 0.0, "label": -1})
    data, labels = jax.random.normal(jax.random.key(0), (4, 2)), jnp.arange(4)

    def network(t, x, args):
        return x * jnp.tanh(jnp.sum(args["text"])) + args["label"].astype(x.dtype)

    def compare(corrupt):
        args = {"text": Z, "label": labels}
        corrupted = CorruptedConditionLoss(loss, corrupt)(network, (data, args), jax.random.key(3))[0]
        key_corrupt, key_loss = jax.random.split(jax.random.key(3))
        text = corrupt(jax.random.split(key_corrupt, 2)[1], Z)  # the leaves of a dict come sorted
        expected = loss(network, (data, args | {"text": text}), key_loss)[0]
        return corrupted, expected, loss(network, (data, args), key_loss)[0]

    for corrupt in (BatchCentredNoise(0.0), SpectrumAwareNoise(0.0)):
        corrupted, _, clean = compare(corrupt)
        assert corrupted == clean
    corrupted, expected, clean = compare(BatchCentredNoise(0.2))
    assert corrupted == expected
    assert corrupted != clean


def test_refusals():
    for make in (BatchCentredNoise, SpectrumAwareNoise):
        with pytest.raises(ValueError, match="`strength`"):
            make(-0.1)
    with pytest.raises(ValueError, match="a pair"):
        CorruptedConditionLoss(DenoisingLoss(VPPath(), VPrediction()), BatchCentredNoise())(lambda t, x, args: x, Z, jax.random.key(0))
