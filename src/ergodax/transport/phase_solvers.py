"""Solvers for motion in phase space, m = (x, v): an exponential integrator for the flow of a `PhaseBridge` and a splitting for its SDE.

Chen, Gu, Dinh, Theodorou, Susskind, Zhai 2024 (arXiv:2310.07805), who take the first from Zhang, Tao, Chen 2022 (gDDIM, arXiv:2206.05564) and the
second from Dockhorn, Vahdat, Kreis 2022 (CLD, arXiv:2112.07068). The network's output is the acceleration over z = `bridge.scale(t)`.
"""

from collections.abc import Callable
from typing import ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..core.check import check_count
from .agm_phase_bridge import PhaseBridge


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)


class PhaseExponential(dfx.AbstractSolver):
    """The paper's exponential integrator: x and v move exactly in z(s) N(s), N a polynomial through the network's last outputs.

        v₁ = v₀ + ∫ z(s) N(s) ds,    x₁ = x₀ + h v₀ + ∫ (t₁ - s) z(s) N(s) ds,    both from t₀ to t₁.

    One call a step, through the last `max_order` outputs (static, 1 to 3, default 2), or through fewer in the first steps; since the first step is of
    order 1, "3" too converges with order 2, with a smaller constant. Runs on an `ODETerm` of any field of (x, v) whose first half is v. The
    integrals are by 12 Gauss-Legendre nodes in √(1 - s), where z is smooth (the authors sum 50 000 values). State: last output and slope, two times.
    """

    bridge: PhaseBridge
    max_order: int = eqx.field(static=True, default=2)
    term_structure: ClassVar = dfx.ODETerm
    interpolation_cls: ClassVar[Callable] = dfx.LocalLinearInterpolation

    def __check_init__(self):
        check_count("max_order", self.max_order)
        if self.max_order > 3:
            raise ValueError(f"`max_order` must be 1, 2 or 3, got {self.max_order}.")

    def order(self, terms):
        """1 or 2."""
        return min(self.max_order, 2)

    def func(self, terms, t0, y0, args):
        """The field at `t0`."""
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        """No history: the times are infinite."""
        never = jnp.asarray(-jnp.inf, y0.dtype)
        return jnp.zeros_like(y0[1]), jnp.zeros_like(y0[1]), never, never

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from `t0` to `t1`."""
        previous, slope_previous, last, before = solver_state
        start, end = jnp.asarray(t0, y0.dtype), jnp.asarray(t1, y0.dtype)
        output = terms.vf(start, y0, args)[1] / self.bridge.scale(start)
        slope = (output - previous) / (start - last)
        parts = [output, slope, (slope - slope_previous) / (start - before)][: self.max_order]

        root0, root1 = jnp.sqrt(1 - start), jnp.sqrt(1 - end)
        roots = (root0 + root1) / 2 + (root0 - root1) / 2 * _NODES.astype(y0.dtype)
        s = 1 - roots**2
        weights = (root0 - root1) * roots * _WEIGHTS.astype(y0.dtype) * jax.vmap(self.bridge.scale)(s)
        gap = jnp.where(jnp.isfinite(last), start - last, 0)
        basis = [jnp.ones_like(s), s - start, (s - start) * (s - start + gap)]
        push = sum(jnp.sum(weights * shape) * part for shape, part in zip(basis, parts))
        drift = sum(jnp.sum(weights * (end - s) * shape) * part for shape, part in zip(basis, parts))
        y1 = jnp.stack([y0[0] + (end - start) * y0[1] + drift, y0[1] + push])
        return y1, None, dict(y0=y0, y1=y1), (output, slope, start, last), dfx.RESULTS.successful


class PhaseSplitting(dfx.AbstractItoSolver):
    """SSCS, the symmetric splitting: half a step of dx = v dt, dv = √η g dW, a kick v += h F, half a step.

    Free flight with noise is exact; one call a step, at the midpoint (the authors' code calls at t₀ and lets g start anew at each step). Runs on
    `phase_sde_terms`; weak order 1.
    """

    bridge: PhaseBridge
    term_structure: ClassVar = dfx.MultiTerm[tuple[dfx.ODETerm, dfx.AbstractTerm]]
    interpolation_cls: ClassVar[Callable] = dfx.LocalLinearInterpolation

    def order(self, terms):
        """1, in law."""
        return 1

    def func(self, terms, t0, y0, args):
        """The drift at `t0`."""
        return terms.terms[0].vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        """Nothing is kept."""
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from `t0` to `t1`."""
        drift, noise = terms.terms
        middle = t0 + (t1 - t0) / 2
        y = self._fly(t0, middle, y0, noise)
        kick = jnp.asarray(t1 - t0, y0.dtype) * drift.vf(middle, y, args)[1]
        y1 = self._fly(middle, t1, jnp.stack([y[0], y[1] + kick]), noise)
        return y1, None, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful

    def _fly(self, start, end, y, noise):
        h, left = jnp.asarray(end - start, y.dtype), jnp.asarray(1 - end, y.dtype)
        # ∫₀ʰ uᵏ (left + u)² du, k = 0, 1, 2: with g² = p² (left + u)², the covariance of (v, x)
        vv, xv, xx = (left**2 * h ** (k + 1) / (k + 1) + 2 * left * h ** (k + 2) / (k + 2) + h ** (k + 3) / (k + 3) for k in range(3))
        amplitude = jnp.asarray(self.bridge.noise_scale * jnp.sqrt(self.bridge.noise_share), y.dtype)
        e = amplitude * noise.contr(start, end) / jnp.sqrt(h)
        x = y[0] + h * y[1] + jnp.sqrt(xx) * e[0]
        return jnp.stack([x, y[1] + xv / jnp.sqrt(xx) * e[0] + jnp.sqrt(vv - xv**2 / xx) * e[1]])


__all__ = ["PhaseExponential", "PhaseSplitting"]
