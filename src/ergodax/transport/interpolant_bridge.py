"""The Schrödinger bridge by optimising the interpolant. Albergo, Boffi, Vanden-Eijnden 2023 (arXiv:2303.08797).

For any interpolant x_t = Î(t, x₀, x₁) + γ(t) z the diffusion dX = u dt + √ε dW has x_t's law at all times, with the forward drift

    u(t, x) = b + ε/2 s = E[∂Î/∂t + (γ' - ε/(2γ)) z | x_t = x].

The Schrödinger bridge of √ε W is the law of least ½ ∫ E|u|² dt (Benamou and Brenier's form of transport, with noise: Chen, Georgiou, Pavon 2016,
arXiv:1412.4430), so with γ fixed it solves

    max_Î min_û ∫ E[½|û(t, x_t)|² - (∂Î/∂t + (γ' - ε/(2γ)) z) · û(t, x_t)] dt:

the inner minimum is at û = u, its value is -½ ∫ E|u|² dt, and the pair (x₀, x₁) may stay independent, since only the law at each time counts.
With too large a γ no Î reaches it; with γ² = ε t(1 - t), `BrownianBridgeGamma(ε)`, or less, some Î always does.

ε is the variance of the noise per unit of time, as in all bridges of this room; the paper's is half of it.
"""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import given_pairs, uniform_times
from ..core.check import check_range
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .interpolants import Gamma, Interpolant
from .sde import sde_terms


class LearnedInterpolant(Interpolant):
    """Î = I + t(1 - t) f(t, x₀, x₁): another interpolant and what a network adds to it between the ends, with the other's γ.

    - `base`: I and γ.
    - `correction`: f, `(t, x₀, x₁) -> array like x`, differentiable in t.
    """

    base: Interpolant
    correction: Callable

    @property
    def gamma(self) -> Gamma:  # pyrefly: ignore[bad-override]  # a property serves an AbstractVar as well as a field
        """γ."""
        return self.base.gamma

    def mean(self, t, x0, x1):
        return self.base.mean(t, x0, x1) + t * (1 - t) * self.correction(t, x0, x1)


class InterpolantBridge(eqx.Module):
    """Both players. As a vector field `(t, x, args)`, û, the drift of the bridge's SDE.

    - `interpolant`: Î, usually a `LearnedInterpolant`.
    - `drift`: û, a network `(t, x, args) -> array like x`.
    - `epsilon`: ε > 0, the variance of the reference's noise per unit of time.
    """

    interpolant: Interpolant
    drift: VectorField
    epsilon: Scalar

    def __check_init__(self):
        check_range("epsilon", self.epsilon, low=0.0, open_low=True)

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The drift at one scalar time."""
        return self.drift(t, x, args)

    def terms(self, key: PRNGKey, y0: Float[Array, "*x"]) -> dfx.MultiTerm:
        """For `integrate(bridge.terms(key, x0), diffrax.Euler(), x0, times=times)`."""
        return sde_terms(self, self.epsilon, key, y0)


class InterpolantBridgeLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: the objective, its gradient turned round for Î: one optimiser descends in û and ascends in Î.

    - `model`: an `InterpolantBridge`. Its γ and ε are held fixed. Let û learn faster than Î (`optax.multi_transform`): Î ascends what û has settled
      to, -½ ∫ E|u|² dt.
    - `batch`: (x₀, x₁) of shape (B, *x) each.
    - `times`, `coupling`: as in `VelocityLoss`. Every z comes with -z, since its factor is infinite at the ends.

    The value tends to -½ ∫ E|u|² dt of the bridge. Raises `ValueError` for pairs of unequal shape.
    """

    times: Callable = uniform_times
    coupling: Callable = given_pairs

    def __call__(self, model: InterpolantBridge, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The objective on one batch."""
        x0, x1 = batch
        if x0.shape != x1.shape or x0.ndim < 1:
            raise ValueError(f"x₀ and x₁ must have one shape (batch, *example), got {x0.shape} and {x1.shape}.")
        key_coupling, key_time, key_latent = jax.random.split(key, 3)
        x0 = self.coupling(key_coupling, x1, x0, None)
        t = self.times(key_time, x0.shape[0]).astype(x0.dtype)
        z = jax.random.normal(key_latent, x0.shape, x0.dtype)
        interpolant = jax.tree.map(lambda leaf: _reversed(leaf) if eqx.is_inexact_array(leaf) else leaf, model.interpolant)
        gamma = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, model.interpolant.gamma)
        half = jax.lax.stop_gradient(jnp.asarray(model.epsilon, x0.dtype)) / 2

        @jax.vmap
        def one(t, x0, x1, z):
            def signed(z):
                drift = model.drift(t, interpolant.mean(t, x0, x1) + gamma(t) * z, None)
                target = interpolant.d_mean(t, x0, x1) + (gamma.product(t) - half) / gamma(t) * z
                return jnp.sum(drift**2) / 2 - jnp.sum(target * drift)

            return (signed(z) + signed(-z)) / 2

        return jnp.mean(one(t, x0, x1, z)), {}


def _reversed(leaf):
    """The value of `leaf` with the opposite gradient."""
    still = jax.lax.stop_gradient(leaf)
    return still + (still - leaf)


__all__ = ["InterpolantBridge", "InterpolantBridgeLoss", "LearnedInterpolant"]
