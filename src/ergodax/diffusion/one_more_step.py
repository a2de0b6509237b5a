"""One More Step: a step from pure noise to where a trained model's path begins. Hu, Zheng, Zheng, Wang, Tao, Cham 2023 (arXiv:2311.15744).

Most trained noise schedules keep some signal at their first time, α > 0, so training starts at x = α x₁ + σ ε and sampling at N(0, σ²): the mean of
the data, brightness and other low frequencies are lost. One more step repairs it without touching the model. A small network estimates E[x₁ | c]
from pure noise ε, and the sampler starts at

    x = α D + √(σ² - s²) ε + s ξ,   D = E[x₁ | ε, c],   ξ ~ N(0, I),

with α and σ at the sampler's FIRST time. s = 0 keeps the noise that the network saw; s = σ draws it anew, the ancestral form of the released pipeline
(which multiplies the noise by σ² there; here it is σ, so that the variance is that of training).

The network is trained at signal-to-noise ratio 0, where v-prediction is -x₁ and a flow's velocity x₁ - ε. That is `DenoisingLoss` at the start of any
path with α(0) = 0, and the network is then a denoiser like any other, also under guidance:

    start = FlowMatchingPath()
    loss = DenoisingLoss(start, VPrediction(), times=noise_times)
    step = OneMoreStep(ClassifierFreeGuidance(Denoiser(psi, start, VPrediction()), 2.0), path)
    x = integrate(term, solver, step(key, term.grid[0], noise, prompt), args)

Its prompt may differ from the sampler's, and models with the same data and condition share it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField


def noise_times(key: PRNGKey, n: int) -> Float[Array, " n"]:
    """n times 0, pure noise: the `times` that train the network of `OneMoreStep`."""
    return jnp.zeros(n)


class OneMoreStep(eqx.Module):
    """The sampler's start from pure noise.

    - `denoised`: `(t, x, args)`, called at t = 0 with pure noise: E[x₁ | x, args].
    - `path`: the path of the model that will be sampled.
    - `noise_scale`: s/σ in [0, 1], default 0, deterministic; 1 is ancestral. May be swept.

    Raises `ValueError` for a scale out of range.
    """

    denoised: VectorField
    path: AffinePath
    noise_scale: Scalar = 0.0

    def __check_init__(self):
        check_range("noise_scale", self.noise_scale, low=0.0, high=1.0)

    def __call__(self, key: PRNGKey, t: Time, noise: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The state at the sampler's first time `t`, of the shape and dtype of `noise` ~ N(0, I); one example or what `denoised` takes."""
        t = jnp.asarray(t, noise.dtype)
        scale = jnp.asarray(self.noise_scale, noise.dtype)
        fresh = jax.random.normal(key, (noise.size,), noise.dtype).reshape(noise.shape)
        mixed = jnp.sqrt((1 - scale) * (1 + scale)) * noise + scale * fresh
        return self.path.interpolate(t, self.denoised(jnp.zeros_like(t), noise, args), mixed)


__all__ = ["OneMoreStep", "noise_times"]
