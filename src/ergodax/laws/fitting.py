"""Fitting laws: many starts in one program, robust objectives, standard errors, bootstrap bands, and a warning before far extrapolation.

A law is an Equinox Module whose floating leaves are its parameters, `law(inputs) -> prediction`. Its fit minimises

    F(θ) = Σ_i w_i h(s(law(x_i)) - s(y_i)),   h(r) = r²/2,  or Huber's  r²/2 for |r| ≤ δ,  δ |r| - δ²/2 beyond,

with s the logarithm or nothing: `huber_log(1e-3)` is the choice of Hoffmann et al. 2022 (arXiv:2203.15556) and of most scaling laws since.

**Minimiser.** Such objectives are stiff (parameters of very different scale and strongly correlated), and L-BFGS stops early on them. But F is a sum
of squares, F = ½ Σ w ρ² with ρ = sign(r) √(2 h(r)), which has a continuous derivative, and parameters are few. So this is Levenberg-Marquardt
(Marquardt 1963) on ρ: scaled by the columns of the Jacobian as in MINPACK (Moré 1978), damped by Nielsen's rule (1999), each step by QR. It needs no
learning rate, does not depend on the units of the parameters, and says for every start how flat it is there: the largest cosine between the
residuals and a column of the Jacobian, MINPACK's measure of the gradient.

**Uncertainty.** θ̂ has the covariance H⁻¹ (Σ s_i s_iᵀ) H⁻¹ n/(n - p) of an M-estimator (Huber 1967), with H the Hessian of F and s_i the gradient of
the i-th term: it takes the errors as independent. Errors along one loss curve are not; `bootstrap` with `blocks` weighs whole blocks.

**Derivatives.** The fitted law is differentiable in data, weights and δ, by the implicit function theorem at the minimum.
"""

import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, Real

from ..core.check import check_count, check_range, is_concrete
from ..core.types import PRNGKey, Scalar


Law = TypeVar("Law", bound=Callable[[Any], Any])


class Objective(eqx.Module):
    """What a fit makes small, `½ Σ w residuals²`. Made by `huber_log`, `huber`, `squared_log` and `squared`.

    - `delta`: Huber's δ, may be traced; None for squares.
    - `log`: whether predictions and observations are compared by their logarithms. Both must then be positive.
    """

    delta: Scalar | None
    log: bool = eqx.field(static=True)

    def __check_init__(self):
        check_range("delta", self.delta, low=0.0, open_low=True)

    def __call__(self, prediction: Float[Array, " n"], observed: Float[Array, " n"]) -> Float[Array, " n"]:
        """ρ: the residual, or beyond δ the signed root of twice Huber's loss."""
        r = jnp.log(prediction) - jnp.log(observed) if self.log else prediction - observed
        if self.delta is None:
            return r
        delta, size = jnp.asarray(self.delta, r.dtype), jnp.abs(r)
        return jnp.where(size <= delta, r, jnp.sign(r) * jnp.sqrt(delta * (2 * jnp.maximum(size, delta) - delta)))


def huber_log(delta: Scalar = 1e-3) -> Objective:
    """Huber's loss of the difference of logarithms, which is the relative error. Default δ = 1e-3, of scaling laws."""
    return Objective(delta, True)


def huber(delta: Scalar) -> Objective:
    """Huber's loss of the difference."""
    return Objective(delta, False)


def squared_log() -> Objective:
    """Half the square of the difference of logarithms."""
    return Objective(None, True)


def squared() -> Objective:
    """Half the square of the difference: least squares."""
    return Objective(None, False)


def _ranges(features: Callable, inputs: Any) -> PyTree:
    """The smallest and largest number in every leaf."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(features(inputs))]
    return [jnp.stack([jnp.min(leaf), jnp.max(leaf)]) if leaf.size else jnp.full(2, jnp.nan) for leaf in leaves]


def _excess(seen: Array, asked: Array) -> float:
    """How far `asked` lies beyond `seen`, in widths of the latter; on a logarithmic axis if all are positive."""
    (low, high), (lowest, highest) = np.asarray(seen, float), np.asarray(asked, float)
    if min(low, lowest) > 0:
        low, high, lowest, highest = np.log([low, high, lowest, highest])
    beyond, slack = max(low - lowest, highest - high), 1e-6 * max(1.0, abs(low))
    return 0.0 if beyond <= slack else beyond / max(high - low, slack)


def _vector(law: Any, free: tuple[bool, ...]) -> tuple[Float[Array, " p"], Callable[[Float[Array, " p"], Any], Any]]:
    """The free leaves as one vector, and `(vector, law) -> law` that puts one back."""
    spec = jax.tree.unflatten(jax.tree.structure(law), free)
    vector, unravel = ravel_pytree(eqx.filter(law, spec))
    return vector, lambda vector, law: eqx.combine(unravel(vector), eqx.filter(law, spec, inverse=True))


class LawFit(eqx.Module, Generic[Law]):
    """A fitted law, and how far to trust it. `fit(inputs)` predicts.

    - `law`: from the start that ended lowest.
    - `laws`: from every start, stacked; `best` is the one taken.
    - `objective`: F at the end of each start; infinite where the start itself could not be evaluated.
    - `gradient`: at the end of each, the largest cosine between residuals and a column of the Jacobian, 0 at a minimum.
    - `converged`: for each, whether the gradient is 0 but for rounding, or the fit perfect. A valley with no end in sight is not.
    - `steps`: what each took.
    - `covariance`: (p, p), of the free parameters in the order of the law's leaves; NaN or infinite where the data do not determine them.
    - `seen`: smallest and largest number of each of the features of the inputs.
    - `free`: which of the law's leaves were fitted.

    A call WARNS (UserWarning) when inputs that can be read lie farther beyond what was seen than that is wide, on a logarithmic axis for positive
    numbers: a law seen from 1e7 to 1e9 is asked at 1e12. `fit.law(inputs)` predicts silently.
    """

    law: Law
    laws: Law
    objective: Float[Array, " starts"]
    gradient: Float[Array, " starts"]
    converged: Bool[Array, " starts"]
    steps: Int[Array, " starts"]
    best: Int[Array, ""]
    covariance: Float[Array, "p p"]
    seen: list[Real[Array, "2"]]
    free: tuple[bool, ...] = eqx.field(static=True)
    features: Callable[[Any], PyTree] = eqx.field(static=True)

    def __call__(self, inputs: Any) -> Any:
        asked = _ranges(self.features, inputs)
        if is_concrete((self.seen, asked)):
            for seen, new in zip(self.seen, asked, strict=True):
                if (excess := _excess(seen, new)) > 1:
                    warnings.warn(
                        f"the law was fitted on inputs from {seen[0]:.4g} to {seen[1]:.4g} and is asked at {new[0]:.4g} to {new[1]:.4g}, "
                        f"{excess:.1f} widths beyond: an extrapolation that its errors do not cover.",
                        stacklevel=2,
                    )
        return self.law(inputs)

    def standard_errors(self) -> Law:
        """Of every parameter, in the shape of the law; 0 for those that were held fixed."""
        _, unravel = _vector(self.law, self.free)
        return unravel(jnp.sqrt(jnp.diagonal(self.covariance)), jax.tree.map(jnp.zeros_like, self.law))

    def standard_error(self, function: Callable[[Law], Float[Array, "..."]]) -> Float[Array, "..."]:
        """Of any function of the law, to first order: `fit.standard_error(lambda law: law.exponent)`, or of a prediction."""
        vector, unravel = _vector(self.law, self.free)
        jacobian = jax.jacfwd(lambda vector: function(unravel(vector, self.law)))(vector)
        return jnp.sqrt(jnp.einsum("...i,ij,...j->...", jacobian, self.covariance, jacobian))


def _levenberg_marquardt(residuals, start, max_steps):
    """The minimum of ½ |residuals|² from one start: (parameters, value, largest cosine, converged, steps)."""
    eps = jnp.finfo(start.dtype).eps

    def evaluate(x):
        jacobian, r = jax.jacfwd(lambda x: (residuals(x),) * 2, has_aux=True)(x)
        cost = jnp.sum(r**2) / 2
        fine = jnp.isfinite(cost) & jnp.all(jnp.isfinite(jacobian))
        return jnp.where(fine, r, 0), jnp.where(fine, jacobian, 0), jnp.where(fine, cost, jnp.inf)

    def cosine(r, jacobian):
        lengths = jnp.linalg.norm(jacobian, axis=0) * jnp.linalg.norm(r)
        return jnp.max(jnp.abs(r @ jacobian) / jnp.where(lengths > 0, lengths, 1))

    def perfect(cost, r):
        return cost <= r.size * (32 * eps) ** 2

    def improve(carry):
        x, r, jacobian, cost, scale, damping, growth, step, _ = carry
        scale = jnp.maximum(scale, jnp.linalg.norm(jacobian, axis=0))
        unit = jnp.where(scale > 0, scale, 1)
        q, triangle = jnp.linalg.qr(jnp.concatenate([jacobian / unit, jnp.sqrt(damping) * jnp.eye(x.size, dtype=x.dtype)]))
        move = jax.scipy.linalg.solve_triangular(triangle, -(r @ q[: r.size]))
        expected = -(r @ (jacobian / unit)) @ move / 2 + damping * (move @ move) / 2
        trial = x + move / unit
        new_r, new_jacobian, new_cost = evaluate(trial)
        ratio = (cost - new_cost) / jnp.where(expected > 0, expected, 1)
        accepted = (new_cost < cost) & (expected > 0)
        x, r, jacobian, cost = (jnp.where(accepted, a, b) for a, b in ((trial, x), (new_r, r), (new_jacobian, jacobian), (new_cost, cost)))
        damping = jnp.clip(damping * jnp.where(accepted, jnp.maximum(1 / 3, 1 - (2 * jnp.clip(ratio, 0, 1) - 1) ** 3), growth), eps**2, 1 / eps)
        growth = jnp.where(accepted, 2, 2 * growth)
        stuck = ~(expected > eps * cost) | (damping >= 1 / eps)
        return x, r, jacobian, cost, scale, damping, growth, step + 1, stuck | perfect(cost, r)

    r, jacobian, cost = evaluate(start)
    damping = jnp.full_like(cost, 1e-3)
    step = jnp.zeros_like(cost, dtype=max_steps.dtype)
    start = start + jnp.zeros_like(cost)  # as much of a mesh as the data
    carry = start, r, jacobian, cost, jnp.zeros_like(start), damping, 2 * jnp.ones_like(cost), step, ~jnp.isfinite(cost)
    x, r, jacobian, cost, *_, steps, _ = jax.lax.while_loop(lambda carry: ~carry[-1] & (carry[-2] < max_steps), improve, carry)
    slope = cosine(r, jacobian)
    return x, cost, slope, jnp.isfinite(cost) & ((slope <= 100 * jnp.sqrt(eps)) | perfect(cost, r)), steps


def _frozen(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, tree)


def _minimise(starts, free, inputs, observed, objective, weights, prior, max_steps):
    """From stacked starts: laws, values, cosines, whether converged, steps. Derivatives stop here."""
    starts, inputs, observed, objective, weights, prior = _frozen((starts, inputs, observed, objective, weights, prior))

    def one(start):
        vector, unravel = _vector(start, free)

        def residuals(vector):
            law = unravel(vector, start)
            errors = jnp.sqrt(weights) * objective(law(inputs), observed)
            return errors if prior is None else jnp.concatenate([errors, prior(law)])

        found, *rest = _levenberg_marquardt(residuals, vector, max_steps)
        return unravel(found, start), *rest

    return eqx.filter_vmap(one)(starts)


def _polish(law, free, inputs, observed, objective, weights, prior):
    """The law again, with derivatives to the data, and its covariance."""
    vector, unravel = _vector(law, free)

    def terms(vector, inputs, observed, objective, weights, prior):
        law_here = unravel(vector, law)
        errors = weights * objective(law_here(inputs), observed) ** 2 / 2
        return errors if prior is None else jnp.concatenate([errors, prior(law_here) ** 2 / 2])

    data = inputs, observed, objective, weights, prior
    hessian = jax.hessian(lambda vector: jnp.sum(terms(vector, *_frozen(data))))(vector)
    size = jnp.sqrt(jnp.abs(jnp.diagonal(hessian)))
    unit = jnp.where(size > 0, size, 1)
    inverse = jnp.linalg.inv(hessian / jnp.outer(unit, unit)) / jnp.outer(unit, unit)
    scores = jax.jacfwd(lambda vector: terms(vector, *_frozen(data))[: observed.size])(vector)
    spread = inverse @ (scores.T @ scores) @ inverse * (observed.size / jnp.maximum(observed.size - vector.size, 0))
    gradient = jax.grad(lambda vector: jnp.sum(terms(vector, *data)))(vector)
    move = jnp.where(jnp.isfinite(inverse), inverse, 0) @ (gradient - jax.lax.stop_gradient(gradient))  # 0, but its derivative is not
    return unravel(vector - move, law), spread


@eqx.filter_jit
def _fit(starts, free, inputs, observed, objective, weights, prior, features, max_steps):
    laws, values, gradient, converged, steps = _minimise(starts, free, inputs, observed, objective, weights, prior, max_steps)
    best = jnp.argmin(values)
    law = jax.tree.map(lambda leaf: leaf[best] if eqx.is_array(leaf) else leaf, laws)
    law, covariance = _polish(law, free, inputs, observed, objective, weights, prior)
    return LawFit(law, laws, values, gradient, converged, steps, best, covariance, _ranges(features, inputs), free, features)


@eqx.filter_jit
def _refit(keys, law, free, inputs, observed, objective, weights, prior, blocks, max_steps, batch_size):
    starts = jax.tree.map(lambda leaf: leaf[None] if eqx.is_array(leaf) else leaf, law)

    def refit(key):
        drawn = jax.random.exponential(key, observed.shape, observed.dtype)
        share = drawn if blocks is None else drawn[blocks]
        laws, *_ = _minimise(starts, free, inputs, observed, objective, weights * share, prior, max_steps)
        return jax.tree.map(lambda leaf: leaf[0], eqx.filter(laws, eqx.is_array))

    arrays = jax.lax.map(refit, keys, batch_size=batch_size)
    return eqx.combine(arrays, eqx.filter(law, eqx.is_array, inverse=True))


def _prepare(starts, inputs, observed, objective, weights, free):
    """What is wrong with the data is said here; then all in the dtype of `observed`."""
    observed = jnp.asarray(observed)
    if observed.ndim != 1 or not jnp.issubdtype(observed.dtype, jnp.floating):
        raise ValueError(f"`observed` must be a floating vector, got {observed.dtype} of shape {observed.shape}.")
    leaves = jax.tree.leaves(starts)
    parameters = [eqx.is_inexact_array(leaf) for leaf in leaves]
    if free is not None:
        parameters = [is_parameter and bool(choice) for is_parameter, choice in zip(parameters, jax.tree.leaves(free), strict=True)]
    free = tuple(parameters)
    counts = {leaf.shape[:1] for leaf in leaves if eqx.is_array(leaf)}
    if not any(free) or len(counts) != 1 or counts == {()}:
        shapes = [np.shape(leaf) for leaf in leaves]
        raise ValueError(f"`starts` must have floating leaves that are free, all stacked over starts, got leaves of shapes {shapes}.")
    p = sum(leaf[0].size for leaf, choice in zip(leaves, free) if choice)
    if observed.size < p:
        raise ValueError(f"{observed.size} points cannot determine {p} parameters: at least {p} are needed.")
    for name, values in (("observed", observed), ("inputs", inputs)):
        for leaf in jax.tree.leaves(values):
            if is_concrete(leaf) and (bad := np.flatnonzero(~np.isfinite(np.asarray(leaf)))).size:
                raise ValueError(f"`{name}` must be finite, but {bad.size} of {np.size(leaf)} numbers are not, the first is number {bad[0]}.")
    if objective.log and is_concrete(observed) and (bad := np.flatnonzero(np.asarray(observed) <= 0)).size:
        raise ValueError(f"`observed` must be positive, as its logarithm is fitted, but number {bad[0]} is {observed[bad[0]]}.")
    weights = jnp.ones_like(observed) if weights is None else jnp.asarray(weights, observed.dtype)
    if weights.shape != observed.shape:
        raise ValueError(f"`weights` must have the shape of `observed`, {observed.shape}, got {weights.shape}.")
    check_range("weights", weights, low=0.0, open_high=True)
    starts = jax.tree.map(lambda leaf: leaf.astype(observed.dtype) if eqx.is_inexact_array(leaf) else leaf, starts)
    shape = eqx.filter_eval_shape(lambda starts: eqx.filter_vmap(lambda law: law(inputs))(starts), starts).shape[1:]
    if shape != observed.shape:
        raise ValueError(f"the law predicts shape {shape} from `inputs`, but `observed` has {observed.shape}.")
    if objective.delta is not None:
        objective = Objective(jnp.asarray(objective.delta, observed.dtype), objective.log)
    return starts, observed, objective, weights, free


def _identity(inputs):
    return inputs


def fit_law(
    starts: Law,
    inputs: Any,
    observed: Float[Array, "..."],
    *,
    objective: Objective | None = None,
    weights: Float[Array, "..."] | None = None,
    prior: Callable[[Law], Float[Array, "..."]] | None = None,
    free: PyTree[bool] | None = None,
    features: Callable[[Any], PyTree] = _identity,
    max_steps: int = 500,
) -> LawFit[Law]:
    """Fit a law from many starts at once: a pure function, to be jitted and vmapped over data, weights and δ.

    - `starts`: a law whose array leaves have a leading axis, one entry for each start: `jax.vmap(Law)(...)`, or `stack_laws(...)`.
    - `inputs`: what the law is called on, giving (n,).
    - `observed`: (n,), floating; the fit is done in its dtype. In float32 a fit knows some three digits, so bring float64 under x64 for more.
    - `objective`: default `huber_log(1e-3)`.
    - `weights`: of the points, default 1.
    - `prior`: `law -> vector`, half whose square is added to F, in units of it: a ridge towards what is known. A Module, so that its numbers may be
      traced. `objective` of the result contains it.
    - `free`: a law of booleans, False for leaves that stay as they start (`eqx.tree_at`). Default: all floating leaves are free.
    - `features`: what of the inputs counts when `LawFit` judges whether a prediction is far from the data. Default: every leaf.
    - `max_steps`: of Levenberg-Marquardt for each start, default 500.

    Raises `ValueError` for fewer points than parameters, shapes that do not fit, numbers that are not finite, or not positive where logarithms are
    taken, and when the law cannot be evaluated at any start.
    """
    check_count("max_steps", max_steps)
    starts, observed, objective, weights, free = _prepare(starts, inputs, observed, objective or huber_log(), weights, free)
    fit = _fit(starts, free, inputs, observed, objective, weights, prior, features, jnp.asarray(max_steps))
    if is_concrete(fit.objective) and not np.isfinite(np.asarray(fit.objective)).any():
        raise ValueError("the law or its gradient is not finite (or not positive, where logarithms are taken) at any of `starts`.")
    return fit


def stack_laws(*laws: Law) -> Law:
    """Several laws as one with a leading axis: starts for `fit_law`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *laws)


def bootstrap(
    key: PRNGKey,
    fit: LawFit[Law],
    inputs: Any,
    observed: Float[Array, "..."],
    *,
    samples: int = 200,
    blocks: Int[Array, " n"] | None = None,
    objective: Objective | None = None,
    weights: Float[Array, "..."] | None = None,
    prior: Callable[[Law], Float[Array, "..."]] | None = None,
    max_steps: int = 100,
    batch_size: int | None = None,
) -> Law:
    """Refits under random weights, stacked: what the law could as well have been. One program; `bands` makes intervals of them.

    Weights are exponential, which is the Bayesian bootstrap (Rubin 1981): every point stays in, so no refit is degenerate. Each refit sets out from
    the fitted law.

    - `inputs`, `observed`, `objective`, `weights`, `prior`: as the fit had them.
    - `samples`: how many, default 200.
    - `blocks`: for every point the number, 0…n-1, of its block. A block's points share their weight: for errors that go together along a curve.
    - `batch_size`: how many at a time, default all.
    """
    check_count("samples", samples)
    check_range("blocks", blocks, low=0, high=len(observed) - 1)
    starts = jax.tree.map(lambda leaf: leaf[None] if eqx.is_array(leaf) else leaf, fit.law)
    _, observed, objective, weights, _ = _prepare(starts, inputs, observed, objective or huber_log(), weights, None)
    keys = jax.random.split(key, samples)
    return _refit(keys, fit.law, fit.free, inputs, observed, objective, weights, prior, blocks, jnp.asarray(max_steps), batch_size or samples)


def bands(laws: Law, function: Callable[[Law], Float[Array, "*shape"]], level: Scalar = 0.9) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The central interval of `function(law)` over stacked laws that holds the share `level` of them: (low, high)."""
    check_range("level", level, low=0.0, high=1.0)
    values = eqx.filter_vmap(function)(laws)
    level = jnp.asarray(level, values.dtype)
    return jnp.quantile(values, (1 - level) / 2, axis=0), jnp.quantile(values, (1 + level) / 2, axis=0)


__all__ = ["LawFit", "Objective", "bands", "bootstrap", "fit_law", "huber", "huber_log", "squared", "squared_log", "stack_laws"]
