"""LightSB as its authors formulate it, in CPU torch, written from the paper (arXiv:2310.01174): a peer of `experiments/transport/eot_benchmark.py`.

    PYTHON benchmarks/light_sb_torch.py --steps 10000 --threads 1 < pairs.npz > plans.npz

Reads pairs of the benchmark (an npz file: `epsilons`, and for each number i of them `log_weights_i`, `centres_i`, `scales_i` of the true plan),
trains a model with K = 50 diagonal components on each as the paper does, and writes its parameters, wall seconds and CPU seconds. As in the paper
and in the released settings: α is learned as ε log α, S as log S from 1, r from samples of the target; Adam, batch 128 of fresh samples of both ends
a step, 10 000 steps, constant rate 1e-3, 3e-3 and 6e-2 for ε = 0.1, 1 and 10. Distances are taken by differences, component by component.
"""

import argparse
import io
import json
import sys
import time

import numpy as np
import torch
from torch import nn


RATES = ((0.1, 1e-3), (1.0, 3e-3), (10.0, 6e-2))


class Pair:
    """A standard normal source, and the target that the true plan makes of it."""

    def __init__(self, log_weights, centres, scales, epsilon):
        self.log_weights, self.centres, self.scales = (torch.tensor(part) for part in (log_weights, centres, scales))
        self.epsilon = epsilon

    def source(self, n):
        return torch.randn(n, self.centres.shape[1])

    def target(self, n):
        x = self.source(n)
        exponent = (x**2 @ self.scales.T / 2 + x @ self.centres.T) / self.epsilon
        k = torch.distributions.Categorical(logits=self.log_weights + exponent).sample()
        return self.centres[k] + self.scales[k] * x + torch.sqrt(self.epsilon * self.scales[k]) * torch.randn_like(x)


class LightSB(nn.Module):
    """v(x₁) = Σ_k α_k N(x₁; r_k, ε S_k)."""

    def __init__(self, centres, epsilon):
        super().__init__()
        self.epsilon = epsilon
        self.scaled_log_alpha = nn.Parameter(torch.full((len(centres),), -epsilon * float(np.log(len(centres)))))
        self.r = nn.Parameter(centres.clone())
        self.log_s = nn.Parameter(torch.zeros_like(centres))

    def log_v(self, x1):
        alpha = self.scaled_log_alpha / self.epsilon
        normal = torch.distributions.Independent(torch.distributions.Normal(self.r, torch.sqrt(self.epsilon * torch.exp(self.log_s))), 1)
        return torch.logsumexp(alpha + normal.log_prob(x1[:, None]), -1)

    def log_c(self, x0):
        quadratic = torch.sum(x0[:, None] ** 2 * torch.exp(self.log_s), -1)
        linear = torch.sum(x0[:, None] * self.r, -1)
        return torch.logsumexp(self.scaled_log_alpha / self.epsilon + (quadratic + 2 * linear) / (2 * self.epsilon), -1)


def train(pair, num_components, batch_size, steps):
    model = LightSB(pair.target(num_components), pair.epsilon)
    rate = min(RATES, key=lambda row: abs(np.log(row[0] / pair.epsilon)))[1]
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        loss = (model.log_c(pair.source(batch_size)) - model.log_v(pair.target(batch_size))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--components", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    pairs, out = np.load(io.BytesIO(sys.stdin.buffer.read())), {}
    for i, epsilon in enumerate(pairs["epsilons"]):
        pair = Pair(*(pairs[f"{name}_{i}"] for name in ("log_weights", "centres", "scales")), float(epsilon))
        wall, cpu = time.perf_counter(), time.process_time()
        model = train(pair, options.components, options.batch_size, options.steps)
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        out[f"log_weights_{i}"] = (model.scaled_log_alpha / pair.epsilon).detach().numpy()
        out[f"centres_{i}"], out[f"log_scales_{i}"] = model.r.detach().numpy(), model.log_s.detach().numpy()
        out[f"seconds_{i}"] = np.array(seconds)
        print(json.dumps({"epsilon": float(epsilon), "wall": seconds[0], "cpu": seconds[1]}), file=sys.stderr, flush=True)
    np.savez(sys.stdout.buffer, torch=torch.__version__, **out)


if __name__ == "__main__":
    main()
