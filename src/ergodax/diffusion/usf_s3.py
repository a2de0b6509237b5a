"""USF, a unified sampling framework: every decision of an exponential integrator, per step, as data. Liu, Ning, Yang, Wang 2023 (arXiv:2312.07243).

In λ = log(α/σ) the probability flow is solved by variation of constants from a starting node s to t, h = λ_t - λ_s, in data or noise prediction:

    x_t = (σ_t/σ_s) x_s + σ_t ∫ e^λ D dλ,      x_t = (α_t/α_s) x_s - α_t ∫ e^{-λ} ε dλ.

With H = -h (data) or h (noise) and c = α_t (1 - e^{-h}) or σ_t - (α_t/α_s) σ_s, the step that is exact for a constant, both are

    x_t = ratio x_s + c Σ_{k<p} g_k c_k,       g_k = ∫₀¹ e^{H(1-τ)} τ^k dτ / ∫₀¹ e^{H(1-τ)} dτ,

where c_k is h^k/k! times the k-th derivative of D or ε at s, estimated by divided differences of evaluations that are kept. A step decides

- p, its Taylor order; s, how many nodes back it starts (0: a multistep method; the start of a block: a singlestep one); data or noise;
- of how many evaluations the first derivative is estimated, at most p (the others are estimated of all p): the start's, then the newest ones;
- a relaxation of g₁ or g₂, see `Relaxation`;
- a corrector of its end: the same update once the model was called there, from the same start, and with that call; it costs no further one.

`USF` holds the decisions as arrays, so a population of solvers is one `vmap`. Points of this space: `USF.ddim`, `USF.dpm_solver` (DPM-Solver and
DPM-Solver++, single and multistep; Lu et al. 2022, arXiv:2206.00927, 2211.01095), `USF.deis` (its log ρ variant; Zhang, Chen 2022,
arXiv:2204.13902), `USF.unipc` (Zhao et al. 2023, arXiv:2302.04867).

- The released conversion of UniPC leaves the first corrector unrelaxed; here it is UniPC's.
- DPM-Solver++(3M) as published has half the Taylor coefficient on its second derivative, and order 2.
- Not here: correctors that call the model again."""

import enum
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..core.check import check_count, check_range
from .solver import DenoiserSolver, clocks, finish


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_TAU, _LOG_WEIGHTS = (_NODES + 1) / 2, np.log(_WEIGHTS)


class Relaxation(enum.IntEnum):
    """What replaces a Taylor coefficient."""

    NONE = 0
    HALF = 1  # g₁ = 1/2: DPM-Solver's midpoint rule, and UniPC's B(h) = e^H - 1
    LINEAR = 2  # g₁ = H/(2 (e^H - 1)): UniPC's B(h) = H
    HALF_SECOND = 3  # g₂/2: DPM-Solver++(3M)


class History(eqx.Module):
    """The last `depth` nodes, in a ring: node i is at i mod depth."""

    count: Int[Array, ""]
    states: Float[Array, "depth *y"]  # corrected
    predicted: Float[Array, "depth *y"] | None  # before correction, where the model was called; None: the same
    denoised: Float[Array, "depth *y"]
    log_alpha: Float[Array, " depth"]
    log_sigma: Float[Array, " depth"]


class USF(DenoiserSolver):
    """A solver schedule, one network call per step. Entry i of each array of shape (N,) decides the step from node i to node i + 1.

    - `orders`: Taylor orders p, from 1 to `depth`. Taken lower where there are fewer evaluations; 1 to σ = 0 and from α = 0.
    - `starts`: nodes back to the start, 0 to `depth` - 1.
    - `noise`: noise prediction, else data. A step from α = 0 is always in data prediction.
    - `estimates`: evaluations for the first derivative, 2 to p.
    - `relaxations`: values of `Relaxation`.
    - `correctors`: Taylor orders of the correctors, 0 for none; None for none at all. Needs `starts` < `depth` - 1.
    - `corrector_relaxations`: values of `Relaxation` for them.
    - `depth` (static): nodes that are kept. `rate` (static): the order of convergence, if it is known.
    - `analytic_first` (static, default false): no call in the first step, D = 0 in its place (the mean of centred data, exact at α = 0).

    Raises `ValueError` for arrays of different shapes and decisions out of range.
    """

    orders: Int[Array, " steps"]
    starts: Int[Array, " steps"]
    noise: Bool[Array, " steps"]
    estimates: Int[Array, " steps"]
    relaxations: Int[Array, " steps"]
    correctors: Int[Array, " steps"] | None
    corrector_relaxations: Int[Array, " steps"] | None
    depth: int = eqx.field(static=True, default=4)
    rate: int = eqx.field(static=True, default=1)
    analytic_first: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_count("depth", self.depth)
        shapes = {jnp.shape(table) for table in jax.tree.leaves(self)}
        if len(shapes) != 1:
            raise ValueError(f"all decisions must have one shape (N,), got {sorted(shapes)}.")
        back = self.depth - (1 if self.correctors is None else 2)
        check_range("orders", self.orders, low=1, high=self.depth)
        check_range("starts", self.starts, low=0, high=back)
        check_range("estimates", self.estimates, low=1, high=self.depth)
        check_range("relaxations", self.relaxations, low=0, high=len(Relaxation) - 1)
        check_range("correctors", self.correctors, low=0, high=self.depth)
        check_range("corrector_relaxations", self.corrector_relaxations, low=0, high=len(Relaxation) - 1)

    def order(self, terms):
        """`rate`."""
        return self.rate

    def init(self, terms, t0, t1, y0, args):
        """No nodes: their λ is not finite."""
        zeros, missing = (
            jnp.stack([jnp.zeros_like(y0)] * self.depth),
            jnp.stack([jnp.full_like(clocks(terms, t0, t1, y0).log_sigma0, jnp.inf)] * self.depth),
        )
        return History(jnp.zeros((), int), zeros, None if self.correctors is None else zeros, zeros, missing, missing)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        step, row = clocks(terms, t0, t1, y0), solver_state.count
        if self.analytic_first:
            denoised = jax.lax.cond(row == 0, lambda: jnp.zeros_like(y0), lambda: terms.vf(t0, y0, args).denoised)
        else:
            denoised = terms.vf(t0, y0, args).denoised
        history = _push(solver_state, step, y0, denoised)
        target = step.log_alpha1, step.log_sigma1
        decisions = self.orders[row], self.starts[row], self.noise[row], self.estimates[row], self.relaxations[row]
        if self.correctors is None or self.corrector_relaxations is None:
            plan = _plan(history, *target, *decisions)
        else:
            # The corrector of the last step, and this one.
            last = jnp.maximum(row - 1, 0)
            order = self.correctors[last]
            before = step.log_alpha0, step.log_sigma0, order, self.starts[last] + 1, self.noise[last], order, self.corrector_relaxations[last]
            both = jax.tree.map(lambda *pair: jnp.stack(pair), before, (*target, *decisions))
            plans = jax.vmap(functools.partial(_plan, history))(*both)
            # A NaN in a branch not taken, as the first corrector's weights may be, still ruins gradients.
            corrects, plan = (row > 0) & (order > 0), [weights[1] for weights in plans]
            y = jnp.where(corrects, _apply(history, [jnp.where(corrects, weights[0], 0) for weights in plans]), y0)
            history = eqx.tree_at(lambda h: h.states, history, history.states.at[row % self.depth].set(y))
        return finish(y0, _apply(history, plan), eqx.tree_at(lambda h: h.count, history, row + 1))

    @classmethod
    def ddim(cls, num_steps: int) -> "USF":
        """DDIM: Taylor order 1."""
        check_count("num_steps", num_steps)
        return _schedule(np.ones(num_steps, int), depth=1, rate=1)

    @classmethod
    def dpm_solver(
        cls,
        num_steps: int,
        order: int = 2,
        *,
        noise: bool = False,
        single_step: bool = False,
        midpoint: bool = True,
        lower_order_final: bool = True,
    ) -> "USF":
        """DPM-Solver++, or with `noise` DPM-Solver, of `order` 1, 2 or 3, as diffusers' schedulers have them.

        - `single_step`: blocks of `order` steps, whose nodes are those of the grid.
        - `midpoint`: their midpoint rule, else ("heun") the exact Taylor coefficients. The multistep order 3 has one form only.
        - `lower_order_final` (default true): orders 2 and 1 in the last steps. diffusers does this below 15 steps.
        """
        _check_order(num_steps, order, 3)
        if not single_step:
            orders = _ramp(num_steps, order, lower_order_final)
            relaxations = np.where((orders == 2) & midpoint, Relaxation.HALF, np.where(orders == 3, Relaxation.HALF_SECOND, Relaxation.NONE))
            return _schedule(orders, noise=noise, relaxations=relaxations, depth=order, rate=min(order, 2))
        places = np.arange(num_steps) % order + 1
        if lower_order_final and num_steps % order == 0:
            places[-1] = 1
        relaxations = np.where((places == 2) & midpoint, Relaxation.HALF, Relaxation.NONE)
        orders = np.where((places == 3) & midpoint, 2, places)
        return _schedule(orders, starts=places - 1, noise=noise, relaxations=relaxations, depth=order, rate=order)

    @classmethod
    def deis(cls, num_steps: int, order: int = 3, *, lower_order_final: bool = True) -> "USF":
        """DEIS: `order` 1 to 4 noises, interpolated by a polynomial in log ρ = -λ and integrated exactly."""
        _check_order(num_steps, order, 4)
        return _schedule(_ramp(num_steps, order, lower_order_final), noise=True, depth=order, rate=order)

    @classmethod
    def unipc(
        cls,
        num_steps: int,
        order: int = 2,
        *,
        noise: bool = False,
        linear: bool = False,
        corrector: bool = True,
        lower_order_final: bool = True,
    ) -> "USF":
        """UniPC of `order` 1 to 4, whose corrector adds one to the order of convergence.

        `linear` takes B₁(h) = H, else B₂(h) = e^H - 1; the others as above. The paper's UniP is `corrector=False`.
        """
        _check_order(num_steps, order, 4)
        orders, relaxed = _ramp(num_steps, order, lower_order_final), Relaxation.LINEAR if linear else Relaxation.HALF
        return _schedule(
            orders,
            noise=noise,
            relaxations=np.where(orders == 2, relaxed, Relaxation.NONE),
            correctors=orders + 1 if corrector else None,
            corrector_relaxations=np.where(orders == 1, relaxed, Relaxation.NONE) if corrector else None,
            depth=order + corrector,
            rate=order + corrector,
        )


def _check_order(num_steps, order, highest):
    check_count("num_steps", num_steps)
    check_count("order", order)
    if order > highest:
        raise ValueError(f"`order` must be at most {highest}, got {order}.")


def _ramp(num_steps, order, lower_order_final):
    """1, 2, …, order, order, …, and down again to 1."""
    up = np.arange(1, num_steps + 1)
    return np.minimum(order, np.minimum(up, up[::-1]) if lower_order_final else up)


def _schedule(orders, *, starts=0, noise=False, relaxations=0, correctors=None, corrector_relaxations=None, depth, rate):
    """`USF` of numbers and arrays."""

    def table(values, dtype=int):
        return jnp.asarray(np.broadcast_to(values, orders.shape), dtype)

    after = (None, None) if correctors is None else (table(correctors), table(corrector_relaxations))
    return USF(table(orders), table(starts), table(noise, bool), table(orders), table(relaxations), *after, depth=depth, rate=rate)


def _push(history, step, y, denoised):
    """The newest node in the place of the oldest."""
    slot = history.count % history.log_alpha.shape[0]
    return History(
        history.count,
        history.states.at[slot].set(y),
        None if history.predicted is None else history.predicted.at[slot].set(y),
        history.denoised.at[slot].set(denoised),
        history.log_alpha.at[slot].set(step.log_alpha0),
        history.log_sigma.at[slot].set(step.log_sigma0),
    )


def _plan(history, log_alpha1, log_sigma1, order, start, noise, estimate, relaxation):
    """x_t of the module docstring as weights of what is kept: of the corrected states, and of states and denoised where the model was called."""
    depth = history.log_alpha.shape[0]
    place = jnp.arange(depth)
    age = (history.count - place) % depth
    nodes = jnp.min(jnp.where(jnp.isfinite(history.log_alpha - history.log_sigma), depth, age))  # the newest ones, all finite
    # A step to σ = 0 ends on the newest denoised, wherever it starts.
    start = jnp.where(jnp.isfinite(log_alpha1 - log_sigma1), jnp.clip(nodes - 1, 0, start), 0)
    # The start, then the newest: how far back each is, and where it lies in the ring.
    back = jnp.where(place == 0, start, jnp.where(place <= start, place - 1, place))
    lies = back[:, None] == age
    log_alpha, log_sigma = (jnp.sum(jnp.where(lies, clock, 0), axis=1) for clock in (history.log_alpha, history.log_sigma))
    noise = noise & jnp.isfinite(log_alpha[0])
    h = (log_alpha1 - log_sigma1) - (log_alpha[0] - log_sigma[0])
    used = place < jnp.where(jnp.isfinite(h), jnp.maximum(jnp.minimum(order, nodes), 1), 1)

    ratio = jnp.exp(jnp.where(noise, log_alpha1 - log_alpha[0], log_sigma1 - log_sigma[0]))
    shrunk = jnp.exp(log_alpha1 - jnp.where(noise, log_alpha[0] - log_sigma[0], 0))
    constant = jnp.where(noise, jnp.exp(log_sigma1) - shrunk, -jnp.exp(log_alpha1) * jnp.expm1(-h))
    log_ratio = jnp.where(used, log_alpha - log_sigma, 0)
    weights = constant * _weights(log_ratio, h, used, noise, estimate, relaxation)
    # ε = (x - α D)/σ.
    of_noise = noise & used
    on_state = jnp.where(of_noise, weights * jnp.exp(-jnp.where(used, log_sigma, 0)), 0)
    on_denoised = jnp.where(of_noise, -weights * jnp.exp(jnp.where(of_noise, log_ratio, 0)), weights)
    return tuple(jnp.sum(jnp.where(lies, on[:, None], 0), axis=0) for on in (jnp.where(place == 0, ratio, 0), on_state, on_denoised))


def _weights(log_ratio, h, used, noise, estimate, relaxation):
    """What the evaluations at the nodes `log_ratio`, the start's first, contribute to Σ_k g_k c_k."""
    place, one = jnp.arange(len(used)), jnp.ones((), h.dtype)
    h = jnp.where(jnp.isfinite(h) & (h != 0), h, one)
    signed = jnp.where(noise, h, -h)
    tau = jnp.asarray(_TAU, h.dtype)
    density = jax.nn.softmax(jnp.asarray(_LOG_WEIGHTS, h.dtype) + signed * (1 - tau))
    moments = jnp.sum(density * jnp.asarray(_TAU ** np.arange(len(used))[:, None], h.dtype), axis=1)
    relaxed = jnp.where(relaxation == Relaxation.HALF, one / 2, signed / (2 * jnp.expm1(signed)))
    first = (place == 1) & ((relaxation == Relaxation.HALF) | (relaxation == Relaxation.LINEAR))
    halved = (place == 2) & (relaxation == Relaxation.HALF_SECOND)
    moments = jnp.where(first, relaxed, jnp.where(halved, moments / 2, moments))

    # Newton's form: the divided difference of the nodes 0 … n, of which each has a share, times Π_{j<n} (u - u_j), whose coefficients are `newton`.
    u = jnp.where(used & (place > 0), (log_ratio - log_ratio[0]) / h, 0)
    apart = used[:, None] & used & (place[:, None] != place)
    gaps = 1 / jnp.where(apart, u[:, None] - u, 1)
    share, newton, weights = jnp.ones_like(u), jnp.where(place == 0, one, 0), jnp.zeros_like(u)
    for n in range(len(used)):
        share = share * gaps[:, n]
        counts = used[n] & ((place != 1) | (n < jnp.maximum(estimate, 2)))
        weights = weights + jnp.where(place <= n, share, 0) * jnp.sum(jnp.where(counts, newton * moments, 0))
        newton = jnp.concatenate([jnp.zeros_like(u[:1]), newton[:-1]]) - u[n] * newton
    return weights


def _apply(history, plan):
    """The sum of what is kept, by its weights."""
    on_corrected, on_state, on_denoised = plan
    product = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
    y = product(on_denoised, history.denoised)
    if history.predicted is None:
        return y + product(on_corrected + on_state, history.states)
    return y + product(on_corrected, history.states) + product(on_state, history.predicted)


__all__ = ["USF", "Relaxation"]
