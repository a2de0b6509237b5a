"""GDSS: graphs by a system of diffusions, one of the nodes' features and one of the edges, coupled by their score. Jo, Lee, Hwang 2022.

arXiv:2202.02514. A graph (X, A) of n nodes has features X (n, f) and a symmetric adjacency matrix A (n, n) with diagonal 0. Each is noised on its own
path, and reversed by its part of the score of the JOINT density,

    dX = (f₁ - g₁² ∇_X log p_t(X, A)) dt̄ + g₁ dw₁,    dA = (f₂ - g₂² ∇_A log p_t(X, A)) dt̄ + g₂ dw₂.

What is random is X and the part of A above its diagonal. Packed into one vector it follows an affine path whose clocks are vectors, `GraphPath`, and
all else is as for any data: DenoisingLoss, parametrisations, grids, every one-step solver. In one line each:

    path = GraphPath(VPPath(), VPPath(0.1, 1.0), num_nodes, num_features)
    loss = DenoisingLoss(path, NoisePrediction(), coupling=path.masked_noise)    # loss(network, (path.pack(nodes, edges), mask), key)
    term = DenoiserTerm(Denoiser(network, path, NoisePrediction()), path, uniform_grid(1000, 0.0, 1 - 1e-5))
    nodes, edges = path.unpack(integrate(term, S4Splitting(path), path.prior(key, (size,)), mask, key=key))

with `network = GraphNoise(NodeNetwork(...), EdgeNetwork(...), path)`, edges then rounded at a half. Graphs of fewer nodes have a mask, (n,) of 0
and 1, which is the `args` of network and solver. `S4Splitting` is their solver: predictor and corrector for one call of the network, not two.

Deviations: the splitting's exact half steps have their exact variance, α₁² (σ₀²/α₀² - σ₁²/α₁²), e^B - 1 on VP, where the released code has
1 - e^{-B}; the corrector's 1 - β_i is (α₀/α₁)²; the last noise is not taken off the result; edges count once in the loss."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar, Time
from .solver import NoisyDenoiserSolver, clocks, finish, predicted_noise, unit_noise


class GraphPath(AffinePath):
    """The path of a packed graph, a vector of `size` = n f + n (n - 1)/2: clocks of `node_path` for the features, of `edge_path` for the edges.

    `num_nodes` and `num_features` are n and f (static). The paper uses VP for X, and VP or VE for A.
    """

    node_path: AffinePath
    edge_path: AffinePath
    num_nodes: int = eqx.field(static=True)
    num_features: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_nodes", self.num_nodes, low=2)
        check_count("num_features", self.num_features)

    @property
    def num_node_entries(self) -> int:
        """n f."""
        return self.num_nodes * self.num_features

    @property
    def size(self) -> int:
        """Length of a packed graph."""
        return self.num_node_entries + self.num_nodes * (self.num_nodes - 1) // 2

    def _both(self, node_clock, edge_clock):
        return jnp.where(np.arange(self.size) < self.num_node_entries, node_clock[..., None], edge_clock[..., None])

    def alpha(self, t):
        return self._both(self.node_path.alpha(t), self.edge_path.alpha(t))

    def sigma(self, t):
        return self._both(self.node_path.sigma(t), self.edge_path.sigma(t))

    def log_alpha(self, t):
        return self._both(self.node_path.log_alpha(t), self.edge_path.log_alpha(t))

    def log_sigma(self, t):
        return self._both(self.node_path.log_sigma(t), self.edge_path.log_sigma(t))

    def time(self, log_snr):
        """That of `node_path`."""
        return self.node_path.time(log_snr)

    def pack(self, nodes: Float[Array, "*batch n f"], edges: Float[Array, "*batch n n"]) -> Float[Array, "*batch size"]:
        """The features and what stands above the diagonal."""
        rows, columns = np.triu_indices(self.num_nodes, 1)
        return jnp.concatenate([nodes.reshape(*nodes.shape[:-2], -1), edges[..., rows, columns]], axis=-1)

    def unpack(self, vector: Float[Array, "*batch size"]) -> tuple[Float[Array, "*batch n f"], Float[Array, "*batch n n"]]:
        """(nodes, edges), the edges mirrored and 0 on the diagonal."""
        batch, (rows, columns) = vector.shape[:-1], np.triu_indices(self.num_nodes, 1)
        nodes, upper = jnp.split(vector, [self.num_node_entries], axis=-1)
        edges = jnp.zeros((*batch, self.num_nodes, self.num_nodes), vector.dtype).at[..., rows, columns].set(upper)
        return nodes.reshape(*batch, self.num_nodes, self.num_features), edges + jnp.swapaxes(edges, -1, -2)

    def masked(self, vector: Float[Array, "*batch size"], mask: Float[Array, "*masks n"] | None) -> Float[Array, "*batch size"]:
        """0 for the features and edges of absent nodes (`mask` 0); `vector` itself without a mask."""
        if mask is None:
            return vector
        nodes = jnp.broadcast_to(mask[..., None], (*mask.shape, self.num_features))
        return vector * self.pack(nodes, mask[..., :, None] * mask[..., None, :]).astype(vector.dtype)

    def masked_noise(self, key: PRNGKey, data: Float[Array, "b size"], noise: Float[Array, "b size"], args: PyTree) -> Float[Array, "b size"]:
        """A coupling for `DenoisingLoss`: no noise on absent nodes; `args` are the masks, (b, n), or None."""
        return self.masked(noise, args)


class S4Splitting(NoisyDenoiserSolver):
    """S4, symmetric splitting for systems of SDEs: one network call per step. With the score s at the start,

    1. a Langevin step, x += e s + κ √(2e) z, with e = 2 (α₀/α₁)² (ρ |z|/|s|)², for nodes and edges each with norms of their own;
    2. half a step of the linear part, exactly: x (α_m/α₀) + α_m √(σ₀²/α₀² - σ_m²/α_m²) z;
    3. an Euler step of the score part, x += g²(t₀) s Δt;
    4. the other half of the linear part.

    - `path`: the `GraphPath` of the term.
    - `snr`: ρ, default 0.1; the authors tune it (0.05 to 0.2). `noise_scale`: κ, default 1; they tune it below, which narrows the law.

    On states of shape (..., size), norms are averaged over the leading axes, as theirs are. `args` is the mask of the nodes, or None.
    """

    path: GraphPath
    snr: Scalar = 0.1
    noise_scale: Scalar = 1.0

    def __check_init__(self):
        check_range("snr", self.snr, low=0.0)
        check_range("noise_scale", self.noise_scale, low=0.0)

    def order(self, terms):
        """1, in law."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`; its three noises are increments over its thirds."""
        model, brownian = terms.terms
        length = t1 - t0
        draws = [self.path.masked(unit_noise(brownian, t0 + i * length / 3, t0 + (i + 1) * length / 3), args) for i in range(3)]
        middle = t0 + length / 2
        step, posterior = clocks(model, t0, t1, y0), model.vf(t0, y0, args)
        score = -predicted_noise(step, y0, posterior) * jnp.exp(-step.log_sigma0)
        snr, scale = jnp.asarray(self.snr, y0.dtype), jnp.asarray(self.noise_scale, y0.dtype)

        ratio = jnp.exp(step.log_alpha0 - step.log_alpha1) * snr * self._norms(draws[0]) / self._norms(score)
        size = 2 * ratio**2
        x = y0 + size * score + scale * jnp.sqrt(2 * size) * draws[0]
        x = _linear(clocks(model, t0, middle, y0), x, draws[1])
        x = x + posterior.diffusion.astype(y0.dtype) * step.dt * score
        return finish(y0, _linear(clocks(model, middle, t1, y0), x, draws[2]))

    def _norms(self, vector):
        """The norm of the nodes' part and of the edges', each in the place of its entries."""
        parts = jnp.split(vector, [self.path.num_node_entries], axis=-1)
        return self.path._both(*(jnp.mean(jnp.linalg.norm(part, axis=-1)) for part in parts))


def _linear(step, x, noise):
    """The forward process's drift and noise, run backwards over the step."""
    variance = -jnp.expm1(-2 * step.h) * jnp.exp(2 * (step.log_sigma0 - step.log_alpha0 + step.log_alpha1))
    return jnp.exp(step.log_alpha1 - step.log_alpha0) * x + jnp.sqrt(variance) * noise


class _GraphConvolution(eqx.Module):
    """Ã X W + b, Ã = D^{-1/2} (A + I) D^{-1/2}, degrees at least 1. Kipf and Welling 2017 (arXiv:1609.02907)."""

    linear: eqx.nn.Linear

    def __init__(self, in_size, out_size, *, key):
        self.linear = eqx.nn.Linear(in_size, out_size, key=key)

    def __call__(self, nodes, edges):
        edges = edges + jnp.eye(len(edges), dtype=edges.dtype)
        scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(edges, axis=1), 1))[:, None]
        return scale * (edges @ (scale * (nodes @ self.linear.weight.T))) + self.linear.bias


def _mlp(in_size, out_size, width, depth, key):
    return eqx.nn.MLP(in_size, out_size, width, depth, jax.nn.elu, key=key)


class NodeNetwork(eqx.Module):
    """The noise of the nodes: an MLP on the features and all layers of a graph convolution network, H ← tanh(GCN(H, A)).

    `network(nodes, edges, mask) -> (n, f)`; commutes with renumbering the nodes. Like theirs it does not read the time.
    """

    layers: list[_GraphConvolution]
    final: eqx.nn.MLP

    def __init__(self, num_features: int, width: int = 32, depth: int = 2, *, key: PRNGKey):
        check_count("width", width)
        check_count("depth", depth)
        key_final, *keys = jax.random.split(key, depth + 1)
        sizes = [num_features] + [width] * depth
        self.layers = [_GraphConvolution(i, o, key=k) for i, o, k in zip(sizes[:-1], sizes[1:], keys)]
        self.final = _mlp(sum(sizes), num_features, 2 * sum(sizes), 2, key_final)

    def __call__(self, nodes: Float[Array, "n f"], edges: Float[Array, "n n"], mask: Float[Array, " n"]) -> Float[Array, "n f"]:
        """For one graph, whose absent nodes have no edges; so they touch no other, and what they are given means nothing."""
        hidden = [nodes]
        for layer in self.layers:
            hidden.append(jnp.tanh(layer(hidden[-1], edges)))
        return jax.vmap(self.final)(jnp.concatenate(hidden, axis=1))


class _AttentionLayer(eqx.Module):
    """Graph multi-head attention on channels of edges, which it mixes. Baek, Kang, Hwang 2021 (arXiv:2102.11533)."""

    projections: _GraphConvolution  # stacked over the channels
    mix_nodes: eqx.nn.MLP
    mix_edges: eqx.nn.MLP
    heads: int = eqx.field(static=True)

    def __init__(self, in_size, out_size, in_channels, out_channels, heads, *, key):
        key, key_nodes, key_edges = jax.random.split(key, 3)
        make = eqx.filter_vmap(lambda k: _GraphConvolution(in_size, 3 * out_size, key=k))
        self.projections = make(jax.random.split(key, in_channels))
        width = 2 * max(in_channels, out_channels)
        self.mix_nodes = _mlp(in_channels * out_size, out_size, width, 1, key_nodes)
        self.mix_edges = _mlp(2 * in_channels, out_channels, width, 1, key_edges)
        self.heads = heads

    def __call__(self, nodes, edges, mask):
        def attend(projection, edges):
            query, key, value = jnp.split(projection(nodes, edges), 3, axis=1)
            query, key = (z.reshape(len(z), self.heads, -1) for z in (query, key))
            maps = jnp.mean(jnp.tanh(jnp.einsum("ihd,jhd->hij", query, key) / value.shape[1] ** 0.5), axis=0)
            return value, (maps + maps.T) / 2

        values, maps = eqx.filter_vmap(attend)(self.projections, edges)
        nodes = jnp.tanh(jax.vmap(self.mix_nodes)(jnp.moveaxis(values, 0, 1).reshape(len(nodes), -1))) * mask[:, None]
        channels = jnp.moveaxis(jnp.concatenate([maps, edges]), 0, -1)
        mixed = jnp.moveaxis(jax.vmap(jax.vmap(self.mix_edges))(channels), -1, 0)
        return nodes, (mixed + jnp.swapaxes(mixed, 1, 2)) * jnp.outer(mask, mask)


class EdgeNetwork(eqx.Module):
    """The noise of the edges: attention layers on the powers A, …, A^`powers`, and an MLP on all channels of edges.

    `network(nodes, edges, mask) -> (n, n)`, symmetric; commutes with renumbering the nodes. `heads` must divide `width`.
    """

    layers: list[_AttentionLayer]
    final: eqx.nn.MLP
    powers: int = eqx.field(static=True)

    def __init__(self, num_features: int, width: int = 32, depth: int = 2, powers: int = 2, channels: int = 8, heads: int = 4, *, key: PRNGKey):
        for name, count in (("width", width), ("depth", depth), ("powers", powers), ("channels", channels), ("heads", heads)):
            check_count(name, count)
        if width % heads:
            raise ValueError(f"`heads` must divide `width`, got {heads} heads for a width of {width}.")
        key_final, *keys = jax.random.split(key, depth + 1)
        sizes, counts = [num_features] + [width] * depth, [powers] + [channels] * depth
        self.layers = [_AttentionLayer(sizes[i], sizes[i + 1], counts[i], counts[i + 1], heads, key=k) for i, k in enumerate(keys)]
        self.final = _mlp(sum(counts), "scalar", 2 * sum(counts), 2, key_final)
        self.powers = powers

    def __call__(self, nodes: Float[Array, "n f"], edges: Float[Array, "n n"], mask: Float[Array, " n"]) -> Float[Array, "n n"]:
        """For one graph, whose absent nodes have no edges. The diagonal means nothing."""
        powers = [edges]
        for _ in range(self.powers - 1):
            powers.append(powers[-1] @ edges)
        channels = [jnp.stack(powers)]
        for layer in self.layers:
            nodes, mixed = layer(nodes, channels[-1], mask)
            channels.append(mixed)
        return jax.vmap(jax.vmap(self.final))(jnp.moveaxis(jnp.concatenate(channels), 0, -1))


class GraphNoise(eqx.Module):
    """Two networks of a graph as one of its packed vector: `(t, x, args) -> array like x` for `NoisePrediction`, with `args` the mask or None.

    `node_network(nodes, edges, mask) -> (n, f)` and `edge_network(nodes, edges, mask) -> (n, n)`, on one graph in which absent nodes are 0; the mask
    is (n,), 1 for nodes that exist.
    """

    node_network: Callable
    edge_network: Callable
    path: GraphPath

    def __call__(self, t: Time, x: Float[Array, " size"], args: PyTree = None) -> Float[Array, " size"]:
        """For one graph."""
        mask = jnp.ones(self.path.num_nodes, x.dtype) if args is None else args.astype(x.dtype)
        graph = *self.path.unpack(self.path.masked(x, mask)), mask
        return self.path.masked(self.path.pack(self.node_network(*graph), self.edge_network(*graph)), mask)


__all__ = ["EdgeNetwork", "GraphNoise", "GraphPath", "NodeNetwork", "S4Splitting"]
