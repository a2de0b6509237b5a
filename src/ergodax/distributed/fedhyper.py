"""FedHyper: learning rates of federated averaging that follow their hypergradient, on the server (G, GM, SL) and in the clients (CL).

Wang, Wang, Li 2023, "FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning with Hypergradient Descent" (arXiv:2310.03156).
The derivative of the next loss in a rate is an inner product of two updates in a row: with w' = w + αΔ,

    dF(w') / dα = ⟨∇F(w'), Δ⟩,

and where the clients take one gradient step of rate η, their next mean update is Δ' = -η ∇F(w'), so α grows by ⟨Δ', Δ⟩ = -η dF/dα. With Δ_t the mean
over clients of (local weights - global weights) in round t, and α_0 = β_0 = 1 (zero products in the first round, so no change):

    G:   α_t = clip(α_{t-1} + ⟨Δ_t, Δ_{t-1}⟩, [1/5, 5]),     w ← w + α_t Δ_t;
    GM:  α_t = clip(α_{t-1} + ⟨Δ_t, m_{t-1}⟩, [0.8, 5]),     w ← w + Δ_t + (α_t - 1) m_t,     m_t = Δ_t + 0.9 m_{t-1};
    SL:  β_t = β_{t-1} + ⟨Δ_t, Δ_{t-1}⟩,                     w ← w + Δ_t,     clients' rate clip(η_0 β_t, [1e-3, 1e-1]);
    CL:  β_k = clip(β_{k-1} · min(1.1, 1 + ⟨d_k, d_{k-1}⟩ + (c/m) ⟨d_k, Δ_{t-1}⟩), [0.1, 10]),    d_k the k-th local change of a round,
         made at β_{k-1}, with m clients; the first change leaves β at 1, and Δ_{t-1} takes its place as d_{k-1} for the second.

Values and order are those of the authors' code; GM together with CL is its FULL. Deviations: their SL resets the clients' rates each round, so that
it does nothing there; here it acts. Their CL begins anew in each local epoch; here whoever calls `init` decides. The products are not scale-free:
where updates are small against 1, all of this stays near federated averaging. The mean over clients, a plain one or `jax.lax.pmean`, is the
caller's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..core.check import check_range
from ..core.types import PyTree, Scalar


#: ⟨a, b⟩ of two pytrees of updates.
InnerProduct = Callable[[PyTree, PyTree], Float[Array, ""]]


def inner_product(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """The sum over all leaves and entries of a · b, in the widest dtype of the leaves and at least float32.

    Where the weights are sharded over devices, the sum of it over these devices is wanted: `lambda a, b: jax.lax.psum(inner_product(a, b), axis)`.
    """
    dtype = max([jnp.dtype(jnp.float32), *(leaf.dtype for leaf in jax.tree.leaves(a))], key=lambda dtype: jnp.finfo(dtype).bits)
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros((), dtype))


class ServerState(NamedTuple):
    """The rate α (or β in SL), and the update (in GM the momentum m) of the rounds so far."""

    scale: Float[Array, ""]
    previous: PyTree


class ClientState(NamedTuple):
    """β, the last local change, and the number of local steps in this round."""

    scale: Float[Array, ""]
    previous: PyTree
    count: Int[Array, ""]


def fedhyper_global(*, low: Scalar = 0.2, high: Scalar = 5.0, product: InnerProduct = inner_product) -> optax.GradientTransformation:
    """G: the server's rate. Takes Δ_t as the updates and returns α_t Δ_t, to be added to the global weights.

    Products of two updates do not see their sign, so a pseudo-gradient -Δ_t goes through as well, and comes out as -α_t Δ_t.

    - `low`, `high`: the bounds of α, default [1/5, 5].
    - `product`: ⟨a, b⟩ of two updates, default `inner_product`.

    Raises `ValueError` for bounds that are not positive or do not enclose 1, where α starts.
    """
    _check_bounds(low, high)

    def update(updates, state, params=None):
        del params
        scale = jnp.clip(state.scale + product(updates, state.previous), _like(low, state.scale), _like(high, state.scale))
        return _scaled(scale, updates), ServerState(scale, updates)

    return optax.GradientTransformation(lambda params: _initial(params, product), update)


def fedhyper_global_momentum(
    *, decay: Scalar = 0.9, low: Scalar = 0.8, high: Scalar = 5.0, product: InnerProduct = inner_product
) -> optax.GradientTransformation:
    """GM: Δ_t → Δ_t + (α_t - 1) m_t, with `decay` the factor of m. Otherwise as `fedhyper_global`; the authors recommend it.

    Raises `ValueError` as there, and for a decay outside [0, 1).
    """
    _check_bounds(low, high)
    check_range("decay", decay, low=0.0, high=1.0, open_high=True)

    def update(updates, state, params=None):
        del params
        scale = jnp.clip(state.scale + product(updates, state.previous), _like(low, state.scale), _like(high, state.scale))
        momentum = jax.tree.map(lambda new, kept: new + _like(decay, new) * kept, updates, state.previous)
        return jax.tree.map(jnp.add, updates, _scaled(scale - 1, momentum)), ServerState(scale, momentum)

    return optax.GradientTransformation(lambda params: _initial(params, product), update)


def fedhyper_server_local(*, product: InnerProduct = inner_product) -> optax.GradientTransformation:
    """SL: hands Δ_t on as it is, and keeps the β_t of the clients' rate, for `local_rate`."""

    def update(updates, state, params=None):
        del params
        return updates, ServerState(state.scale + product(updates, state.previous), updates)

    return optax.GradientTransformation(lambda params: _initial(params, product), update)


def local_rate(state: ServerState, rate: Scalar, *, low: Scalar = 1e-3, high: Scalar = 1e-1) -> Float[Array, ""]:
    """SL: what the clients use in the next round, clip(η_0 β_t, [`low`, `high`]), from the state of `fedhyper_server_local` and η_0 = `rate`."""
    return jnp.clip(_like(rate, state.scale) * state.scale, _like(low, state.scale), _like(high, state.scale))


def fedhyper_client(
    num_clients: Scalar,
    *,
    global_weight: Scalar = 0.1,
    growth: Scalar = 1.1,
    low: Scalar = 0.1,
    high: Scalar = 10.0,
    product: InnerProduct = inner_product,
) -> optax.GradientTransformationExtraArgs:
    """CL: scales a client's local updates. It goes last, `optax.chain(optax.sgd(η, momentum=0.5), fedhyper_client(m))`; `init` begins a round.

    `update(updates, state, params, global_update=Δ_{t-1})`: the global update of the round before, in the structure of the weights; zeros at first.

    - `num_clients`: m, how many take part in a round.
    - `global_weight`: c, default 0.1.
    - `growth`: the largest factor of one step, default 1.1.
    - `low`, `high`: the bounds of β, default [0.1, 10].

    Raises `ValueError` for fewer than one client, a growth below 1, and bounds as in `fedhyper_global`.
    """
    check_range("num_clients", num_clients, low=1)
    check_range("global_weight", global_weight, low=0.0)
    check_range("growth", growth, low=1.0)
    _check_bounds(low, high)

    def init(params):
        return ClientState(*_initial(params, product), count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, global_update=None, **extra):
        del params, extra
        if global_update is None:
            raise ValueError("`update` needs `global_update`, the mean update of the round before (zeros in the first round).")
        scale, first = state.scale, state.count == 0
        change = _scaled(scale, updates)
        along = product(change, state.previous) + _like(global_weight, scale) / _like(num_clients, scale) * product(change, global_update)
        factor = jnp.where(first, 1, jnp.minimum(_like(growth, scale), 1 + along))
        scale = jnp.clip(scale * factor, _like(low, scale), _like(high, scale))
        previous = jax.tree.map(lambda new, old: jnp.where(first, old.astype(new.dtype), new), change, global_update)
        return change, ClientState(scale, previous, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(params, product):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return ServerState(jnp.ones_like(product(zeros, zeros)), zeros)


def _like(value, array):
    return jnp.asarray(value).astype(array.dtype)


def _scaled(scale, tree):
    return jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf, tree)


def _check_bounds(low, high):
    check_range("low", low, low=0.0, high=1.0, open_low=True)
    check_range("high", high, low=1.0)


__all__ = [
    "ClientState",
    "InnerProduct",
    "ServerState",
    "fedhyper_client",
    "fedhyper_global",
    "fedhyper_global_momentum",
    "fedhyper_server_local",
    "inner_product",
    "local_rate",
]
