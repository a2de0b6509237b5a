"""MixFlows: the average of a reference density pushed 0 … N - 1 times through one map. Xu, Chen, Campbell 2022 (arXiv:2205.07475).

With T an invertible map, J = |det ∂T| and q₀ a reference density, the family and its log-density are

    q_N = (1/N) Σ_{n=0}^{N-1} Tⁿ# q₀,     q_N(x) = (1/N) Σ_n q₀(T⁻ⁿ x) / Π_{j=1}^{n} J(T⁻ʲ x),

one backward pass of N - 1 inverse maps. Draws are Tⁿ(x₀) with x₀ ~ q₀ and n uniform. If T is ergodic and keeps π, then q_N → π in total variation for
every q₀ « π: nothing has to be learned, and N buys accuracy. The ELBO, E[log p - log q_N], is estimated here over a whole orbit,

    (1/N) Σ_n [log p(Tⁿ x₀) - log q_N(Tⁿ x₀)],   log q_N(Tⁿ x₀) = log (1/N) Σ_{k=n-N+1}^{n} exp(log q₀(Tᵏ x₀) + L_k) - L_n,   L_k = log |det ∂Tᵏ(x₀)|,

from the 2N - 1 states -N < k < N: the paper's estimator from one draw, averaged over n given x₀, at the same 2(N - 1) maps.

`HamiltonianFlow` is the paper's map for densities on Rᵈ, on states of position x, momentum ρ with density r and CDF R, and pseudotime u in [0, 1):

    (x, ρ) ← `num_leapfrog` leapfrog steps of size ε on log p(x) + log r(ρ), none rejected;      Jacobian 1
    u ← u + ξ mod 1;                                                                             Jacobian 1
    ρ_i ← R⁻¹(R(ρ_i) + z(x_i, u) mod 1);                                                         Jacobian Π r(ρ_i)/r(ρ_i')

It keeps the target up to the leapfrog error; q_N and the ELBO are exact at any ε. The reference code is zuhengxu/ErgFlow.jl; u is shifted before the
refreshment, as in its one-dimensional version, once for all coordinates.

Rounding. Under Laplace momenta a position moves by exactly ± ε a step, so orbits come back: 1000 maps on two modes in one dimension return to 1e-15
(ε = 0.1, 10 steps, float64). Normal momenta make T chaotic: there 10 maps return to 5e-9, 40 not at all. `elbo` takes no return trip.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.types import PRNGKey, PyTree, Scalar
from .bijection import Bijection


class MixFlow(eqx.Module):
    """q_N for one example, an array or a pytree; `vmap` over keys or points for many.

    - `flow`: T, any `Bijection`.
    - `reference`: q₀, any object with `sample(key) -> x` and `log_prob(x) -> scalar`.
    - `num_steps`: N (static).

    Raises `ValueError` for N < 1.
    """

    flow: Bijection
    reference: Any
    num_steps: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def sample(self, key: PRNGKey) -> PyTree:
        """One draw, for N - 1 maps whatever n: so that it is differentiable and a batch costs no more than its longest orbit."""
        key_reference, key_count = jax.random.split(key)
        count = jax.random.randint(key_count, (), 0, self.num_steps)

        def advance(x, step):
            return jax.tree.map(lambda new, old: jnp.where(step < count, new, old), self.flow.forward(x)[0], x), None

        return jax.lax.scan(advance, self.reference.sample(key_reference), jnp.arange(self.num_steps - 1))[0]

    def orbit(self, key: PRNGKey) -> PyTree:
        """x₀, T(x₀), …, Tᴺ⁻¹(x₀), along a leading axis: dependent, but E[(1/N) Σ f(Tⁿ x₀)] is the mean of f under q_N. N - 1 maps."""
        start = self.reference.sample(key)

        def advance(x, _):
            x = self.flow.forward(x)[0]
            return x, x

        _, rest = jax.lax.scan(advance, start, length=self.num_steps - 1)
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, rest)

    def log_prob(self, x: PyTree) -> Float[Array, ""]:
        """log q_N(x), for N - 1 inverse maps."""
        log_densities, _, _ = self._walk(self.flow.inverse, x, lambda x: None)
        return jax.nn.logsumexp(log_densities) - jnp.log(jnp.asarray(self.num_steps, log_densities.dtype))

    def elbo(self, key: PRNGKey, log_target: Callable[[PyTree], Array]) -> Float[Array, ""]:
        """An unbiased estimate of E[log p(x) - log q_N(x)] = log ∫ p - KL(q_N ‖ p/∫p), from one orbit of 2(N - 1) maps. `log_target` is log p."""
        x = self.reference.sample(key)
        future, log_det, log_p = self._walk(self.flow.forward, x, log_target)
        past, _, _ = self._walk(self.flow.inverse, x, lambda x: None)
        # log Σ over the window k = n-N+1 … n, as its part up to k = 0 and its part after.
        upto = jax.lax.cumlogsumexp(past[::-1], reverse=True)
        after = jnp.concatenate([jnp.full_like(upto[:1], -jnp.inf), jax.lax.cumlogsumexp(future[1:])])
        log_q = jnp.logaddexp(upto, after) - jnp.log(jnp.asarray(self.num_steps, upto.dtype)) - log_det
        return jnp.mean(log_p - log_q)

    def _walk(self, move, x, observe):
        """log q₀(Tᵏ x) + L_k, L_k and `observe(Tᵏ x)` for k = 0 … N - 1, or 0 … 1 - N with the inverse to `move`."""
        base = self.reference.log_prob(x)
        total = jnp.zeros_like(base)

        def advance(carry, _):
            x, total = carry
            x, log_det = move(x)
            total = total + log_det
            return (x, total), (self.reference.log_prob(x) + total, total, observe(x))

        _, rest = jax.lax.scan(advance, (x, total), length=self.num_steps - 1)
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), (base, total, observe(x)), rest)


class MixFlowLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: minus the ELBO, over `num_orbits` (static) orbits. `batch` is not read.

    - `log_target`: log p, up to a number, on the states of the flow.
    - `build`: `model -> MixFlow`. The model holds just what is to be trained, such as the log of a step size and the reference's parameters.

    Gradients are pathwise. They miss the jumps of a `HamiltonianFlow` (its refreshment mod 1, the sign of a Laplace momentum), as the paper's do.
    """

    log_target: Callable
    build: Callable
    num_orbits: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_orbits", self.num_orbits)

    def __call__(self, model: PyTree, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss."""
        mixflow = self.build(model)
        return -jnp.mean(jax.vmap(lambda key: mixflow.elbo(key, self.log_target))(jax.random.split(key, self.num_orbits))), {}


class Momentum(eqx.Module):
    """The socket for the law of one momentum coordinate: a density on the line with a CDF that can be inverted. All methods work elementwise."""

    @abc.abstractmethod
    def sample(self, key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> Array:
        """Independent draws."""

    @abc.abstractmethod
    def log_prob(self, momentum: Array) -> Array:
        """log r."""

    @abc.abstractmethod
    def score(self, momentum: Array) -> Array:
        """d log r/dρ."""

    @abc.abstractmethod
    def cdf(self, momentum: Array) -> Array:
        """R."""

    @abc.abstractmethod
    def quantile(self, probability: Array) -> Array:
        """R⁻¹, on (0, 1)."""


class LaplaceMomentum(Momentum):
    """r = ½ exp(-|ρ|), the paper's: positions move by ± ε a step."""

    def sample(self, key, shape, dtype):
        return jax.random.laplace(key, shape, dtype)

    def log_prob(self, momentum):
        return -jnp.abs(momentum) - jnp.log(jnp.asarray(2, momentum.dtype))

    def score(self, momentum):
        return -jnp.sign(momentum)

    def cdf(self, momentum):
        tail = jnp.exp(-jnp.abs(momentum)) / 2
        return jnp.where(momentum < 0, tail, 1 - tail)

    def quantile(self, probability):
        return jnp.where(probability < 0.5, jnp.log(2 * probability), -jnp.log(2 * (1 - probability)))


class NormalMomentum(Momentum):
    """r = N(0, 1): the usual Hamiltonian dynamics, smooth in ρ."""

    def sample(self, key, shape, dtype):
        return jax.random.normal(key, shape, dtype)

    def log_prob(self, momentum):
        return jax.scipy.stats.norm.logpdf(momentum)

    def score(self, momentum):
        return -momentum

    def cdf(self, momentum):
        return jax.scipy.special.ndtr(momentum)

    def quantile(self, probability):
        return jax.scipy.special.ndtri(probability)


class HamiltonianState(NamedTuple):
    """A point of the extended space."""

    position: Float[Array, "*x"]
    momentum: Float[Array, "*x"]
    pseudotime: Float[Array, ""]


class ExtendedDensity(eqx.Module):
    """`density`(x) Π r(ρ_i), uniform in u: the reference or the target of a `HamiltonianFlow`. A reference also needs `density.sample(key)`."""

    density: Any
    momentum: Momentum = LaplaceMomentum()

    def sample(self, key: PRNGKey) -> HamiltonianState:
        """One draw."""
        key_position, key_momentum, key_time = jax.random.split(key, 3)
        x = self.density.sample(key_position)
        return HamiltonianState(x, self.momentum.sample(key_momentum, x.shape, x.dtype), jax.random.uniform(key_time, (), x.dtype))

    def log_prob(self, state: HamiltonianState) -> Float[Array, ""]:
        """The log-density of one state, `pseudotime` in [0, 1)."""
        return self.density.log_prob(state.position) + jnp.sum(self.momentum.log_prob(state.momentum))


def sine_shift(position: Float[Array, "*x"], pseudotime: Float[Array, ""]) -> Float[Array, "*x"]:
    """z(x, u) = (sin(2x + u) + 1)/2, the paper's."""
    return (jnp.sin(2 * position + pseudotime) + 1) / 2


class HamiltonianFlow(Bijection):
    """The map T of the module's head, on a `HamiltonianState`; keeps `ExtendedDensity(target, momentum)` up to the leapfrog error.

    - `log_prob`: x -> log p(x), up to a number.
    - `step_size`: ε, a scalar or of the shape of x (may be trained).
    - `num_leapfrog`: leapfrog steps between refreshments (static); `num_leapfrog` + 1 gradients a map.
    - `pseudotime_step`: ξ, default π/16.
    - `momentum`: `LaplaceMomentum()` (default) or `NormalMomentum()`.
    - `shift`: z, `(position, pseudotime) -> array like position` in [0, 1]. Default `sine_shift`.

    R(ρ) is a floating point number, so momenta whose tail it cannot resolve (|ρ| > 35 in float64, 15 in float32, for Laplace) do not come back from
    the refreshment. Raises `ValueError` for a count below 1.
    """

    log_prob: Callable
    step_size: Scalar | Float[Array, "*x"]
    num_leapfrog: int = eqx.field(static=True)
    pseudotime_step: Scalar = jnp.pi / 16
    momentum: Momentum = LaplaceMomentum()
    shift: Callable = sine_shift

    def __check_init__(self):
        check_count("num_leapfrog", self.num_leapfrog)

    def forward(self, x):
        position, momentum = self._leapfrog(x.position, x.momentum, 1)
        pseudotime = jnp.mod(x.pseudotime + jnp.asarray(self.pseudotime_step, x.pseudotime.dtype), 1)
        refreshed, log_det = self._refresh(momentum, self.shift(position, pseudotime))
        return HamiltonianState(position, refreshed, pseudotime), log_det

    def inverse(self, y):
        momentum, log_det = self._refresh(y.momentum, -self.shift(y.position, y.pseudotime))
        pseudotime = jnp.mod(y.pseudotime - jnp.asarray(self.pseudotime_step, y.pseudotime.dtype), 1)
        return HamiltonianState(*self._leapfrog(y.position, momentum, -1), pseudotime), log_det

    def _leapfrog(self, position, momentum, sign):
        eps = sign * jnp.asarray(self.step_size, position.dtype)
        gradient = jax.grad(self.log_prob)

        def step(carry, _):
            position, momentum, force = carry
            momentum = momentum + eps / 2 * force
            position = position - eps * self.momentum.score(momentum)
            force = gradient(position)
            return (position, momentum + eps / 2 * force, force), None

        (position, momentum, _), _ = jax.lax.scan(step, (position, momentum, gradient(position)), length=self.num_leapfrog)
        return position, momentum

    def _refresh(self, momentum, shift):
        info = jnp.finfo(momentum.dtype)
        # Rounding may land on 0 or 1, where the quantile is infinite.
        probability = jnp.clip(jnp.mod(self.momentum.cdf(momentum) + shift, 1), info.tiny, 1 - info.epsneg)
        refreshed = self.momentum.quantile(probability)
        return refreshed, jnp.sum(self.momentum.log_prob(momentum) - self.momentum.log_prob(refreshed))


__all__ = [
    "ExtendedDensity",
    "HamiltonianFlow",
    "HamiltonianState",
    "LaplaceMomentum",
    "MixFlow",
    "MixFlowLoss",
    "Momentum",
    "NormalMomentum",
    "sine_shift",
]
