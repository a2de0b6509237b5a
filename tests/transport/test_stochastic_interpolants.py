"""Losses at their exact minimisers, the antithetic pair, and transport of mean and covariance by flows and diffusions of any ε."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import integrate
from ergodax.transport import (
    BrownianBridgeGamma,
    EncoderDecoderInterpolant,
    GammaDiffusion,
    InterpolantVelocityLoss,
    LatentLoss,
    LinearInterpolant,
    MixtureInterpolantFields,
    ScoreFromLatent,
    ScoreLoss,
    SineSquaredGamma,
    TrigonometricInterpolant,
    VelocityLoss,
    ZeroGamma,
    backward_ode_term,
    backward_sde_terms,
    forward_sde_terms,
    ode_term,
)
from ergodax.transport.stochastic_interpolants import kl_bound, kl_optimal_epsilon


LOSSES = {
    "velocity": (VelocityLoss, LinearInterpolant(BrownianBridgeGamma(2.0))),
    "score": (ScoreLoss, TrigonometricInterpolant(BrownianBridgeGamma(2.0))),
    "latent": (LatentLoss, EncoderDecoderInterpolant()),
    "interpolant_velocity": (InterpolantVelocityLoss, TrigonometricInterpolant(SineSquaredGamma(0.7))),
}


@pytest.mark.parametrize("field", LOSSES)
def test_gradient_vanishes_at_the_exact_field_only(field, mixtures, fields_of):
    """d/dθ loss(f + Σ θ_k φ_k) at θ = 0 is E[(f - target) · φ_k(t, x_t)]: zero for the exact f, and 0.1 E|f|² > 0 along φ = f for 1.1 f."""
    make, interpolant = LOSSES[field]
    exact, loss = getattr(fields_of(interpolant, mixtures), field), make(interpolant)

    def model(scale, theta):
        def call(t, x, args):
            f = exact(t, x)
            return scale * f + theta @ jnp.stack([f, x, jnp.sin(3 * x) * t, jnp.array([1.0, 0.0])])

        return call

    @jax.jit
    @jax.vmap
    def gradients(key):
        key0, key1, key_loss = jax.random.split(key, 3)
        batch = mixtures[0].sample(key0, 256), mixtures[1].sample(key1, 256)
        at = lambda scale: jax.grad(lambda theta: loss(model(scale, theta), batch, key_loss)[0])(jnp.zeros(4))  # noqa: E731
        return at(1.0), at(1.1)

    right, wrong = gradients(jax.random.split(jax.random.key(0), 64))
    z_score = lambda samples: jnp.mean(samples, 0) / (jnp.std(samples, 0) / 8)  # noqa: E731
    assert jnp.abs(z_score(right)).max() < 4
    assert z_score(wrong)[0] > 5


def test_antithetic_pair_removes_the_blow_up(mixtures, fields_of):
    """At the exact score one draw of the loss has variance near E|s|²/γ² → ∞; with the pair it stays bounded as t → 0. Same for γ' and b."""
    interpolant = LinearInterpolant(BrownianBridgeGamma(1.0))
    fields, n = fields_of(interpolant, mixtures), 20_000
    x0, x1 = (mixture.sample(jax.random.key(i), n) for i, mixture in enumerate(mixtures))

    @jax.jit
    def variances(t):
        def one(make, model, antithetic):
            loss = make(interpolant, times=lambda key, n: jnp.full(n, t), antithetic=antithetic)
            draws = jax.vmap(lambda x0, x1, key: loss(model, (x0[None], x1[None]), key)[0])
            return jnp.var(draws(x0, x1, jax.random.split(jax.random.key(2), n)))

        mean_square = jnp.mean(jnp.sum(jax.vmap(lambda x: fields.score(t, x))(x0) ** 2, -1))
        plain, pair = one(ScoreLoss, fields.score, False), one(ScoreLoss, fields.score, True)
        return mean_square, plain, pair, one(VelocityLoss, fields.velocity, False), one(VelocityLoss, fields.velocity, True)

    _, _, pair, _, velocity_pair = variances(1e-2)
    mean_square, plain, pair_at_end, velocity_plain, velocity_pair_at_end = variances(1e-6)
    # z · s/γ: at t = 1e-6 all else is 1e-6 of it; its relative error over n draws is sqrt(kurtosis/n), about 0.02
    assert abs(plain * 1e-6 / mean_square - 1) < 0.1
    assert velocity_plain > 1e3 * velocity_pair_at_end
    assert 0.5 < pair_at_end / pair < 2
    assert 0.5 < velocity_pair_at_end / velocity_pair < 2


def test_without_noise_it_is_flow_matching():
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 5, 3))
    model = lambda t, x, args: t * x + args  # noqa: E731
    args, t = jnp.arange(5.0), jnp.linspace(0.1, 0.9, 5)
    loss = VelocityLoss(LinearInterpolant(ZeroGamma()), times=lambda key, n: t)
    x_t = (1 - t[:, None]) * x0 + t[:, None] * x1
    f = t[:, None] * x_t + args[:, None]
    expected = jnp.mean(jnp.sum((f - (x1 - x0)) ** 2 - (x1 - x0) ** 2, -1)) / 2
    value, aux = loss(model, (x0, x1, args), jax.random.key(1))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert aux == {}


def test_coupling_pairs_the_rows():
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 5, 3))
    model, key = (lambda t, x, args: t * x), jax.random.key(1)
    coupled = LatentLoss(LinearInterpolant(), coupling=lambda key, target, source, args: source[::-1])
    np.testing.assert_allclose(coupled(model, (x0, x1), key)[0], LatentLoss(LinearInterpolant())(model, (x0[::-1], x1), key)[0], rtol=1e-14)
    with pytest.raises(ValueError, match="one shape"):
        coupled(model, (x0, x1[:, :2]), key)


# Sampling. Errors are z-scores over NUM draws. Heun has weak order 2 for additive noise; its bias between Gaussians is computed below, and the
# mixtures take the same steps with fields no stiffer (component variances no smaller).
NUM, STEPS, EPSILONS = 4096, 200, jnp.array([0.0, 0.5, 2.0])


def moment_z_scores(x, mixture):
    """z-scores of the mean, and of the covariance around the true mean."""
    centred = x - mixture.mean
    products = centred[:, :, None] * centred[:, None, :]
    return jnp.concatenate(
        [
            jnp.mean(centred, 0) / jnp.sqrt(jnp.diag(mixture.covariance) / NUM),
            (jnp.mean(products, 0) - mixture.covariance).ravel() / (jnp.std(products, 0).ravel() / jnp.sqrt(NUM)),
        ]
    )


def transport(make_terms, times, start, key):
    run = lambda key, x: integrate(make_terms(key, x), dfx.Heun(), x, times=times)  # noqa: E731
    return jax.vmap(run)(jax.random.split(key, NUM), start)


@pytest.mark.parametrize("ends", ["gaussians", "mixtures"])
@pytest.mark.parametrize("interpolant", [LinearInterpolant(), EncoderDecoderInterpolant()], ids=lambda i: type(i).__name__)
def test_forward_diffusions_of_any_epsilon(ends, interpolant, fields_of, request):
    source, target = request.getfixturevalue(ends)
    fields, times = fields_of(interpolant, (source, target)), jnp.linspace(0.0, 1.0, STEPS + 1)
    start = source.sample(jax.random.key(0), NUM)

    @jax.jit
    @jax.vmap
    def scores(epsilon):
        make = lambda key, x: forward_sde_terms(fields.velocity, fields.score, epsilon, key, x)  # noqa: E731
        return moment_z_scores(transport(make, times, start, jax.random.key(1)), target)

    assert jnp.abs(scores(EPSILONS)).max() < 4


@pytest.mark.parametrize("interpolant", [LinearInterpolant(), EncoderDecoderInterpolant()], ids=lambda i: type(i).__name__)
def test_discretisation_bias_is_below_the_noise(interpolant, gaussians, fields_of):
    """Between Gaussians the drift is J(t) (x - m(t)) + m'(t), so one Heun step maps the covariance by C → M C Mᵀ + (√h n)(√h n)ᵀ, exactly."""
    fields, h = fields_of(interpolant, gaussians), 1 / STEPS
    times, identity = jnp.linspace(0.0, 1.0, STEPS + 1), jnp.eye(2)

    @jax.jit
    @jax.vmap
    def bias(epsilon):
        drift = lambda t, x: fields.velocity(t, x) + epsilon * fields.score(t, x)  # noqa: E731

        def step(moments, t):
            mean, covariance = moments
            j0, j1 = (jax.jacfwd(drift, 1)(s, mean) for s in (t, t + h))
            f0 = drift(t, mean)
            mean = mean + h / 2 * (f0 + drift(t + h, mean + h * f0))
            matrix, noise = identity + h / 2 * (j0 + j1 @ (identity + h * j0)), jnp.sqrt(2 * epsilon * h) * (identity + h / 2 * j1)
            return (mean, matrix @ covariance @ matrix.T + noise @ noise.T), None

        mean, covariance = jax.lax.scan(step, (gaussians[0].mean, gaussians[0].covariance), times[:-1])[0]
        exact = gaussians[1].covariance
        variance = jnp.diag(exact)
        error = jnp.sqrt((variance[:, None] * variance + exact**2) / NUM)  # of a sample covariance
        return jnp.abs((mean - gaussians[1].mean) / jnp.sqrt(variance / NUM)).max(), jnp.abs((covariance - exact) / error).max()

    assert max(b.max() for b in bias(EPSILONS)) < 0.2


def test_flow_there_and_back(mixtures, fields_of):
    fields, times = fields_of(LinearInterpolant(), mixtures), jnp.linspace(0.0, 1.0, 101)
    start = mixtures[0].sample(jax.random.key(0), 8)

    @jax.jit
    @jax.vmap
    def there_and_back(x):
        end = integrate(ode_term(fields.velocity), dfx.Heun(), x, times=times)
        return end, integrate(backward_ode_term(fields.velocity), dfx.Heun(), end, times=-times[::-1])

    end, back = there_and_back(start)
    assert jnp.abs(end - start).max() > 0.5
    np.testing.assert_allclose(back, start, atol=1e-3)  # Heun at h = 0.01: (h |∂b|)² with |∂b| about 3


@pytest.mark.parametrize("epsilon", [lambda t: 0.3 + 2 * t, GammaDiffusion(SineSquaredGamma(), 2.0)], ids=["rising", "gamma"])
def test_backward_diffusion(epsilon, mixtures, fields_of):
    fields, times = fields_of(LinearInterpolant(), mixtures), jnp.linspace(0.0, 1.0, STEPS + 1)
    make = lambda key, x: backward_sde_terms(fields.velocity, fields.score, epsilon, key, x)  # noqa: E731
    end = jax.jit(lambda x: transport(make, -times[::-1], x, jax.random.key(1)))(mixtures[1].sample(jax.random.key(0), NUM))
    assert jnp.abs(moment_z_scores(end, mixtures[0])).max() < 4


def test_gamma_diffusion_with_the_latent_is_exact_at_the_ends(mixtures, fields_of):
    """ε = cγ and s = -η/γ: the drift is b - cη at all times, 0 × ∞ included, and the solve from 0 to 1 is right."""
    interpolant = LinearInterpolant()
    fields, times = fields_of(interpolant, mixtures), jnp.linspace(0.0, 1.0, STEPS + 1)
    score, x = ScoreFromLatent(fields.latent, interpolant.gamma), jnp.array([0.3, -0.5])
    drift = forward_sde_terms(fields.velocity, score, GammaDiffusion(interpolant.gamma, 1.5), jax.random.key(0), x).terms[0].vector_field
    both = jax.jit(jax.vmap(lambda t: (drift(t, x, None), fields.velocity(t, x) - 1.5 * fields.latent(t, x))))
    np.testing.assert_allclose(*both(jnp.array([0.0, 1e-8, 0.4, 1.0])), rtol=1e-12)

    make = lambda key, x: forward_sde_terms(fields.velocity, score, GammaDiffusion(interpolant.gamma, 1.5), key, x)  # noqa: E731
    end = jax.jit(lambda start: transport(make, times, start, jax.random.key(1)))(mixtures[0].sample(jax.random.key(0), NUM))
    assert jnp.abs(moment_z_scores(end, mixtures[1])).max() < 4


def test_gradient_in_the_diffusion_is_finite_from_end_to_end():
    gamma, times, x = BrownianBridgeGamma(), jnp.linspace(0.0, 1.0, 9), jnp.ones(2)
    score = ScoreFromLatent(lambda t, x, args: jnp.sin(x), gamma)

    @jax.jit
    def end(scale):
        terms = forward_sde_terms(lambda t, x, args: -x, score, GammaDiffusion(gamma, scale), jax.random.key(0), x)
        return integrate(terms, dfx.Heun(), x, times=times).sum()

    step = 1e-6
    np.testing.assert_allclose(jax.jit(jax.grad(end))(1.5), (end(1.5 + step) - end(1.5 - step)) / (2 * step), rtol=1e-6)


def test_float32_stays_float32_and_bad_epsilon_is_refused():
    times, x = jnp.linspace(0, 1, 5, dtype=jnp.float32), jnp.ones(2, jnp.float32)
    velocity, score = (lambda t, x, args: t * x), (lambda t, x, args: -x)
    for make, grid in [(forward_sde_terms, times), (backward_sde_terms, -times[::-1])]:
        for epsilon in (0.5, jnp.float64(0.5), GammaDiffusion(BrownianBridgeGamma())):
            assert integrate(make(velocity, score, epsilon, jax.random.key(0), x), dfx.Euler(), x, times=grid).dtype == jnp.float32
        with pytest.raises(ValueError, match="epsilon"):
            make(velocity, score, -0.1, jax.random.key(0), x)
    batch = x[:, None], x[:, None]
    for make in (VelocityLoss, ScoreLoss, LatentLoss, InterpolantVelocityLoss):
        assert make(LinearInterpolant())(velocity, batch, jax.random.key(0))[0].dtype == jnp.float32


def test_kl_bound_is_reached():
    """A Brownian motion from 0, whose forward drift is 0, with errors b̂ - b = ε(ŝ - s) = δ, drifts by 2δ: KL(ρ₁ ‖ ρ̂(1)) is |2δ|²/(2 · 2ε)."""
    epsilon, delta = 0.35, jnp.array([0.3, -0.4])
    gamma = BrownianBridgeGamma(2 * epsilon)
    ends = (jnp.ones(1), jnp.zeros((1, 2)))
    fields = MixtureInterpolantFields(LinearInterpolant(gamma), *ends, jnp.zeros(1), *ends, jnp.full(1, 2 * epsilon))
    x = jnp.array([0.4, 0.9])
    np.testing.assert_allclose(fields.velocity(0.3, x) + epsilon * fields.score(0.3, x), 0, atol=1e-12)
    squared = jnp.sum(delta**2)
    bound = kl_bound(squared / 2, squared / epsilon**2 / 2, epsilon)
    np.testing.assert_allclose(bound, 4 * squared / (4 * epsilon), rtol=1e-12)
    np.testing.assert_allclose(kl_optimal_epsilon(squared / 2, squared / epsilon**2 / 2), epsilon, rtol=1e-12)


def test_kl_bound_between_gaussians(gaussians, fields_of):
    """With b̂ = 1.3 b and ŝ = 0.8 s: KL of the laws at t = 1 (of exact moments) <= Girsanov's 1/(4ε) ∫ E|error|² <= the bound, at three ε."""
    fields, (source, target) = fields_of(LinearInterpolant(), gaussians), gaussians
    steps, midpoints = 400, (jnp.arange(400.0) + 0.5) / 400

    @jax.jit
    @jax.vmap
    def run(epsilon):
        def errors(t):
            # E|f|² of the affine fields over the law of x_t
            mean = (1 - t) * source.mean + t * target.mean
            covariance = (1 - t) ** 2 * source.covariance + t**2 * target.covariance + t * (1 - t) * jnp.eye(2)

            def size(field):
                jacobian = jax.jacfwd(lambda x: field(t, x))(mean)
                return jnp.sum(field(t, mean) ** 2) + jnp.trace(jacobian @ covariance @ jacobian.T)

            both = lambda t, x: 0.3 * fields.velocity(t, x) - 0.2 * epsilon * fields.score(t, x)  # noqa: E731
            return 0.09 * size(fields.velocity) / 2, 0.04 * size(fields.score) / 2, size(both) / (4 * epsilon)

        velocity, score, path = (jnp.mean(v) for v in jax.vmap(errors)(midpoints))

        def step(moments, t):
            mean, covariance = moments
            drift = lambda x: 1.3 * fields.velocity(t, x) + 0.8 * epsilon * fields.score(t, x)  # noqa: E731
            jacobian = jax.jacfwd(drift)(mean)
            matrix = jax.scipy.linalg.expm(jacobian / steps)
            return (mean + drift(mean) / steps, matrix @ covariance @ matrix.T + 2 * epsilon * jnp.eye(2) / steps), None

        mean, covariance = jax.lax.scan(step, (source.mean, source.covariance), midpoints)[0]
        ratio, offset = jnp.linalg.solve(covariance, target.covariance), mean - target.mean
        kl = (jnp.trace(ratio) - 2 - jnp.linalg.slogdet(ratio)[1] + offset @ jnp.linalg.solve(covariance, offset)) / 2
        return (
            kl,
            path,
            kl_bound(velocity, score, epsilon),
            2 * jnp.sqrt(velocity * score),
            kl_bound(velocity, score, kl_optimal_epsilon(velocity, score)),
        )

    kl, path, bound, least, at_optimum = run(jnp.array([0.2, 0.7, 2.0]))
    assert jnp.all(kl < path)
    assert jnp.all(path < bound)
    assert jnp.all(kl > 0.01 * bound)  # no vacuous bound
    np.testing.assert_allclose(at_optimum, least, rtol=1e-12)
    assert jnp.all(bound >= least)
    with pytest.raises(ValueError, match="epsilon"):
        kl_bound(0.1, 0.1, 0.0)
