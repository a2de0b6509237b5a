"""PFGM++: diffusion by an electric field in D extra dimensions. Xu, Liu, Tian, Tong, Tegmark, Jaakkola 2023 (arXiv:2302.04265).

The data y of dimension N are charges on the plane r = 0 of N + D dimensions. Their field leads to perturbations at distance r from the plane

    p_r(x | y) ∝ (|x - y|² + r²)^{-(N+D)/2},   r = σ √D   (their eq. 4 and 7, and proposition 3 for the alignment with EDM),

and its lines to the flow dx/dσ = (x - E[y | x])/σ, which is EDM's. So all that changes is the law of the noise: with their B ~ Beta(N/2, D/2),

    x = y + r √(B/(1 - B)) u,   u uniform on the sphere,   that is   x = y + σ n,   n = ε √(D/χ²_D),   ε ~ N(0, I):

n follows Student's t law with D degrees of freedom. D → ∞ gives Gaussian noise, D = 1 is PFGM. All else is taken over: paths, parametrisations,
weights, grids, solvers. In one line each:

    loss = DenoisingLoss(EDMPath(), EDMPrediction(), coupling=PFGMPPNoise(128.0))          # loss(network, batch, key)
    x1 = integrate(DenoiserTerm(denoised, path, grid), Heun(), pfgmpp_prior(key, path, (n, *shape), 128.0))

D is any positive real number and may be swept. The paper tells the network σ, as here. Its N is the number of entries of one example.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar, Time


class PFGMPPNoise(eqx.Module):
    """`DenoisingLoss`'s coupling: turns each row ε of the Gaussian noise into ε √(D/χ²_D).

    - `extra_dims`: D > 0; the paper's best are 128 and 2048 for images of N = 3072.
    - `clip`: B is kept within [clip, 1 - clip]. Default 0, the paper's law. (For small N/D a clip changes the law: B is about N/(N + D).)
    """

    extra_dims: Scalar = 128.0
    clip: Scalar = 0.0

    def __check_init__(self):
        check_range("extra_dims", self.extra_dims, low=0.0, open_low=True)
        check_range("clip", self.clip, low=0.0, high=0.5)

    def __call__(self, key: PRNGKey, data: Float[Array, "n *x"], noise: Float[Array, "n *x"], args: PyTree = None) -> Float[Array, "n *x"]:
        """The new noise, of unit scale parameter; its covariance is D/(D - 2) I for D > 2."""
        rows = noise.reshape(noise.shape[0], -1)
        dtype = noise.dtype if jnp.finfo(noise.dtype).bits >= 32 else jnp.float32
        dims = jnp.asarray(self.extra_dims, dtype)
        chi2 = 2 * jax.random.gamma(key, dims / 2, (rows.shape[0],), dtype)
        length2 = jnp.sum(rows.astype(dtype) ** 2, axis=1)
        # B = |ε|²/(|ε|² + χ²), so B/(1 - B) = |ε|²/χ²
        low = jnp.asarray(self.clip, dtype)
        share = jnp.clip(length2 / (length2 + chi2), low, 1 - low)
        other = jnp.clip(chi2 / (length2 + chi2), low, 1 - low)
        scale = jnp.sqrt(dims * share / (other * length2))
        return (rows * scale[:, None].astype(rows.dtype)).reshape(noise.shape)


def pfgmpp_prior(key: PRNGKey, path: AffinePath, shape: tuple[int, ...], extra_dims: Scalar = 128.0, dtype=None) -> Float[Array, "..."]:
    """Draws from p_{r_max} with r_max = σ(0) √D, where sampling starts: `shape` is (n, *example). Raises `ValueError` without an axis of draws."""
    if len(shape) < 2:
        raise ValueError(f"`shape` must be (draws, *example), got {shape}.")
    key_noise, key_scale = jax.random.split(key)
    gaussian = path.prior(key_noise, shape, dtype)
    # scale and shape of the noise are independent, so the coupling may act after σ(0): it is homogeneous of degree 1 in ε without a clip
    sigma = path.sigma(jnp.zeros((), gaussian.dtype))
    return sigma * PFGMPPNoise(extra_dims)(key_scale, gaussian, gaussian / sigma)


class EmpiricalPFGMPPDenoiser(eqx.Module):
    """The exact E[y | x] for a data set, as a vector field `(t, x, args)`: Σ w_i y_i, w_i ∝ (|x - α y_i|² + D σ²)^{-(N+D)/2}.

    - `points`: the data, (m, *x); x is one example.
    - `path`: any affine path, x = α y + σ n; the paper's is `EDMPath`.
    """

    points: Float[Array, "m *x"]
    path: AffinePath
    extra_dims: Scalar = 128.0

    def __check_init__(self):
        check_range("extra_dims", self.extra_dims, low=0.0, open_low=True)

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """E[y | x_t = x] at one scalar `t` with σ > 0, of the shape of `x`."""
        alpha, sigma = (clock.astype(x.dtype) for clock in (self.path.alpha(t), self.path.sigma(t)))
        points, dims = self.points.reshape(len(self.points), -1).astype(x.dtype), jnp.asarray(self.extra_dims, x.dtype)
        squares = jnp.sum((x.ravel() - alpha * points) ** 2, axis=1)
        logits = -(math.prod(x.shape) + dims) / 2 * jnp.log1p(squares / (dims * sigma**2))
        return jnp.dot(jax.nn.softmax(logits), points, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)


__all__ = ["EmpiricalPFGMPPDenoiser", "PFGMPPNoise", "pfgmpp_prior"]
