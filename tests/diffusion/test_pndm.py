"""PNDM: its transfer map, diffusers' numbers, order, the calls it makes, limits, both drivers."""

import functools
import json
import pathlib

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import AffinePath, DenoiserTerm, FlowMatchingPath, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, Heun, log_snr_grid, uniform_grid
from ergodax.diffusion.pndm import PNDM, WarmUp, transfer
from ergodax.diffusion.solver import clocks
from ergodax.testing import convergence_order


F_PNDM, S_PNDM, PLMS = PNDM(), PNDM(2, WarmUp.improved_euler()), PNDM(4, WarmUp.improved_euler())
EULER = PNDM(1, WarmUp(0, (), (1.0,)))
GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "pndm.npz")
CASES = json.loads(str(GOLDEN["cases"]))
MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3]))


@eqx.filter_jit
def solve(path, solver, grid, y0, mixture=MIXTURE):
    return integrate(DenoiserTerm(mixture.denoiser(path), path, grid), solver, y0)


def test_transfer_map():
    """The paper's formula; DDIM; exact for a constant noise over any number of steps."""
    path = VPPath()
    term = DenoiserTerm(MIXTURE.denoiser(path), path, jnp.array([0.3, 0.55, 0.9]))
    x, e = jnp.array([0.3, -0.8]), jnp.array([1.2, 0.4])
    bar_t, bar_s = path.alpha(0.3) ** 2, path.alpha(0.9) ** 2
    denominator = jnp.sqrt(bar_t) * (jnp.sqrt((1 - bar_s) * bar_t) + jnp.sqrt((1 - bar_t) * bar_s))
    expected = jnp.sqrt(bar_s / bar_t) * x - (bar_s - bar_t) * e / denominator
    direct = transfer(clocks(term, 0.0, 2.0, x), x, e)
    np.testing.assert_allclose(direct, expected, atol=1e-12)
    twice = transfer(clocks(term, 1.0, 2.0, x), transfer(clocks(term, 0.0, 1.0, x), x, e), e)
    np.testing.assert_allclose(twice, direct, atol=1e-12)
    data = (x - path.sigma(0.3) * e) / path.alpha(0.3)
    np.testing.assert_allclose(direct, path.alpha(0.9) * data + path.sigma(0.9) * e, atol=1e-12)


class TablePath(AffinePath):
    """diffusers' table of α² as a path in steps of one training timestep; behind its end the last entry."""

    alphas_cumprod: jax.Array

    def log_alpha(self, t):
        return 0.5 * jnp.log(self.alphas_cumprod[jnp.round(jnp.asarray(t)).astype(int)])

    def log_sigma(self, t):
        return 0.5 * jnp.log1p(-self.alphas_cumprod[jnp.round(jnp.asarray(t)).astype(int)])

    def alpha(self, t):
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t):
        return jnp.exp(self.log_sigma(t))

    def time(self, log_snr):
        raise NotImplementedError


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_diffusers(case):
    """F-PNDM and PLMS at the same noise levels, to rounding."""
    weights, means, stds, table = (GOLDEN[f"target/{case['target']}/{field}"] for field in ("weights", "means", "stds", "alphas_cumprod"))
    start, final, timesteps = (jnp.asarray(GOLDEN[f"{case['name']}/{field}"]) for field in ("start", "final", "timesteps"))
    grid = len(table) - 2 - jnp.append(timesteps, 2 * timesteps[-1] - timesteps[-2])
    mixture = GaussianMixture(weights, means, np.broadcast_to(stds[:, None] ** 2, means.shape))
    actual = solve(TablePath(jnp.asarray(table)), PLMS if case["skip_prk_steps"] else F_PNDM, grid, start, mixture)
    np.testing.assert_allclose(actual, final, rtol=0, atol=1e-10)


@functools.cache
def fine_solution(path, grid):
    y0 = path.sigma(0.1) * jax.random.normal(jax.random.key(0), (64, 2))
    return y0, solve(path, Heun(), grid(4096), y0)


def equal_steps(n):
    return uniform_grid(n, 0.1, 0.95)


def equal_log_snr(n):
    return log_snr_grid(VPPath(), n, 0.1, 0.95)


@pytest.mark.parametrize(
    ("path", "solver", "grid"),
    [
        (VPPath(), F_PNDM, equal_steps),
        (VPPath(), S_PNDM, equal_steps),
        (VPPath(), PLMS, equal_steps),
        (VPPath(), F_PNDM, equal_log_snr),
        (FlowMatchingPath(), F_PNDM, equal_steps),
    ],
    ids=["F-PNDM", "S-PNDM", "PLMS", "log-SNR", "flow"],
)
def test_order(path, solver, grid):
    counts = (64, 128, 256, 512)
    y0, fine = fine_solution(path, grid)
    errors = [float(jnp.sqrt(jnp.mean((solve(path, solver, grid(n), y0) - fine) ** 2))) for n in counts]
    assert abs(convergence_order(counts, errors) - solver.order(None)) < 0.2, errors


def test_one_gradient_is_ddim():
    path, y0 = VPPath(), jax.random.normal(jax.random.key(1), (16, 2))
    grid = uniform_grid(20, 0.0, 1.0)
    assert EULER.order(None) == 1
    np.testing.assert_allclose(solve(path, EULER, grid, y0), solve(path, DDIM(), grid, y0), atol=1e-12)


@pytest.mark.parametrize(("solver", "calls"), [(F_PNDM, 12 + 5), (S_PNDM, 2 + 7), (PLMS, 2 + 7)], ids=("F-PNDM", "S-PNDM", "PLMS"))
def test_number_of_network_calls(solver, calls):
    """Of 8 steps, for one example and under vmap."""
    path, count = VPPath(), [0]

    def denoised(t, x, args):
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
        return jnp.tanh(x)

    def run(x):
        return integrate(DenoiserTerm(denoised, path, uniform_grid(8, 0.1, 0.9)), solver, x)

    y0 = jnp.ones((3, 2))
    jax.block_until_ready(jax.jit(run)(y0[0]))
    jax.effects_barrier()
    assert count[0] == calls
    jax.block_until_ready(jax.jit(jax.vmap(run))(y0))
    jax.effects_barrier()
    assert count[0] == 2 * calls  # the callback has no batched input, so it runs once per call of the batched network


def test_both_drivers_agree():
    path, n = VPPath(), 9
    term, y0 = DenoiserTerm(MIXTURE.denoiser(path), path, uniform_grid(n, 0.0, 0.99)), jax.random.normal(jax.random.key(1), (32, 2))

    @eqx.filter_jit
    def both(term, y0):
        steps = dfx.StepTo(jnp.arange(n + 1.0))
        other = dfx.diffeqsolve(term, F_PNDM, 0.0, float(n), None, y0, stepsize_controller=steps, adjoint=dfx.ForwardMode())
        return integrate(term, F_PNDM, y0), other.ys[0]

    np.testing.assert_allclose(*both(term, y0), rtol=0, atol=1e-12)


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="`max_order` must be 1, 2, 3 or 4, got 5"):
        PNDM(5)
    with pytest.raises(ValueError, match="`weights` must be one more than the 1 `nodes`, got 1"):
        WarmUp(1, (1.0,), (1.0,))
