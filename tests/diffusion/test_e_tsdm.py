"""Early timestep sharing: the shared times, the singularity that they remove, and where they act."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import Denoiser, NoisePrediction, VPPath
from ergodax.data import GaussianMixture
from ergodax.diffusion import DenoisingLoss
from ergodax.diffusion.e_tsdm import EarlyTimestepSharing, shared_time


PATH = VPPath()
MIXTURE = GaussianMixture.isotropic([0.4, 0.6], [[1.0, 0.0], [-1.0, 0.5]], [0.3, 0.5])


def noise(t, x, args):
    return NoisePrediction().from_denoised(PATH, t, x, MIXTURE.denoised(PATH, t, x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_shared_times(dtype):
    """The paper's 1000 steps: 19 -> 0, 59 -> 40, 99 -> 80, 100 -> 100; idempotent to the bit; five values below the threshold."""
    steps = jnp.arange(1000)
    t = 1 - steps.astype(dtype) / 1000
    shared = shared_time(t)
    assert shared.dtype == dtype
    expected = np.where(steps < 100, steps // 20 * 20, steps)
    np.testing.assert_allclose(1 - np.asarray(shared, float), expected / 1000, atol=2e-7 if dtype == jnp.float32 else 1e-15)
    np.testing.assert_array_equal(shared[100:], t[100:])
    np.testing.assert_array_equal(shared_time(shared), shared)
    assert len(np.unique(shared[:100])) == 5
    dense = jnp.linspace(0.9, 1, 5001).astype(dtype)[1:]
    assert len(np.unique(shared_time(dense))) == 5
    np.testing.assert_array_equal(shared_time(shared_time(dense)), shared_time(dense))
    for threshold, n in ((0.3, 7), (1.0, 3), (0.07, 10)):
        once = shared_time(dense, threshold, n)
        np.testing.assert_array_equal(shared_time(once, threshold, n), once)


def test_the_singularity_goes():
    """|dε/du| of the exact noise prediction grows like u^(-1/2) towards the data; with shared times it is 0 between a few finite jumps."""
    x = jnp.array([0.4, -0.2])
    rate = jax.jit(jax.vmap(jax.jacfwd(lambda u: jnp.linalg.norm(noise(1 - u, x, None)))))
    u = jnp.logspace(-7, -4, 13)
    slope = np.polyfit(np.log(u), np.log(np.abs(rate(u))), 1)[0]
    assert abs(slope + 0.5) < 0.02
    network = EarlyTimestepSharing(noise)
    inside = jnp.linspace(0.0801, 0.0999, 7)
    both = jax.jit(jax.vmap(lambda u: jax.jvp(lambda u: network(1 - u, x, None), (u,), (1.0,))))
    values, rates = both(inside)
    np.testing.assert_array_equal(rates, 0.0)
    np.testing.assert_allclose(values, jnp.broadcast_to(values[0], values.shape), rtol=1e-13)
    np.testing.assert_allclose(values[0], noise(jnp.asarray(1 - 0.08), x, None), rtol=1e-12)
    # The jumps, at 0.04, 0.06 and 0.08. (At u = 0 the exact noise prediction is 0/0: no network is.)
    shared, _ = both(jnp.linspace(0.0201, 0.0999, 800))
    steps = np.linalg.norm(np.diff(shared, axis=0), axis=1)
    assert (steps > 1e-3).sum() == 3
    np.testing.assert_allclose(steps[steps < 1e-3], 0.0, atol=1e-12)
    np.testing.assert_array_equal(network(0.5, x, None), noise(jnp.asarray(0.5), x, None))


def test_only_the_condition_changes():
    """Loss and denoiser use the true time: with a network that ignores time nothing changes, and one that returns it shows the shared one."""
    key, data = jax.random.key(0), jnp.ones((64, 2))
    loss = DenoisingLoss(PATH, NoisePrediction(), times=lambda key, n: jax.random.uniform(key, (n,), minval=0.9))
    still = lambda t, x, args: jnp.tanh(x)  # noqa: E731
    assert loss(EarlyTimestepSharing(still), data, key)[0] == loss(still, data, key)[0]
    shown = EarlyTimestepSharing(lambda t, x, args: t * jnp.ones_like(x))
    denoised = Denoiser(shown, PATH, NoisePrediction())(0.95, data[0])
    np.testing.assert_allclose(denoised, (1 - PATH.sigma(0.95) * 0.96) / PATH.alpha(0.95), rtol=1e-12)
    gradient = jax.grad(lambda scale: loss(EarlyTimestepSharing(lambda t, x, args: scale * t * x), data, key)[0])(1.0)
    assert np.isfinite(gradient)
    assert gradient != 0


def test_refusals():
    for wrong in ({"threshold": 0.0}, {"threshold": 1.5}, {"num_intervals": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must lie in"):
            EarlyTimestepSharing(noise, **wrong)
