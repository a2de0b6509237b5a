"""Diffusion in phase space by the complete recipe. Pandey and Mandt 2023 (arXiv:2303.01748).

Every linear diffusion with stationary law N(0, S), that is exp(-H) with H = ½ zᵀ S⁻¹ z, has the form (Ma, Chen, Fox 2015, arXiv:1506.04696)

    dz = -(D + Q) S⁻¹ z β du + √(2 D β) dw,   D positive semi-definite, Q skew-symmetric:  `CompleteRecipe`.

One variable with D = ½, Q = 0 is VP. Phase-space Langevin diffusion (PSLD) couples the data with a momentum of mass M, z = (x, m),

    dx = (β/2) (m/M - Γ x) du + √(βΓ) dw₁,    dm = (β/2) (-x - ν m) du + √(βMν) dw₂,   S = diag(1, M),

in their time u = 1 - t, critically damped at 1/M = (Γ - ν)²/4. Γ = 0 is critically damped Langevin diffusion (CLD: Dockhorn, Vahdat, Kreis 2022,
arXiv:2112.07068), with their β_c = β/2 and friction Γ_c = νM.

Training is hybrid score matching (theirs, and Dockhorn et al.): the start m ~ N(0, γ₀M) is marginalised, and a network learns ε of
z_t = φ_t x + L_t ε. In one line each:

    loss = HybridScoreLoss(PSLD())                                                              # loss(network, batch, key)
    term = LinearSDETerm(NoiseScore(network, PSLD()), PSLD())
    z1 = jax.vmap(lambda z: integrate(term, diffrax.Heun(), z, times=times))(PSLD().prior(key, shape, n))     # data: z1[:, 0]

Stochastic: `reverse_sde_terms` with `diffrax.Euler()`, or `SymmetricSplitting` (SSCS). The moments here are matrix exponentials (`linear_sde`), which
are the authors' polynomials in closed form; the numerical 1e-9 that they add to the covariance is not needed and left out. Their likelihood-weighted
loss is `weight=diffusion_weight`; their upper-triangular factor (for ν = 0 with half the outputs) is not here.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import stratified_times
from ..core.check import check_range
from ..core.types import PRNGKey, PyTree, Scalar, VectorField
from .linear_sde import LinearBeta, LinearSDE, NoisyLinearSolver, apply_matrix, linear_transition, working_time
from .solver import finish, unit_noise


class CompleteRecipe(LinearSDE):
    """The linear diffusion with stationary law N(0, S) of a damping and a coupling.

    - `damping_root`: (K, K) with D = RRᵀ.
    - `coupling`: (K, K), any matrix C; Q = C - Cᵀ.
    - `stationary`: (K,) the diagonal of S, positive.
    - `initial`: (K - 1,) variances of the auxiliary variables at the data.
    - `beta`: default `LinearBeta()`, VP's 0.1 to 20.

    VP: `CompleteRecipe([[√½]], [[0]], [1], [])` as arrays. All four may be learned. Raises `ValueError` for shapes that do not fit.
    """

    damping_root: Float[Array, "_ _"]  # pyrefly: ignore[bad-class-definition]  # an AbstractVar is no field
    coupling: Float[Array, "_ _"]  # pyrefly: ignore[bad-class-definition]
    stationary: Float[Array, " _"]  # pyrefly: ignore[bad-class-definition]
    initial: Float[Array, " _"]  # pyrefly: ignore[bad-class-definition]
    beta: LinearBeta = LinearBeta()

    def __check_init__(self):
        k = self.damping_root.shape[0]
        expected = {"damping_root": (k, k), "coupling": (k, k), "stationary": (k,), "initial": (k - 1,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"`{name}` must have shape {shape} for {k} variables, got {getattr(self, name).shape}.")
        check_range("stationary", self.stationary, low=0.0, open_low=True)
        check_range("initial", self.initial, low=0.0)

    @property
    def drift_matrix(self):
        return -(self.diffusion_matrix / 2 + self.coupling - self.coupling.T) / self.stationary

    @property
    def noise_matrix(self):
        return math.sqrt(2) * self.damping_root

    @property
    def initial_covariance(self):
        return jnp.diag(jnp.pad(self.initial, (1, 0)))

    @property
    def prior_covariance(self):
        return jnp.diag(self.stationary)


class PSLD(LinearSDE):
    """Phase-space Langevin diffusion of two variables, (x, m).

    - `gamma`, `nu`: Γ, ν >= 0, friction of data and momentum. Γ = 0.01, ν = 4 + Γ are the paper's for CIFAR-10 (best Γ 0.01 to 0.02).
    - `mass`: M; None (default, static) is critical damping, 4/(Γ - ν)².
    - `initial_scale`: γ₀ > 0 of m ~ N(0, γ₀ M I) at the data; default theirs, 0.04.
    - `beta`: default constant 8, theirs.
    """

    gamma: Scalar = 0.01
    nu: Scalar = 4.01
    mass: Scalar | None = None
    initial_scale: Scalar = 0.04
    beta: LinearBeta = LinearBeta(8.0, 8.0)

    def __check_init__(self):
        check_range("gamma", self.gamma, low=0.0)
        check_range("nu", self.nu, low=0.0)
        check_range("mass", self.mass, low=0.0, open_low=True)
        check_range("initial_scale", self.initial_scale, low=0.0)

    @property
    def _mass(self):
        return 4 / (self.gamma - self.nu) ** 2 if self.mass is None else self.mass

    @property
    def drift_matrix(self):
        return jnp.array([[-self.gamma, 1 / self._mass], [-1.0, -self.nu]]) / 2

    @property
    def noise_matrix(self):
        return _diagonal(jnp.sqrt(self.gamma), jnp.sqrt(self._mass * self.nu))

    @property
    def initial_covariance(self):
        return _diagonal(0.0, self.initial_scale * self._mass)

    @property
    def prior_covariance(self):
        return _diagonal(1.0, self._mass)


def _diagonal(first, second):
    return jnp.array([[first, 0.0], [0.0, second]])


def uniform_noise_weight(process: LinearSDE, t: Scalar) -> Float[Array, "k k"]:
    """The identity: the plain mean squared error of ε."""
    return jnp.eye(process.drift_matrix.shape[0], dtype=jnp.result_type(t))


def diffusion_weight(process: LinearSDE, t: Scalar) -> Float[Array, "k k"]:
    """β L⁻¹ GGᵀ L⁻ᵀ: the error of the score in the metric of the noise, which weights the likelihood bound (Song et al. 2021, arXiv:2101.09258)."""
    factor = jnp.linalg.cholesky(process.moments(t)[1])
    scaled = jax.scipy.linalg.solve_triangular(factor, process.noise_matrix.astype(factor.dtype), lower=True)
    return process.rate(t).astype(factor.dtype) * apply_matrix(scaled, scaled.T)


class HybridScoreLoss(eqx.Module):
    """`loss(network, batch, key) -> (scalar, {})`: E_{t, x, ε} mean of (ε̂ - ε)ᵀ W (ε̂ - ε), ε̂ = network(t, z_t, args), z_t = φ_t x + L_t ε.

    - `process`: any `LinearSDE`.
    - `batch`: data of shape (B, *x), or a pair (data, args) with `args` a pytree of leading axis B.
    - `network`: on ONE state, `(t, z, args) -> (p, *x)` with z of shape (K, *x): p = K, or only the last p rows of ε. Where noise enters the last p
      variables alone (CLD: p = 1), no other rows are needed.
    - `weight`: `(process, t) -> W` (K, K), of which the last p rows and columns count; `uniform_noise_weight` (default) or `diffusion_weight`.
    - `times`: `(key, n) -> (n,)`; default `stratified_times`.

    Raises `ValueError` for data without a batch axis.
    """

    process: LinearSDE
    weight: Callable = uniform_noise_weight
    times: Callable = stratified_times

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        data, args = batch if isinstance(batch, tuple) else (batch, None)
        if data.ndim < 2:
            raise ValueError(f"the data of a batch must have shape (batch, *example), got {data.shape}.")
        n, k = data.shape[0], self.process.drift_matrix.shape[0]
        key_noise, key_time = jax.random.split(key)
        noise = jax.random.normal(key_noise, (k * data.size,), data.dtype).reshape(n, k, *data.shape[1:])
        times = self.times(key_time, n).astype(data.dtype)

        def one(t, x, noise, args):
            value = model(t, self.process.perturb(t, x, noise), args)
            p = value.shape[0]
            error = value - noise[k - p :]
            weight = self.weight(self.process, t)[k - p :, k - p :]
            return jnp.mean(error * apply_matrix(weight, error))

        return jnp.mean(jax.vmap(one)(times, data, noise, args)), {}


class SymmetricSplitting(NoisyLinearSolver):
    """SSCS: exact Ornstein–Uhlenbeck half step, score step, half step; one call per step, weak order 1. Dockhorn et al. 2022, Pandey and Mandt 2023.

    dz = [Ã z dt + G dw] + GGᵀ (s + S⁻¹ z) dt, all times β, with Ã = -A - GGᵀ S⁻¹: the first bracket keeps N(0, S) and is solved exactly, the second
    is 0 where the data are N(0, S) themselves. Runs on `with_noise(LinearSDETerm(score, process), key, z0)`.
    """

    def order(self, terms):
        """1, in law."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from `t0` to `t1`."""
        model, noise = terms.terms
        process = model.contr(t0, t1).process
        middle = t0 + (t1 - t0) / 2
        dtype = working_time(t0, y0).dtype
        drift, diffusion, stationary = (m.astype(dtype) for m in (process.drift_matrix, process.diffusion_matrix, process.prior_covariance))
        # S and GGᵀ are symmetric
        pull = jnp.linalg.solve(stationary, diffusion).T

        def elapsed(start, end):
            return process.elapsed(working_time(start, y0)) - process.elapsed(working_time(end, y0))

        def relax(z, start, end):
            phi, sigma = linear_transition(-drift - pull, diffusion, elapsed(start, end))
            return apply_matrix(phi, z) + apply_matrix(jnp.linalg.cholesky(sigma), unit_noise(noise, start, end))

        z = relax(y0, t0, middle)
        kick = apply_matrix(diffusion, model.vf(t0, z, args).score) + apply_matrix(pull, z)
        z = z + elapsed(t0, t1).astype(z.dtype) * kick
        return finish(y0, relax(z, middle, t1))


__all__ = ["PSLD", "CompleteRecipe", "HybridScoreLoss", "SymmetricSplitting", "diffusion_weight", "uniform_noise_weight"]
