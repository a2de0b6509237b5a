"""Pre-training under infinite compute: what fixed data give when compute is free, judged by asymptotes.

Kim, Kotha, Liang, Hashimoto 2025 (arXiv:2509.14786). D tokens and no more. Well regularised models (rate, epochs and weight decay tuned for each
size; the best decay is some 30 times the usual 0.1) improve with their size N, and ensembles with the number K of their members, both as an
`OffsetPowerLaw`; recipes are compared by where these lead:

    L(N) = E + A / N^α;   L(K) = E + A / K^α with α near 1;   both: first K → ∞ at every N, then N → ∞ of those limits (`fit_nested_asymptotes`).

Over several D the limits obey E_∞ + B / D^β again, and the data efficiency of a recipe is the share by which a baseline would need more tokens for
the same loss (`data_efficiency`; the paper's best recipe has 5.17 at 2e8 tokens).

Why α is near 1: an average of K members has, for squared errors, the excess (variance of a member)/K over its limit. `ensemble_losses` gives the
losses of K = 1, 2, … from one set of members, averaged over subsets, so that the curve is less noisy than nested subsets are.

Members should be tuned for the ensemble, not for themselves: longer and less regularised. The tuning itself and the distillation into one model
are not here: see `core.sweep`.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from .fitting import LawFit, Objective, fit_law, squared
from .power_law import Amount, OffsetPowerLaw


def ensemble_losses(
    predictions: Float[Array, "members *prediction"],
    loss: Callable[[Array], Float[Array, ""]],
    sizes: Sequence[int] | None = None,
) -> Float[Array, " sizes"]:
    """The mean loss of an average of K of the members, over the M cyclic runs of K neighbours, for every K in `sizes`.

    - `predictions`: of each of M members, (M, ...): logits, or probabilities if those are to be averaged. Members in random order.
    - `loss`: averaged prediction -> scalar.
    - `sizes`: each from 1 to M; default all of them.

    Raises `ValueError` for sizes outside that range.
    """
    members = len(predictions)
    sizes = range(1, members + 1) if sizes is None else sizes
    for size in sizes:
        check_count("sizes", size)
        if size > members:
            raise ValueError(f"`sizes` must be at most the number of members, got {size} of {members}.")
    order = jnp.arange(members)
    # 1 where member j is within K places after member i: (sizes, M, M)
    weights = jnp.stack([((order - order[:, None]) % members < size).astype(predictions.dtype) / size for size in sizes])
    return jax.lax.map(lambda rows: jnp.mean(jax.vmap(loss)(jnp.tensordot(rows, predictions, 1))), weights)


class NestedAsymptotes(eqx.Module):
    """Limits of ensembles, and the limit of these.

    - `ensembles`: for each size the law of the number of members, stacked (S,); their floors are the losses of infinite ensembles.
    - `limits`: the fit through those floors as a law of the size. `limits.law.floor` is the loss of infinitely large members, infinitely many;
      its standard error takes the floors as data.
    """

    ensembles: OffsetPowerLaw
    limits: LawFit[OffsetPowerLaw]


def fit_nested_asymptotes(
    sizes: Float[Array, " s"],
    members: Float[Array, " k"],
    losses: Float[Array, "..."],
    *,
    objective: Objective | None = None,
) -> NestedAsymptotes:
    """First K → ∞ at every size, then the size → ∞: all fits of the first kind in one program.

    - `sizes`: N (parameters, or a width), S ≥ 3 of them. `members`: K, at least 3. `losses`: of K members of size N, (S, K).
    - `objective`: default `squared()`, for errors of one size in all losses.

    Raises `ValueError` for too few sizes or members, shapes that do not fit, and losses that are not positive and finite.
    """
    if losses.shape != sizes.shape + members.shape:
        raise ValueError(f"`losses` must have the shape (sizes, members), {sizes.shape + members.shape}, got {losses.shape}.")
    check_range("losses", losses, low=0.0, open_low=True, open_high=True)
    objective = squared() if objective is None else objective

    def fit(x, y):
        return fit_law(OffsetPowerLaw.starts(x, y), x, y, objective=objective)

    ensembles = jax.vmap(lambda y: fit(members, y).law)(losses)
    return NestedAsymptotes(ensembles, fit(sizes, ensembles.floor))


def data_efficiency(baseline: OffsetPowerLaw, loss: Amount, tokens: Amount) -> Float[Array, "..."]:
    """How many times more tokens the baseline needs for the same loss: D_baseline(loss) / D; ∞ where it never gets there.

    - `baseline`: its loss as a law of tokens.
    - `loss`: reached by the other recipe with `tokens`.
    """
    needed = baseline.inverse(loss)
    return needed / jnp.asarray(tokens, needed.dtype)


__all__ = ["NestedAsymptotes", "data_efficiency", "ensemble_losses", "fit_nested_asymptotes"]
