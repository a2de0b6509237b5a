"""Cold diffusion: generation by undoing any degradation. Bansal, Borgnia, Chu, Li, Kazemi, Huang, Goldblum, Geiping, Goldstein 2022.

arXiv:2208.09392. A degradation D(t, x) takes data x at t = 1, D(1, x) = x, to something without content at t = 0 (their step s counts the
other way): a blur, a mask, snow, noise. A restorer R learns to undo it,

    min E ‖R(t, D(t, x)) - x‖₁   (`RestorationLoss`),

and sampling alternates both. With x̂ = R(t₀, x₀), the plain way is x₁ = D(t₁, x̂) (their algorithm 1, `NaiveRestoration`); theirs is

    x₁ = x₀ - D(t₀, x̂) + D(t₁, x̂)   (algorithm 2),

which is exact for every R where D(t, x) = x + (1 - t) e, and so forgives a restorer its errors where D is smooth. It is Euler's
method on dx = ∂_t D(t, x̂) dt with exact increments; `Restoration` is that term, and any explicit diffrax solver steps on it:

    x1 = integrate(Restoration(restorer, GaussianBlur(20.0)), diffrax.Euler(), x0, times=uniform_grid(100))

Where D draws something, D(t, x, z), the sampler reads z off the state it has: for D = α_t x + σ_t z (`PathDegradation`),
z = (x₀ - α x̂)/σ, and Euler's steps are DDIM's.

Blurred to its mean, an image is one colour; `constant_image_prior` draws such starts. The authors' blur is a product of discrete kernels, here the
heat kernel itself on the same torus."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import given_pairs, stratified_times
from ..core.check import check_range
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .draw import draw
from .solver import finish


class Degradation(eqx.Module):
    """The socket for a degradation of ONE example; with D(1, x, z) = x."""

    @abc.abstractmethod
    def __call__(self, t: Time, data: Float[Array, "*x"], noise: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """D(t, x, z) at one scalar `t`; a deterministic one ignores z."""

    def infer(self, t: Time, state: Float[Array, "*x"], data: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """z, from a state at time t and the data that it is thought to come from. Zeros for a deterministic degradation."""
        return jnp.zeros_like(state)


class DeterministicDegradation(Degradation):
    """Any `function(t, data) -> array like data`: masks, down-sampling, snow."""

    function: Callable

    def __call__(self, t, data, noise):
        return self.function(t, data)


class PathDegradation(Degradation):
    """D = α_t x + σ_t z on an affine path: noise (hot diffusion), or, with the z that a coupling gives, other images (their animorphosis)."""

    path: AffinePath

    def __call__(self, t, data, noise):
        return self.path.interpolate(t, data, noise)

    def infer(self, t, state, data):
        return (state - self.path.alpha(t) * data) / self.path.sigma(t)


class GaussianBlur(Degradation):
    """The heat kernel of standard deviation (1 - t)^power · `max_std` pixels, on images (..., height, width, channels) with periodic edges.

    `power` (default 1) sets how the blur grows. At `max_std` of the image's side nothing but the mean is left.
    """

    max_std: Scalar
    power: Scalar = 1.0

    def __check_init__(self):
        check_range("max_std", self.max_std, low=0.0)
        check_range("power", self.power, low=0.0, open_low=True)

    def __call__(self, t, data, noise):
        height, width = data.shape[-3:-1]
        rows = jnp.fft.fftfreq(height).astype(data.dtype)[:, None, None]
        columns = jnp.fft.rfftfreq(width).astype(data.dtype)[:, None]
        std = jnp.asarray(self.max_std * (1 - t) ** self.power, data.dtype)
        decay = jnp.exp(-2 * jnp.pi**2 * std**2 * (rows**2 + columns**2))
        spectrum = jnp.fft.rfft2(data, axes=(-3, -2))
        return jnp.fft.irfft2(decay.astype(spectrum.dtype) * spectrum, (height, width), axes=(-3, -2))


class Restored(NamedTuple):
    """What a solver sees of the restorer."""

    data: Float[Array, "*x"]  # x̂
    noise: Float[Array, "*x"]  # z


class Restoration(dfx.AbstractTerm):
    """dx = ∂_t D(t, x̂, z) dt with x̂ = `restorer(t, x, args)` and z = `degradation.infer(t, x, x̂)`, by exact increments.

    Integrate with `times` from 0 (degraded) to 1. `diffrax.Euler()` is the paper's improved sampling, one call of the restorer per step.
    """

    restorer: VectorField
    degradation: Degradation

    def vf(self, t, y, args):
        """The data, restored at time `t`: a `Restored`."""
        t = jnp.asarray(t, y.dtype)
        data = self.restorer(t, y, args)
        return Restored(data, self.degradation.infer(t, y, data))

    def contr(self, t0, t1, **kwargs):
        """The step's ends."""
        return t0, t1

    def prod(self, vf, control):
        """D(t₁, x̂, z) - D(t₀, x̂, z)."""
        start, end = (self.degradation(jnp.asarray(t, vf.data.dtype), *vf) for t in control)
        return end - start


class NaiveRestoration(dfx.AbstractSolver):
    """The plain alternation x₁ = D(t₁, x̂, z), one call of the restorer per step: what the paper improves on."""

    term_structure: ClassVar = Restoration
    interpolation_cls: ClassVar[Callable] = dfx.LocalLinearInterpolation

    def order(self, terms):
        """1 where x̂ is exact."""
        return 1

    def func(self, terms, t0, y0, args):
        """The restored data at `t0`."""
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        """No state."""
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from `t0` to `t1`: D(t₁, x̂, z) as D(1, x̂, z) less an increment, for diffrax's driver hides the degradation."""
        restored = terms.vf(t0, y0, args)
        return finish(y0, restored.data - terms.prod(restored, terms.contr(t1, jnp.ones_like(t1))))


class RestorationLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: E mean |model(t, D(t, x, z), args) - x|.

    - `degradation`: of one example.
    - `batch`: data of shape (B, *x), or a pair (data, args); `model`: a restorer of ONE example.
    - `times`, `coupling` (of z, from N(0, I) as drawn): plugs as in `DenoisingLoss`.

    Raises `ValueError` for data without a batch axis.
    """

    degradation: Degradation
    times: Callable = stratified_times
    coupling: Callable = given_pairs

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        times, data, noise, args = draw(batch, key, self.times, self.coupling)

        def one(t, x, z, condition):
            return jnp.mean(jnp.abs(model(t, self.degradation(t, x, z), condition) - x))

        return jnp.mean(jax.vmap(one)(times, data, noise, args)), {}


def constant_image_prior(key: PRNGKey, colours: Any, shape: tuple[int, ...], perturbation: Scalar = 0.002) -> Float[Array, "n height width channels"]:
    """Images of one colour each, drawn from `colours`, plus N(0, perturbation²) on every pixel, which breaks their symmetry.

    - `colours`: a law with `sample(key, n) -> (n, channels)`, such as an `ergodax.data.GaussianMixture` fitted to the mean colours of the data.
    - `shape`: (n, height, width, channels).
    - `perturbation`: default 0.002, the middle of what the authors try.

    Raises `ValueError` for another shape.
    """
    if len(shape) != 4:
        raise ValueError(f"`shape` must be (n, height, width, channels), got {shape}.")
    check_range("perturbation", perturbation, low=0.0)
    key_colour, key_noise = jax.random.split(key)
    colour = colours.sample(key_colour, shape[0])
    if colour.shape != (shape[0], shape[3]):
        raise ValueError(f"`colours` must give {(shape[0], shape[3])}, got {colour.shape}.")
    noise = jax.random.normal(key_noise, (math.prod(shape),), colour.dtype).reshape(shape)
    return colour[:, None, None, :] + jnp.asarray(perturbation, colour.dtype) * noise


__all__ = [
    "Degradation",
    "DeterministicDegradation",
    "GaussianBlur",
    "NaiveRestoration",
    "PathDegradation",
    "Restoration",
    "RestorationLoss",
    "Restored",
    "constant_image_prior",
]
