"""The simplified bridge: exact rounds between Gaussians and their bias in N, the first round as denoising, and the alternation as a scan."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import iterate
from ergodax.transport.discrete_bridge import Alternation, Learner, SimulatedPairs, SimulatedPaths, TerminalTransition
from ergodax.transport.gaussian_bridge import GaussianBridge
from ergodax.transport.reference import Brownian
from ergodax.transport.samples import Samples
from ergodax.transport.sdsb import FlowTransition, MeanTransition, SimplifiedBridgeLoss


VARIANCES = 1.0, 2.25


class Affine(eqx.Module):
    """gain[i] x + shift[i] at grid point i of N + 1, over the unit interval."""

    gain: jax.Array
    shift: jax.Array

    def __call__(self, t, x, z):
        i = jnp.round(t * (self.gain.size - 1)).astype(int)
        return self.gain[i] * x + self.shift[i]


def exact_plan(epsilon):
    ends = [jnp.array([[v]]) for v in VARIANCES]
    return float(GaussianBridge(jnp.zeros(1), ends[0], jnp.zeros(1), ends[1], Brownian(epsilon)).cross_covariance()[0, 0])


def fitted_rounds(n, rounds, epsilon=1.0):
    """The same iteration on variances alone: (forward covariance of the ends, variance of x₀ that B generates, gains of F, gains of B)."""
    step, forward = epsilon / n, np.ones(n)
    for _ in range(rounds):
        variance = np.empty(n + 1)
        variance[0] = VARIANCES[0]
        for k in range(n):
            variance[k + 1] = forward[k] ** 2 * variance[k] + step
        backward = forward * variance[:-1] / variance[1:]
        variance[n] = VARIANCES[1]
        for k in range(n - 1, -1, -1):
            variance[k] = backward[k] ** 2 * variance[k + 1] + step
        forward = backward * variance[1:] / variance[:-1]
    return VARIANCES[0] * np.prod(forward), variance[0], forward, backward


def sigma_paths(chain, variance):
    """Paths of an affine chain, in pairs ±, of exactly its covariance: √m of one of the m independent draws behind a path, 0 of the others."""
    n = chain.times.size - 1
    noise = jnp.concatenate([jnp.eye(n + 1), -jnp.eye(n + 1)]) * jnp.sqrt(n + 1.0)
    start = jnp.sqrt(variance) * noise[:, -1]

    def run(start, noise):
        def step(x, k):
            mean, spread = chain.moments(k, x[None], jnp.zeros(1))
            after = mean[0] + jnp.sqrt(spread) * noise[k]
            return after, after

        path = jax.lax.scan(step, start, jnp.arange(n), reverse=not chain.forward)[1]
        return jnp.concatenate([start[None], path] if chain.forward else [path, start[None]])

    return jax.vmap(run)(start, noise)[..., None]


def least_squares(key, model, paths):
    """The minimiser of a quadratic loss over the network, by one Newton step (unused rows of the parameters stay)."""
    flat, unravel = jax.flatten_util.ravel_pytree(model.network)
    loss = lambda flat: SimplifiedBridgeLoss()(eqx.tree_at(lambda m: m.network, model, unravel(flat)), paths, key)[0]  # noqa: E731
    return eqx.tree_at(lambda m: m.network, model, unravel(flat - jnp.linalg.pinv(jax.hessian(loss)(flat)) @ jax.grad(loss)(flat)))


def affine_pair(n, make):
    network, times = Affine(jnp.ones(n + 1), jnp.zeros(n + 1)), jnp.linspace(0.0, 1.0, n + 1)
    return make(network, times, True), make(network, times, False)


MAKE = {
    "mean": lambda network, times, forward: MeanTransition(network, 1.0, times, forward),
    "terminal": lambda network, times, forward: TerminalTransition(network, Brownian(1.0), times, forward),
    "flow": lambda network, times, forward: FlowTransition(network, 1.0, times, forward),
}


def rounds_of(make, n, num_rounds):
    """Exact rounds with the library's losses, kernels and alternation: Cov(x₀, x_N) and Var(x_N) of the forward chain, and all gains."""
    forward, backward = affine_pair(n, MAKE[make])
    start, _ = affine_pair(n, MAKE["mean"])
    learn_backward = lambda key, model, other: least_squares(key, model, sigma_paths(other, VARIANCES[0]))  # noqa: E731
    learn_forward = lambda key, model, other: least_squares(key, model, sigma_paths(other, VARIANCES[1]))  # noqa: E731
    # the first forward chain is the reference, whatever the parametrisation
    backward = learn_backward(jax.random.key(0), backward, start)
    forward = learn_forward(jax.random.key(0), forward, backward)
    rounds = Alternation(forward, backward, learn_forward, learn_backward)
    if num_rounds > 1:
        forward, backward = rounds.models(iterate(jax.random.key(1), rounds.step, rounds.init(), num_rounds - 1))
    paths = sigma_paths(forward, VARIANCES[0])[..., 0]
    return jnp.mean(paths[:, 0] * paths[:, -1]), jnp.mean(paths[:, -1] ** 2), forward.network.gain, backward.network.gain


def test_exact_rounds_are_the_recursion_of_variances():
    cross, _, forward, backward = jax.jit(lambda: rounds_of("mean", 4, 3))()
    expected = fitted_rounds(4, 3)
    np.testing.assert_allclose(cross, expected[0], rtol=1e-9)
    np.testing.assert_allclose(forward[:-1], expected[2], rtol=1e-9)
    np.testing.assert_allclose(backward[1:], expected[3], rtol=1e-9)


def test_bias_is_of_order_one_over_n():
    """Cov(x₀, x_N) is off by -4.5 %, -1.1 %, -0.6 % for N = 16, 128, 256, and the generated variance of x₀ by 4.9 %, .65 %, .33 %."""
    truth = exact_plan(1.0)
    np.testing.assert_allclose(truth, 1.08114, atol=5e-6)
    results = {n: fitted_rounds(n, 60) for n in (16, 128, 256)}
    cross = {n: r[0] / truth - 1 for n, r in results.items()}
    start = {n: r[1] / VARIANCES[0] - 1 for n, r in results.items()}
    np.testing.assert_allclose([cross[n] for n in cross], [-0.045, -0.011, -0.006], atol=6e-4)
    np.testing.assert_allclose([start[n] for n in start], [0.049, 0.0065, 0.0033], atol=6e-4)
    assert abs(cross[256] / cross[128] - 0.55) < 0.1


def reparametrised_rounds(n, rounds, epsilon=1.0):
    """Cov(x₀, x_N) and the variance of x_N of the forward chain, where each network is the mean of the far end, g x."""
    t = np.linspace(0, 1, n + 1)
    gain, noise = np.ones(n), np.full(n, epsilon / n)
    h = np.diff(t)
    for _ in range(rounds):
        variance = [VARIANCES[0]]
        for k in range(n):
            variance.append(gain[k] ** 2 * variance[k] + noise[k])
        g = VARIANCES[0] * np.cumprod(gain) / np.array(variance[1:])
        gain, noise = 1 + h / t[1:] * (g - 1), epsilon * h * t[:-1] / t[1:]
        variance = [VARIANCES[1]]
        for k in reversed(range(n)):
            variance.insert(0, gain[k] ** 2 * variance[0] + noise[k])
        g = VARIANCES[1] * np.cumprod(gain[::-1])[::-1] / np.array(variance[:-1])
        gain, noise = 1 + h / (1 - t[:-1]) * (g - 1), epsilon * h * (1 - t[1:]) / (1 - t[:-1])
    variance = VARIANCES[0]
    for k in range(n):
        variance = gain[k] ** 2 * variance + noise[k]
    return VARIANCES[0] * np.prod(gain), variance


@pytest.mark.parametrize("make", ["terminal", "flow"])
def test_exact_reparametrised_rounds_are_their_recursion(make):
    cross, variance, _, _ = jax.jit(lambda: rounds_of(make, 3, 2))()
    np.testing.assert_allclose([cross, variance], reparametrised_rounds(3, 2), rtol=1e-9)


def test_bias_of_the_reparametrised_chains():
    """A mean for the far end leaves its spread out: the variance of x_N is low by about log(N)/N. The numbers of the module's docstring."""
    truth = np.array([[exact_plan(1.0)], [VARIANCES[1]]])
    covariance, variance = np.array([reparametrised_rounds(n, 12) for n in (16, 128, 256)]).T / truth - 1
    np.testing.assert_allclose(covariance, [0.0148, 0.0014, 0.0007], atol=6e-5)
    np.testing.assert_allclose(variance, [-0.0886, -0.0190, -0.0108], atol=6e-5)


@pytest.mark.parametrize("make", ["terminal", "flow"])
@pytest.mark.parametrize("forward", [True, False])
def test_steps_to_the_far_end_are_the_papers(make, forward):
    """Mean x + γ/(time left) (x̂ - x) and variance 2γ (time left after)/(time left), in the paper's clock: γ = ε Δt/2, γ̄_N = ε/2."""
    epsilon, times = 0.7, jnp.array([0.0, 0.2, 0.5, 0.6, 1.0])
    gammas = np.diff(times) * epsilon / 2
    bar = np.concatenate([[0], np.cumsum(gammas)])
    x = jnp.array([0.4, -1.1])
    far = lambda t, x, z: jnp.sin(x) + t + z  # noqa: E731
    clock = lambda t: 1 - t if forward else t  # noqa: E731
    flow = lambda t, x, z: (far(t, x, z) - x) / clock(t)  # noqa: E731
    chain = {
        "terminal": TerminalTransition(far, Brownian(epsilon), times, forward),
        "flow": FlowTransition(flow, epsilon, times, forward),
    }[make]
    for k in range(4):
        mean, variance = chain.moments(jnp.array(k), x, 0.1 * x)
        i = k if forward else k + 1
        before, after = (bar[-1] - bar[k], bar[-1] - bar[k + 1]) if forward else (bar[k + 1], bar[k])
        np.testing.assert_allclose(mean, x + gammas[k] / before * (far(times[i], x, 0.1 * x) - x), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(variance, 2 * gammas[k] * after / before, rtol=1e-12, atol=1e-14)
        path = jnp.arange(10.0).reshape(5, 2) ** 2
        end = path[-1 if forward else 0]
        target = end if make == "terminal" else (end - path[i]) / clock(times[i])
        np.testing.assert_allclose(chain.target(jnp.array(k), path), target, rtol=1e-12)


def test_first_round_is_denoising():
    """On Brownian paths from a mixture, L_B has no gradient at B = the bridge's mean to the exact denoiser, E[x_k | x_{k+1}], and one at 1.05 B."""
    means, times, epsilon = jnp.array([-1.0, 1.5]), jnp.linspace(0.0, 1.0, 6), 0.8

    def denoiser(t, x, z):
        variance = 0.1 + epsilon * t
        share = jax.nn.softmax(-((x[0] - means) ** 2) / (2 * variance))
        return jnp.sum(share * (means + 0.1 / variance * (x[0] - means)))[None]

    exact = TerminalTransition(denoiser, Brownian(epsilon), times, False)

    def network(scale, theta):
        def call(t, x, z):
            k = jnp.round(t * 5).astype(int) - 1
            mean = exact.moments(k, x, z)[0]
            return scale * mean + theta @ jnp.stack([mean, jnp.sin(x), t * jnp.ones(1)])

        return call

    class Law(eqx.Module):
        def sample(self, key, n):
            key_mean, key_noise = jax.random.split(key)
            return (jax.random.choice(key_mean, means, (n,)) + jnp.sqrt(0.1) * jax.random.normal(key_noise, (n,)))[:, None]

    brownian = MeanTransition(lambda t, x, z: x, epsilon, times)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0), out_axes=1)
    @partial(jax.vmap, in_axes=(0, None))
    def gradients(scale, key):
        paths = SimulatedPaths(Law(), 256)(brownian)(key, 0)
        loss = lambda theta: SimplifiedBridgeLoss()(MeanTransition(network(scale, theta), epsilon, times, False), paths, key)[0]  # noqa: E731
        return jax.grad(loss)(jnp.zeros(3))

    right, wrong = gradients(jnp.array([1.0, 1.05]), jax.random.split(jax.random.key(0), 36))
    z_score = lambda draws: jnp.mean(draws, 0) / (jnp.std(draws, 0) / 6)  # noqa: E731
    assert jnp.abs(z_score(right)).max() < 4
    assert z_score(wrong)[0] > 5


def test_learning_from_samples_as_one_scan():
    """Alternation of two optimiser runs inside `iterate` finds the exact rounds' plan; times and ε stay as they are."""
    n, keys = 4, jax.random.split(jax.random.key(0), 3)
    laws = [Samples(jnp.sqrt(v) * jax.random.normal(key, (4000, 1))) for v, key in zip(VARIANCES, keys, strict=False)]
    laws = [Samples((law.points - law.points.mean()) / law.points.std() * jnp.sqrt(v)) for law, v in zip(laws, VARIANCES, strict=True)]
    forward, backward = affine_pair(n, MAKE["mean"])
    with jax.numpy_dtype_promotion("standard"):
        optimiser = optax.adamw(optax.cosine_decay_schedule(0.1, 60), weight_decay=0.0)
        learn_backward, learn_forward = (Learner(SimplifiedBridgeLoss(), optimiser, SimulatedPaths(law, 256), 60) for law in laws)
        rounds = Alternation(forward, backward, learn_forward, learn_backward)
        state = jax.jit(lambda key: iterate(key, rounds.step, rounds.init(), 3))(keys[2])
    forward, backward = rounds.models(state)
    expected = fitted_rounds(n, 3)
    np.testing.assert_allclose(forward.times, jnp.linspace(0.0, 1.0, n + 1))
    # each gain is a regression of 256 fresh pairs averaged over the last steps of a decaying rate
    np.testing.assert_allclose(forward.network.gain[:-1], expected[2], atol=0.04)
    np.testing.assert_allclose(backward.network.gain[1:], expected[3], atol=0.04)


def test_paths_and_pairs_run_in_time_order_and_keep_the_dtype():
    times = jnp.linspace(0.0, 1.0, 4)
    law = Samples(jnp.arange(12.0, dtype=jnp.float32).reshape(6, 2))
    for forward in (True, False):
        chain = MeanTransition(lambda t, x, z: x + 100, 0.0, times, forward)
        make = jax.jit(lambda key, chain=chain: (SimulatedPaths(law, 3)(chain)(key, 0), SimulatedPairs(law, 3)(chain)(key, 0)))
        paths, (x0, x1) = make(jax.random.key(0))
        assert (paths.shape, paths.dtype) == ((3, 4, 2), jnp.float32)
        np.testing.assert_allclose(paths - paths[:, :1], jnp.arange(4.0)[:, None] * (100 if forward else -100) * jnp.ones((3, 1, 2)))
        np.testing.assert_allclose(x0, paths[:, 0])
        np.testing.assert_allclose(x1, paths[:, -1])
        loss, aux = eqx.filter_eval_shape(SimplifiedBridgeLoss(), chain, paths, jax.random.key(1))
        assert (loss.dtype, aux) == (jnp.float32, {})
    # a forward network on backward paths: every error is (x + 100) - (x - 100)
    np.testing.assert_allclose(SimplifiedBridgeLoss()(MeanTransition(lambda t, x, z: x + 100, 0.0, times), paths, jax.random.key(1))[0], 2 * 200.0**2)
    with pytest.raises(ValueError, match=r"\(batch, 4, \*example\)"):
        SimplifiedBridgeLoss()(chain, paths[:, 1:], jax.random.key(1))
    with pytest.raises(ValueError, match="increase"):
        MeanTransition(lambda t, x, z: x, 1.0, times[::-1])
    with pytest.raises(ValueError, match="epsilon"):
        FlowTransition(lambda t, x, z: x, 0.0, times)
