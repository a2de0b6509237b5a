"""ergodax's samplers against k-diffusion's and diffusers', on Gaussian mixtures whose denoiser is exact: same noise levels, same start, same noise.

The peers ran on a denoiser written in torch, ours run on `GaussianMixture`'s, so that one is checked too. `samplers.npz` is written by
`make_samplers.py` beside it, which says what was run. Everything is in float64.
"""

import json
import pathlib

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import AffinePath, DenoiserTerm, EDMPath, FlowMatchingPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, Ancestral, DPMSolverPP2M, Heun, karras_grid


GOLDEN = np.load(pathlib.Path(__file__).with_name("samplers.npz"))
CASES = {case["name"]: case for case in json.loads(str(GOLDEN["cases"]))}
SOLVERS = {"euler": dfx.Euler, "heun": Heun, "ddim": DDIM, "dpmpp_2m": DPMSolverPP2M}

# Two float64 runs of one recursion differ by rounding: at most 1.4e-14 was seen. The bound leaves room for another compiler's order of summation; the
# smallest change of a coefficient that matters (1e-6, relative) moves these states by 1e-7.
TOLERANCE = 1e-10


class TablePath(AffinePath):
    """A peer's table as a path: entry i holds the clocks at t = i. Solvers that need them between the entries do not run on it."""

    log_alphas: jax.Array
    log_sigmas: jax.Array

    def log_alpha(self, t):
        return self.log_alphas[jnp.asarray(t).astype(int)]

    def log_sigma(self, t):
        return self.log_sigmas[jnp.asarray(t).astype(int)]

    def alpha(self, t):
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t):
        return jnp.exp(self.log_sigma(t))

    def time(self, log_snr):
        raise NotImplementedError


class GivenNoise(dfx.AbstractPath):
    """The saved noise of step i as the increment from index i to i + 1."""

    rows: jax.Array
    t0: float = 0.0
    t1: float = jnp.inf

    def evaluate(self, t0, t1=None, left=True):
        return self.rows[t0.astype(int)]


def path_and_grid(case):
    """The peer's noise levels as a path and a grid on it."""

    def table(field):
        return jnp.asarray(GOLDEN[f"{case['name']}/{field}"])

    if case["path"] == "flow":
        return FlowMatchingPath(), 1 - table("sigmas")
    if case["path"] == "edm":
        sigmas = table("sigmas")
        return EDMPath(sigmas[0]), 1 - sigmas / sigmas[0]
    if case["sampler"] == "dpmpp_2m":
        log_ratio = jnp.log(table("sigmas"))
        log_alphas = -0.5 * jnp.log1p(table("sigmas") ** 2)
        log_sigmas = log_ratio + log_alphas
    else:
        log_alphas, log_sigmas = 0.5 * jnp.log(table("alphas_cumprod")), 0.5 * jnp.log1p(-table("alphas_cumprod"))
    return TablePath(log_alphas, log_sigmas), jnp.arange(len(log_alphas), dtype=log_alphas.dtype)


@eqx.filter_jit
def run(solver, path, grid, mixture, start, noises):
    """The final state; `noises` None for an ODE solver."""
    term = DenoiserTerm(mixture.denoiser(path), path, grid)
    if noises is not None:
        term = dfx.MultiTerm(term, dfx.ControlTerm(lambda t, y, args: jnp.ones((), y.dtype), GivenNoise(noises)))
    return integrate(term, solver, start)


def final_state(case, solver, start=None, steps=slice(None)):
    """The case's run by `solver` over a slice of its grid."""
    path, grid = path_and_grid(case)
    weights, means, stds = (GOLDEN[f"target/{case['target']}/{field}"] for field in ("weights", "means", "stds"))
    mixture = GaussianMixture(weights, means, np.broadcast_to(stds[:, None] ** 2, means.shape))
    noises = jnp.asarray(GOLDEN[f"noises/{case['target']}"]) if isinstance(solver, Ancestral) else None
    start = jnp.asarray(GOLDEN[f"{case['name']}/start"]) if start is None else start
    return run(solver, path, grid[steps], mixture, start, noises)


def assert_matches(case, final):
    assert final.dtype == jnp.float64
    np.testing.assert_allclose(final, GOLDEN[f"{case['name']}/final"], rtol=0, atol=TOLERANCE)


def names(condition):
    return [name for name, case in CASES.items() if condition(case)]


@pytest.mark.parametrize("name", names(lambda case: case["sampler"] in SOLVERS and "sigma_min_lower" not in case["name"]))
def test_ode_solver(name):
    case = CASES[name]
    assert_matches(case, final_state(case, SOLVERS[case["sampler"]]()))


@pytest.mark.parametrize("name", names(lambda case: case["sampler"] == "euler" and case["path"] == "edm"))
def test_ddim_is_euler_in_sigma(name):
    case = CASES[name]
    assert_matches(case, final_state(case, DDIM()))


@pytest.mark.parametrize("name", names(lambda case: "sigma_min_lower" in case["name"]))
def test_lower_order_final(name):
    """diffusers' `lower_order_final` is a last step by DDIM. (A last step to σ = 0 has order 1 in any case: `dpmpp_2m_zero_lower` above.)"""
    case = CASES[name]
    second_order = final_state(case, DPMSolverPP2M())
    final = final_state(case, DDIM(), final_state(case, DPMSolverPP2M(), steps=slice(None, -1)), slice(-2, None))
    assert_matches(case, final)
    assert np.abs(final - second_order).max() > 0.1


@pytest.mark.parametrize("name", names(lambda case: case["sampler"] == "ancestral"))
def test_ancestral(name):
    case = CASES[name]
    assert_matches(case, final_state(case, Ancestral(jnp.asarray(case["eta"]))))


@pytest.mark.parametrize("name", names(lambda case: case["sampler"] == "ddim"))
def test_ancestral_without_noise_is_ddim(name):
    case = CASES[name]
    assert_matches(case, final_state(case, Ancestral(jnp.asarray(0.0))))


@pytest.mark.parametrize("name", names(lambda case: case["name"].startswith("k_diffusion") and case["sampler"] == "heun"))
def test_karras_grid(name):
    sigmas = GOLDEN[f"{name}/sigmas"]
    path = EDMPath(sigmas[0])
    grid = karras_grid(path, CASES[name]["steps"], sigmas[-2], sigmas[0])
    np.testing.assert_allclose(path.sigma(grid), sigmas, rtol=1e-10, atol=0)
