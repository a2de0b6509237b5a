"""Writes `pndm.npz`: the final states of diffusers' `PNDMScheduler` on the Gaussian mixtures of `make_samplers.py`, whose helpers it uses.

    python tests/golden/make_pndm.py

in the environment of that script. Each target has the table of α² over all training timesteps, noisiest first, and behind it the value after the
last step; each case its timesteps, the starting and the final state, all in float64 (arithmetic repeated in double, as that script says)."""

import json
import pathlib
from importlib.metadata import version

import diffusers
import numpy as np
import torch
from make_samplers import BATCH, BETAS, TARGETS, arrays, cases, record, run_diffusers


def pndm_cases(target, mixture, start):
    def predict(scheduler, i, x):
        a = scheduler.alphas_cumprod[scheduler.timesteps[i]].double()
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        return (x - alpha * mixture.denoised(x, alpha, sigma)) / sigma

    for n in (10, 20):
        for skip in (False, True):

            def make(skip=skip):
                # Two ways to end: at α = 1, or at the smallest noise of the table.
                ends = dict(set_alpha_to_one=True) if target == "two" else dict(set_alpha_to_one=False, steps_offset=1)
                return diffusers.PNDMScheduler(**BETAS[target], **ends, skip_prk_steps=skip)

            final, scheduler, error = run_diffusers(make, n, start, predict)
            arrays[f"target/{target}/alphas_cumprod"] = torch.cat([scheduler.alphas_cumprod.flip(0), scheduler.final_alpha_cumprod[None]]).numpy()
            timesteps = scheduler._timesteps[::-1].copy()
            name = f"{target}/{'plms' if skip else 'f_pndm'}/{n}"
            record(
                name, start, final, dict(timesteps=timesteps),
                target=target, skip_prk_steps=skip, steps=n, shipped_error=error,
            )  # fmt: skip


def main():
    generator = np.random.Generator(np.random.PCG64(2202_09778))
    for target, mixture in TARGETS.items():
        for field in ("weights", "means", "stds"):
            arrays[f"target/{target}/{field}"] = getattr(mixture, field).numpy()
        pndm_cases(target, mixture, torch.as_tensor(generator.standard_normal((BATCH, mixture.means.shape[-1]))))
    versions = {package: version(package) for package in ("torch", "diffusers", "numpy")}
    path = pathlib.Path(__file__).with_name("pndm.npz")
    np.savez_compressed(path, cases=json.dumps(cases), versions=json.dumps(versions), **arrays)
    for case in cases:
        print(f"{case['name']:24s} shipped_error {case['shipped_error']:.1e}")
    print(f"{len(cases)} cases, {path.stat().st_size / 1e3:.0f} kB, {versions}")


if __name__ == "__main__":
    main()
