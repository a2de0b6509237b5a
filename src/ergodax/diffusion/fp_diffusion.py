"""A flexible diffusion model: forward SDEs with stationary law N(0, I), learned. Du, Zhang, Yang, Du 2023 (arXiv:2206.10365).

In noise time u = 1 - t, with x of d entries, R⁻¹(x) symmetric and positive (the Riemannian part) and ω(x) antisymmetric (the symplectic part),

    dx = β [ -(½ R⁻¹ + ω) x + ½ div R⁻¹ + div ω ] du + √(β R⁻¹) dW,   (div A)_i = Σ_j ∂_j A_ij,

keeps N(0, I). R = I, ω = 0 is VP; learning ω alone is the paper's FP-Drift, R alone its FP-Noise; critically damped Langevin is the augmented state
with blocks in both. The paper leaves div ω out: without it only a constant ω keeps N(0, I). (Complete recipe: Ma, Chen, Fox 2015, arXiv:1506.04696.)

Constant matrices (`ConstantFP`) have a Gaussian kernel: with B = ∫₀ᵘ β and M = ½ R⁻¹ + ω

    x_t | x ~ N(Φ x, Σ),   Φ = e^{-BM},   Σ = I - Φ Φᵀ = L Lᵀ,   ∇ log p = -L^{-T} ε,

and all is trained on the whole bound (u₀ = `margin`, and a Gaussian decoder round the denoised x from there):

    -log p(x) <= KL(q(x_{t=0} | x) ‖ N(0, I)) + ½ E ∫_{u₀}^1 β |R^{-½} L^{-T} (ε̂ - ε)|² du
                 + ½ E|ε̂ - ε|²_{u₀} + ½ log det 2πΣ_{u₀} + ½ B(u₀) tr R⁻¹.

Variable matrices (`VariableFP`) have none; with D = β R⁻¹ and the forward drift f, along simulated paths,

    log p(x) >= E[ log N(x_{t=0}; 0, I) + ∫ (-½ sᵀ D s - ∇·(D s) - ½ ∇·div D + ∇·f) du ].

Backwards, in our t, for every κ: dx = [-f + ½ (1 + κ²) (D s + div D)] dt + κ √D dW. In one line each:

    loss = FPLoss()                                                                # loss(NoiseScore(network, ConstantFP(coupling=c)), batch, key)
    x1 = integrate(diffrax.ODETerm(FPReverse(model, model.process)), diffrax.Heun(), x0, times=times)
    x1 = integrate(fp_reverse_terms(model.process, model, key, x0), diffrax.Euler(), x0, times=times)

All matrices are d × d for flattened data: for few entries, or latents. The regulariser ½ (tr R⁻¹ - log det R⁻¹ - d), 0 at R = I, is ours.
"""

import abc
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from ..core.batch import stratified_times
from ..core.check import check_count, check_range
from ..core.likelihood import ExactDivergence, standard_normal_log_prob
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .draw import draw
from .linear_sde import LinearBeta, apply_matrix, linear_transition, noise_score, working_time


_EXACT = ExactDivergence()


class FPProcess(eqx.Module):
    """The socket: β, and two d × d matrices at a flat x of (d,). Times are scalars in our t; x may have any shape."""

    beta: eqx.AbstractVar[LinearBeta]

    @abc.abstractmethod
    def root(self, x: Float[Array, " d"]) -> Float[Array, "d d"]:
        """A matrix G with R⁻¹ = G Gᵀ."""

    @abc.abstractmethod
    def omega(self, x: Float[Array, " d"]) -> Float[Array, "d d"]:
        """ω."""

    @abc.abstractmethod
    def divergences(self, x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """(div R⁻¹, div ω)."""

    def rate(self, t: Time, x: Float[Array, "*x"]) -> Float[Array, ""]:
        """β at t, in the dtype of `x`."""
        return self.beta(1 - working_time(t, x)).astype(x.dtype)

    def diffuse(self, t: Time, x: Float[Array, "*x"], vector: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """D v = β R⁻¹(x) v."""
        root = self.root(x.ravel())
        return self.rate(t, x) * apply_matrix(root, apply_matrix(root.T, vector.ravel())).reshape(x.shape)

    def forward_drift(self, t: Time, x: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """f, the drift in noise time u."""
        flat = x.ravel()
        riemannian, symplectic = self.divergences(flat)
        pull = apply_matrix(self.omega(flat), flat) - riemannian / 2 - symplectic
        return -self.rate(t, x) * pull.reshape(x.shape) - self.diffuse(t, x, x) / 2

    def spread(self, t: Time, x: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """div D."""
        return self.rate(t, x) * self.divergences(x.ravel())[0].reshape(x.shape)

    def noise(self, t: Time, x: Float[Array, "*x"], w: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """√D w = √β G(x) w."""
        return jnp.sqrt(self.rate(t, x)) * apply_matrix(self.root(x.ravel()), w.ravel()).reshape(x.shape)


class ConstantFP(FPProcess):
    """Constant matrices R⁻¹ = G Gᵀ, ω = C - Cᵀ, and their Gaussian kernel.

    - `root_matrix`: G (d, d); None (default, static): the identity. `coupling`: C (d, d); None (default, static): 0. Both None is VP.
    - `beta`: default `LinearBeta()`, 0.1 to 20.
    """

    root_matrix: Float[Array, "d d"] | None = None
    coupling: Float[Array, "d d"] | None = None
    beta: LinearBeta = LinearBeta()

    def __check_init__(self):
        shapes = {matrix.shape for matrix in (self.root_matrix, self.coupling) if matrix is not None}
        if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != shape[1] for shape in shapes):
            raise ValueError(f"`root_matrix` and `coupling` must be square matrices of one size, got shapes {shapes}.")

    def root(self, x):
        return jnp.eye(x.size, dtype=x.dtype) if self.root_matrix is None else self.root_matrix.astype(x.dtype)

    def omega(self, x):
        return jnp.zeros((x.size, x.size), x.dtype) if self.coupling is None else (self.coupling - self.coupling.T).astype(x.dtype)

    def divergences(self, x):
        return jnp.zeros_like(x), jnp.zeros_like(x)

    def kernel(self, t: Time, x: Float[Array, "*x"]) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
        """(Φ, Σ) for data like `x`; Σ by `linear_transition`, in which the small Σ near the data does not cancel."""
        t, flat = working_time(t, x), x.ravel()
        root, omega = self.root(flat).astype(t.dtype), self.omega(flat).astype(t.dtype)
        inverse = apply_matrix(root, root.T)
        return linear_transition(-inverse / 2 - omega, inverse, self.beta.integral(1 - t))

    def perturb(self, t: Time, data: Float[Array, "*x"], noise: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """Φ x + L ε."""
        mean, covariance = self.kernel(t, data)
        return (apply_matrix(mean, data.ravel()) + apply_matrix(jnp.linalg.cholesky(covariance), noise.ravel())).reshape(data.shape)

    def score(self, t: Time, noise: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """-L^{-T} ε."""
        return noise_score(jnp.linalg.cholesky(self.kernel(t, noise)[1]), noise.reshape(-1, 1)).reshape(noise.shape)


class VariableFP(FPProcess):
    """Matrices that depend on x: G = `root_field`(x), ω = C - Cᵀ with C = `coupling_field`(x), both (d,) -> (d, d); their divergences by autodiff."""

    root_field: Callable  # pyrefly: ignore[bad-class-definition]  # an AbstractVar is no field
    coupling_field: Callable  # pyrefly: ignore[bad-class-definition]
    beta: LinearBeta = LinearBeta()

    def root(self, x):
        return self.root_field(x)

    def omega(self, x):
        return self.coupling_field(x) - self.coupling_field(x).T

    def divergences(self, x):
        slopes = jax.jacfwd(lambda x: (apply_matrix(self.root(x), self.root(x).T), self.omega(x)))(x)
        return jax.tree.map(lambda slope: jnp.einsum("ijj->i", slope), slopes)


class FPReverse(eqx.Module):
    """-f + ½ (1 + κ²) (D s + div D) as a vector field in our t. κ = `noise_scale`: 0 (default) is the probability flow, 1 the reverse SDE's drift."""

    score: VectorField
    process: FPProcess
    noise_scale: Scalar = 0.0

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """dx/dt at one scalar `t`, for ONE example."""
        pull = self.process.diffuse(t, x, self.score(t, x, args)) + self.process.spread(t, x)
        return (1 + jnp.asarray(self.noise_scale, x.dtype) ** 2) / 2 * pull - self.process.forward_drift(t, x)


class _ReverseNoise(eqx.Module):
    process: FPProcess
    noise_scale: Scalar

    def __call__(self, t, x, args):
        matrix = jnp.asarray(self.noise_scale, x.dtype) * jnp.sqrt(self.process.rate(t, x)) * self.process.root(x.ravel())
        return lx.PyTreeLinearOperator(matrix.reshape(*x.shape, *x.shape), jax.eval_shape(lambda: x))


def fp_reverse_terms(process: FPProcess, score: VectorField, key: PRNGKey, x0: Float[Array, "*x"], noise_scale: Scalar = 1.0) -> dfx.MultiTerm:
    """The reverse SDE for `integrate` and diffrax's Itô solvers; every κ = `noise_scale` >= 0 has the same marginals. One key a trajectory."""
    check_range("noise_scale", noise_scale, low=0.0)
    brownian = dfx.UnsafeBrownianPath(jax.ShapeDtypeStruct(x0.shape, x0.dtype), key)
    return dfx.MultiTerm(dfx.ODETerm(FPReverse(score, process, noise_scale)), dfx.ControlTerm(_ReverseNoise(process, noise_scale), brownian))


def conditioning_penalty(process: FPProcess, x: Float[Array, "*x"]) -> Float[Array, ""]:
    """½ (tr R⁻¹ - log det R⁻¹ - d) at x."""
    root = process.root(x.ravel())
    return (jnp.sum(root**2) - x.size) / 2 - jnp.linalg.slogdet(root)[1]


class FPLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {each term})`: the bound of a `NoiseScore`, in nats per dimension; network and process are trained.

    - `batch`: data of shape (B, *x), or a pair (data, args) with `args` a pytree of leading axis B.
    - `margin`: u₀, default 1e-3; times are log-uniform above it, as the integrand grows like 1/u. `regulariser`: of R, default 0.
    - `times`: `(key, n) -> (n,)`, uniform on (0, 1), from which the times are made; default `stratified_times`.
    """

    margin: Scalar = 1e-3
    regulariser: Scalar = 0.0
    times: Callable = stratified_times

    def __check_init__(self):
        check_range("margin", self.margin, low=0.0, high=1.0, open_low=True, open_high=True)
        check_range("regulariser", self.regulariser, low=0.0)

    def __call__(self, model: Any, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        process, key_draw, key_end = model.process, *jax.random.split(key)

        def one(r, x, noise, args, last):
            margin = jnp.asarray(self.margin, x.dtype)
            u, root = margin**r, process.root(x.ravel())
            times = jnp.stack([1 - u, 1 - margin, jnp.zeros_like(u)])
            means, covariances = jax.vmap(lambda t: process.kernel(t, x))(times)
            factors = jnp.linalg.cholesky(covariances)
            log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)), axis=1)

            def error(i, noise):
                z = apply_matrix(means[i], x.ravel()) + apply_matrix(factors[i], noise.ravel())
                return model.network(times[i], z.reshape(x.shape), args) - noise

            whitened = noise_score(factors[0], error(0, noise).reshape(-1, 1))
            speed = process.rate(1 - u, x) * jnp.sum(apply_matrix(root.T, whitened) ** 2)
            shrink = process.beta.integral(working_time(margin, x)) * jnp.sum(root**2)
            terms = {
                "diffusion": -jnp.log(margin) * u * speed / 2,
                "prior": (jnp.sum(apply_matrix(means[2], x.ravel()) ** 2) + jnp.trace(covariances[2]) - x.size - log_det[2]) / 2,
                "reconstruction": (jnp.sum(error(1, last) ** 2) + x.size * jnp.log(2 * jnp.pi) + log_det[1] + shrink) / 2,
                "regulariser": conditioning_penalty(process, x),
            }
            return jax.tree.map(lambda term: term.astype(x.dtype) / x.size, terms)

        drawn = draw(batch, key_draw, self.times)
        last = jax.random.normal(key_end, (drawn.data.size,), drawn.data.dtype).reshape(drawn.data.shape)
        terms = jax.tree.map(jnp.mean, jax.vmap(one)(*drawn, last))
        bound = terms["diffusion"] + terms["prior"] + terms["reconstruction"]
        return bound + self.regulariser * terms["regulariser"], terms


def fp_integrand(score: VectorField, process: FPProcess, t: Time, x: Float[Array, "*x"], args: PyTree = None, divergence: Callable = _EXACT):
    """-½ sᵀ D s - ∇·(D s + ½ div D - f) at one x, a scalar."""

    def field(x):
        return process.diffuse(t, x, score(t, x, args)) + process.spread(t, x) / 2 - process.forward_drift(t, x)

    s = score(t, x, args)
    return -jnp.sum(s * process.diffuse(t, x, s)) / 2 - divergence(field, x)[1]


class SimulatedFPBound(eqx.Module):
    """The bound of any `FPProcess` on log p(x) of ONE example in nats, by `num_steps` Euler steps of the forward SDE (static); one path a key.

    `divergence`: as in `log_likelihood`, default `ExactDivergence()`. Differentiable in the score and the process, through the path.
    """

    num_steps: int = eqx.field(static=True, default=100)
    divergence: Callable = _EXACT

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def __call__(self, score: VectorField, process: FPProcess, x: Float[Array, "*x"], key: PRNGKey, args: PyTree = None) -> tuple[Array, Array]:
        """(The estimate, the end of the path.)"""
        h = 1 / self.num_steps

        def step(carry, i):
            x, total = carry
            t = (1 - i * h).astype(x.dtype)
            w = jax.random.normal(jax.random.fold_in(key, i.astype(int)), (x.size,), x.dtype).reshape(x.shape)
            moved = x + h * process.forward_drift(t, x) + h**0.5 * process.noise(t, x, w)
            return (moved, total + h * fp_integrand(score, process, t, x, args, self.divergence)), None

        (end, total), _ = jax.lax.scan(step, (x, jnp.zeros_like(jnp.sum(x))), jnp.arange(self.num_steps, dtype=working_time(0.0, x).dtype))
        return standard_normal_log_prob(end) + total, end


__all__ = [
    "ConstantFP",
    "FPLoss",
    "FPProcess",
    "FPReverse",
    "SimulatedFPBound",
    "VariableFP",
    "conditioning_penalty",
    "fp_integrand",
    "fp_reverse_terms",
]
