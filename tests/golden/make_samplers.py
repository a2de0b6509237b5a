"""Writes `samplers.npz`: the final states of k-diffusion's and diffusers' samplers on Gaussian mixtures whose denoiser is exact.

Run it in an environment of its own, with `pip install diffusers k-diffusion torch` (neither JAX nor ergodax is imported here, so that the
numbers are independent):

    python tests/golden/make_samplers.py

Each case holds what a test needs to repeat the run: the table of noise levels that the peer used, the starting state, the noise of every step
(one table for each target) and the final state, all in float64. `cases` (JSON) names target, peer, sampler and options of each; `versions` the
packages.

diffusers keeps its tables in float32, and most of its schedulers cast the sample to float32 in every step ("upcast to avoid precision issues",
written with half precision in mind). Its arithmetic is therefore repeated in double: the scheduler is built and its timesteps are set as shipped,
then its tables are widened (same values), and its module's `torch.float32` stands for float64 while it steps. `shipped_error` of a case is
max |as shipped - in double|, the rounding of float32: 1e-9 to 1e-6 here. k-diffusion computes in the dtype of its input, so its numbers are as
shipped.
"""

import contextlib
import importlib.util
import json
import pathlib
import sys
import types
from importlib.metadata import version
from unittest import mock

import diffusers
import numpy as np
import torch


def k_diffusion_sampling():
    """`k_diffusion.sampling` alone: the package's `__init__` and `utils` want torchvision's compiled operators, which no sampler uses."""
    package = types.ModuleType("k_diffusion")
    package.__path__ = importlib.util.find_spec("k_diffusion").submodule_search_locations
    stubs = {name: mock.MagicMock() for name in ("torchvision", "torchvision.transforms")}
    with mock.patch.dict(sys.modules, {"k_diffusion": package, **stubs}):
        return importlib.import_module("k_diffusion.sampling")


kd = k_diffusion_sampling()
torch.set_default_dtype(torch.float64)
BATCH = 16
STEPS = {"two": (10, 20), "five": (10,)}


class Mixture:
    """Σ_k w_k N(m_k, s_k² I) and its exact E[x₁ | α x₁ + σ x₀ = x]."""

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (torch.as_tensor(np.asarray(a, float)) for a in (weights, means, stds))

    def denoised(self, x, alpha, sigma):
        variance = alpha**2 * self.stds**2 + sigma**2
        residual = x[:, None] - alpha * self.means
        log_weights = self.weights.log() - 0.5 * x.shape[-1] * variance.log() - 0.5 * (residual**2).sum(-1) / variance
        posterior_means = self.means + (alpha * self.stds**2 / variance)[:, None] * residual
        return (log_weights.softmax(-1)[..., None] * posterior_means).sum(-2)


TARGETS = {
    "two": Mixture([0.5, 0.3, 0.2], [[1.0, 0.5], [-1.0, 0.2], [0.1, -1.2]], [0.3, 0.5, 0.2]),
    "five": Mixture(
        [0.4, 0.3, 0.2, 0.1],
        [[0.9, -0.4, 0.3, 0.7, -1.1], [-0.8, 0.6, -0.2, 0.4, 0.5], [0.2, 1.1, 0.8, -0.9, 0.3], [-0.3, -1.0, 0.5, -0.6, -0.7]],
        [0.25, 0.4, 0.3, 0.5],
    ),
}
SIGMA_RANGE = {"two": (0.02, 80.0), "five": (0.01, 20.0)}
BETAS = {
    "two": dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    "five": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
}

cases, arrays = [], {}


def record(name, start, final, table, **about):
    """Stores one case; `table` is {field: array} with the noise levels of the peer."""
    cases.append(dict(name=name, **about))
    for field, value in dict(start=start, final=final, **table).items():
        value = np.asarray(value, np.float64)
        if not np.isfinite(value).all():
            raise FloatingPointError(f"{name}: {field} is not finite")
        arrays[f"{name}/{field}"] = value


@contextlib.contextmanager
def in_double(scheduler):
    """The module's `torch.float32` means float64 here, and the scheduler's tables are widened; nothing else of the peer changes."""
    module = sys.modules[type(scheduler).__module__]

    class Double:
        def __getattr__(self, name):
            return getattr(torch, "float64" if name == "float32" else name)

    for field in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, field):
            setattr(scheduler, field, getattr(scheduler, field).double())
    module.torch = Double()
    try:
        yield
    finally:
        module.torch = torch


def run_diffusers(make, n, start, predict, **step_options):
    """(final state in double, the scheduler, |shipped - double|). `predict(scheduler, i, x)` is the model's output at the i-th call."""

    def run(scheduler, double):
        x = start.clone()
        with in_double(scheduler) if double else contextlib.nullcontext():
            for i, t in enumerate(scheduler.timesteps):
                options = {k: v[i] if torch.is_tensor(v) else v for k, v in step_options.items()}
                if hasattr(scheduler, "is_scale_input_called"):
                    scheduler.scale_model_input(x, t)  # only silences a warning: the model here takes the unscaled sample
                x = scheduler.step(predict(scheduler, i, x), t, x, **options).prev_sample
        return x

    finals = []
    for double in (False, True):
        scheduler = make()
        scheduler.set_timesteps(n)
        finals.append(run(scheduler, double))
    return finals[1], scheduler, float((finals[0] - finals[1]).abs().max())


def k_diffusion_cases(target, mixture, noise0, noises):
    def model(x, sigma):
        return mixture.denoised(x, 1.0, sigma[0])

    for n in STEPS[target]:
        sigmas = kd.get_sigmas_karras(n, *SIGMA_RANGE[target], rho=7.0)
        start = sigmas[0] * noise0
        for sampler in ("euler", "heun", "dpmpp_2m"):
            final = getattr(kd, f"sample_{sampler}")(model, start, sigmas, disable=True)
            record(f"k_diffusion/{target}/{sampler}/{n}", start, final, dict(sigmas=sigmas), target=target, sampler=sampler, steps=n, path="edm")
        for eta in (0.5, 1.0):
            rows = iter(noises)
            final = kd.sample_euler_ancestral(model, start, sigmas, eta=eta, noise_sampler=lambda *_, rows=rows: next(rows), disable=True)
            record(
                f"k_diffusion/{target}/ancestral_{eta}/{n}", start, final, dict(sigmas=sigmas),
                target=target, sampler="ancestral", eta=eta, steps=n, path="edm",
            )  # fmt: skip


def variance_preserving_cases(target, mixture, noise0, noises):
    def noise_prediction(x, alpha, sigma):
        return (x - alpha * mixture.denoised(x, alpha, sigma)) / sigma

    def predict_ddim(scheduler, i, x):
        a = scheduler.alphas_cumprod[scheduler.timesteps[i]].double()
        return noise_prediction(x, a.sqrt(), (1 - a).sqrt())

    def predict_dpm(scheduler, i, x):
        s = scheduler.sigmas[i].double()
        return noise_prediction(x, 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt())

    for n in STEPS[target]:
        for eta in (0.0, 1.0):

            def make():
                # Two ways to end: at α = 1, or at the smallest noise of the table.
                ends = dict(set_alpha_to_one=True) if target == "two" else dict(set_alpha_to_one=False, steps_offset=1)
                return diffusers.DDIMScheduler(**BETAS[target], **ends, clip_sample=False)

            options = dict(eta=eta, variance_noise=noises) if eta else dict(eta=eta)
            final, scheduler, error = run_diffusers(make, n, noise0, predict_ddim, **options)
            table = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
            record(
                f"diffusers/{target}/ddim_{eta}/{n}", noise0, final, dict(alphas_cumprod=table),
                target=target, sampler="ancestral" if eta else "ddim", eta=eta, steps=n, path="vp", shipped_error=error,
            )  # fmt: skip

    ends = ((10, "zero", True), (20, "zero", False), (10, "sigma_min", False), (20, "sigma_min", False), (10, "sigma_min", True))
    for n, end, lower_order_final in ends:
        if n not in STEPS[target]:
            continue

        def make(end=end, lower_order_final=lower_order_final):
            return diffusers.DPMSolverMultistepScheduler(
                **BETAS[target], algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
                lower_order_final=lower_order_final, final_sigmas_type=end,
            )  # fmt: skip

        final, scheduler, error = run_diffusers(make, n, noise0, predict_dpm)
        # lower_order_final only acts on fewer than 15 steps; a last step to zero noise is of first order in any case.
        record(
            f"diffusers/{target}/dpmpp_2m_{end}{'_lower' if lower_order_final else ''}/{n}", noise0, final, dict(sigmas=scheduler.sigmas),
            target=target, sampler="dpmpp_2m", steps=n, path="vp", lower_order_final=lower_order_final, shipped_error=error,
        )  # fmt: skip


def variance_exploding_cases(target, mixture, noise0):
    def predict(scheduler, i, x):
        s = scheduler.sigmas[i].double()
        return (x - mixture.denoised(x, 1.0, s)) / s

    for n in STEPS[target]:
        for sampler, scheduler_type in (("euler", diffusers.EulerDiscreteScheduler), ("heun", diffusers.HeunDiscreteScheduler)):

            def make(scheduler_type=scheduler_type):
                return scheduler_type(**BETAS[target])

            scheduler = make()
            scheduler.set_timesteps(n)
            start = scheduler.init_noise_sigma.double() * noise0
            final, scheduler, error = run_diffusers(make, n, start, predict)
            sigmas = scheduler.sigmas if sampler == "euler" else torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
            record(
                f"diffusers/{target}/{sampler}/{n}", start, final, dict(sigmas=sigmas),
                target=target, sampler=sampler, steps=n, path="edm", shipped_error=error,
            )  # fmt: skip


def flow_matching_cases(target, mixture, noise0):
    def predict(scheduler, i, x):
        s = scheduler.sigmas[i].double()
        return (x - mixture.denoised(x, 1 - s, s)) / s

    shift = dict(two=1.0, five=3.0)[target]
    schedulers = dict(
        euler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        heun=lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
        dpmpp_2m=lambda: diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction", algorithm_type="dpmsolver++", solver_order=2
        ),
    )
    for n in STEPS[target]:
        for sampler, make in schedulers.items():
            final, scheduler, error = run_diffusers(make, n, noise0, predict)
            sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]) if sampler == "heun" else scheduler.sigmas
            record(
                f"diffusers/{target}/flow_{sampler}/{n}", noise0, final, dict(sigmas=sigmas),
                target=target, sampler=sampler, steps=n, path="flow", shipped_error=error,
            )  # fmt: skip


def main():
    generator = np.random.Generator(np.random.PCG64(2206_00364))
    for target, mixture in TARGETS.items():
        dim = mixture.means.shape[-1]
        noise0 = torch.as_tensor(generator.standard_normal((BATCH, dim)))
        noises = torch.as_tensor(generator.standard_normal((max(STEPS[target]), BATCH, dim)))
        arrays[f"noises/{target}"] = noises.numpy()
        for field in ("weights", "means", "stds"):
            arrays[f"target/{target}/{field}"] = getattr(mixture, field).numpy()
        k_diffusion_cases(target, mixture, noise0, noises)
        variance_preserving_cases(target, mixture, noise0, noises)
        variance_exploding_cases(target, mixture, noise0)
        flow_matching_cases(target, mixture, noise0)
    versions = {package: version(package) for package in ("torch", "diffusers", "k-diffusion", "numpy")}
    path = pathlib.Path(__file__).with_name("samplers.npz")
    np.savez_compressed(path, cases=json.dumps(cases), versions=json.dumps(versions), **arrays)
    for case in cases:
        print(f"{case['name']:42s} shipped_error {case.get('shipped_error', 0.0):.1e}")
    print(f"{len(cases)} cases, {path.stat().st_size / 1e3:.0f} kB, {versions}")


if __name__ == "__main__":
    main()
