"""Meta flow matching: one vector field for many populations, given the population it starts from. Atanackovic, Zhang, Amos, Blanchette, Lee, Bengio,
Tong, Neklyudov 2024 (arXiv:2408.14608).

Each environment i (a patient, a well) has a population p₀ before and p₁ after, perhaps with a condition c (a treatment). How a point moves depends on
the whole population, dx/dt = v_t(x, p_t), as it does when cells signal to each other. The population enters through an embedding e = φ(p₀),

    L = E_i E_{(x₀, x₁) ~ π_i, t} |v_t((1 - t) x₀ + t x₁ | φ(p₀^i), c^i) - (x₁ - x₀)|²,

and φ is trained with v: a graph network on the k nearest neighbours within the population, so that populations that no run has seen are embedded, not
looked up. For a new population, embed once, then move all its points:

    source, source_weights = stack_populations(before)               # lists of (n_i, d), sizes may differ
    target, target_weights = stack_populations(after)
    batches = PopulationBatches(source, source_weights, target, target_weights)
    key_embedding, key_field = jax.random.split(key)
    model = MetaFlow(PopulationEmbedding(d, key=key_embedding), PopulationField(d, 64, key=key_field))
    fitted = fit(MetaFlowMatchingLoss(), model, optax.adam(1e-3), batches, key, num_steps=10_000, every=100)
    predicted = fitted.model.transport(population)

π_i is the coupling of the loss inside: `MetaFlowMatchingLoss(VelocityLoss(..., coupling=...))`. The paper's updates alternate between v and φ, which
is `alternating_updates`; updating both at once, as above, costs half the steps.

Deviations: the field is a plain MLP (theirs adds random Fourier features of x); the loss lacks the constant E|x₁ - x₀|² and is halved, as
`ergodax.transport.InterpolantLoss` says; its gradient reaches φ at every step, while their field steps reuse embeddings of earlier steps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.loop import integrate
from ..core.types import PRNGKey, PyTree, Time, VectorField
from .interpolants import LinearInterpolant, ZeroGamma
from .stochastic_interpolants import VelocityLoss


class PopulationEmbedding(eqx.Module):
    """φ: `embedding(points, weights) -> (size,)`, a vector of norm 1 for a population of any number n of points, in any order.

    Graph convolutions h ← relu(W h̄ + b), h̄ the mean over a point and its k nearest neighbours (Kipf and Welling 2017, arXiv:1609.02907, on a graph
    in which all have the same degree), the last without relu; then the mean over the population, divided by its norm.

    - `dim`: of a point. `size`, `width`, `depth`: of the output, units per layer and number of layers (default 64, 64, 3; the authors' depth is 3).
    - `num_neighbours`: k, static; smaller populations use all their points (default 16; the released code's is 100).
    - `dtype`: of the parameters, default JAX's.

    Costs O(n² dim); memory is that of 256 rows of distances at a time. Raises `ValueError` for counts that do not fit.
    """

    layers: list[eqx.nn.Linear]
    num_neighbours: int = eqx.field(static=True)

    def __init__(self, dim: int, size: int = 64, width: int = 64, depth: int = 3, num_neighbours: int = 16, *, key: PRNGKey, dtype=None):
        for name, count, low in (("dim", dim, 1), ("size", size, 1), ("width", width, 1), ("depth", depth, 1), ("num_neighbours", num_neighbours, 0)):
            check_count(name, count, low=low)
        sizes = [dim] + [width] * (depth - 1) + [size]
        self.layers = [eqx.nn.Linear(i, o, key=k, dtype=dtype) for i, o, k in zip(sizes[:-1], sizes[1:], jax.random.split(key, depth))]
        self.num_neighbours = num_neighbours

    def __call__(self, points: Float[Array, "n dim"], weights: Float[Array, " n"] | None = None) -> Float[Array, " size"]:
        """The embedding of one population. Points of weight 0 (default 1 each) are absent: they change nothing."""
        weights = jnp.ones(len(points), points.dtype) if weights is None else weights.astype(points.dtype)
        points = jnp.where(weights[:, None] > 0, points, 0)
        neighbours, is_edge = _nearest(points, weights > 0, self.num_neighbours)
        share = is_edge.astype(points.dtype) / (1 + jnp.sum(is_edge, 1, keepdims=True)).astype(points.dtype)
        own = 1 - jnp.sum(share, 1, keepdims=True)
        h = points
        for i, layer in enumerate(self.layers):
            h = jax.nn.relu(h) if i else h
            h = jax.vmap(layer)(own * h + jnp.einsum("nk,nkd->nd", share, h[neighbours]))
        pooled = weights @ h / jnp.maximum(jnp.sum(weights), jnp.finfo(points.dtype).tiny)
        return pooled * jax.lax.rsqrt(jnp.maximum(jnp.sum(pooled**2), jnp.finfo(points.dtype).tiny))


def _nearest(points, present, k):
    """Indices of the k nearest points that are present, (n, k), other than the point itself, and whether there were so many."""
    points = jax.lax.stop_gradient(points)
    points = points - jnp.mean(points, 0, where=present[:, None])
    squares, index = jnp.sum(points**2, 1), jnp.arange(len(points))

    def row(i):
        distance = squares - 2 * points @ points[i]
        value, neighbours = jax.lax.top_k(-jnp.where(present & (index != i), distance, jnp.inf), min(k, len(points) - 1))
        return neighbours, value > -jnp.inf

    return jax.lax.map(row, index, batch_size=256)


class PopulationField(eqx.Module):
    """v: an MLP on x, the cosines and sines of πt … π`num_frequencies`t, and `args`, arrays that condition it: `(t, x, (embedding, condition))`.

    - `dim`: of x, (dim,). `args_size`: entries of `args` in all; None among them counts nothing.
    - `width`, `depth`: units and number of hidden layers (default 128, 3); `dtype`: of the parameters, default JAX's.

    Raises `ValueError` for counts that do not fit, and for `args` of another size.
    """

    mlp: eqx.nn.MLP
    args_size: int = eqx.field(static=True)
    num_frequencies: int = eqx.field(static=True)

    def __init__(self, dim: int, args_size: int, width: int = 128, depth: int = 3, num_frequencies: int = 3, *, key: PRNGKey, dtype=None):
        counts = (("dim", dim, 1), ("args_size", args_size, 0), ("width", width, 1), ("depth", depth, 1), ("num_frequencies", num_frequencies, 1))
        for name, count, low in counts:
            check_count(name, count, low=low)
        self.mlp = eqx.nn.MLP(dim + 2 * num_frequencies + args_size, dim, width, depth, jax.nn.silu, key=key, dtype=dtype)
        self.args_size = args_size
        self.num_frequencies = num_frequencies

    def __call__(self, t: Time, x: Float[Array, " dim"], args: PyTree = None) -> Float[Array, " dim"]:
        """v at one scalar `t`."""
        given = [jnp.ravel(leaf).astype(x.dtype) for leaf in jax.tree.leaves(args)]
        if (size := sum(leaf.size for leaf in given)) != self.args_size:
            raise ValueError(f"`args` must hold {self.args_size} numbers in all, got {size}.")
        angle = jnp.pi * jnp.asarray(t, x.dtype) * jnp.arange(1, self.num_frequencies + 1).astype(x.dtype)
        return self.mlp(jnp.concatenate([x, jnp.cos(angle), jnp.sin(angle), *given]))


class MetaFlow(eqx.Module):
    """The model: `embedding(points, weights) -> e` and `field(t, x, (e, condition)) -> array like x`; both may be any callables.

    As a vector field it is `field`.
    """

    embedding: Callable
    field: VectorField

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """v at one scalar `t`, with `args` (e, condition)."""
        return self.field(t, x, args)

    def transport(
        self,
        points: Float[Array, "n dim"],
        weights: Float[Array, " n"] | None = None,
        condition: PyTree = None,
        *,
        solver: dfx.AbstractSolver | None = None,
        times: Float[Array, " steps"] | None = None,
    ) -> Float[Array, "n dim"]:
        """All points of a population, moved from t = 0 to 1, its embedding held fixed (default: Heun, 50 steps)."""
        args = self.embedding(points, weights), condition
        times = jnp.linspace(0, 1, 51, dtype=points.dtype) if times is None else times
        solver = dfx.Heun() if solver is None else solver
        return jax.vmap(lambda x: integrate(dfx.ODETerm(self.field), solver, x, args, times=times))(points)


class MetaBatch(NamedTuple):
    """m environments: their populations, with weights, and B pairs of each."""

    population: Float[Array, "m n d"]
    weights: Float[Array, "m n"]
    source: Float[Array, "m b d"]
    target: Float[Array, "m b d"]
    condition: PyTree = None  # leading axis m


class MetaFlowMatchingLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, aux)` for a `MetaFlow` and a `MetaBatch`: the mean over environments of the loss inside.

    `loss` is called as `loss(model.field, (x₀, x₁, (e, condition)), key)`, within one environment each time, so its coupling pairs points of one
    environment. Default `VelocityLoss` on the straight line without latent noise, flow matching.
    """

    loss: Callable = VelocityLoss(LinearInterpolant(ZeroGamma()), antithetic=False)

    def __call__(self, model: MetaFlow, batch: MetaBatch, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch; every population is embedded once."""

        def environment(batch, key):
            args = model.embedding(batch.population, batch.weights), batch.condition
            args = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(batch.source), *leaf.shape)), args)
            return self.loss(model.field, (batch.source, batch.target, args), key)

        losses = jax.vmap(environment)(batch, jax.random.split(key, len(batch.source)))
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), losses)


def stack_populations(populations: Sequence[ArrayLike]) -> tuple[Float[np.ndarray, "m n d"], Float[np.ndarray, "m n"]]:
    """Populations of shapes (n_i, d) as one array (m, n, d), n the largest n_i, filled up with zeros, and weights (m, n): 1 for points, else 0.

    On the host. Raises `ValueError`, naming the population, for other shapes, none at all, or points that are not finite.
    """
    arrays = [np.asarray(points) for points in populations]
    for i, points in enumerate(arrays):
        if points.ndim != 2 or not points.size or points.shape[1] != arrays[0].shape[1]:
            raise ValueError(f"Populations must have shapes (n, d), n >= 1, with one d, got {points.shape} for number {i}.")
        if not np.isfinite(points).all():
            raise ValueError(f"Population number {i} has points that are not finite, the first in row {np.argmin(np.isfinite(points).all(1))}.")
    if not arrays:
        raise ValueError("There must be at least one population, got none.")
    largest = max(map(len, arrays))
    padded = np.stack([np.pad(points, ((0, largest - len(points)), (0, 0))) for points in arrays])
    return padded, np.stack([np.arange(largest) < len(points) for points in arrays]).astype(padded.dtype)


class PopulationBatches(eqx.Module):
    """`batch(key, step) -> MetaBatch` for `ergodax.core.Fit`.

    - `source`, `target`: (m, n, d) and (m, n', d); `source_weights`, `target_weights`: (m, n) and (m, n'), >= 0, 0 for absent points.
    - `condition`: a pytree of leading axis m, or None.
    - `num_environments`, `num_pairs`: environments a step, without replacement (default 8, at most m), and pairs of each (default 64). Rows are drawn
      by their weights, with replacement.
    - `population_size`: embed this many points of a population, drawn by weight without replacement (default None, all).
    - `paired`: row j of `target` belongs to row j of `source` and comes with it (default False: drawn independently).

    Raises `ValueError` for shapes that do not fit, negative weights, and weights that differ where rows are paired.
    """

    source: Float[Array, "m n d"] = eqx.field(converter=jnp.asarray)
    source_weights: Float[Array, "m n"] = eqx.field(converter=jnp.asarray)
    target: Float[Array, "..."] = eqx.field(converter=jnp.asarray)
    target_weights: Float[Array, "..."] = eqx.field(converter=jnp.asarray)
    condition: PyTree = None
    num_environments: int = eqx.field(static=True, default=8)
    num_pairs: int = eqx.field(static=True, default=64)
    population_size: int | None = eqx.field(static=True, default=None)
    paired: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        counts = {"num_environments": self.num_environments, "num_pairs": self.num_pairs, "population_size": self.population_size or 1}
        for name, count in counts.items():
            check_count(name, count)
        shapes = [self.source.shape, self.source_weights.shape, self.target.shape, self.target_weights.shape]
        fit = len(shapes[0]) == len(shapes[2]) == 3 and shapes[0][::2] == shapes[2][::2] and [s[:2] for s in shapes[::2]] == shapes[1::2]
        if not fit:
            raise ValueError(f"expected points (m, n, d) and weights (m, n), with one m and d for source and target, got {shapes}.")
        if self.num_environments > shapes[0][0]:
            raise ValueError(f"`num_environments` must be at most {shapes[0][0]}, the environments there are, got {self.num_environments}.")
        check_range("source_weights", self.source_weights, low=0.0)
        check_range("target_weights", self.target_weights, low=0.0)
        if self.paired and shapes[0] != shapes[2]:
            raise ValueError(f"paired rows need one shape for `source` and `target`, got {shapes[0]} and {shapes[2]}.")

    def __call__(self, key: PRNGKey, step: PyTree = None) -> MetaBatch:
        """One batch."""
        key_environments, *keys = jax.random.split(key, self.num_environments + 1)
        chosen = jax.random.permutation(key_environments, len(self.source))[: self.num_environments]

        def environment(key, i):
            key_source, key_target, key_population = jax.random.split(key, 3)
            points, weights = self.source[i], self.source_weights[i]
            rows = _draw(key_source, weights, self.num_pairs)
            partners = rows if self.paired else _draw(key_target, self.target_weights[i], self.num_pairs)
            pairs = points[rows], self.target[i][partners]
            if self.population_size is not None:
                kept = _draw(key_population, weights, self.population_size, replace=False)
                points, weights = points[kept], (weights[kept] > 0).astype(weights.dtype)
            return points, weights, *pairs

        batch = jax.vmap(environment)(jnp.stack(keys), chosen)
        return MetaBatch(*batch, jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], self.condition))


def _draw(key, weights, size, replace=True):
    return jax.random.choice(key, len(weights), (size,), replace=replace, p=weights / jnp.sum(weights))


def alternating_updates(
    field_optimiser: optax.GradientTransformation, embedding_optimiser: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """An optimiser of a `MetaFlow` that updates the field at even steps and the embedding at odd ones, as the authors do; the other stands still."""

    def only_at(parity, optimiser):
        return optax.conditionally_mask(optimiser, lambda step, **_: jnp.asarray(step) % 2 == parity)

    def labels(params):
        parts = params.embedding, params.field
        return eqx.tree_at(
            lambda model: (model.embedding, model.field), params, [jax.tree.map(lambda _, i=i: i, part) for i, part in enumerate(parts)]
        )

    return optax.partition({0: only_at(1, embedding_optimiser), 1: only_at(0, field_optimiser)}, labels)


__all__ = [
    "MetaBatch",
    "MetaFlow",
    "MetaFlowMatchingLoss",
    "PopulationBatches",
    "PopulationEmbedding",
    "PopulationField",
    "alternating_updates",
    "stack_populations",
]
