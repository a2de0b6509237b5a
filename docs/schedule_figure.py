"""Makes `schedules.svg` of the documentation, with its numbers as CSV beside it: `python docs/schedule_figure.py` (about 10 seconds).

Left: the schedules. Right: the expected excess loss of SGD on a noisy quadratic after 1000 updates against the peak rate, to many digits.
"""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt

from ergodax import schedules
from ergodax.data import NoisyQuadratic


ASSETS = Path(__file__).parent / "assets"
T, W = 1000, 25
CHOICES = {
    "constant": schedules.wsd_schedule(1.0, T, warmup_steps=W, decay_steps=0),
    "inverse sqrt": schedules.inverse_sqrt_schedule(1.0, W, warmup_steps=W),
    "WSD, 20 %": schedules.wsd_schedule(1.0, T, warmup_steps=W, decay_steps=0.2 * T, cooldown=schedules.linear_cooldown),
    "REX": schedules.rex_schedule(1.0, T, warmup_steps=W),
    "linear": schedules.linear_schedule(1.0, T, warmup_steps=W),
    "cosine": schedules.cosine_schedule(1.0, T, warmup_steps=W),
    "UBA, φ = 5": schedules.budget_aware_schedule(1.0, T, 5.0, warmup_steps=W),
}


@jax.jit
def excess(profiles: jax.Array, peaks: jax.Array) -> jax.Array:
    """Schedules × peaks."""
    eigenvalues = 1 / jnp.arange(1.0, 101.0)
    problem = NoisyQuadratic(eigenvalues, noise=eigenvalues / 50, start=jnp.ones(100))
    return jax.vmap(lambda profile: jax.vmap(lambda peak: problem.excess(peak * profile))(peaks))(profiles)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    mpl.rcParams["svg.hashsalt"] = "ergodax"  # the same bytes each time
    ASSETS.mkdir(exist_ok=True)
    steps, peaks = jnp.arange(T), jnp.geomspace(0.05, 1.9, 48)
    profiles = jnp.stack([schedule(steps) for schedule in CHOICES.values()])
    losses = excess(profiles, peaks)
    with (ASSETS / "schedules.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["peak", *CHOICES])
        writer.writerows([f"{number:.4e}" for number in row] for row in jnp.column_stack([peaks, losses.T]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4))
    for name, profile, loss in zip(CHOICES, profiles, losses):
        (line,) = left.plot(steps, profile, label=name)
        right.loglog(peaks, loss, color=line.get_color())
        right.plot(peaks[loss.argmin()], loss.min(), "o", markersize=4, color=line.get_color())
    left.set(xlabel="update", ylabel="share of the peak rate")
    right.set(xlabel="peak rate", ylabel="expected excess loss", ylim=(1.5e-3, 0.05))
    right.grid(alpha=0.3)
    figure.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.02))
    figure.tight_layout()
    figure.savefig(ASSETS / "schedules.svg", bbox_inches="tight", metadata={"Date": None})
