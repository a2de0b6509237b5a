"""The torch peer of `sweeps.py`: torchcfm's network and flow-matching step, run after run. Needs torch and torchcfm, not JAX."""

import json
import math
import sys

import torch
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchcfm.models.models import MLP


def eight_gaussians(count: int) -> torch.Tensor:
    """As the JAX side: eight modes on a circle."""
    angles = 2 * math.pi * torch.randint(8, (count,)) / 8
    return 4 * torch.stack([torch.cos(angles), torch.sin(angles)], 1) + 0.2 * torch.randn(count, 2)


def train(job: dict, rate: float, seed: int) -> float:
    """One run; its mean loss over the last tenth of the steps."""
    torch.manual_seed(seed)
    data, matcher = eight_gaussians(4096), ConditionalFlowMatcher(sigma=0.0)
    model = MLP(dim=2, w=job["width"], time_varying=True)
    optimiser = torch.optim.Adam(model.parameters(), rate)
    losses = []
    for step in range(job["steps"]):
        target = data[torch.randint(len(data), (job["batch"],))]
        t, x, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(target), target)
        loss = torch.mean((model(torch.cat([x, t[:, None]], dim=-1)) - velocity) ** 2)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step >= 0.9 * job["steps"]:
            losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def main() -> None:
    """All runs, one after the other."""
    job = json.loads(sys.argv[1])
    count = job["runs"]
    values = [(rate, seed) for seed in range(max(1, count // 4)) for rate in job["rates"][: min(count, 4)]]
    print(json.dumps({"losses": [train(job, rate, seed) for rate, seed in values], "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
