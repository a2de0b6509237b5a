"""AutoLRS: the Gaussian process in NumPy, ask and tell, the best constant rate of a noisy quadratic, exact restoring, divergence, and the cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.schedules import RateSearch, autolrs_stage, gaussian_process, stage_lengths, stages_schedule, train_autolrs


def test_gaussian_process():
    """Mean, deviation and choice of length and noise, by dense linear algebra; places that were not told change nothing."""
    x, y = np.array([0.5, 0.0, 1.0, 0.3, 0.62, 0.9]), np.array([1.0, 3.0, 2.5, 1.4, 0.9, 7.0])
    told, candidates = np.array([1, 1, 1, 1, 1, 0], bool), np.linspace(0, 1, 11)

    def kernel(a, b, length):
        r = np.sqrt(5) * np.abs(np.subtract.outer(a, b)) / length
        return (1 + r + r**2 / 3) * np.exp(-r)

    known, values = x[told], (y[told] - y[told].mean()) / y[told].std()
    found = []
    for length in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
        for noise in (1e-4, 1e-2):
            inverse = np.linalg.inv(kernel(known, known, length) + noise * np.eye(5))
            scale, across = values @ inverse @ values / 5, kernel(candidates, known, length)
            likelihood = -2.5 * np.log(scale) + np.linalg.slogdet(inverse)[1] / 2
            variance = scale * (1 - np.einsum("ij,jk,ik->i", across, inverse, across))
            found.append((likelihood, across @ inverse @ values, np.sqrt(variance)))
    _, mean, deviation = max(found, key=lambda one: one[0])
    ours = jax.jit(gaussian_process)(x, y, told, candidates)
    np.testing.assert_allclose(ours[0], y[told].mean() + y[told].std() * mean, rtol=1e-8)
    np.testing.assert_allclose(ours[1], y[told].std() * deviation, rtol=1e-6, atol=1e-8)


def test_ask_and_tell():
    """From a host's loop: the middle first, then where least is known, never twice; divergence becomes the penalty."""
    search = RateSearch(1e-3, 1e1, num_probes=6, num_candidates=9)
    ask, tell = jax.jit(search.ask), jax.jit(search.tell)
    probes, asked = search.init(), []
    for score in (2.0, jnp.nan, 1.5, jnp.inf, 1e9, 1.7):
        asked.append(float(ask(probes)))
        probes = tell(probes, jnp.asarray(score))
    assert len(set(asked)) == 6
    np.testing.assert_allclose(asked[0], 0.1)
    np.testing.assert_allclose(sorted(asked[1:3]), [1e-3, 10.0])
    np.testing.assert_array_equal(probes.scores, [2.0, 1e6, 1.5, 1e6, 1e6, 1.7])
    np.testing.assert_allclose(search.rates(probes), asked)
    assert float(search.best(probes)) == asked[2]
    assert RateSearch(jnp.float32(1e-3), jnp.float32(1.0)).init().scores.dtype == jnp.float32


EIGENVALUE = 0.02


def exact(second_moment, rate, steps):
    """One curvature: the mean loss by its second moment, x² = 1, noise variance 0.01 λ, floor 0.1."""

    def one(moment, _):
        moment = (1 - rate * EIGENVALUE) ** 2 * moment + rate**2 * 0.01 * EIGENVALUE
        return moment, 0.1 + EIGENVALUE * moment / 2

    return jax.lax.scan(one, second_moment, length=steps)


def test_finds_the_best_constant_rate():
    """τ = 200 over rates 1e-2 to 1e2: with κ = 1 within a factor 1.5 of the best and 0.01 % in the loss; with 1e6 within 2.2."""
    start = jnp.ones(())

    @jax.jit
    @jax.vmap
    def stage(kappa):
        return autolrs_stage(exact, start, RateSearch(1e-2, 1e2, kappa), 200)[1]

    grid = jnp.geomspace(1e-2, 1e2, 4001)
    losses = jax.jit(jax.vmap(lambda rate: exact(start, rate, 200)[1][-1]))(grid)
    found = stage(jnp.array([1.0, 1e6]))
    factors = np.exp(np.abs(np.log(found.rate / grid[losses.argmin()])))
    assert (factors < [1.5, 2.2]).all()
    assert found.losses[0, -1] / losses.min() - 1 < 1e-4
    np.testing.assert_array_equal(found.rate, jnp.take_along_axis(found.rates, found.forecasts.argmin(axis=1)[:, None], axis=1)[:, 0])
    # The scores are the losses after 200 steps, known after 20: exponentials but at a rate of 100, where (1 - ηλ)² = 1. The slowest ones decay more
    # slowly than any that is fitted.
    after = jax.jit(jax.vmap(jax.vmap(lambda rate: exact(start, rate, 200)[1][-1])))(found.rates)
    decaying = np.asarray(found.rates) < 99
    np.testing.assert_allclose(found.forecasts[decaying], after[decaying], rtol=2e-3)
    assert found.search_steps == 200


def keyed(state, rate, steps):
    """A training whose state has a key, a count and weights; it diverges above a rate of 1."""

    def one(state, _):
        key, count, w = state
        key, use = jax.random.split(key)
        w = w - rate * (w + 0.01 * jax.random.normal(use))
        return (key, count + 1, w), jnp.where(rate > 1, jnp.nan, 0.5 + w**2)

    return jax.lax.scan(one, state, length=steps)


def test_stages():
    """The state after the search is that of the start, to the bit; k τ' steps are counted; diverged probes score 1e6; then validation."""
    start = (jax.random.key(5), jnp.int32(0), jnp.ones(()))
    search = RateSearch(1e-3, 1e1, num_probes=4, num_candidates=33)

    def validate(state, rate, steps):
        state, losses = keyed(state, rate, steps)
        return state, 3 + losses[:: steps // 4][:4]

    def last(losses, time):
        return losses[-1] + 0 * time

    def run(state):
        return train_autolrs(keyed, state, search, 200, first=40, longest=80, validate=validate, forecast=last, forecast_validation=last)

    (key, count, w), stages = jax.jit(run)(start)
    assert [stage.steps for stage in stages] == [40, 80, 80]
    assert [stage.probe_steps for stage in stages] == [4, 8, 8]
    assert [stage.search_steps for stage in stages] == [16, 32, 32]
    assert [bool(stage.forecasts.min() > 3) for stage in stages] == [False, False, True]
    again = start
    for stage in stages:
        again, losses = jax.jit(keyed, static_argnums=2)(again, stage.rate, stage.steps)
        np.testing.assert_allclose(losses, stage.losses, rtol=1e-12)
        diverged = np.asarray(stage.rates) > 1
        assert diverged.any()
        assert (np.asarray(stage.forecasts)[diverged] == 1e6).all()
        assert (np.asarray(stage.forecasts)[~diverged] < 10).all()
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(again[0]))
    assert count == again[1] == 200
    np.testing.assert_allclose(w, again[2], rtol=1e-12)
    schedule = stages_schedule(stages)
    rates = [float(stage.rate) for stage in stages]
    np.testing.assert_array_equal(schedule(jnp.array([0, 39, 40, 119, 120, 199, 200, 500])), [rates[i] for i in (0, 0, 1, 1, 2, 2, 2, 2)])
    assert stages_schedule(stages[:1])(7) == rates[0]


def test_stage_lengths():
    assert stage_lengths(30_000) == (1000, 2000, 4000, 8000, 8000, 7000)
    assert stage_lengths(500) == (500,)
    assert stage_lengths(70, first=10, longest=15) == (10, 15, 15, 15, 15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RateSearch(0.0, 1.0), r"`low` must lie in \(0, inf\), got 0"),
        (lambda: RateSearch(1.0, 0.5), r"`high` must lie in \(1, inf\), got 0.5"),
        (lambda: RateSearch(0.1, 1.0, kappa=-1.0), "`kappa` must lie in .* got -1"),
        (lambda: RateSearch(0.1, 1.0, num_candidates=5), "`num_candidates` must be an integer of at least 10, got 5"),
        (lambda: autolrs_stage(keyed, None, RateSearch(0.1, 1.0), 4, probe_steps=5), "`steps` must be an integer of at least 5, got 4"),
        (lambda: stage_lengths(100, first=9, longest=8), "`longest` must be an integer of at least 9, got 8"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
