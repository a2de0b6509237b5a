"""A Gaussian random field whose every conditional is known; the mask by its Jacobian; the loss against flow matching; guidance on constant fields."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.transport import (
    FlowAR,
    FlowARLoss,
    LinearInterpolant,
    ScaleModel,
    VelocityLoss,
    ZeroGamma,
    downsample,
    generate_scales,
    scale_pyramid,
    upsample,
)


def field_covariance(side):
    """exp(-|i - j|²/4) on a square, plus a little white noise."""
    places = np.stack(np.divmod(np.arange(side**2), side), 1)
    return np.exp(-np.sum((places[:, None] - places) ** 2, -1) / 4) + 0.1 * np.eye(side**2)


def pooling(side, factor):
    """Down as a matrix."""
    rows, columns = np.divmod(np.arange(side**2), side)
    coarse = rows // factor * (side // factor) + columns // factor
    return (np.arange((side // factor) ** 2)[:, None] == coarse) / factor**2


class GaussianField(ScaleModel):
    """The exact velocity of s_k given s_{k-1}: with s_k ~ N(m, C), v = m + (t C - (1 - t) I)(t² C + (1 - t)² I)⁻¹ (x - t m)."""

    gains: list[jax.Array]
    values: list[jax.Array]
    bases: list[jax.Array]
    shape: tuple[int, ...] = eqx.field(static=True, default=(4, 4, 1))
    num_scales: int = eqx.field(static=True, default=3)

    def semantics(self, coarser, label=None):
        means = [gain @ x.ravel() for gain, x in zip(self.gains[1:], coarser)]
        return [jnp.zeros((1, 1, 1)), *(mean.reshape(2 * x.shape[0], -1, 1) for mean, x in zip(means, coarser))]

    def velocity(self, t, x, args):
        k = {1: 0, 2: 1, 4: 2}[x.shape[0]]
        values, basis = self.values[k], self.bases[k]
        offset = basis.T @ (x - t * args).ravel()
        return args + (basis @ ((t * values - (1 - t)) / (t**2 * values + (1 - t) ** 2) * offset)).reshape(x.shape)


def gaussian_field():
    covariance, parts = field_covariance(4), ([], [], [])
    for side in (1, 2, 4):
        down = pooling(4, 4 // side)
        own = down @ covariance @ down.T
        if side == 1:
            gain, conditional = np.zeros((1, 1)), own
        else:
            coarser = pooling(side, 2)
            gain = own @ coarser.T @ np.linalg.inv(coarser @ own @ coarser.T)
            conditional = own - gain @ coarser @ own
        values, basis = np.linalg.eigh(conditional)
        for part, value in zip(parts, (gain, np.where(values > 1e-12, values, 0), basis)):
            part.append(jnp.asarray(value))
    return GaussianField(*parts)


def draw(model, n, steps):
    times = jnp.linspace(0.0, 1.0, steps + 1)
    return jax.jit(jax.vmap(lambda key: generate_scales(model, key, times=times)))(jax.random.split(jax.random.key(0), n))


def test_gaussian_random_field():
    """The samples have the field's covariance, and each scale pools to the one before, to rounding, with any number of Euler steps."""
    model, n = gaussian_field(), 6000
    covariance = field_covariance(4)
    for steps in (1, 200):
        coarse, middle, fine = draw(model, n, steps)
        np.testing.assert_allclose(jax.vmap(lambda x: downsample(x, 2))(fine), middle, rtol=0, atol=1e-10)
        np.testing.assert_allclose(jax.vmap(lambda x: downsample(x, 2))(middle), coarse, rtol=0, atol=1e-10)
    samples = np.asarray(fine).reshape(n, -1)
    spread = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / n)
    # Euler's own error with 200 steps is below 1% of the variance.
    assert (np.abs(samples.T @ samples / n - covariance) < 4 * spread + 0.01 * covariance.max()).all()
    assert np.abs(samples.mean(0) / np.sqrt(np.diag(covariance) / n)).max() < 4


def test_pyramid():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 3)))
    scales = scale_pyramid(x, 3)
    assert [scale.shape for scale in scales] == [(1, 2, 3), (2, 4, 3), (4, 8, 3)]
    np.testing.assert_array_equal(scales[2], x)
    np.testing.assert_allclose(scales[1][1, 2], x[2:4, 4:6].mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(downsample(scales[1], 2), scales[0], rtol=1e-12)
    slope = jnp.arange(6.0)[:, None, None] * jnp.ones((1, 6, 1))
    np.testing.assert_allclose(upsample(slope)[4:-4, 4, 0], (np.arange(12)[4:-4] - 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(upsample(jnp.full((1, 1, 2), 3.0)), 3.0, rtol=1e-6)


def small(shape, num_scales):
    """A model with random numbers for all its weights, so that nothing is zero by its start."""
    make = lambda key: FlowAR(shape, num_scales, width=8, depth=1, heads=2, flow_depth=1, num_classes=2, key=key)  # noqa: E731
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape)), jax.eval_shape(make, jax.random.key(0)))


SMALL = small((4, 4, 1), 3)


def test_semantics_are_block_causal():
    """∂c_k/∂s_j is 0 exactly for j >= k, and nothing else is; c_1 sees the label alone; a prefix gives the same as the whole."""
    coarser = scale_pyramid(jax.random.normal(jax.random.key(2), (4, 4, 1)), 3)[:-1]

    @jax.jit
    def all_of_it(coarser):
        rows = jax.jacrev(lambda coarser: jnp.stack([jnp.sum(jnp.sin(c)) for c in SMALL.semantics(coarser, 1)]))(coarser)
        jacobian = jnp.stack([jnp.abs(block).reshape(3, -1).sum(1) for block in rows], 1)
        return SMALL.semantics(coarser, 1), SMALL.semantics(coarser[:1], 1), SMALL.semantics(coarser, 0), jacobian

    whole, prefix, other, jacobian = all_of_it(coarser)
    assert [c.shape for c in whole] == [(1, 1, 8), (2, 2, 8), (4, 4, 8)]
    np.testing.assert_array_equal(jacobian > 0, [[False, False], [True, False], [True, True]])
    for a, b in zip(prefix, whole):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    assert all(jnp.abs(a - b).max() > 1e-3 for a, b in zip(whole, other))


def test_velocity_reads_semantics_place_by_place():
    """With attention off, the velocity at a place depends on x and c there alone: the norm is adaptive in space; with it on, on all places."""
    x, c = jax.random.normal(jax.random.key(3), (2, 2, 1)), jax.random.normal(jax.random.key(4), (2, 2, 8))
    silent = eqx.tree_at(lambda m: m.flow.blocks.mixed, SMALL, jax.tree.map(jnp.zeros_like, SMALL.flow.blocks.mixed))

    @jax.jit
    def jacobians(x, c):
        parts = [jax.jacrev(model.velocity, (1, 2))(0.4, x, c) for model in (silent, SMALL)]
        return [[jnp.abs(j.reshape(4, 4, -1)).sum(-1) for j in part] for part in parts]

    (x_alone, c_alone), (x_mixed, c_mixed) = jacobians(x, c)
    for alone in (x_alone, c_alone):
        np.testing.assert_array_equal(alone > 0, np.eye(4, dtype=bool))
    assert (x_mixed > 0).all()
    assert (c_mixed > 0).all()


def test_one_scale_is_flow_matching():
    """K = 1: the loss is `VelocityLoss` from noise to images given c_1(label), for the same draws."""
    images, labels, key = jax.random.normal(jax.random.key(6), (5, 2, 2, 1)), jnp.array([0, 1, 1, 0, -1]), jax.random.key(7)
    base = VelocityLoss(LinearInterpolant(ZeroGamma()), antithetic=False)

    model = small((2, 2, 1), 1)

    @jax.jit
    def both(images, key):
        _, key_noise, key_loss = jax.random.split(key, 3)
        noise = jax.random.normal(key_noise, images.shape)
        conditions = jax.vmap(lambda label: model.semantics([], label)[0])(labels)
        own = FlowARLoss(base, label_dropout=0.0)(model, (images, labels), key)[0]
        return own, base(model.velocity, (noise, images, conditions), key_loss)[0]

    np.testing.assert_allclose(*both(images, key), rtol=1e-10)


class Constant(ScaleModel):
    """Velocity c, and c_k = k + 10 (label + 1) at scale k."""

    shape: tuple[int, ...] = eqx.field(static=True, default=(4, 4, 2))
    num_scales: int = eqx.field(static=True, default=3)

    def semantics(self, coarser, label=None):
        return [jnp.asarray(k + 1 + 10 * (jnp.asarray(label, float) + 1)) for k in range(len(coarser) + 1)]

    def velocity(self, t, x, args):
        return jnp.zeros_like(x) + args


def test_loss_sums_over_scales_and_drops_labels():
    """For constant velocities E L = Σ_k p_k (½ c_k² - c_k E[mean of the image]), p_k entries at scale k, c_k with and without the label."""
    images = 0.7 + np.random.default_rng(8).standard_normal((32, 4, 4, 2))
    run = jax.jit(
        jax.vmap(lambda key, rate: FlowARLoss(label_dropout=rate)(Constant(), (jnp.asarray(images), jnp.zeros(32, int)), key)[0], (0, None))
    )
    keys, mean = jax.random.split(jax.random.key(9), 256), np.mean(images)
    for rate in (0.0, 0.3):
        values = np.asarray(run(keys, rate))
        expected = 0.0
        for share, shift in ((1 - rate, 10), (rate, 0)):
            expected += share * sum(p * ((k + shift) ** 2 / 2 - (k + shift) * mean) for k, p in ((1, 2), (2, 8), (3, 32)))
        assert abs(values.mean() - expected) / (values.std() / 16) < 4


def test_guidance():
    """Constant fields: the noise is moved by 1 × null plus, after the start, w_k times the difference, w_k from 1 to w over the scales."""
    times, key = jnp.linspace(0.0, 1.0, 11), jax.random.key(10)
    run = jax.jit(lambda w, start: generate_scales(Constant(), key, 1, guidance_scale=w, guidance_start=start, times=times))
    plain = generate_scales(Constant(), key, 1, times=times)
    for w, start in ((3.0, 0.0), (3.0, 0.3), (0.0, 0.0)):
        for k, (guided, unguided) in enumerate(zip(run(w, start), plain)):
            # The label adds 20 to the velocity: by the weight, on the share 1 - start of the time.
            np.testing.assert_allclose(guided - unguided, 20 * (w - 1) * k / 2 * (1 - start), atol=1e-10)


def test_sampling_a_network():
    """With its last layer at zero, where training starts, a network leaves the noise as it is, each scale's its own; in float32, so is what comes."""
    start = eqx.tree_at(lambda m: m.flow.outer, SMALL, replace_fn=lambda layer: jax.tree.map(jnp.zeros_like, layer))
    start, times = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start), jnp.array([0.0, 1.0], jnp.float32)
    scales = jax.jit(jax.vmap(lambda key: generate_scales(start, key, 1, times=times)))(jax.random.split(jax.random.key(12), 300))
    assert all(scale.dtype == jnp.float32 for scale in scales)
    flat = np.concatenate([np.asarray(scale).reshape(300, -1) for scale in scales], 1)
    assert np.abs(flat.T @ flat / 300 - np.eye(21)).max() < 5 * (2 / 300) ** 0.5


def test_refusals():
    key = jax.random.key(0)
    for arguments, message in [
        (((6, 4, 1), 3), "multiples of 4"),
        (((4, 4, 1), 3, 10, 1, 4), "`heads` must divide"),
        (((4, 4, 1), 0), "`num_scales`"),
    ]:
        with pytest.raises(ValueError, match=message):
            FlowAR(*arguments, key=key)
    with pytest.raises(ValueError, match="`coarser` must hold"):
        SMALL.semantics([jnp.zeros((2, 2, 1))])
    with pytest.raises(ValueError, match="`label`"):
        SMALL.semantics([], 2)
    with pytest.raises(ValueError, match="images must have shape"):
        FlowARLoss()(SMALL, jnp.zeros((2, 4, 4, 2)), key)
    with pytest.raises(ValueError, match="`label_dropout`"):
        FlowARLoss(label_dropout=1.5)
