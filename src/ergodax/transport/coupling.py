"""Couplings of a mini-batch: which source goes with which target. Each is a plug `(key, x₁, x₀, args) -> x₀` for the room's losses.

Targets and their `args` stay where they are; only the rows of the source move. Any coupling of the two marginals gives a valid interpolant and only
changes which one: independent pairs cross, optimally transported pairs do not, and straight paths need few steps of the flow.

    independent  x₀ shuffled
    optimal      the permutation π that minimises Σ_b ‖x₁_b - x₀_π(b)‖² over the batch
    entropic     x₀_b drawn from row b of the plan P that minimises Σ P_bi ½‖x₁_b - x₀_i‖² + ε KL(P ‖ uniform),
                 the static Schrödinger bridge of a Brownian motion of variance ε on the batch

Pooladian et al. 2023 (arXiv:2304.14772); Tong et al. 2023 (arXiv:2302.00482). A model that sees a condition c (`args`) must not be trained on the
last two as they stand: the plan then makes x₀ depend on c, while sampling starts from an x₀ that does not. The cure, C²OT of Cheng and Schwing 2025
(arXiv:2503.10636): source row i is taken to be drawn for condition c_i, and the cost becomes

    ‖x₁_b - x₀_i‖² + w d(c_b, c_i),

d their cosine distance (`cosine_distances`), in the plane the squared one; for discrete conditions w = ∞, here `within_condition`. w may be chosen
for each batch so that a given share of all pairs stays as cheap as the pair that was given (`MatchedShare`; here exactly, there by bisection).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.assignment import optimal_assignment, same_condition, squared_distances
from ..core.check import check_count, check_range, require
from ..core.types import PRNGKey, PyTree, Scalar
from .samples import Samples


class IndependentCoupling(eqx.Module):
    """The rows of x₀ in random order, whatever order they came in."""

    def __call__(self, key: PRNGKey, x1: Float[Array, "n *x"], x0: Float[Array, "n *x"], args: PyTree) -> Float[Array, "n *x"]:
        """x₀ shuffled."""
        return jax.random.permutation(key, x0)


def cosine_distances(rows: Float[Array, "n *c"], columns: Float[Array, "m *c"]) -> Float[Array, "n m"]:
    """1 - cos of the angle between rows_i and columns_j, none of which may be 0; (n, m)."""
    rows, columns = (a.reshape(a.shape[0], -1) / jnp.linalg.norm(a.reshape(a.shape[0], -1), axis=1, keepdims=True) for a in (rows, columns))
    return squared_distances(rows, columns) / 2  # of unit vectors, without the rounding of 1 - cos


class MatchedShare(eqx.Module):
    """C²OT's choice of w: the largest at which at least `share` of all n² pairs (b, i) still cost no more than the given pair (b, b); at least 0.

    `(cost, condition cost) -> w`, for `condition_weight`. The share falls in w, from that without conditions to that of equal conditions alone; it is
    never below 1/n. `share` is in [0, 1], may be swept; default 0.05, the authors' on moons.
    """

    share: Scalar = 0.05

    def __check_init__(self):
        check_range("share", self.share, low=0.0, high=1.0)

    def __call__(self, cost: Float[Array, "n n"], condition_cost: Float[Array, "n n"]) -> Float[Array, ""]:
        """w, infinite where equal conditions alone make up the share."""
        saving = jnp.diag(cost)[:, None] - cost
        # Pair (b, i) counts up to the weight saving/d; with d = 0 always or never.
        limit = jnp.where(condition_cost > 0, saving / jnp.where(condition_cost > 0, condition_cost, 1), jnp.where(saving >= 0, jnp.inf, -jnp.inf))
        rank = jnp.clip(jnp.ceil(jnp.asarray(self.share, cost.dtype) * cost.size).astype(int), 1, cost.size)
        return jnp.maximum(-jnp.sort(-limit, axis=None)[rank - 1], 0)


def _costs(coupling: "OptimalCoupling | EntropicCoupling", x1: Array, x0: Array, args: PyTree) -> Float[Array, "n n"]:
    """‖x₁_b - x₀_i‖² + w Σ d(c_b, c_i), the sum over the leaves of `args`."""
    if x1.shape != x0.shape:
        raise ValueError(f"x₁ and x₀ must have one shape (batch, *example), got {x1.shape} and {x0.shape}.")
    conditions = jax.tree.leaves(args)
    if not conditions and (coupling.within_condition or coupling.condition_weight is not None):
        raise ValueError("a coupling by condition needs conditions, but `args` is empty: give the loss batches (x₀, x₁, args).")
    x1, x0, conditions = jax.lax.stop_gradient((x1, x0, conditions))
    cost = squared_distances(x1, x0)
    if coupling.condition_weight is None:
        return cost
    distance = sum((coupling.condition_cost(c.astype(cost.dtype), c.astype(cost.dtype)) for c in conditions), jnp.zeros_like(cost))
    # Long rows leave rounding on the diagonal, which is 0.
    distance = jnp.where(jnp.eye(len(cost), dtype=bool), 0, distance)
    weight = coupling.condition_weight
    weight = jnp.asarray(weight(cost, distance) if callable(weight) else weight, cost.dtype)
    # The pairs as given have no penalty and cost at most n max(cost) together: a larger penalty than that changes nothing and may be infinite.
    return cost + jnp.where(distance > 0, jnp.minimum(weight * distance, (len(cost) + 1) * jnp.max(cost)), 0)


class OptimalCoupling(eqx.Module):
    """The rows of x₀ in the order of least total squared distance to x₁, by the Hungarian algorithm: exact, O(n³). Deterministic.

    - `condition_weight`: w >= 0 of C²OT, a number or a rule such as `MatchedShare()`; may be swept. None (default): conditions are not looked at.
    - `condition_cost`: `(conditions, conditions) -> (n, n)`, d: `squared_distances` of `ergodax.core.assignment` (default) or `cosine_distances`.
    - `within_condition` (static, default False): never pair across unequal conditions, w = ∞: for labels, compared exactly.

    Conditions are the leaves of `args`, of leading axis n each. No gradient flows through the choice. Inside `shard_map` every device couples its own
    part of a batch. Raises `ValueError` for unequal shapes, and where conditions are asked for but `args` is empty.
    """

    condition_weight: Scalar | Callable | None = None
    condition_cost: Callable = squared_distances
    within_condition: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if not callable(self.condition_weight):
            check_range("condition_weight", self.condition_weight, low=0.0)

    def __call__(self, key: PRNGKey, x1: Float[Array, "n *x"], x0: Float[Array, "n *x"], args: PyTree) -> Float[Array, "n *x"]:
        """The rows of x₀, reordered; `key` is not used."""
        return x0[optimal_assignment(_costs(self, x1, x0, args), args if self.within_condition else None)]


class EntropicCoupling(eqx.Module):
    """For every row of x₁ a row of x₀, drawn from the entropic plan of the batch (cost ½‖x₁ - x₀‖², Sinkhorn of ott): rows may repeat.

    - `epsilon`: ε > 0, in units of x²; may be swept. 0 would be `OptimalCoupling`, ∞ independent draws.
    - `condition_weight`, `condition_cost`, `within_condition`: as in `OptimalCoupling`; the penalty w d is halved with the squared distance.
    - `tolerance`: of the plan's marginals, in total variation (default 1e-3, ott's).
    - `max_iterations` (static, default 2000): after so many the plan is taken as it is; each draw's law is normalised in any case.

    In expectation every source is drawn once. No gradient flows through the plan. Needs ott: `pip install 'ergodax[ot]'`.
    """

    epsilon: Scalar
    condition_weight: Scalar | Callable | None = None
    condition_cost: Callable = squared_distances
    within_condition: bool = eqx.field(static=True, default=False)
    tolerance: Scalar = 1e-3
    max_iterations: int = eqx.field(static=True, default=2000)

    def __check_init__(self):
        check_range("epsilon", self.epsilon, low=0.0, open_low=True)
        check_range("tolerance", self.tolerance, low=0.0, open_low=True)
        check_count("max_iterations", self.max_iterations)
        if not callable(self.condition_weight):
            check_range("condition_weight", self.condition_weight, low=0.0)

    def __call__(self, key: PRNGKey, x1: Float[Array, "n *x"], x0: Float[Array, "n *x"], args: PyTree) -> Float[Array, "n *x"]:
        """n rows of x₀."""
        return x0[jax.random.categorical(key, self.log_plan(x1, x0, args))]

    def log_plan(self, x1: Float[Array, "n *x"], x0: Float[Array, "n *x"], args: PyTree = None) -> Float[Array, "n n"]:
        """The logarithm of the plan's row b: the law over i of the source for target b, normalised."""
        geometry, linear = require("ott.geometry.geometry", "ot"), require("ott.solvers.linear", "ot")
        cost = _costs(self, x1, x0, args) / 2
        epsilon = jax.lax.stop_gradient(jnp.asarray(self.epsilon, cost.dtype))
        same = same_condition(args if self.within_condition else None, len(cost))
        # Far enough that no mass goes there, near enough that no digits are lost.
        cost = jnp.where(same, cost, 2 * jnp.max(cost) + 100 * epsilon)
        with jax.numpy_dtype_promotion("standard"):  # ott adds Python-made arrays of other dtypes to its own
            plan = linear.solve(geometry.Geometry(cost_matrix=cost, epsilon=epsilon), threshold=self.tolerance, max_iterations=self.max_iterations)
        return jax.nn.log_softmax(jnp.where(same, (jax.lax.stop_gradient(plan.g) - cost) / epsilon, -jnp.inf), axis=1)


class PairBatches(eqx.Module):
    """`batch(key, step) -> (x₀, x₁, args)` for `ergodax.core.Fit`, where every row of the target brings its conditions. (Without: `Minibatches`.)

    - `source`: `Samples`, or anything with `sample(key, n)`, such as a `GaussianMixture`.
    - `target`: `Samples` of n rows.
    - `args`: a pytree of arrays of leading axis n, such as labels.
    - `batch_size` (static): rows drawn of each, independently; a loss's `coupling` pairs them anew.

    Raises `ValueError` for `args` of another number of rows.
    """

    source: Any
    target: Samples
    args: PyTree
    batch_size: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("batch_size", self.batch_size)
        rows = len(self.target.points)
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.args)]
        if not shapes or any(shape[:1] != (rows,) for shape in shapes):
            raise ValueError(f"`args` must hold arrays with the {rows} rows of the target, got shapes {shapes}.")

    def __call__(self, key: PRNGKey, step: Any) -> tuple:
        """One batch."""
        key_source, key_target = jax.random.split(key)
        rows = self.target.indices(key_target, self.batch_size)
        drawn = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], (self.target.points, self.args))
        return self.source.sample(key_source, self.batch_size), *drawn


__all__ = ["EntropicCoupling", "IndependentCoupling", "MatchedShare", "OptimalCoupling", "PairBatches", "cosine_distances"]
