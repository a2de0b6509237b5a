"""FedHyper: hypergradients by finite differences, the rules step by step, the quadratics of the card, and clients over two devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from ergodax.distributed import fedhyper_client, fedhyper_global, fedhyper_global_momentum, fedhyper_server_local, inner_product, local_rate


def test_hypergradient():
    """With one gradient step in the clients, α grows by -η times the derivative of the next loss in α."""

    def loss(w):
        return jnp.sum(jnp.cosh(w) * jnp.arange(1.0, 5.0)) + jnp.prod(w)

    eta, w = 0.05, jnp.array([0.3, -1.0, 0.7, 0.2])
    server = fedhyper_global()
    state = server.init(w)
    first = -eta * jax.grad(loss)(w)
    updates, state = server.update(first, state)
    np.testing.assert_array_equal(updates, first)  # α_0 = 1
    assert state.scale == 1
    difference = (loss(w + (1 + 1e-6) * first) - loss(w + (1 - 1e-6) * first)) / 2e-6
    second = -eta * jax.grad(loss)(w + first)
    updates, state = server.update(second, state)
    np.testing.assert_allclose((state.scale - 1) / -eta, difference, rtol=0, atol=1e-5 * abs(difference))
    np.testing.assert_allclose(updates, state.scale * second, rtol=1e-14)


SERVERS = {"average": optax.identity(), "G": fedhyper_global(), "GM": fedhyper_global_momentum()}

#: Rounds to an excess of 1e-2 from 10, 3 and 1 in each coordinate.
ROUNDS = {"average": [637, 419, 241], "G": [142, 259, 224], "GM": [71, 59, 65]}


def quadratics():
    """Centres and curvatures of 8 clients in 10 dimensions."""
    rng = np.random.default_rng(0)
    centres = 0.3 * rng.standard_normal((8, 10))
    curvatures = np.geomspace(0.1, 1, 10) * np.exp(0.2 * rng.standard_normal((8, 10)))
    return jnp.asarray(curvatures), jnp.asarray(centres)


def local_update(w, curvatures, centres):
    """Five steps of rate 0.01 in one client: local minus global weights."""
    local = jax.lax.fori_loop(0, 5, lambda _, x: x - 0.01 * curvatures * (x - centres), w)
    return local - w


def mean_update(w, clients):
    return jax.vmap(local_update, (None, 0, 0))(w, *clients).mean(axis=0)


@pytest.mark.parametrize("name", SERVERS)
def test_rounds_on_quadratics(name):
    clients, server = quadratics(), SERVERS[name]
    mean = clients[0].mean(axis=0)
    optimum = (clients[0] * clients[1]).mean(axis=0) / mean

    @jax.jit
    @jax.vmap
    def rounds(start):
        def excess(w):
            return jnp.sum(mean * (w - optimum) ** 2) / 2

        def one(carry):
            w, state, count = carry
            updates, state = server.update(mean_update(w, clients), state, w)
            return w + updates, state, count + 1

        w = jnp.full(10, start)
        count = jnp.zeros((), jnp.int32)
        return jax.lax.while_loop(lambda carry: (excess(carry[0]) >= 1e-2) & (carry[2] < 1000), one, (w, server.init(w), count))[2]

    assert rounds(jnp.array([10.0, 3.0, 1.0])).tolist() == ROUNDS[name]


def test_servers_step_by_step():
    """Three rounds on two leaves of two dtypes, by hand; None passes."""
    ways = [{"a": jnp.array([0.5, -1.0]), "b": jnp.array([x], jnp.float32), "c": None} for x in (1.0, 0.5, -1.5)]
    # ⟨Δ_1, Δ_0⟩ = 1.75, ⟨Δ_2, Δ_1⟩ = 0.5, m_1 = (0.95, -1.9, 1.4), ⟨Δ_2, m_1⟩ = 0.275.
    scales = {"G": [1, 2.75, 3.25], "GM": [1, 2.75, 3.025], "SL": [1, 2.75, 3.25]}
    second = {"G": [0.5 * 2.75, -2.75, 0.5 * 2.75], "GM": [0.5 + 1.75 * 0.95, -1 - 1.75 * 1.9, 0.5 + 1.75 * 1.4], "SL": [0.5, -1.0, 0.5]}
    for name, server in (("G", fedhyper_global()), ("GM", fedhyper_global_momentum()), ("SL", fedhyper_server_local())):
        state = server.init(ways[0])
        for i, way in enumerate(ways):
            updates, state = server.update(way, state)
            np.testing.assert_allclose(state.scale, scales[name][i], rtol=1e-6)
            if i == 1:
                np.testing.assert_allclose([*updates["a"], *updates["b"]], second[name], rtol=1e-6)
        assert (updates["a"].dtype, updates["b"].dtype, updates["c"]) == (jnp.float64, jnp.float32, None)
        assert state.scale.dtype == jnp.float64
        # A pseudo-gradient has the other sign, and so has what comes of it.
        flipped, other = jax.tree.map(jnp.negative, ways[0]), server.init(ways[0])
        for way in (flipped, jax.tree.map(jnp.negative, ways[1])):
            updates, other = server.update(way, other)
        np.testing.assert_allclose([*-updates["a"], *-updates["b"]], second[name], rtol=1e-6)
    assert [float(local_rate(state, rate)) for rate in (0.01, 0.001 / 3.25, 1.0)] == pytest.approx([0.0325, 0.001, 0.1])
    assert local_rate(state, 1e-5) == 1e-3


def test_bounds():
    up, down = jnp.array([3.0, 0.0]), jnp.array([-3.0, 0.0])
    for server, low in ((fedhyper_global(), 0.2), (fedhyper_global_momentum(), 0.8)):
        state = server.update(up, server.init(up))[1]
        assert server.update(up, state)[1].scale == 5
        assert server.update(down, state)[1].scale == low
    client = fedhyper_client(2)
    state = client.init(up)
    seen = []
    for _ in range(40):
        _, state = client.update(up, state, global_update=up)
        seen.append(float(state.scale))
    np.testing.assert_allclose(seen[:3], [1, 1.1, 1.21], rtol=1e-12)  # at most a tenth more in one step
    assert state.scale == 10
    _, state = client.update(down, state, global_update=up)
    assert state.scale == pytest.approx(0.1)


@pytest.mark.parametrize("server", [*SERVERS.values(), fedhyper_server_local()])
def test_orthogonal_updates_are_averaging(server):
    """Where successive updates have product 0, nothing changes, to the bit."""
    axes = jnp.eye(6)
    state = server.init(axes[0])
    for axis in axes:
        updates, state = server.update(axis, state)
        np.testing.assert_array_equal(updates, axis)
    client, state = fedhyper_client(4), fedhyper_client(4).init(axes[0])
    for axis in axes[1:]:
        updates, state = client.update(axis, state, global_update=axes[0])
        np.testing.assert_array_equal(updates, axis)


def test_client_step_by_step():
    """β by the recursion in NumPy, behind momentum as in the authors' runs: a change is made at the β before it."""
    rng = np.random.default_rng(1)
    gradients, last = rng.standard_normal((7, 3)), rng.standard_normal(3)
    optimiser = optax.chain(optax.sgd(0.2, momentum=0.5), fedhyper_client(5, global_weight=0.4))
    state = optimiser.init(jnp.zeros(3))
    scale, velocity, before, seen = 1.0, np.zeros(3), last, []
    for k, gradient in enumerate(gradients):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(jnp.asarray(gradient), state, jnp.zeros(3), global_update=jnp.asarray(last))
        velocity = 0.5 * velocity + gradient
        change = -0.2 * scale * velocity
        np.testing.assert_allclose(updates, change, rtol=1e-12)
        if k > 0:
            scale = np.clip(scale * min(1.1, 1 + change @ before + 0.4 / 5 * (change @ last)), 0.1, 10)
            before = change
        seen.append(scale)
    assert len(set(np.round(seen, 6))) > 5  # neither end of a range is always hit
    assert min(np.diff(seen)) < 0 < max(np.diff(seen))


def test_two_devices():
    """Clients, each with its own β, over two devices with `pmean`: as on one. `product` sums over sharded weights."""
    clients, server, scaler = quadratics(), fedhyper_global_momentum(), fedhyper_client(8)
    start = jnp.full(10, 10.0)

    def local(w, last, curvatures, centres):
        def step(carry, _):
            x, state = carry
            updates, state = scaler.update(-0.01 * curvatures * (x - centres), state, global_update=last)
            return (x + updates, state), None

        w = w + jnp.zeros_like(centres)  # from here on the client's own
        (x, state), _ = jax.lax.scan(step, (w, scaler.init(w)), length=5)
        return x - w, state.scale

    def train(clients, reduce):
        def one(carry, _):
            w, state, last = carry
            changes, scales = jax.vmap(local, (None, None, 0, 0))(w, last, *clients)
            mean = reduce(changes.mean(axis=0))
            updates, state = server.update(mean, state)
            return (w + updates, state, mean), scales

        (w, state, _), scales = jax.lax.scan(one, (start, server.init(start), jnp.zeros_like(start)), length=6)
        return w, state.scale, scales

    alone = jax.jit(lambda clients: train(clients, lambda x: x))(clients)
    mesh, spec = Mesh(np.array(jax.devices()[:2]), ("clients",)), PartitionSpec("clients")
    out = (PartitionSpec(), PartitionSpec(), PartitionSpec(None, "clients"))
    sharded = jax.shard_map(lambda c: train(c, lambda x: jax.lax.pmean(x, "clients")), mesh=mesh, in_specs=(spec,), out_specs=out)
    for a, b in zip(jax.jit(sharded)(clients), alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert alone[2].shape == (6, 8)
    assert alone[2][-1].std() > 0

    parts = fedhyper_global(product=lambda a, b: jax.lax.psum(inner_product(a, b), "clients"))

    def two_rounds(way):
        state = parts.update(way, parts.init(way))[1]
        return parts.update(way, state)[1].scale

    split = jax.shard_map(two_rounds, mesh=mesh, in_specs=(spec,), out_specs=PartitionSpec())
    np.testing.assert_allclose(jax.jit(split)(0.1 * jnp.arange(10.0)), 1 + 2.85, rtol=1e-14)


def test_bfloat16_and_sweep():
    """Products in float32; bounds and weights swept in one trace."""
    assert inner_product(jnp.full(1000, 0.1, jnp.bfloat16), jnp.ones(1000, jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(inner_product(jnp.ones(1000, jnp.bfloat16), jnp.ones(1000, jnp.bfloat16)), 1000)
    traces = []

    @jax.jit
    @jax.vmap
    def scale(high, decay):
        traces.append(None)
        server, way = fedhyper_global_momentum(decay=decay, high=high), jnp.array([1.0, 0.0])
        state = server.init(way)
        for _ in range(3):
            _, state = server.update(way, state)
        return state.scale

    # m = 1, 1 + d: α = 1, 2, 3 + d up to the bound.
    np.testing.assert_allclose(scale(jnp.array([9.0, 9.0, 2.5]), jnp.array([0.9, 0.0, 0.9])), [3.9, 3.0, 2.5], rtol=1e-14)
    scale(jnp.array([2.0, 3.0, 4.0]), jnp.array([0.5, 0.1, 0.2]))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fedhyper_global(low=0.0), r"`low` must lie in \(0, 1\], got 0"),
        (lambda: fedhyper_global(high=0.5), r"`high` must lie in \[1, inf\), got 0.5"),
        (lambda: fedhyper_global_momentum(decay=1.0), r"`decay` must lie in \[0, 1\), got 1"),
        (lambda: fedhyper_client(0), "`num_clients` must lie in .* got 0"),
        (lambda: fedhyper_client(4).update(jnp.ones(2), fedhyper_client(4).init(jnp.ones(2))), "`update` needs `global_update`"),
        (lambda: fedhyper_client(4, growth=0.9), "`growth` must lie in .* got 0.9"),
        (lambda: fedhyper_client(4, global_weight=-1.0), "`global_weight` must lie in .* got -1"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
