"""The torch peers of `samplers.py`, in a process of their own: it says what it can time, then answers each network's name on stdin with one round.

Needs torch, diffusers and k-diffusion, not JAX. Networks are the twins of the JAX ones; what counts is each peer's ratio to its own bare calls.
"""

import argparse
import importlib.util
import itertools
import json
import sys
import time
import types
from importlib.metadata import version
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
from torch import nn


BATCH = 64


def k_diffusion_sampling():
    """`k_diffusion.sampling` alone: the package's `__init__` and `utils` want torchvision's compiled operators, which no sampler uses."""
    package = types.ModuleType("k_diffusion")
    package.__path__ = importlib.util.find_spec("k_diffusion").submodule_search_locations
    stubs = {name: mock.MagicMock() for name in ("torchvision", "torchvision.transforms")}
    with mock.patch.dict(sys.modules, {"k_diffusion": package, **stubs}):
        return importlib.import_module("k_diffusion.sampling")


kd = k_diffusion_sampling()


class MLP(nn.Module):
    """512 x 3 on 64 numbers and the time."""

    def __init__(self):
        super().__init__()
        widths = [65, 512, 512, 512, 64]
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self, t, x):
        return self.mlp(torch.cat([x, t.expand(len(x), 1)], -1))


class Gain(nn.Module):
    """x times a number."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, t, x):
        return self.gain * x


class ResidualBlock(nn.Module):
    """The block of `ergodax.nn.UNet`."""

    def __init__(self, in_channels, out_channels, cond):
        super().__init__()
        self.norm1 = nn.GroupNorm(in_channels // 4, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(cond, 2 * out_channels)
        self.norm2 = nn.GroupNorm(out_channels // 4, out_channels, affine=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, c):
        h = self.conv1(F.silu(self.norm1(x)))
        shift, scale = self.modulation(c)[:, None, None].chunk(2)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.shortcut(x) + self.conv2(h)


class UNet(nn.Module):
    """`ergodax.nn.UNet((8, 8, 1), 32, (1, 2))`, channels first."""

    def __init__(self, width=32):
        super().__init__()
        wide, cond = 2 * width, 4 * width
        self.register_buffer("frequencies", torch.logspace(0, 2, 32))
        self.conditioning = nn.Sequential(nn.Linear(64, cond), nn.SiLU(), nn.Linear(cond, cond), nn.SiLU())
        self.inner = nn.Conv2d(1, width, 3, padding=1)
        self.down = ResidualBlock(width, width, cond)
        self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.low = nn.ModuleList([ResidualBlock(a, wide, cond) for a in (width, wide, wide, 2 * wide)])
        self.upsample = nn.Conv2d(wide, wide, 3, padding=1)
        self.up = ResidualBlock(wide + width, width, cond)
        self.outer = nn.Sequential(nn.GroupNorm(width // 4, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, t, x):
        angle = self.frequencies * t
        c = self.conditioning(torch.cat([angle.cos(), angle.sin()]))
        high = self.down(self.inner(x), c)
        skip = h = self.low[0](self.downsample(high), c)
        h = self.low[2](self.low[1](h, c), c)
        h = self.low[3](torch.cat([h, skip], 1), c)
        h = self.upsample(F.interpolate(h, scale_factor=2))
        return self.outer(self.up(torch.cat([h, high], 1), c))


def networks():
    """{name: (network, shape of one example)}, the names of `samplers.py`."""
    return {"none, d=1": (Gain(), (1,)), "MLP 512x3, d=64": (MLP(), (64,)), "U-Net 32-64, 8x8x1": (UNet(), (1, 8, 8))}


def bare(network, steps, x):
    for t in torch.linspace(0, 1, steps):
        x = x + 1e-3 * network(t, x)
    return x


def with_k_diffusion(sampler):
    def run(network, steps, x):
        def denoised(x, sigma):
            return x - sigma[0] * network(sigma[0], x)

        return sampler(denoised, x, kd.get_sigmas_karras(steps, 0.01, 20.0), disable=True)

    return run


def with_diffusers(make):
    def run(network, steps, x):
        scheduler = make()
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(network(t / 1000, x), t, x).prev_sample
        return x

    return run


RUNS = {
    ("torch", "bare calls"): (bare, 1),
    ("k-diffusion", "Euler"): (with_k_diffusion(kd.sample_euler), 1),
    ("k-diffusion", "DPM++2M"): (with_k_diffusion(kd.sample_dpmpp_2m), 1),
    ("k-diffusion", "Heun"): (with_k_diffusion(kd.sample_heun), 2),
    ("diffusers", "DDIM"): (with_diffusers(lambda: diffusers.DDIMScheduler(clip_sample=False)), 1),
    ("diffusers", "DPM++2M"): (with_diffusers(lambda: diffusers.DPMSolverMultistepScheduler(solver_order=2)), 1),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    versions = {package: version(package) for package in ("torch", "diffusers", "k-diffusion")}
    found = networks()
    # Their Heun ends with an Euler step: 2 N - 1 calls.
    cells = [(name, *run, calls if calls == 1 else 2 - 1 / options.steps) for name in found for run, (_, calls) in RUNS.items()]
    print(json.dumps(dict(versions=versions, cells=cells)), flush=True)
    starts = {name: torch.randn(BATCH, *shape) for name, (_, shape) in found.items()}
    for line in sys.stdin:
        name, seconds = line.strip(), []
        for function, _ in RUNS.values():
            wall, cpu = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                function(found[name][0], options.steps, starts[name])
            seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
