"""Wasserstein bounds for samplers of the probability flow on log-concave data. Gao and Zhu 2024 (arXiv:2401.17958).

Let -log p₁ of the data be m-strongly convex (and L-smooth). Then -log p_t is a(t)-strongly convex and L(t)-smooth, with

    a(t) = 1/(α²/m + σ²),   L(t) = 1/(α²/L + σ²),

so that the probability flow contracts. Their exponential integrator keeps the score s over a step from t₀ to t₁:

    y₁ = A y₀ + I s_θ(y₀, t₀),   A = α₁/α₀,   I = ½ ∫ (α₁/α) g² dt.

Errors in W₂, e_k = W₂(law of y_k, p_{t_k}), started from N(0, σ²) where p_0 should be:

    e_k <= ρ_k e_{k-1} + local_k,   e_0 = α(0) ‖x₁‖,   ρ_k = max(|A - I a|, |A - I L|) at t_{k-1},
    local_k = I M + ½ ∫ (α₁/α) g² [M₁ (t - t₀) (1 + ‖x_{t₀}‖) + L(t) ∫_{t₀}^t (f ‖x‖ + ½ g² √(d L))] dt,

with norms in L₂, M the score's error and M₁ its Lipschitz constant in time. On fine grids, M = 0, e_K → E₀ = α(0) √(v₁/v₀) ‖x₁‖ with v = 1/a: what
the wrong start costs. Their time runs over [0, T] from data to noise, f = d log α/dt in ours.

Deviations, all of them sharper than the paper's text: the norm of A - I H for a matrix a <= H <= L is taken exactly and not to second order in
the step; L(t) by the Cramér-Rao bound in the place of min(1/σ², L/α²); one recursion in the place of three terms E₀ + E₁ + E₂, with the local
errors along the true flow, whose norms are known.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.check import check_count, check_increasing, check_range
from ..core.path import AffinePath
from ..core.types import Scalar, Time
from .solver import DenoiserSolver, clocks, finish


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def _nodes(start, end):
    """Gauss-Legendre nodes and weights between two times, (16,) each."""
    half = (end - start) / 2
    return start + half * (1 + _NODES.astype(half.dtype)), half * _WEIGHTS.astype(half.dtype)


def exponential_coefficients(path: AffinePath, start: Float[Array, ""], end: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A and I of a step, I by 16 nodes. Both must be finite: α > 0 at the start."""
    t, weight = _nodes(start, end)
    return path.alpha(end) / path.alpha(start), jnp.sum(weight * path.alpha(end) / path.alpha(t) * path.diffusion(t)) / 2


class ScoreExponential(DenoiserSolver):
    """The paper's exponential integrator: the score held over a step. Order 1, one network call. `path` is the term's; σ > 0 at a step's start.

    (DDIM holds the denoised data, which is exact where this is not, on a single point.)
    """

    path: AffinePath

    def order(self, terms):
        """1."""
        return 1

    def init(self, terms, t0, t1, y0, args):
        """No state."""
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        step, denoised = clocks(terms, t0, t1, y0), terms.vf(t0, y0, args).denoised
        score = (jnp.exp(step.log_alpha0) * denoised - y0) * jnp.exp(-2 * step.log_sigma0)
        a, i = (c.astype(y0.dtype) for c in exponential_coefficients(self.path, step.t0, step.t1))
        return finish(y0, a * y0 + i * score)


def log_concavity(path: AffinePath, t: Time, constant: Scalar) -> Float[Array, "..."]:
    """1/(α²/constant + σ²): a(t) of m, and L(t) of L. Exactly the smallest and the largest eigenvalue of -∇² log p_t on Gaussian data."""
    return 1 / (path.alpha(t) ** 2 / constant + path.sigma(t) ** 2)


class ProbabilityFlowBound(eqx.Module):
    """`bound(grid) -> (N + 1,)` bounds of W₂(law of y_k, p_{t_k}) for `ScoreExponential` on a grid of times, started from N(0, σ(grid[0])²).

    - `path`; `dim` (static): d.
    - `second_moment`: E|x|² of the data.
    - `strong_convexity`, `smoothness`: m <= L; at L = ∞ (default) only σ smooths, and the bound grows without limit where σ → 0.
    - `time_lipschitz` (default 0): M₁, of the score in units of the path's t: |s(t, x) - s(t₀, x)| <= M₁ (t - t₀)(1 + |x|). 0 leaves it out.
    - `score_error` (default 0): M, the L₂ error of the network's score at the numerical states.

    All but `dim` may be traced. Raises `ValueError` for constants out of range, or a grid that does not increase.
    """

    path: AffinePath
    dim: int = eqx.field(static=True)
    second_moment: Scalar
    strong_convexity: Scalar
    smoothness: Scalar = jnp.inf
    time_lipschitz: Scalar = 0.0
    score_error: Scalar = 0.0

    def __check_init__(self):
        check_count("dim", self.dim)
        check_range("strong_convexity", self.strong_convexity, low=0.0, open_low=True)
        check_range("smoothness", self.smoothness, low=0.0, open_low=True)
        for name in ("second_moment", "time_lipschitz", "score_error"):
            check_range(name, getattr(self, name), low=0.0)

    def initialisation(self, start: Time = 0.0, end: Time = 1.0) -> Float[Array, "..."]:
        """E₀ from `start` to `end`: the continuous flow's error from a start in N(0, σ²), α_start √(v_end/v_start) ‖x₁‖."""
        variance = [1 / log_concavity(self.path, t, self.strong_convexity) for t in (start, end)]
        return self.path.alpha(start) * jnp.sqrt(variance[1] / variance[0] * self.second_moment)

    def contraction(self, start: Time, end: Time) -> Float[Array, ""]:
        """ρ of one step: the norm of A - I H for a symmetric H between a and L at `start`."""
        a, i = exponential_coefficients(self.path, jnp.asarray(start), jnp.asarray(end))
        ends = [jnp.abs(a - i * log_concavity(self.path, start, constant)) for constant in (self.strong_convexity, self.smoothness)]
        return jnp.maximum(*ends)

    def local_error(self, start: Float[Array, ""], end: Float[Array, ""]) -> Float[Array, ""]:
        """local_k of one step."""
        path, (t, weight) = self.path, _nodes(start, end)

        def norm(t):
            return jnp.sqrt(path.alpha(t) ** 2 * self.second_moment + path.sigma(t) ** 2 * self.dim)

        def speed(t):
            return path.d_log_alpha(t) * norm(t) + path.diffusion(t) / 2 * jnp.sqrt(self.dim * log_concavity(path, t, self.smoothness))

        def moved(t):
            inner, inner_weight = _nodes(start, t)
            return jnp.sum(inner_weight * speed(inner))

        drift = log_concavity(path, t, self.smoothness) * jax.vmap(moved)(t)
        change = self.time_lipschitz * (t - start) * (1 + norm(start)) + drift + self.score_error
        return jnp.sum(weight * path.alpha(end) / path.alpha(t) * path.diffusion(t) / 2 * change)

    def __call__(self, grid: Float[Array, " steps"]) -> Float[Array, " steps"]:
        """e_0 … e_N."""
        check_increasing("grid", grid)
        first = self.path.alpha(grid[0]) * jnp.sqrt(self.second_moment)
        rho, local = jax.vmap(lambda s, e: (self.contraction(s, e), self.local_error(s, e)))(grid[:-1], grid[1:])

        def recursion(error, step):
            error = step[0] * error + step[1]
            return error, error

        return jnp.concatenate([first[None], jax.lax.scan(recursion, first, (rho, local))[1]])


__all__ = ["ProbabilityFlowBound", "ScoreExponential", "exponential_coefficients", "log_concavity"]
