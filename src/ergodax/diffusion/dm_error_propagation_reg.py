"""Regularising the error that a sampling chain accumulates. Li, van der Schaar 2023 (arXiv:2308.05021).

A sampler's steps see their own earlier output, not the noised data they were trained on. With p_j the law of the chain after step j from noise to
data and q_j that of noised data, the paper splits the cumulative error KL(p_j ‖ q_j) into the error of step j itself and what was passed on to it,
and adds to the training loss

    L_reg = E_j [ w_j MMD²(p_j, q_j) ],   w_j = exp(ρ (j - 1)),

the squared maximum mean discrepancy in place of the KL, which has no estimate from samples. Instead of the whole chain only its last part is run
(the paper's bootstrap): data are noised to step j - 1 - L, or to the start where that is before it, taken through the steps up to j - 1 by the
present model without gradient, then through step j with it, and compared with data noised directly to j.

Here j counts steps from the noise, so that T - t of the paper is j - 1. One j is drawn per batch, and the mean over j stands for the paper's sum (a
factor N in the scale). Not built in: their claim that errors only grow along the chain (μ_t ≥ 1); by the chain rule of KL they cannot grow by
propagation, E_j = E_{j-1} + E_mod,j - E KL(p(x_{j-1} | x_j) ‖ q(x_{j-1} | x_j)).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_increasing, check_range
from ..core.prediction import Denoiser
from ..core.term import DenoiserTerm, with_noise
from ..core.types import PRNGKey, PyTree, Scalar, VectorField
from .ancestral import Ancestral
from .objective import DenoisingLoss
from .solver import NoisyDenoiserSolver


class GaussianKernel(eqx.Module):
    """k(x, y) = exp(-‖x - y‖²/(2 h²)), from squared distances. `bandwidth` is h (default 1, of the order of the distances is best)."""

    bandwidth: Scalar = 1.0

    def __check_init__(self):
        check_range("bandwidth", self.bandwidth, low=0.0, open_low=True)

    def __call__(self, squared_distance: Float[Array, "..."]) -> Float[Array, "..."]:
        """Elementwise, in the dtype of the distances."""
        return jnp.exp(-squared_distance / (2 * jnp.asarray(self.bandwidth, squared_distance.dtype) ** 2))


def squared_mmd(x: Float[Array, "n *x"], y: Float[Array, "n *x"], kernel: Callable) -> Float[Array, ""]:
    """Unbiased estimate of MMD² between the laws of the rows of `x` and of `y`: the mean over i ≠ j of k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j).

    Gretton, Borgwardt, Rasch, Schölkopf, Smola 2012, lemma 6. The pairs (x_i, y_i) must be independent of each other; x_i and y_i need not be, so
    both may come from the same datum. May be negative. `kernel`: squared distances -> values. Raises `ValueError` for shapes that differ or n < 2.
    """
    if x.shape != y.shape or x.shape[0] < 2:
        raise ValueError(f"x and y must share a shape (n, *x) with n >= 2, got {x.shape} and {y.shape}.")
    n = x.shape[0]
    both = jnp.concatenate([x.reshape(n, -1), y.reshape(n, -1)])
    norms = jnp.sum(both**2, axis=1)
    # Accelerators round products by default, and a small distance is a difference of large ones.
    products = jnp.matmul(both, both.T, precision=jax.lax.Precision.HIGHEST)
    values = kernel(jnp.maximum(norms[:, None] + norms - 2 * products, 0))
    xx, yy, xy = values[:n, :n], values[n:, n:], values[:n, n:]
    return jnp.sum(jnp.where(jnp.eye(n, dtype=bool), 0, xx + yy - 2 * xy)) / (n * (n - 1))


class ErrorPropagationLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {"denoising": …, "propagation": …})`: a denoising loss plus `scale` times the regulariser above.

    - `base`: the `DenoisingLoss`; its path and prediction are the chain's too.
    - `grid`: the chain's times, (N + 1,), increasing from noise to data.
    - `scale`: λ_reg (λ_nll is 1); `rho`: ρ, default 0: equal weights. Both may be swept.
    - `window`: L, the number of steps run without gradient (static, default 5). Costs L + 1 calls of the model, one of them with a gradient.
    - `solver`: a one-step `NoisyDenoiserSolver`; `Ancestral()`, DDPM's own, by default. Its steps leave out the variance of the data given x_t, so on
      a coarse grid a little discrepancy stays with the exact model too.
    - `kernel`: squared distances -> values.

    A batch is that of `DenoisingLoss`, of at least 2 examples. Raises `ValueError` for settings out of range.
    """

    base: DenoisingLoss
    grid: Float[Array, " steps"]
    scale: Scalar
    rho: Scalar = 0.0
    window: int = eqx.field(static=True, default=5)
    solver: NoisyDenoiserSolver = Ancestral()
    kernel: Callable = GaussianKernel()

    def __check_init__(self):
        check_increasing("grid", self.grid)
        check_count("window", self.window, low=0)
        check_range("scale", self.scale, low=0.0)

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        key_base, key_step, key_discrepancy = jax.random.split(key, 3)
        denoising, _ = self.base(model, batch, key_base)
        step = jax.random.randint(key_step, (), 1, self.grid.shape[0])
        weight = jnp.exp(jnp.asarray(self.rho, denoising.dtype) * (step - 1).astype(denoising.dtype))
        propagation = weight * self.discrepancy(model, batch, key_discrepancy, step)
        total = denoising + jnp.asarray(self.scale, denoising.dtype) * propagation
        return total, {"denoising": denoising, "propagation": propagation}

    def discrepancy(self, model: VectorField, batch: PyTree, key: PRNGKey, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """The estimate of MMD²(p_j, q_j) at j = `step`, 1 … N, which may be traced."""
        data, args = batch if isinstance(batch, tuple) else (batch, None)
        path = self.base.path
        key_start, key_end, key_chain = jax.random.split(key, 3)

        def noised(key, index):
            noise = jax.random.normal(key, (data.size,), data.dtype).reshape(data.shape)
            return path.interpolate(self.grid[index].astype(data.dtype), data, noise)

        denoised = eqx.filter_vmap(Denoiser(model, path, self.base.prediction), in_axes=(None, 0, 0))
        term = with_noise(DenoiserTerm(denoised, path, self.grid), key_chain, data)

        def advance(x, index):
            start = jnp.asarray(index, self.grid.dtype)
            return self.solver.step(term, start, start + 1, x, args, None, made_jump=False)[0]

        def body(x, index):
            # Steps before the start of the chain leave the start as it is.
            return jnp.where(index >= 0, advance(x, jnp.maximum(index, 0)), x), None

        before = step - 1
        x, _ = jax.lax.scan(body, noised(key_start, jnp.maximum(before - self.window, 0)), before - self.window + jnp.arange(self.window))
        return squared_mmd(advance(jax.lax.stop_gradient(x), before), noised(key_end, step), self.kernel)


__all__ = ["ErrorPropagationLoss", "GaussianKernel", "squared_mmd"]
