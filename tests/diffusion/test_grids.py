"""Grids: ends, spacing, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import CosinePath, EDMPath, VPPath
from ergodax.diffusion import karras_grid, log_snr_grid, quadratic_grid, uniform_grid


def test_uniform_and_quadratic():
    np.testing.assert_allclose(uniform_grid(4, 0.1, 0.9), [0.1, 0.3, 0.5, 0.7, 0.9])
    grid = quadratic_grid(4, 0.0, 1.0)
    np.testing.assert_allclose(1 - grid, [1, 9 / 16, 1 / 4, 1 / 16, 0])
    np.testing.assert_allclose(quadratic_grid(7, 0.05, 0.9)[jnp.array([0, -1])], [0.05, 0.9], rtol=0)


@pytest.mark.parametrize("path", [VPPath(), CosinePath()], ids=repr)
def test_log_snr_is_equally_spaced(path):
    grid = log_snr_grid(path, 10, 0.01, 0.95)
    assert grid[0] == 0.01
    assert grid[-1] == 0.95
    steps = np.diff(path.log_snr(grid))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-10)


def test_karras_is_the_papers():
    path, n, rho = EDMPath(80.0), 18, 7.0
    i = np.arange(n)
    sigma = (80.0 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho
    grid = karras_grid(path, n)
    assert grid.shape == (n + 1,)
    np.testing.assert_allclose(path.sigma(grid), np.append(sigma, 0.0), atol=1e-12)
    vp = VPPath()
    levels = karras_grid(vp, n, 0.02, 50.0)[:-1]
    np.testing.assert_allclose(vp.sigma(levels)[0] / vp.alpha(levels)[0], 50.0, rtol=1e-9)


def test_shape_parameters_sweep():
    rhos = jnp.array([1.0, 3.0, 7.0])
    together = jax.jit(jax.vmap(lambda rho: karras_grid(EDMPath(), 6, rho=rho)))(rhos)
    np.testing.assert_allclose(together, [karras_grid(EDMPath(), 6, rho=float(rho)) for rho in rhos], atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform_grid(0), "`num_steps` must be an integer of at least 1, got 0"),
        (lambda: uniform_grid(-3), "got -3"),
        (lambda: uniform_grid(4, -0.1), r"`start` must lie in \[0, 1\], got -0.1"),
        (lambda: log_snr_grid(VPPath(), 4, 0.1, 1.5), "`end`"),
        (lambda: karras_grid(EDMPath(), 4, 0.0), "`sigma_min`"),
        (lambda: karras_grid(EDMPath(), 4, 2.0, 1.0), r"`sigma_max` must lie in \(2, inf\), got 1.0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
