"""Score-based generative modelling through SDEs. Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021 (arXiv:2011.13456).

The paper's forward SDEs are `ergodax.core.VPPath`, `VEPath` and `SubVPPath` (their time u is our 1 - t); its reverse SDE (eq. 6) is
`EulerMaruyama`, its probability flow (eq. 13) `ergodax.core.ProbabilityFlow`, its likelihood (eq. 39) `ergodax.core.log_likelihood`, its VE
ancestral sampler (eq. 47) `Ancestral`. Here is the rest.

- Training, `score_weight` and `likelihood_weight`: the score's error weighted by λ = σ² (eq. 7) or g².
- The reverse diffusion predictor (eq. 46). With the forward chain x_{i+1} = r x_i + G z between two noise levels, r = α_{i+1}/α_i and G² = σ²_{i+1}
  - r² σ²_i, it steps x_i = (2 - r) x_{i+1} + G² s(x_{i+1}) + G z. The paper writes it for VP and VE; on any affine path the same clocks serve.
- The predictor-corrector sampler (algorithms 1 to 5): Langevin steps at one noise level, and then a step of any solver,

      x ← x + e s(x) + √(2e) z,   e = 2 (snr r |z|/|s|)²   (r² is their 1 - β for VP, and 1 for VE).

- Controllable generation (section 5): ∇log p_t(x | y) = s + ∇log p_t(y | x), and, where y is a part of the data, that part put in at every step.

As in the released code the corrector comes first in each step. Deviations: |z| and |s| are norms over the whole state, so for a batch root mean
squares (theirs: means of norms); the known part is noised to the end of the step it follows (theirs: to its start) and not put in between corrector
and predictor.
"""

from collections.abc import Callable
from typing import get_origin

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from ..core.check import check_count, check_range
from ..core.path import AffinePath
from ..core.prediction import Prediction
from ..core.types import PyTree, Scalar, Time, VectorField
from .solver import NoisyDenoiserSolver, clocks, finish, predicted_noise, unit_noise


def score_weight(path: AffinePath, prediction: Prediction, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """`DenoisingLoss`'s weight with which it is E σ² mean(|s - s*|²), whatever the network predicts (for noise: 1)."""
    _, b, d = prediction.coefficients(path, t)
    return path.snr(t) * (b / d) ** 2


def likelihood_weight(path: AffinePath, prediction: Prediction, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same with g² for σ²: half of it, times the dimension, bounds -log-likelihood. Song, Durkan, Murray, Ermon 2021 (arXiv:2101.09258)."""
    return score_weight(path, prediction, t) * path.diffusion(t) / path.sigma(t) ** 2


class ReverseDiffusion(NoisyDenoiserSolver):
    """The reverse diffusion predictor, one network call per step. Needs α > 0 on the grid, as r does."""

    def order(self, terms):
        """1, in law."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        model, noise = terms.terms
        step, posterior = clocks(model, t0, t1, y0), model.vf(t0, y0, args)
        ratio = jnp.exp(step.log_alpha0 - step.log_alpha1)
        share = -jnp.expm1(-2 * step.h)  # G²/σ₀²
        sigma0 = jnp.exp(step.log_sigma0)
        kick = jnp.sqrt(share) * unit_noise(noise, t0, t1) - share * predicted_noise(step, y0, posterior)
        return finish(y0, (2 - ratio) * y0 + sigma0 * kick)


class PredictorCorrector(NoisyDenoiserSolver):
    """`num_corrections` Langevin steps at the noise level of each step's start, then the step of `predictor`.

    - `predictor`: any solver on a `DenoiserTerm`, such as `ReverseDiffusion()`; a deterministic one too (the paper's "probability flow" predictor).
    - `snr`: default 0.16, the paper's for VE on CIFAR-10. May be swept.
    - `num_corrections` (static, default 1): one network call each; 0 is `predictor` alone.

    Needs α > 0 on the grid, and a Brownian noise term, as `with_noise` makes: parts of a step have independent increments. Raises `ValueError` for
    values out of range.
    """

    predictor: dfx.AbstractSolver
    snr: Scalar = 0.16
    num_corrections: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_range("snr", self.snr, low=0.0)
        check_count("num_corrections", self.num_corrections, low=0)

    def order(self, terms):
        """That of the predictor."""
        return self.predictor.order(terms)

    def init(self, terms, t0, t1, y0, args):
        """The predictor's state."""
        return self.predictor.init(_terms_of(self.predictor, *terms.terms), t0, t1, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        model, noise = terms.terms
        kept, *fresh = (_NoisePart(noise, k, self.num_corrections + 1) for k in range(self.num_corrections + 1))
        step, y = clocks(model, t0, t1, y0), y0
        for part in fresh:
            y = self.correct(step, y, model.vf(t0, y, args), unit_noise(part, t0, t1))
        return self.predictor.step(_terms_of(self.predictor, model, kept), t0, t1, y, args, solver_state, made_jump)

    def correct(self, step, y: Float[Array, "*y"], posterior, noise: Float[Array, "*y"]) -> Float[Array, "*y"]:
        """One Langevin step at the start of `step`, with unit `noise`."""
        score = -predicted_noise(step, y, posterior) * jnp.exp(-step.log_sigma0)
        ratio = jnp.sum(noise**2) / jnp.sum(score**2) * jnp.exp(2 * (step.log_alpha0 - step.log_alpha1))
        size = 2 * jnp.asarray(self.snr, y.dtype) ** 2 * ratio
        return y + size * score + jnp.sqrt(2 * size) * noise


class ConditionedDenoiser(eqx.Module):
    """E[x₁ | x_t, y] from E[x₁ | x_t] and p_t(y | x_t): D + (σ²/α) scale ∇ log p_t(y | x_t), as a vector field `(t, x, args)`.

    - `log_likelihood`: `(t, x, args) -> scalar` (one per example for a batch), log p_t(y | x_t) up to a constant in x, y held in it or in `args`: for
      instance the log-softmax of a classifier of noisy data.
    - `scale`: of the gradient; default 1, the conditional law as it stands.

    Needs α > 0.
    """

    denoised: VectorField
    path: AffinePath
    log_likelihood: Callable
    scale: Scalar = 1.0

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The conditional mean at one scalar `t`, of the shape of `x`."""
        gradient = jax.grad(lambda x: jnp.sum(self.log_likelihood(t, x, args)))(x)
        gain = jnp.asarray(self.scale * self.path.sigma(t) ** 2 / self.path.alpha(t), x.dtype)
        return self.denoised(t, x, args) + gain * gradient


class Inpainting(NoisyDenoiserSolver):
    """`solver` with a known part of the data: after every step that part is replaced by α known + σ z at the step's end.

    - `solver`: any on a `DenoiserTerm`, `PredictorCorrector` among them.
    - `known`, `mask`: arrays that broadcast with the state; the mask is 1 where `known` is known, 0 elsewhere.
    - `basis` (default None): an orthonormal (c, c) matrix, and the mask then speaks of `known @ basis`. With (1, 1, 1)/√3 for its first column, a
      mask of (1, 0, 0) and a grey image for `known`, images are coloured.

    The known part is exact at the end of a grid that ends at σ = 0. The rest is an approximation to its conditional law: the network sees a known
    part that was noised independently of it.
    """

    solver: dfx.AbstractSolver
    known: Float[Array, "..."]
    mask: Real[Array, "..."] | Real[np.ndarray, "..."]
    basis: Float[Array, "c c"] | None = None

    def order(self, terms):
        """That of the solver."""
        return self.solver.order(terms)

    def init(self, terms, t0, t1, y0, args):
        """The solver's state."""
        return self.solver.init(_terms_of(self.solver, *terms.terms), t0, t1, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        model, noise = terms.terms
        kept, fresh = (_NoisePart(noise, k, 2) for k in range(2))
        y1, _, _, state, result = self.solver.step(_terms_of(self.solver, model, kept), t0, t1, y0, args, solver_state, made_jump)
        step = clocks(model, t0, t1, y0)
        noisy = jnp.exp(step.log_alpha1) * self.known.astype(y0.dtype) + jnp.exp(step.log_sigma1) * unit_noise(fresh, t0, t1)
        change = noisy - y1
        if self.basis is not None:
            basis = self.basis.astype(y0.dtype)
            y1 = y1 + (jnp.asarray(self.mask, y0.dtype) * (change @ basis)) @ basis.T
        else:
            # Chosen, not added: the known part is exact.
            y1 = jnp.where(jnp.asarray(self.mask, bool), noisy, y1)
        return (*finish(y0, y1, state)[:4], result)


class _NoisePart(dfx.AbstractTerm):
    """Noise made of the `k`-th of `count` equal parts of every interval: parts are independent of each other."""

    term: dfx.AbstractTerm
    k: int = eqx.field(static=True)
    count: int = eqx.field(static=True)

    def vf(self, t, y, args):
        return self.term.vf(t, y, args)

    def contr(self, t0, t1, **kwargs):
        width = (t1 - t0) / self.count
        return self.term.contr(t0 + self.k * width, t0 + (self.k + 1) * width, **kwargs) * self.count**0.5

    def prod(self, vf, control):
        return self.term.prod(vf, control)


def _terms_of(solver, model, noise):
    """What `solver` steps on: with the noise if it is stochastic."""
    return dfx.MultiTerm(model, noise) if get_origin(solver.term_structure) is dfx.MultiTerm else model


__all__ = [
    "ConditionedDenoiser",
    "Inpainting",
    "PredictorCorrector",
    "ReverseDiffusion",
    "likelihood_weight",
    "score_weight",
]
