"""ergodax's solvers of higher order, and the points of `USF`, against diffusers' and k-diffusion's: same levels, start and noise.

`high_order.npz` is written by `make_high_order.py` beside it, which says what was run. Everything is in float64."""

import dataclasses
import functools
import json
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import TablePath, run

from ergodax.core import EDMPath
from ergodax.data import GaussianMixture
from ergodax.diffusion.dpm_solver_2 import DPMSolver2
from ergodax.diffusion.dpm_solver_pp_sde import DPMSolverPP2MSDE, DPMSolverPP3MSDE
from ergodax.diffusion.lms import LMS
from ergodax.diffusion.usf_s3 import USF, Relaxation


GOLDEN = np.load(pathlib.Path(__file__).with_name("high_order.npz"))
CASES = {case["name"]: case for case in json.loads(str(GOLDEN["cases"]))}
POINTS = {"ddim": USF.ddim, "deis": USF.deis, "unipc": USF.unipc, "dpm_solver": USF.dpm_solver}
TOLERANCE = 1e-10  # as in `test_samplers.py`


def population(target, path):
    """The names of all cases that are points of USF, on one path."""
    return [name for name, case in CASES.items() if case["solver"] in POINTS and (case["target"], case["path"]) == (target, path)]


def path_and_grid(case):
    sigmas = jnp.asarray(GOLDEN[f"{case['name']}/sigmas"])
    if case["path"] == "edm":
        return EDMPath(sigmas[0]), 1 - sigmas / sigmas[0]
    log_alphas = -0.5 * jnp.log1p(sigmas**2)
    return TablePath(log_alphas, jnp.log(sigmas) + log_alphas), jnp.arange(len(sigmas), dtype=sigmas.dtype)


def target_of(case):
    weights, means, stds = (GOLDEN[f"target/{case['target']}/{field}"] for field in ("weights", "means", "stds"))
    return GaussianMixture(weights, means, np.broadcast_to(stds[:, None] ** 2, means.shape))


def point(case):
    """Its point of USF, with the static shape that all have in common."""
    solver = POINTS[case["solver"]](len(GOLDEN[f"{case['name']}/sigmas"]) - 1, **case["arguments"])
    none = jnp.zeros_like(solver.orders)
    correctors = (none, none) if solver.correctors is None else (solver.correctors, solver.corrector_relaxations)
    return dataclasses.replace(solver, correctors=correctors[0], corrector_relaxations=correctors[1], depth=4, rate=1)


@functools.cache
def finals(target, path, change=lambda solver: solver):
    """{name: final state}: one program for all solvers of a population."""
    names = population(target, path)
    cases = [CASES[name] for name in names]
    runs = [(change(point(case)), *path_and_grid(case), jnp.asarray(GOLDEN[f"{case['name']}/start"])) for case in cases]
    runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    solved = eqx.filter_vmap(lambda one: run(one[0], one[1], one[2], target_of(cases[0]), one[3], None))(runs)
    return dict(zip(names, np.asarray(solved)))


@pytest.mark.parametrize("name", [name for target in ("two", "five") for path in ("vp", "edm") for name in population(target, path)])
def test_points_of_usf(name):
    final = finals(CASES[name]["target"], CASES[name]["path"])[name]
    assert final.dtype == np.float64
    np.testing.assert_allclose(final, GOLDEN[f"{name}/final"], rtol=0, atol=TOLERANCE)


def unrelaxed_first_corrector(solver):
    return eqx.tree_at(lambda s: s.corrector_relaxations, solver, jnp.zeros_like(solver.orders))


def full_second_derivative(solver):
    exact = jnp.where(solver.relaxations == Relaxation.HALF_SECOND, Relaxation.NONE, solver.relaxations)
    return eqx.tree_at(lambda s: s.relaxations, solver, exact)


@pytest.mark.parametrize(
    ("change", "name", "least"),
    [(unrelaxed_first_corrector, "two/unipc_2_bh2_data", 1e-6), (full_second_derivative, "two/dpmsolver++_multi_3_midpoint", 1e-4)],
)
def test_what_the_released_formulas_hide(change, name, least):
    """UniPC's first corrector is relaxed, and DPM-Solver++(3M) has half of its second derivative: without, the numbers are others."""
    changed = finals("two", "vp", change)[name]
    assert np.abs(changed - GOLDEN[f"{name}/final"]).max() > least


def solver_of(case, path):
    options = case["arguments"]
    match case["solver"]:
        case "dpm_2":
            return DPMSolver2(path)
        case "lms":
            return LMS(**options)
        case "2m_sde_midpoint":
            return DPMSolverPP2MSDE(jnp.asarray(options["eta"]))
        case "2m_sde_heun":
            return DPMSolverPP2MSDE(jnp.asarray(options["eta"]), midpoint=False)
        case "3m_sde":
            return DPMSolverPP3MSDE(jnp.asarray(options["eta"]))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["solver"] not in POINTS])
def test_k_diffusion(name):
    case = CASES[name]
    path, grid = path_and_grid(case)
    noises = jnp.asarray(GOLDEN[f"noises/{case['target']}"]) if "sde" in name else None
    final = run(solver_of(case, path), path, grid, target_of(case), jnp.asarray(GOLDEN[f"{name}/start"]), noises)
    assert final.dtype == jnp.float64
    np.testing.assert_allclose(final, GOLDEN[f"{name}/final"], rtol=0, atol=TOLERANCE)
