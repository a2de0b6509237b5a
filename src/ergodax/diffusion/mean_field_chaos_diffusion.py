"""Mean-field chaos diffusion: clouds of any number of particles, with a score that sees the others as a measure. Park, Kim, Alaa 2024.

arXiv:2406.05396. A datum is an exchangeable cloud of N particles, noised one by one. The score of a particle reads the cloud's empirical measure ν,

    s(t, x^i, ν) = A(t, x^i) + [B *_R ν](x^i),   [B *_R ν](x) = mean of B(t, x - x^j) over the x^j with |x - x^j| <= R

(`MeanFieldNetwork`), so one network serves every N, and as N grows it becomes a function of one particle and a law: chaos propagates. Mean-field
score matching is the loss per particle, which has a limit,

    L = E_t λ_t E (1/N) Σ_i |s(t, x_t^i, ν_t) - ∇ log q_t(x_t^i | x_1^i)|²;

that is `DenoisingLoss(path, ScorePrediction(), weight)` on clouds (N, d), times d, for it takes the mean over both axes.

Few particles are enough where there is much noise. The times are cut into intervals of growing cardinality N_0 < N_1 < …, and

- training takes N_k particles of each cloud for the times of interval k (`SubdividedLoss`);
- sampling starts with N_0 particles, and at the end of an interval every particle branches into b (`branching_integrate`, any solver in between).

In one line each:

    loss = SubdividedLoss(DenoisingLoss(path, ScorePrediction()), jnp.array([0.0, 0.5, 1.0]), (64, 256))    # loss(network, batch, key)
    x1 = branching_integrate(denoised, path, (grid[:51], grid[50:]), EulerMaruyama(), x0, Branching(shift, 4), key)

Branching keeps b - 1 copies of each particle and moves one by a map Ψ, `Branching`. What Ψ is in the paper, a learned network, could not be
confirmed, nor the weights of the intervals; both are plugs here. `LangevinShift` is a Ψ that needs no training: it keeps the law of the cloud. A
cloud and its shift are then one of twice the particles where these are independent, and nearly so where chaos has propagated."""

import itertools
from collections.abc import Callable, Sequence

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.check import check_count, check_increasing, check_range, is_concrete
from ..core.loop import integrate
from ..core.path import AffinePath
from ..core.term import DenoiserTerm
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .objective import DenoisingLoss


class MeanFieldNetwork(eqx.Module):
    """`network(t, x, args) -> (N, d)` for a cloud x (N, d) of any N; commutes with renumbering the particles.

    - `own`, `interaction`: A and B, networks `(t, x, args)` on one point (d,); B is given the difference of two particles.
    - `radius`: R > 0, default infinite. A particle is its own neighbour.

    The memory is that of N² calls of B, with `batch_size` (static) that of `batch_size` · N.
    """

    own: VectorField
    interaction: VectorField
    radius: Scalar = float("inf")
    batch_size: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_range("radius", self.radius, low=0.0, open_low=True)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def __call__(self, t: Time, x: Float[Array, "n d"], args: PyTree = None) -> Float[Array, "n d"]:
        """The value at every particle."""

        def one(point):
            offset = point - x
            near = jnp.sum(offset**2, axis=1) <= jnp.asarray(self.radius, x.dtype) ** 2
            pulls = jax.vmap(lambda difference: self.interaction(t, difference, args))(offset)
            pull = jnp.sum(jnp.where(near[:, None], pulls, 0), axis=0) / jnp.sum(near, dtype=x.dtype)
            return self.own(t, point, args) + pull

        return jax.vmap(one)(x) if self.batch_size is None else jax.lax.map(one, x, batch_size=self.batch_size)


class SubdividedLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: Σ_k w_k (t_{k+1} - t_k)/(t_K - t_0) L_k, L_k that of N_k particles on the times of interval k.

    - `base`: a `DenoisingLoss`; its `times` on [0, 1] are scaled to each interval.
    - `boundaries`: t_0 < … < t_K, (K + 1,).
    - `cardinalities` (static): N_0, …, N_{K-1}, at most the particles of a cloud; drawn at random from it.
    - `weights`: (K,), default 1: then equal cardinalities are `base` on t_0 … t_K.
    - `batch`: clouds of shape (B, N, d), or a pair (data, args); `model` on ONE cloud of any N.

    Raises `ValueError` for lengths that do not fit or a cloud with too few particles.
    """

    base: DenoisingLoss
    boundaries: Float[Array, " ends"]
    cardinalities: tuple[int, ...] = eqx.field(static=True)
    weights: Float[Array, " intervals"] | None = None

    def __check_init__(self):
        check_increasing("boundaries", self.boundaries)
        for count in self.cardinalities:
            check_count("cardinalities", count)
        lengths = len(self.boundaries) - 1, len(self.cardinalities if self.weights is None else self.weights)
        if lengths != (len(self.cardinalities),) * 2:
            raise ValueError(f"{len(self.cardinalities)} `cardinalities` need as many intervals and weights, got {lengths[0]} and {lengths[1]}.")

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        data, args = batch if isinstance(batch, tuple) else (batch, None)
        if data.ndim != 3 or data.shape[1] < max(self.cardinalities):
            raise ValueError(f"the data must have shape (batch, at least {max(self.cardinalities)} particles, d), got {data.shape}.")
        share = jnp.diff(self.boundaries) / (self.boundaries[-1] - self.boundaries[0])
        if self.weights is not None:
            share = self.weights.astype(share.dtype) * share

        def interval(k, key):
            key_subset, key_loss = jax.random.split(key)
            start, end = self.boundaries[k : k + 2]
            keys = jax.random.split(key_subset, len(data))
            subset = jax.vmap(lambda key, cloud: jax.random.permutation(key, cloud)[: self.cardinalities[k]])(keys, data)

            def times(key, n):
                return start + (end - start) * self.base.times(key, n).astype(start.dtype)

            loss = eqx.tree_at(lambda base: base.times, self.base, times)
            return loss(model, subset if args is None else (subset, args), key_loss)[0]

        keys = jax.random.split(key, len(self.cardinalities))
        losses = jnp.stack([interval(k, keys[k]) for k in range(len(self.cardinalities))])
        return jnp.sum(share.astype(losses.dtype) * losses), {}


class LangevinShift(eqx.Module):
    """A Ψ that keeps the law of the cloud: `num_steps` (static) of unadjusted Langevin, x += e s + √(2e) z with e = `step_size` · σ_t².

    - `denoised`: of the cloud, `(t, x, args)`; s = (α D - x)/σ².
    - `step_size`: default 0.1. The law is kept to first order in it.
    """

    denoised: VectorField
    path: AffinePath
    step_size: Scalar = 0.1
    num_steps: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        check_range("step_size", self.step_size, low=0.0)
        check_count("num_steps", self.num_steps)

    def __call__(self, key: PRNGKey, t: Time, x: Float[Array, "n d"], args: PyTree = None) -> Float[Array, "n d"]:
        """The moved cloud."""
        t, size = jnp.asarray(t, x.dtype), jnp.asarray(self.step_size, x.dtype)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)

        def step(x, key):
            noise = jax.random.normal(key, (x.size,), x.dtype).reshape(x.shape)
            return x + size * (alpha * self.denoised(t, x, args) - x) + jnp.sqrt(2 * size) * sigma * noise, None

        return jax.lax.scan(step, x, jax.random.split(key, self.num_steps))[0]


class Branching(eqx.Module):
    """Every particle becomes `factor` = b (static, default 2): b - 1 copies and one moved by `shift`, any `(key, t, x, args) -> array like x`."""

    shift: Callable
    factor: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        check_count("factor", self.factor, low=2)

    def __call__(self, key: PRNGKey, t: Time, x: Float[Array, "n d"], args: PyTree = None) -> Float[Array, "m d"]:
        """A cloud of b N particles."""
        return jnp.concatenate([x] * (self.factor - 1) + [self.shift(key, t, x, args)])


def branching_integrate(
    denoised: VectorField,
    path: AffinePath,
    grids: Sequence[Float[Array, " _"]],
    solver: dfx.AbstractSolver,
    x0: Float[Array, "n d"],
    branching: Callable,
    key: PRNGKey,
    args: PyTree = None,
) -> Float[Array, "m d"]:
    """Sample a cloud: `integrate` with `solver` over each grid, and `branching(key, t, x, args) -> more particles` between them.

    - `denoised`: `(t, x, args) -> array like x` for a cloud of any N.
    - `grids`: times of each interval; every grid starts where the one before it ended. One grid is `integrate`.
    - `x0`: the N_0 particles of the start, `path.prior(key, (N_0, d))`.

    Raises `ValueError` for grids that do not join.
    """
    ends = [(before[-1], after[0]) for before, after in itertools.pairwise(grids)]
    if not grids or (is_concrete(ends) and any(np.asarray(end) != np.asarray(start) for end, start in ends)):
        raise ValueError(f"`grids` must be at least one, each from where the one before ended, got joints {ends}.")
    x = x0
    for k, grid in enumerate(grids):
        key_branch, key_solve = jax.random.split(jax.random.fold_in(key, k))
        x = branching(key_branch, grid[0], x, args) if k else x
        x = integrate(DenoiserTerm(denoised, path, grid), solver, x, args, key=key_solve)
    return x


__all__ = ["Branching", "LangevinShift", "MeanFieldNetwork", "SubdividedLoss", "branching_integrate"]
