"""Simplified diffusion Schrödinger bridge: iterative proportional fitting where each chain is regressed on the neighbouring state, or on the far end.
Tang, Hang, Gu, Chen, Guo 2024 (arXiv:2403.14623).

On times 0 = t_0 < … < t_N = 1, with noise of variance ε per unit of time (the paper's steps are γ_{k+1} = ε (t_{k+1} - t_k)/2, γ̄_N = ε/2),

    forward   x_{k+1} = F(t_k, x_k) + √(2 γ_{k+1}) z,        backward   x_k = B(t_{k+1}, x_{k+1}) + √(2 γ_{k+1}) z,

    L_B = E ‖B(t_{k+1}, x_{k+1}) - x_k‖²  on paths of F from p₀,     L_F = E ‖F(t_k, x_k) - x_{k+1}‖²  on paths of B from p₁,

where DSB (De Bortoli, Thornton, Heng, Doucet 2021, arXiv:2106.01357) regresses B on x_{k+1} + F(t_k, x_k) - F(t_k, x_{k+1}), at two more calls of the
other network and with a difference of smaller order in the step. In turn they converge to the Schrödinger bridge of √ε W, whose plan is that of
entropic OT with cost ½|x₀ - x₁|² and weight ε, but for a bias of order 1/N: each step's variance is set to 2γ. The first backward round is the
training of a diffusion model with forward process F.

Reparametrised (R-DSB), the network predicts the same thing at all times and the step is drawn from the Brownian bridge to what it says: the far end
(TR-DSB, `TerminalTransition` with `Brownian(ε)`) or the flow to it (FR-DSB, `FlowTransition`):

    x_k | x_{k+1} ~ N(x_{k+1} + γ_{k+1}/γ̄_{k+1} (x̂₀ - x_{k+1}), 2 γ_{k+1} γ̄_k/γ̄_{k+1} I),   x̂₀ = x_{k+1} + t_{k+1} v,   t = γ̄/γ̄_N.

A mean x̂ leaves the spread of the far end out, so with R-DSB what is generated has too little variance, by about log(N)/N: between N(0, 1) and
N(0, 2.25) at ε = 1, -8.9 % at N = 16 and -1.9 % at N = 128, where the plain chains have +4.9 % and +0.65 %; covariances of the ends are off by
+1.5 % and +0.14 % against -4.5 % and -1.1 %.

Training: `Alternation` of two `Learner(SimplifiedBridgeLoss(), optimiser, SimulatedPaths(law, batch_size), num_steps)` through `core.iterate`.

Deviations: paths are drawn fresh for each batch (the authors cache some thousands and redraw now and then), and all steps of a path enter the loss.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_increasing, check_range
from ..core.types import PRNGKey, Scalar, VectorField
from .discrete_bridge import TerminalTransition, Transition
from .reference import Brownian


class MeanTransition(Transition):
    """F or B itself: the network `(t, x, z)` returns the mean of the neighbouring state, and the variance is ε (t_{k+1} - t_k).

    With `lambda t, x, z: x`, forward, it is √ε W on the grid. A residual network, x + f(t, x), starts near it. `epsilon`: ε >= 0, may be swept.
    """

    network: VectorField
    epsilon: Scalar  # pyrefly: ignore[bad-class-definition]  # an AbstractVar is no field
    times: Float[Array, " n"]
    forward: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_increasing("times", self.times)
        check_range("epsilon", self.epsilon, low=0.0)

    def moments(self, k, x, z):
        mean = self.network(self.times[self.ends(k)[0]].astype(x.dtype), x, z)
        return mean, jnp.asarray(self.epsilon * (self.times[k + 1] - self.times[k]), x.dtype)

    def target(self, k, path):
        return path[self.ends(k)[1]]


class FlowTransition(Transition):
    """FR-DSB: the network returns the flow (x̂ - x)/(time left) to the far end x̂, so that its target stays of one size.

    `epsilon`: ε > 0, the variance of the Brownian motion per unit of time; may be swept.
    """

    network: VectorField
    epsilon: Scalar  # pyrefly: ignore[bad-class-definition]  # an AbstractVar is no field
    times: Float[Array, " n"]
    forward: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_increasing("times", self.times)
        check_range("epsilon", self.epsilon, low=0.0, open_low=True)

    def moments(self, k, x, z):
        far = lambda t, x, z: x + self._left(k).astype(x.dtype) * self.network(t, x, z)  # noqa: E731
        return TerminalTransition(network=far, reference=Brownian(self.epsilon), times=self.times, forward=self.forward).moments(k, x, z)

    def target(self, k, path):
        return (path[-1 if self.forward else 0] - path[self.ends(k)[0]]) / self._left(k).astype(path.dtype)

    def _left(self, k):
        return self.times[-1] - self.times[k] if self.forward else self.times[k + 1] - self.times[0]


class SimplifiedBridgeLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: ‖network - target‖², summed over an example's dimensions, mean over batch and steps.

    - `model`: a `Transition`.
    - `batch`: paths (B, N + 1, *x) in time order, of a chain of the OTHER direction (`SimulatedPaths`).

    Raises `ValueError` for paths that do not have the model's N + 1 states.
    """

    def __call__(self, model: Transition, batch: Float[Array, "batch n *x"], key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        if batch.ndim < 2 or batch.shape[1] != model.times.shape[0]:
            raise ValueError(f"paths must have shape (batch, {model.times.shape[0]}, *example), got {batch.shape}.")

        def one(key, k, path):
            start = model.ends(k)[0]
            z = jax.random.normal(key, path.shape[1:], path.dtype)
            error = model.network(model.times[start].astype(path.dtype), path[start], z) - model.target(k, path)
            return jnp.sum(error**2)

        ks = jnp.arange(batch.shape[1] - 1)
        keys = jax.random.split(key, (batch.shape[0], ks.size))
        return jnp.mean(jax.vmap(jax.vmap(one, (0, 0, None)), (0, None, 0))(keys, ks, batch)), {}


__all__ = ["FlowTransition", "MeanTransition", "SimplifiedBridgeLoss"]
