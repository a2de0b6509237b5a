"""What the experiments of this folder share: exact targets, the digits model, and distances beside their floors."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ergodax import data, nn
from ergodax.core import AffinePath, Denoiser, VPPath, integrate
from ergodax.core.run import Run
from ergodax.core.types import PRNGKey
from ergodax.diffusion import karras_grid, log_snr_grid, uniform_grid


sys.path.append(str(Path(__file__).resolve().parent.parent))

import digits  # the network, training and judge of `experiments/digits.py`
from common import ROOT as ROOT, axes as axes, heat as heat, over_seeds as over_seeds


@dataclasses.dataclass(frozen=True)
class Target:
    """A model to sample from, and what its samples are compared with.

    - `field`: the posterior mean `(t, x, label) -> array like x`.
    - `starts`: `(key, n, t) -> (x, labels)`, what sampling from time t starts at.
    - `law`: `(key, n, t) -> x`, fresh draws of what sampling up to time t should give: what the floor is made of.
    - `reference`: the same, for what all are compared with; may give fewer than n.
    """

    name: str
    path: AffinePath
    field: Callable
    starts: Callable
    law: Callable
    reference: Callable


def ten_modes() -> data.GaussianMixture:
    """64 dimensions, ten modes of unequal weight."""
    key_means, key_weights = jax.random.split(jax.random.key(64))
    weights = jax.random.uniform(key_weights, (10,), minval=0.5, maxval=1.5)
    return data.GaussianMixture.isotropic(weights / weights.sum(), jax.random.normal(key_means, (10, 64)), 0.2)


def stretched() -> data.GaussianMixture:
    """8 dimensions, four modes whose covariances have condition number 100."""
    key_means, key_turns = jax.random.split(jax.random.key(8))
    turns = jnp.linalg.qr(jax.random.normal(key_turns, (4, 8, 8)))[0]
    scales = jnp.geomspace(0.05, 0.5, 8) ** 2
    return data.GaussianMixture(jnp.array([0.4, 0.3, 0.2, 0.1]), jax.random.normal(key_means, (4, 8)), (turns * scales) @ jnp.swapaxes(turns, 1, 2))


MIXTURES = {"eight Gaussians, 2-D": data.eight_gaussians, "four stretched, 8-D": stretched, "ten modes, 64-D": ten_modes}
DIGITS = "digits model"


def mixture_target(name: str, path: AffinePath | None = None) -> Target:
    """An exact one: both its ends are laws that can be drawn from, so that nothing but the solver errs."""
    path = VPPath() if path is None else path
    mixture = MIXTURES[name]()
    denoiser = mixture.denoiser(path)

    def law(key, n, t):
        return mixture.marginal(path, t).sample(key, n)

    return Target(name, path, lambda t, x, label: denoiser(t, x), lambda key, n, t: (law(key, n, t), jnp.zeros(n, int)), law, law)


def digits_target(run: Run, config: digits.Config) -> Target:
    """The digits model, trained here (once for a folder); it is judged by the test images, with training images as the floor."""
    split = digits.DATA[config.data]()
    fitted, _ = run.train(digits.make_fit(config, split, config.train.steps), jax.random.key(config.seed), config.train.steps)
    path, prediction = digits.PATHS[config.path]

    def starts(key, n, t):
        key_labels, key_noise = jax.random.split(key)
        labels = jax.random.choice(key_labels, split.train_y, (n,), replace=False)
        return path.prior(key_noise, (n, *split.train_x.shape[1:])), labels

    def law(key, n, t):
        return jax.random.choice(key, split.train_x, (n,), replace=False)

    return Target(DIGITS, path, Denoiser(fitted.average, path, prediction), starts, law, lambda key, n, t: split.test_x[:n])


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data to train on.

    - `train`: (x, labels) with one leading axis.
    - `reference`: what samples are compared with.
    - `fresh`: `(key, n) -> x`, draws that no model made: the floor.
    - `num_classes`: of the labels that the network is told, or None.
    """

    name: str
    train: tuple
    reference: jax.Array
    fresh: Callable
    num_classes: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.train[0].shape[1:]

    def network(self, width: int, depth: int, key: PRNGKey):
        """The residual MLP that all methods of a comparison share."""
        return nn.TimeMLP(self.shape, width, depth, num_classes=self.num_classes, key=key)


def plane(name: str, draw: Callable, size: int = 20000, reference: int = 1000) -> Problem:
    """Points of the plane, from `draw(key, n)`."""
    key_train, key_reference = jax.random.split(jax.random.key(2))
    return Problem(name, (draw(key_train, size), jnp.zeros(size, jnp.int32)), draw(key_reference, reference), draw, None)


def digit_images() -> Problem:
    """The digits with their labels; the floor is training images against test images."""
    split = data.digits()

    def fresh(key, n):
        return jax.random.choice(key, split.train_x, (n,), replace=False)

    return Problem("digits", (split.train_x, split.train_y), split.test_x, fresh, 10)


PROBLEMS = {
    "eight Gaussians": lambda: plane("eight Gaussians", lambda key, n: data.eight_gaussians().sample(key, n)),
    "digits": digit_images,
}


GRIDS = ("log-SNR", "Karras", "time")


def grids(path: AffinePath, num_steps: int, sigma_min: float, sigma_max: float):
    """Times between two noise levels σ/α: one row for each of `GRIDS`."""
    start, end = (path.time(-2 * jnp.log(sigma)) for sigma in (sigma_max, sigma_min))
    karras = karras_grid(path, num_steps + 1, sigma_min, sigma_max)[:-1]
    rows = [log_snr_grid(path, num_steps, start, end), karras, uniform_grid(num_steps, start, end)]
    return jnp.stack([row.at[0].set(start).at[-1].set(end) for row in rows])


def solve(term, solver, starts, labels, keys=None):
    """One solve for each start; `keys` for a stochastic solver, others ignore them."""
    if keys is None:
        return jax.vmap(lambda start, label: integrate(term, solver, start, label))(starts, labels)
    return jax.vmap(lambda start, label, key: integrate(term, solver, start, label, key=key))(starts, labels, keys)


@jax.jit
def distances(key: PRNGKey, samples, reference) -> dict[str, jax.Array]:
    """Of two samples."""
    return {
        "sliced_wasserstein": data.sliced_wasserstein(key, samples, reference, num_projections=32),
        "energy_distance": data.energy_distance(samples, reference),
    }


def floor(key: PRNGKey, draw: Callable, n: int, reference, redraws: int) -> dict[str, np.ndarray]:
    """What fresh draws of the law itself score against `reference`: `redraws` values of each distance."""
    keys = jax.random.split(key, redraws)
    scores = [distances(key, draw(key, n), reference) for key in keys]
    return {name: np.array([float(score[name]) for score in scores]) for name in scores[0]}
