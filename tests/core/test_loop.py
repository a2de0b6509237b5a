"""The drivers: what they return, what they refuse, and that they change nothing."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import DenoiserTerm, FlowMatchingPath, VPPath, integrate, iterate, with_noise
from ergodax.data import eight_gaussians
from ergodax.diffusion import DDIM, Ancestral, Heun, uniform_grid
from ergodax.testing import assert_mean, count_traces


PATH, MIXTURE = VPPath(), eight_gaussians()


def term(num_steps=8, path=PATH):
    return DenoiserTerm(MIXTURE.denoiser(path), path, uniform_grid(num_steps))


def test_save_is_stacked_and_ends_with_the_result():
    y0 = jax.random.normal(jax.random.key(0), (5, 2))
    y, (t, ys) = integrate(term(), DDIM(), y0, save=lambda t, y: (t, y))
    assert ys.shape == (8, 5, 2)
    np.testing.assert_array_equal(ys[-1], y)
    np.testing.assert_allclose(t, np.arange(1, 9) / 8)
    np.testing.assert_array_equal(integrate(term(), DDIM(), y0), y)


def test_stock_terms_in_real_time():
    times = jnp.linspace(0.0, 2.0, 101)
    y = integrate(dfx.ODETerm(lambda t, y, a: -a * y), dfx.Dopri5(), jnp.ones(3), 0.5, times=times)
    np.testing.assert_allclose(y, np.exp(-1.0), rtol=1e-11)


def test_stock_explicit_solvers_see_the_probability_flow():
    """Tsit5 on the term solves the same ODE as Heun with many steps, on a path whose velocity is finite at both ends of the grid."""
    y0 = jax.random.normal(jax.random.key(0), (64, 2))
    make = lambda n: DenoiserTerm(MIXTURE.denoiser(PATH), PATH, uniform_grid(n, 0.0, 0.98))  # noqa: E731
    fine = integrate(make(2000), Heun(), y0)
    np.testing.assert_allclose(jnp.median(jnp.abs(integrate(make(400), dfx.Tsit5(), y0) - fine)), 0, atol=2e-6)


def test_gradient_through_the_solve():
    """Reverse mode equals a central difference, to the initial state and to a parameter of the path."""

    def total(y0, beta_max):
        path = VPPath(0.1, beta_max)
        return jnp.sum(integrate(DenoiserTerm(MIXTURE.denoiser(path), path, uniform_grid(6, 0.0, 0.9)), Heun(), y0) ** 2)

    y0, beta = jnp.array([0.4, -0.2]), jnp.asarray(10.0)
    gradient = jax.grad(total, argnums=(0, 1))(y0, beta)
    h = 1e-5
    np.testing.assert_allclose(gradient[1], (total(y0, beta + h) - total(y0, beta - h)) / (2 * h), rtol=1e-6)
    step = jnp.array([h, 0.0])
    np.testing.assert_allclose(gradient[0][0], (total(y0 + step, beta) - total(y0 - step, beta)) / (2 * h), rtol=1e-6)


def test_grid_sweeps_without_retrace():
    counted, traces = count_traces(lambda end, y: integrate(DenoiserTerm(MIXTURE.denoiser(PATH), PATH, uniform_grid(6, 0.0, end)), DDIM(), y))
    run = jax.jit(jax.vmap(counted, in_axes=(0, None)))
    ends, y0 = jnp.array([0.8, 0.95]), jnp.ones(2)
    together = run(ends, y0)
    run(ends + 0.01, y0)
    assert traces() == 1
    alone = [integrate(DenoiserTerm(MIXTURE.denoiser(PATH), PATH, uniform_grid(6, 0.0, end)), DDIM(), y0) for end in ends]
    np.testing.assert_allclose(together, alone, atol=1e-12)


def test_noise_is_fresh_each_step_and_unit():
    model = term(400)
    draws = [with_noise(model, jax.random.key(3), jnp.zeros(200)).terms[1].contr(float(s), float(s + 1)) for s in range(50)]
    flat = np.concatenate(draws)
    assert_mean(flat, 0.0)
    assert_mean(flat**2, 1.0)
    assert_mean(draws[0] * draws[1], 0.0)


def test_going_back_in_time_must_be_meant():
    back = jnp.array([0.0, 0.5, 0.3, 0.9])
    with pytest.raises(ValueError, match=r"entries 1 and 2 are 0\.5 and 0\.3"):
        DenoiserTerm(MIXTURE.denoiser(PATH), PATH, back)
    restarted = DenoiserTerm(MIXTURE.denoiser(PATH), PATH, back, restarts=True)
    y = integrate(restarted, DDIM(), jnp.ones(2))
    # Out to 0.5, back to 0.3 and on: exactly the DDIM steps between those times.
    first = integrate(DenoiserTerm(MIXTURE.denoiser(PATH), PATH, jnp.array([0.0, 0.5])), DDIM(), jnp.ones(2))
    second = integrate(DenoiserTerm(MIXTURE.denoiser(PATH), PATH, jnp.array([0.5, 0.3]), restarts=True), DDIM(), first)
    np.testing.assert_allclose(y, integrate(DenoiserTerm(MIXTURE.denoiser(PATH), PATH, jnp.array([0.3, 0.9])), DDIM(), second), atol=1e-13)


@pytest.mark.parametrize("grid", [jnp.zeros(3), jnp.array([0.5]), jnp.zeros((2, 2)), jnp.array([0.0, jnp.nan, 1.0])])
def test_bad_grids(grid):
    with pytest.raises((ValueError, TypeError)):
        DenoiserTerm(MIXTURE.denoiser(PATH), PATH, grid)


def test_refusals_say_what_to_do():
    y0, ode = jnp.ones(2), dfx.ODETerm(lambda t, y, a: y)
    with pytest.raises(ValueError, match="`times` does not go with a DenoiserTerm"):
        integrate(term(), DDIM(), y0, times=jnp.linspace(0, 1, 3))
    with pytest.raises(ValueError, match="`times` is needed"):
        integrate(ode, dfx.Euler(), y0)
    with pytest.raises(ValueError, match="must increase strictly"):
        integrate(ode, dfx.Euler(), y0, times=jnp.array([0.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match="`key` goes with a DenoiserTerm"):
        integrate(ode, dfx.Euler(), y0, times=jnp.array([0.0, 1.0]), key=jax.random.key(0))
    with pytest.raises(ValueError, match="Ancestral is stochastic: it needs `key`"):
        integrate(term(), Ancestral(), y0)


def test_exact_indices_give_exact_times():
    model = DenoiserTerm(MIXTURE.denoiser(FlowMatchingPath()), FlowMatchingPath(), uniform_grid(7))
    np.testing.assert_array_equal([model.time(float(s)) for s in range(8)], model.grid)
    np.testing.assert_allclose(model.time(2.25), 0.75 * model.grid[2] + 0.25 * model.grid[3])


def test_iterate():
    """A kernel that records what it does: keys differ, infos are those of the right steps."""

    def step(key, state):
        draw = jax.random.normal(key)
        return 0.5 * state + draw, draw

    key, start = jax.random.key(0), jnp.zeros(())
    state, (states, draws) = iterate(key, step, start, 12, save=lambda state, info: (state, info))
    expected = [start]
    for draw in draws:
        expected.append(0.5 * expected[-1] + draw)
    np.testing.assert_allclose(states, expected[1:], rtol=1e-12)
    assert len(np.unique(draws)) == 12
    end, thinned = iterate(key, step, start, 12, save=lambda state, info: state, every=4)
    np.testing.assert_allclose(thinned, states[3::4], rtol=1e-12)
    np.testing.assert_allclose([end, iterate(key, step, start, 12)], [state, state], rtol=1e-12)
    with pytest.raises(ValueError, match="`every` must divide `num_steps`, got 5 and 12"):
        iterate(key, step, start, 12, every=5)
