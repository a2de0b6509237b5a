"""What every network obeys: the socket, the conditioning, no dead weights, and that it can learn what no blind network can."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from ergodax.nn import Conditioning, DiT, FourierTime, TimeMLP, UNet
from ergodax.testing import count_traces


SHAPE = (4, 4, 1)
CLASSES = 3
MAKERS = {
    "mlp": lambda key, **options: TimeMLP(SHAPE, 16, 2, CLASSES, **options, key=key),
    "unet": lambda key, **options: UNet(SHAPE, 8, (1, 2), CLASSES, heads=2, **options, key=key),
    "dit": lambda key, **options: DiT(SHAPE, 2, 16, 2, 2, CLASSES, **options, key=key),
}
each = pytest.mark.parametrize("name", MAKERS)

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, *SHAPE)))
T = jnp.asarray(np.linspace(0.05, 0.95, 6))
LABELS = jnp.asarray([0, 1, 2, -1, 1, 0])
call = jax.jit(lambda network, t, x, label: network(t, x, label))


def random_network(make, seed=0):
    """A network with no zeros left in it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape)), jax.eval_shape(make, jax.random.key(0)))


@pytest.fixture(scope="module")
def fresh():
    return {name: jax.jit(make)(jax.random.key(0)) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def moved():
    return {name: random_network(make) for name, make in MAKERS.items()}


@each
def test_a_fresh_network_returns_zero_and_needs_no_filter(name, fresh):
    assert np.array_equal(call(fresh[name], 0.3, X[0], 1), np.zeros(SHAPE))
    assert all(isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(fresh[name]))


@each
def test_dtypes(name):
    """The network has its own dtype, the result that of x, and no constant raises either (promotion is strict here)."""
    for dtype in (jnp.bfloat16, jnp.float32):
        network = jax.eval_shape(lambda key, dtype=dtype: MAKERS[name](key, dtype=dtype), jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {jnp.dtype(dtype)}
        for x_dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            out = jax.eval_shape(lambda *inputs: inputs[0](*inputs[1:]), network, 0.5, jax.ShapeDtypeStruct(SHAPE, x_dtype), 1)
            assert out.shape == SHAPE
            assert out.dtype == x_dtype


@each
def test_vmap_over_examples_and_over_weights_equals_a_loop(name, moved):
    networks = moved[name], random_network(MAKERS[name], seed=1)
    alone = [[call(network, T[i], X[i], LABELS[i]) for i in range(6)] for network in networks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    together = jax.jit(jax.vmap(jax.vmap(call, in_axes=(None, 0, 0, 0)), in_axes=(0, None, None, None)))(stacked, T, X, LABELS)
    np.testing.assert_allclose(together, np.asarray(alone), atol=1e-11)


@each
def test_two_devices_equal_one(name, moved):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("batch",))
    batched = jax.vmap(call, in_axes=(None, 0, 0, 0))
    split = jax.shard_map(batched, mesh=mesh, in_specs=(PartitionSpec(), *3 * [PartitionSpec("batch")]), out_specs=PartitionSpec("batch"))
    np.testing.assert_allclose(jax.jit(split)(moved[name], T, X, LABELS), jax.jit(batched)(moved[name], T, X, LABELS), atol=1e-11)


@each
def test_seeds_can_be_swept_and_a_second_network_compiles_nothing(name, moved):
    keys = jax.random.split(jax.random.key(0), 5)
    networks = jax.eval_shape(jax.vmap(MAKERS[name]), keys)
    assert all(lanes.shape == (5, *one.shape) for lanes, one in zip(jax.tree.leaves(networks), jax.tree.leaves(moved[name]), strict=True))
    counted, traces = count_traces(lambda network, t, x, label: network(t, x, label))
    compiled = jax.jit(counted)
    compiled(moved[name], T[0], X[0], LABELS[0])
    compiled(random_network(MAKERS[name], seed=1), T[1], X[1], LABELS[1])
    assert traces() == 1


@each
def test_time_image_and_label_matter_and_minus_one_reads_the_null_row(name, moved):
    network = moved[name]

    def of(t, x, label, network=network):
        return np.asarray(call(network, t, x, jnp.asarray(label)))

    here, null = of(0.3, X[0], 0), of(0.3, X[0], -1)
    for other in (of(0.31, X[0], 0), of(0.3, X[1], 0), of(0.3, X[0], 1), of(0.3, X[0], 2), null):
        assert np.abs(here - other).max() > 1e-4
    rows = network.conditioning.label.weight
    assert rows.shape[0] == CLASSES + 1
    where = [leaf is rows for leaf in jax.tree.leaves(network)]
    swapped = [rows[np.asarray([3, 1, 2, 0])] if hit else leaf for leaf, hit in zip(jax.tree.leaves(network), where)]
    swapped = jax.tree.unflatten(jax.tree.structure(network), swapped)
    np.testing.assert_allclose(of(0.3, X[0], 0, swapped), null, atol=1e-12)
    np.testing.assert_allclose(of(0.3, X[0], -1, swapped), here, atol=1e-12)


def test_conditioning_takes_every_kind_of_label_and_none():
    embed = random_network(lambda key: Conditioning(8, CLASSES, key=key))
    for kinds in ((-1, None, jnp.asarray(-1), np.int64(-1)), (1, jnp.asarray(1), np.int64(1), np.asarray(1, np.uint8))):
        values = [embed(0.3, label) for label in kinds]
        assert all(np.array_equal(values[0], value) for value in values[1:])


@each
def test_every_single_weight_gets_a_gradient(name, moved):
    def loss(network):
        return jnp.mean((jax.vmap(network)(T, X, LABELS) - X) ** 2)

    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(moved[name])):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.count_nonzero(leaf) == leaf.size, f"{jax.tree_util.keystr(path)} has {leaf.size - np.count_nonzero(leaf)} dead weights"


@each
def test_learns_what_no_network_blind_to_time_image_or_label_can(name, fresh):
    """Targets s_t s_label s_x x₀ with independent signs: averaged over any one sign they vanish, so a network blind to t, x or the label cannot go
    below mean(x₀²) = 1. A hundredth of it needs all three."""
    signs = np.asarray(np.meshgrid(*3 * [[-1.0, 1.0]])).reshape(3, 8)
    x0 = np.asarray(X[0]) / np.sqrt(np.mean(np.asarray(X[0]) ** 2))
    t, label, x = 0.5 + 0.25 * signs[0], (signs[1] > 0).astype(np.int32), signs[2][:, None, None, None] * x0
    target = np.prod(signs, axis=0)[:, None, None, None] * x0
    optimiser = optax.adam(3e-3)

    def loss(network):
        return jnp.mean((jax.vmap(network)(jnp.asarray(t), jnp.asarray(x), jnp.asarray(label)) - target) ** 2)

    def step(carry, _):
        network, state = carry
        value, gradient = jax.value_and_grad(loss)(network)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(network, updates), state), value

    with jax.numpy_dtype_promotion("standard"):  # optax itself does not run under strict promotion
        losses = jax.jit(lambda network: jax.lax.scan(step, (network, optimiser.init(network)), None, length=300)[1])(fresh[name])
    np.testing.assert_allclose(losses[0], 1, rtol=1e-12)
    assert losses[-1] < 0.01


@pytest.mark.parametrize("name", ["mlp", "unet"])
def test_dropout_acts_only_with_a_key(name, moved):
    network = random_network(lambda key: MAKERS[name](key, dropout=0.5))
    run = jax.jit(lambda network, key: network(T[0], X[0], 0, key=key))
    first, again, other = (run(network, jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    without = call(moved[name], T[0], X[0], 0)
    assert not np.array_equal(first, without)
    # No key, or rate 0: nothing is dropped.
    np.testing.assert_allclose(call(network, T[0], X[0], 0), without, atol=1e-12)
    np.testing.assert_allclose(run(moved[name], jax.random.key(0)), without, atol=1e-12)


def test_without_classes_args_are_ignored():
    network, x = random_network(lambda key: TimeMLP((2,), 8, 1, key=key)), jnp.asarray([1.0, -0.5])
    assert np.array_equal(network(0.5, x, {"measurement": jnp.ones(3)}), network(0.5, x))


@each
def test_refuses_batches_and_wrong_labels(name, moved):
    network = moved[name]
    with pytest.raises(ValueError, match=r"one example `x` of shape \(4, 4, 1\), got shapes \(\) and \(6, 4, 4, 1\); use jax.vmap"):
        network(0.5, X, 0)
    with pytest.raises(ValueError, match="one scalar `t`"):
        network(T, X[0], 0)
    for label in (3, -2):
        with pytest.raises(ValueError, match=rf"0 … 2, or be -1 for no class, got {label}"):
            network(0.5, X[0], label)
    for label in (0.5, LABELS, True, {"label": 1}):
        with pytest.raises(ValueError, match="one integer or None"):
            network(0.5, X[0], label)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda key: TimeMLP((2,), 0, key=key), "`width`"),
        (lambda key: TimeMLP((2,), 8, 0, key=key), "`depth`"),
        (lambda key: TimeMLP((0,), 8, key=key), "the size of `shape`"),
        (lambda key: TimeMLP((2,), 8, num_classes=0, key=key), "`num_classes`"),
        (lambda key: TimeMLP((2,), 8, dropout=1.0, key=key), "`dropout`"),
        (lambda key: UNet((6, 6, 1), 8, (1, 2, 2), key=key), "multiples of 4"),
        (lambda key: UNet((8, 8), 8, key=key), "height, width, channels"),
        (lambda key: UNet((8, 8, 1), 8, (), key=key), "the number of `multipliers`"),
        (lambda key: UNet((8, 8, 1), 8, (1, 0), key=key), "`multipliers`"),
        (lambda key: UNet((8, 8, 1), 8, num_blocks=0, key=key), "`num_blocks`"),
        (lambda key: UNet((8, 8, 1), 8, heads=3, key=key), "`heads` must divide"),
        (lambda key: UNet((8, 8, 1), 8, dropout=-0.1, key=key), "`dropout`"),
        (lambda key: DiT((8, 8, 1), 3, key=key), "multiples of 3"),
        (lambda key: DiT((8, 8, 1), 2, 18, key=key), "multiple of 4"),
        (lambda key: DiT((8, 8, 1), 2, 16, heads=3, key=key), "`heads` must divide"),
        (lambda key: DiT((8, 8, 1), 2, 16, mlp_ratio=0, key=key), "`mlp_ratio`"),
        (lambda key: FourierTime(7), "even"),
        (lambda key: FourierTime(8, 1.0), "`max_frequency`"),
    ],
)
def test_refuses_sizes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make, jax.random.key(0))
