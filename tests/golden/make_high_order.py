"""Writes `high_order.npz`: the final states of diffusers' and k-diffusion's solvers of higher order on the Gaussian mixtures of `make_samplers.py`.

    python tests/golden/make_high_order.py

in the environment of that script, which also says how diffusers' arithmetic is repeated in double, and what a case holds. Schedulers: DEIS, UniPC,
DPM-Solver and DPM-Solver++ (multistep and singlestep), and EDM's two, which get the raw output of a network with EDM's preconditioning. Samplers of
k-diffusion: dpm_2, lms, dpmpp_2m_sde, dpmpp_3m_sde, with the noise of every step saved."""

import contextlib
import json
import pathlib
from importlib.metadata import version

import diffusers
import numpy as np
import torch
from make_samplers import BATCH, BETAS, SIGMA_RANGE, TARGETS, arrays, cases, in_double, kd, record


STEPS = {"two": 8, "five": 9}
DATA_STD = 0.5


def predict_noise(mixture):
    """ε at the noise level of the i-th call, for schedulers that keep σ/α."""

    def predict(scheduler, i, x):
        s = scheduler.sigmas[i].double()
        alpha, sigma = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
        return (x - alpha * mixture.denoised(x, alpha, sigma)) / sigma

    return predict


def predict_preconditioned(mixture):
    """The raw output of EDM's network."""

    def predict(scheduler, i, x):
        s = scheduler.sigmas[i].double()
        total = s**2 + DATA_STD**2
        return (mixture.denoised(x, 1.0, s) - DATA_STD**2 / total * x) * total.sqrt() / (s * DATA_STD)

    return predict


def diffusers_case(name, make, target, predict, start, **about):
    """In double, and as shipped on a sample in float32: UniPC's tables do not go with another."""
    finals = []
    for dtype, context in ((torch.float32, contextlib.nullcontext), (torch.float64, in_double)):
        torch.set_default_dtype(dtype)
        scheduler, x = make(), start.to(dtype)
        scheduler.set_timesteps(STEPS[target])
        with context(*(() if dtype == torch.float32 else (scheduler,))):
            for i, t in enumerate(scheduler.timesteps):
                if hasattr(scheduler, "is_scale_input_called"):
                    scheduler.scale_model_input(x, t)  # only silences a warning: the model here takes the unscaled sample
                x = scheduler.step(predict(scheduler, i, x.double()).to(dtype), t, x).prev_sample
        finals.append(x.double())
    error = float((finals[0] - finals[1]).abs().max())
    record(f"{target}/{name}", start, finals[1], dict(sigmas=scheduler.sigmas), target=target, shipped_error=error, **about)


def variance_preserving_cases(target, mixture, start):
    def case(name, scheduler, **options):
        about = {key: options.pop(key) for key in ("solver", "arguments")}
        diffusers_case(name, lambda: scheduler(**BETAS[target], **options), target, predict_noise(mixture), start, path="vp", **about)

    # To the smallest noise of the table, so that the last step shows its order; "zero" ends at σ = 0.
    for order in (1, 2, 3):
        for lower in (False, True):
            about = dict(solver="deis", arguments=dict(order=order, lower_order_final=lower))
            case(f"deis_{order}{'_lower' * lower}", diffusers.DEISMultistepScheduler, solver_order=order, lower_order_final=lower, **about)
        for kind in ("bh1", "bh2") if target == "two" else ("bh2",):
            for data in (True, False):
                for lower in (False, True):
                    arguments = dict(order=order, noise=not data, linear=kind == "bh1", lower_order_final=lower)
                    case(
                        f"unipc_{order}_{kind}_{'data' if data else 'noise'}{'_lower' * lower}", diffusers.UniPCMultistepScheduler,
                        solver_order=order, solver_type=kind, predict_x0=data, lower_order_final=lower, final_sigmas_type="sigma_min",
                        solver="unipc", arguments=arguments,
                    )  # fmt: skip
        for algorithm in ("dpmsolver++", "dpmsolver"):
            for kind in ("midpoint", "heun") if target == "two" else ("midpoint",):
                for lower in (False, True):
                    arguments = dict(order=order, noise=algorithm == "dpmsolver", midpoint=kind == "midpoint", lower_order_final=lower)
                    common = dict(
                        solver_order=order, algorithm_type=algorithm, solver_type=kind, lower_order_final=lower, final_sigmas_type="sigma_min"
                    )
                    if algorithm == "dpmsolver++" or order < 3:
                        case(
                            f"{algorithm}_multi_{order}_{kind}{'_lower' * lower}", diffusers.DPMSolverMultistepScheduler, **common,
                            solver="dpm_solver", arguments=arguments,
                        )  # fmt: skip
                    if lower or STEPS[target] % order == 0:
                        case(
                            f"{algorithm}_single_{order}_{kind}{'_lower' * lower}", diffusers.DPMSolverSinglestepScheduler, **common,
                            solver="dpm_solver", arguments=arguments | dict(single_step=True),
                        )  # fmt: skip
    case(
        "unipc_3_bh2_data_zero", diffusers.UniPCMultistepScheduler, solver_order=3, final_sigmas_type="zero",
        solver="unipc", arguments=dict(order=3),
    )  # fmt: skip
    case(
        "unipc_2_no_corrector", diffusers.UniPCMultistepScheduler, disable_corrector=list(range(20)), final_sigmas_type="sigma_min",
        solver="unipc", arguments=dict(order=2, corrector=False),
    )  # fmt: skip
    case(
        "dpmsolver++_single_3_zero", diffusers.DPMSolverSinglestepScheduler, solver_order=3, lower_order_final=True,
        solver="dpm_solver", arguments=dict(order=3, single_step=True),
    )  # fmt: skip


def edm_cases(target, mixture, noise0):
    low, high = SIGMA_RANGE[target]
    common = dict(sigma_min=low, sigma_max=high, sigma_data=DATA_STD)
    start = noise0 * high
    diffusers_case(
        "edm_euler", lambda: diffusers.EDMEulerScheduler(**common), target, predict_preconditioned(mixture), start,
        path="edm", solver="ddim", arguments={},
    )  # fmt: skip
    for order in (1, 2, 3):
        for kind in ("midpoint", "heun"):

            def make(order=order, kind=kind):
                return diffusers.EDMDPMSolverMultistepScheduler(**common, solver_order=order, solver_type=kind)

            diffusers_case(
                f"edm_dpmsolver++_{order}_{kind}", make, target, predict_preconditioned(mixture), start,
                path="edm", solver="dpm_solver", arguments=dict(order=order, midpoint=kind == "midpoint"),
            )  # fmt: skip


def k_diffusion_cases(target, mixture, noise0, noises):
    def model(x, sigma):
        return mixture.denoised(x, 1.0, sigma[0])

    sigmas = kd.get_sigmas_karras(STEPS[target], *SIGMA_RANGE[target], rho=7.0)
    sigmas = sigmas if target == "two" else sigmas[:-1]  # to σ = 0, and to the smallest
    start = sigmas[0] * noise0

    def case(name, sampler, about, **options):
        final = sampler(model, start, sigmas, disable=True, **options)
        record(f"{target}/k_{name}", start, final, dict(sigmas=sigmas), target=target, path="edm", **about)

    case("dpm_2", kd.sample_dpm_2, dict(solver="dpm_2", arguments={}))
    for order in (4,) if target == "two" else (2, 3):
        case(f"lms_{order}", kd.sample_lms, dict(solver="lms", arguments=dict(max_order=order)), order=order)
    for eta in (0.0, 0.5, 1.0):
        for name, sampler, options in (
            ("2m_sde_midpoint", kd.sample_dpmpp_2m_sde, dict(solver_type="midpoint")),
            ("2m_sde_heun", kd.sample_dpmpp_2m_sde, dict(solver_type="heun")),
            ("3m_sde", kd.sample_dpmpp_3m_sde, {}),
        ):
            rows = iter(noises)
            about = dict(solver=name, arguments=dict(eta=eta))
            case(f"{name}_{eta}", sampler, about, eta=eta, noise_sampler=lambda *_, rows=rows: next(rows), **options)


def main():
    generator = np.random.Generator(np.random.PCG64(2312_07243))
    for target, mixture in TARGETS.items():
        dim = mixture.means.shape[-1]
        noise0 = torch.as_tensor(generator.standard_normal((BATCH, dim)))
        noises = torch.as_tensor(generator.standard_normal((max(STEPS.values()), BATCH, dim)))
        arrays[f"noises/{target}"] = noises.numpy()
        for field in ("weights", "means", "stds"):
            arrays[f"target/{target}/{field}"] = getattr(mixture, field).numpy()
        variance_preserving_cases(target, mixture, noise0)
        edm_cases(target, mixture, noise0)
        k_diffusion_cases(target, mixture, noise0, noises)
    versions = {package: version(package) for package in ("torch", "diffusers", "k-diffusion", "numpy")}
    path = pathlib.Path(__file__).with_name("high_order.npz")
    np.savez_compressed(path, cases=json.dumps(cases), versions=json.dumps(versions), **arrays)
    for case in cases:
        print(f"{case['name']:48s} shipped_error {case.get('shipped_error', 0.0):.1e}")
    print(f"{len(cases)} cases, {path.stat().st_size / 1e3:.0f} kB, {versions}")


if __name__ == "__main__":
    main()
