"""Conjugate and splitting integrators. Pandey, Rudolph, Mandt 2023 (arXiv:2310.07894).

Conjugate. In noise time u = 1 - t the probability flow is dz/du = F z - ½ GGᵀ s, with s = C_skip z + C_out ε. In ẑ = A_u z,

    A_u = exp ∫ (B - F + ½ GGᵀ C_skip) du,   dẑ/du = A B A⁻¹ ẑ + dΦ/du ε,   Φ_u = -½ ∫ A GGᵀ C_out du,

and an Euler step from u to u - h is ẑ_{u-h} = ẑ_u - h A B A⁻¹ ẑ_u + (Φ_{u-h} - Φ_u) ε. (MINUS h: with a plus the step is not consistent with A.)
B = 0 is DDIM, the exponential integrator; B = λI is λ-DDIM-I, a matrix B (the paper's λ times all ones) λ-DDIM-II. `ConjugateDDIM` is λ-DDIM-I on any
affine path; `ConjugateIntegrator` does it for linear diffusions of any number of variables. There A is taken from the step's start, so nothing
overflows, and ∫ is a Gauss rule in √(u - u₁), in which the integrand is smooth up to the data.

Splitting, for phase space (x, m). Part A moves x, part B moves m, each with all else fixed; with v the reversed velocity of the flow,

    symplectic Euler  A B,     velocity Verlet  ½B A ½B (the last at the next time),

and for the reverse SDE part O is the exact Ornstein–Uhlenbeck step of the forward friction and noise (the rest, with the friction reversed twice and
the full score, goes to A and B): OBA, BAO, OBAB. `reduced` solvers call the score once per time and share it among the parts. Parts are Euler
steps, as published, so velocity Verlet is of order 1 (a rate depends on its own variable, too); `midpoint=True` makes it 2. `ConjugateSplitting`
solves the parts by the conjugate step instead: the paper's hybrid.

    integrate(LinearSDETerm(NoiseScore(network, process), process), velocity_verlet(), z0, times=times)
    integrate(with_noise(term, key, z0), oba(reduced=True), z0, times=times)

Left out: C_skip that changes in time, and the noise scale λ_s of the stochastic splittings.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.types import Scalar, Time
from .linear_sde import LinearSDE, LinearSolver, NoisyLinearSolver, apply_matrix, linear_transition, reverse_drift, working_time
from .solver import DenoiserSolver, clocks, finish, predicted_noise, unit_noise


def _gauss(num_nodes, dtype):
    """Nodes w and weights on [0, 1]; the integral of f over [t₁ - h, t₁] is h Σ 2 w f(t₁ - h w²) weight."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return jnp.asarray((1 + nodes) / 2, dtype), jnp.asarray(weights / 2, dtype)


class ConjugateDDIM(DenoiserSolver):
    """λ-DDIM-I on a `DenoiserTerm`, order 1, one call per step; `stability` λ = 0 is DDIM.

        x₁ = e^{λh} (1 - λh) (α₁/α₀) x₀ + α₁ (κ₁ - e^{λh} κ₀ + λ ∫ e^{λ(t₁ - t)} κ dt) ε,   κ = σ/α, the integral over the step.

    λ is per unit of path time. Needs α > 0 on the grid. `num_nodes` (static) of the quadrature.
    """

    stability: Scalar = 0.0
    num_nodes: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        check_count("num_nodes", self.num_nodes)

    def order(self, terms):
        """1."""
        return 1

    def init(self, terms, t0, t1, y0, args):
        """No state."""
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        step, posterior = clocks(terms, t0, t1, y0), terms.vf(t0, y0, args)
        rate = jnp.asarray(self.stability, y0.dtype)
        nodes, weights = _gauss(self.num_nodes, y0.dtype)
        inside = jax.vmap(lambda w: clocks(terms, t0, t1 - (t1 - t0) * w.astype(jnp.result_type(t1)) ** 2, y0))(nodes)
        ratios = jnp.exp(rate * (step.t1 - inside.t1) + inside.log_sigma1 - inside.log_alpha1)
        integral = step.dt * jnp.sum(2 * nodes * weights * ratios)
        growth = jnp.exp(rate * step.dt)
        shrink = jnp.exp(step.log_alpha1 - step.log_alpha0)
        noise = jnp.exp(step.log_sigma1) - growth * shrink * jnp.exp(step.log_sigma0) + jnp.exp(step.log_alpha1) * rate * integral
        return finish(y0, growth * (1 - rate * step.dt) * shrink * y0 + noise * predicted_noise(step, y0, posterior))


def conjugate_step(
    process: LinearSDE,
    t0: Time,
    t1: Time,
    z: Float[Array, "k *x"],
    score: Float[Array, "k *x"],
    *,
    rows: Float[Array, " k"] | None = None,
    shift: Scalar = 0.0,
    stability: Float[Array, "k k"] | None = None,
    skip: Float[Array, "k k"] | None = None,
    num_nodes: int = 8,
) -> Float[Array, "k *x"]:
    """The conjugate Euler step of the flow from `t0` to `t1`, with the score at its start.

    - `rows`: 1 for the variables that move, 0 for those kept fixed; None (default): all move.
    - `shift`, `stability`: B = λ I + β Λ. λ = `shift` (with `rows` None only) is per unit of t, Λ = `stability` per unit of ∫β, where B - F commutes
      with itself at other times whatever β. The paper's matrix B is β Λ for its constant β.
    - `skip`: a constant C_skip; ε is what remains, -Lᵀ (s - C_skip z).
    """
    t0, t1 = working_time(t0, z), working_time(t1, z)
    dtype, k = t0.dtype, z.shape[0]
    rows = jnp.ones(k, dtype) if rows is None else rows.astype(dtype)
    stability, skip = (jnp.zeros((k, k), dtype) if m is None else m.astype(dtype) for m in (stability, skip))
    drift, push = process.drift_matrix.astype(dtype), process.diffusion_matrix.astype(dtype)
    shift, h = jnp.asarray(shift, dtype), t1 - t0
    stability, push, linear = rows[:, None] * stability, rows[:, None] * push, rows[:, None] * (stability - drift + apply_matrix(push, skip) / 2)

    def back(t):
        """A at t₁ inverted, times A at t."""
        flow, _ = linear_transition(linear, jnp.zeros_like(linear), process.elapsed(t) - process.elapsed(t1))
        return jnp.exp(shift * (t1 - t)) * flow

    def integrand(w):
        t = t1 - h * w**2
        factor = jnp.linalg.cholesky(process.moments(t)[1])
        return 2 * w * process.rate(t) * jax.scipy.linalg.solve_triangular(factor, apply_matrix(back(t), push).T, lower=True).T

    nodes, weights = _gauss(num_nodes, dtype)
    phi = h / 2 * jnp.tensordot(weights, jax.vmap(integrand)(nodes), axes=1)
    start = jnp.linalg.cholesky(process.moments(t0)[1])
    noise = -apply_matrix(start.T, score - apply_matrix(skip, z))
    euler = (1 - shift * h) * jnp.eye(k, dtype=dtype) - (process.elapsed(t0) - process.elapsed(t1)) * stability
    return apply_matrix(back(t0), apply_matrix(euler, z)) - apply_matrix(phi, noise)


class ConjugateIntegrator(LinearSolver):
    """The conjugate Euler step on a `LinearSDETerm`, order 1, one call per step; by default the exponential integrator (DDIM for one variable).

    Fields as the arguments of `conjugate_step`. The last step may reach the data, t = 1.
    """

    shift: Scalar = 0.0
    stability: Float[Array, "k k"] | None = None
    skip: Float[Array, "k k"] | None = None
    num_nodes: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        check_count("num_nodes", self.num_nodes)

    def order(self, terms):
        """1."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from `t0` to `t1`."""
        step, score = terms.contr(t0, t1), terms.vf(t0, y0, args).score
        options = dict(shift=self.shift, stability=self.stability, skip=self.skip, num_nodes=self.num_nodes)
        return finish(y0, conjugate_step(step.process, step.t0, step.t1, y0, score, **options))


class Part(NamedTuple):
    """A part of a splitting: which variables move, for how much of the step, and whether at the step's end (else its start)."""

    position: bool
    momentum: bool
    share: float
    at_end: bool


_A, _B = Part(True, False, 1.0, False), Part(False, True, 1.0, False)
_HALF_B, _LAST_B = Part(False, True, 0.5, False), Part(False, True, 0.5, True)
_O = Part(False, False, 1.0, False)


def _rows(part, z):
    """1 for the variables that move: row 0 is the position, all others momenta."""
    return jnp.asarray([part.position] + [part.momentum] * (z.shape[0] - 1), z.dtype)


def _move(part, dt, z, rate):
    return z + part.share * dt * apply_matrix(jnp.diag(_rows(part, z)), rate)


class Splitting(LinearSolver):
    """A splitting of the probability flow; `symplectic_euler` and `velocity_verlet` make it. All fields are static.

    The score is called once per part (twice with `midpoint`); with `reduced`, once for all parts at the same time.
    """

    scheme: tuple[Part, ...] = eqx.field(static=True)
    reduced: bool = eqx.field(static=True, default=False)
    midpoint: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if self.reduced and self.midpoint:
            raise ValueError("`reduced` shares one score among the parts and `midpoint` needs its own for each: choose one of them.")

    def order(self, terms):
        """1, or 2 for a symmetric scheme with `midpoint`."""
        return 2 if self.midpoint and len(self.scheme) == 3 else 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from `t0` to `t1`."""
        process, dt, z = terms.contr(t0, t1).process, jnp.asarray(t1 - t0, y0.dtype), y0
        score: Any = None
        for i, part in enumerate(self.scheme):
            t = t1 if part.at_end else t0
            if not self.reduced or i == 0 or part.at_end:
                score = terms.vf(t, z, args).score
            rate = reverse_drift(process, t, z, score)
            if self.midpoint:
                # time runs with the position, and stands still while the momentum moves
                t = t0 + (t1 - t0) / 2 if part.position else t
                half = _move(part, dt / 2, z, rate)
                rate = terms.vf(t, half, args).velocity
            z = _move(part, dt, z, rate)
        return finish(y0, z)


def symplectic_euler(reduced: bool = False) -> Splitting:
    """A, then B with the new x: order 1, two calls per step (`reduced`: one)."""
    return Splitting((_A, _B), reduced)


def velocity_verlet(reduced: bool = False, midpoint: bool = False) -> Splitting:
    """½B, A, ½B at the next time: three calls per step (`reduced`: two). Order 1 as published; 2, and six calls, with `midpoint`.

    The last call is at the end of the step, so the grid must stop before t = 1 where the score is infinite there.
    """
    return Splitting((_HALF_B, _A, _LAST_B), reduced, midpoint)


class ConjugateSplitting(LinearSolver):
    """The hybrid: a splitting whose parts are conjugate steps, the frozen variables' pull included. One call per part, or per time if `reduced`.

    `conjugate_symplectic_euler` and `conjugate_velocity_verlet` make it. `stability`: Λ of `conjugate_step`, row by row; None (default) is B = 0.
    """

    scheme: tuple[Part, ...] = eqx.field(static=True)
    stability: Float[Array, "k k"] | None = None
    reduced: bool = eqx.field(static=True, default=False)
    num_nodes: int = eqx.field(static=True, default=8)

    def order(self, terms):
        """1."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from `t0` to `t1`."""
        process, z, score = terms.contr(t0, t1).process, y0, None
        for part in self.scheme:
            # half parts cover the first and the last half of the step
            start = t1 - part.share * (t1 - t0) if part.at_end else t0
            end = t1 if part.at_end else t0 + part.share * (t1 - t0)
            if not self.reduced or score is None or part.at_end:
                score = terms.vf(start, z, args).score
            z = conjugate_step(process, start, end, z, score, rows=_rows(part, z), stability=self.stability, num_nodes=self.num_nodes)
        return finish(y0, z)


def conjugate_symplectic_euler(stability: Float[Array, "k k"] | None = None, reduced: bool = False) -> ConjugateSplitting:
    """A, then B, each a conjugate step."""
    return ConjugateSplitting((_A, _B), stability, reduced)


def conjugate_velocity_verlet(stability: Float[Array, "k k"] | None = None, reduced: bool = False) -> ConjugateSplitting:
    """½B, A, ½B, each a conjugate step; the last call is at the middle of the step."""
    return ConjugateSplitting((_HALF_B, _A, _LAST_B), stability, reduced)


class StochasticSplitting(NoisyLinearSolver):
    """A splitting of the reverse SDE on `with_noise(LinearSDETerm(score, process), key, z0)`; `oba`, `bao` and `obab` make it. Order 1 in law.

    For processes whose noise matrix is diagonal (PSLD, CLD). With `reduced`, parts at the same time share one call.
    """

    scheme: tuple[Part, ...] = eqx.field(static=True)
    reduced: bool = eqx.field(static=True, default=False)

    def order(self, terms):
        """1, in law."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from `t0` to `t1`."""
        model, noise = terms.terms
        process, dt, z, score = model.contr(t0, t1).process, jnp.asarray(t1 - t0, y0.dtype), y0, None
        drift, diffusion = process.drift_matrix.astype(z.dtype), process.diffusion_matrix
        friction = jnp.diag(jnp.diag(drift))
        for part in self.scheme:
            if part == _O:
                elapsed = process.elapsed(working_time(t0, z)) - process.elapsed(working_time(t1, z))
                decay, covariance = linear_transition(friction.astype(elapsed.dtype), diffusion.astype(elapsed.dtype), elapsed)
                variance = jnp.diag(covariance)
                std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
                z = apply_matrix(decay, z) + apply_matrix(jnp.diag(std), unit_noise(noise, t0, t1))
                continue
            t = t1 if part.at_end else t0
            if not self.reduced or score is None or part.at_end:
                score = model.vf(t, z, args).score
            pull = apply_matrix(diffusion, score) - apply_matrix(drift + friction, z)
            z = _move(part, dt, z, process.rate(working_time(t, z)).astype(z.dtype) * pull)
        return finish(y0, z)


def oba(reduced: bool = False) -> StochasticSplitting:
    """O, B, A: two calls per step (`reduced`: one)."""
    return StochasticSplitting((_O, _B, _A), reduced)


def bao(reduced: bool = False) -> StochasticSplitting:
    """B, A, O: two calls per step (`reduced`: one)."""
    return StochasticSplitting((_B, _A, _O), reduced)


def obab(reduced: bool = False) -> StochasticSplitting:
    """O, ½B, A, ½B at the next time: three calls per step (`reduced`: two)."""
    return StochasticSplitting((_O, _HALF_B, _A, _LAST_B), reduced)


__all__ = [
    "ConjugateDDIM",
    "ConjugateIntegrator",
    "ConjugateSplitting",
    "Part",
    "Splitting",
    "StochasticSplitting",
    "bao",
    "conjugate_step",
    "conjugate_symplectic_euler",
    "conjugate_velocity_verlet",
    "oba",
    "obab",
    "symplectic_euler",
    "velocity_verlet",
]
