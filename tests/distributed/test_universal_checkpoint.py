"""Universal checkpoints: any mesh to any mesh to the bit, training that goes on unchanged, and the pattern language on hand-made shards."""

import json
import os
import signal
import subprocess
import sys
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.child import environment

from ergodax.distributed import (
    Averaged,
    Fragmented,
    Replicated,
    Unique,
    Vocabulary,
    ZeroFlat,
    ZeroPerLeaf,
    load_universal,
    save_universal,
    split_atoms,
    union_fragments,
)


ENVIRONMENT = environment(JAX_ENABLE_X64="1")
ENVIRONMENT["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"


def run(script, *args):
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)


def equal(a, b):
    """The same structure, types, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert type(x) is type(y)
        if eqx.is_array_like(x):
            x, y = (jax.random.key_data(leaf) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else leaf for leaf in (x, y))
            assert np.asarray(x).dtype == np.asarray(y).dtype
            assert np.shape(x) == np.shape(y)
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# Eight devices, in one process of their own

SCRIPT = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ergodax.distributed import ZeroFlat, load_universal, save_universal

folder = Path(sys.argv[1])
optimiser = optax.adam(1e-2)
devices = np.array(jax.devices())
meshes = {shape: Mesh(devices[: shape[0] * shape[1]].reshape(shape), ("dp", "tp")) for shape in [(4, 1), (2, 2), (1, 4), (2, 4), (8, 1)]}
specs = {"in": P(None, "tp"), "bias": P("tp"), "out": P("tp", "dp")}
shapes = {"in": (5, 8), "bias": (8,), "out": (8, 8)}  # 112 numbers, on 3 ranks with padding
inputs = jax.random.normal(jax.random.key(1), (16, 5))

def fresh():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
    return {"params": params, "adam": optimiser.init(params), "step": jnp.zeros((), jnp.int32), "key": jax.random.key(7)}

def loss(params, key):
    x = inputs + 0.1 * jax.random.normal(key, inputs.shape)  # the random key matters
    return jnp.mean((jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"] - jnp.sin(x @ jnp.ones((5, 8)))) ** 2)

@jax.jit
def train_step(state):
    value, gradient = jax.value_and_grad(loss)(state["params"], jax.random.fold_in(state["key"], state["step"]))
    updates, adam = optimiser.update(gradient, state["adam"])
    return state | {"params": optax.apply_updates(state["params"], updates), "adam": adam, "step": state["step"] + 1}, value

def train(state, steps, step=train_step):
    losses = []
    for _ in range(steps):
        state, value = step(state)
        losses.append(float(value))
    return state, losses

def spec(path, leaf):
    name = getattr(path[-1], "key", None)
    return specs.get(name, P())

structure = jax.eval_shape(fresh)

def like(mesh):
    return jax.tree.map_with_path(lambda p, s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec(p, s))), structure)

def put(state, mesh):
    return jax.tree.map(lambda leaf, target: jax.device_put(leaf, target.sharding), state, like(mesh))

def bits(state):
    return [np.asarray(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a).tobytes() for a in jax.tree.leaves(state)]

report = {"round_trips": 0, "same_bits": True, "on_target": True, "key_type": True, "small_shards": True}
start, first = train(fresh(), 10)
end, rest = train(start, 20)
for a in [(4, 1), (2, 2), (1, 4)]:
    save_universal(folder / str(a), put(start, meshes[a]))
    for b, mesh in meshes.items():
        loaded = load_universal(folder / str(a), like(mesh))
        report["round_trips"] += 1
        report["same_bits"] &= bits(loaded) == bits(start)
        pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(like(mesh)), strict=True)
        report["on_target"] &= all(x.sharding == y.sharding and x.dtype == y.dtype for x, y in pairs)
        report["key_type"] &= bool(loaded["key"] == start["key"])
        report["small_shards"] &= loaded["adam"][0].nu["out"].addressable_shards[0].data.shape == (8 // b[1], 8 // b[0])
report["resumed"] = {str(b): train(load_universal(folder / "(4, 1)", like(meshes[b])), 20)[1] for b in [(2, 2), (1, 4)]}

# A job with flat ZeRO slices, three ranks and padding: from mesh (2, 2), 20 steps there, back to (1, 4)

flat_mesh = Mesh(devices[:3], ("dp",))
zero = ZeroFlat()

def flat(leaves):
    vectors = zero.split({name: np.asarray(leaves[name]) for name in shapes}, 3)
    sharding = NamedSharding(flat_mesh, P("dp"))
    return jax.make_array_from_callback((3 * len(vectors[0]),), sharding, lambda index: vectors[index[0].start // len(vectors[0])])

def unflat(vector):
    return zero.union([np.asarray(shard.data) for shard in sorted(vector.addressable_shards, key=lambda s: s.index[0].start)], shapes)

@jax.jit
def flat_step(state):
    def flat_loss(vector, key):
        return loss(zero.union(list(jnp.split(vector, 3)), shapes), key)
    value, gradient = jax.value_and_grad(flat_loss)(state["params"], jax.random.fold_in(state["key"], state["step"]))
    updates, adam = optimiser.update(gradient, state["adam"])
    return state | {"params": optax.apply_updates(state["params"], updates), "adam": adam, "step": state["step"] + 1}, value

atoms = load_universal(folder / "(2, 2)", jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), structure))
adam = atoms["adam"][0]
flat_state = atoms | {"params": flat(atoms["params"]), "adam": (adam._replace(mu=flat(adam.mu), nu=flat(adam.nu)), atoms["adam"][1])}
report["flat_length"] = flat_state["params"].shape[0]
def save_flat(path, state):
    adam = state["adam"][0]
    whole = {"step": state["step"], "key": state["key"], "adam/0/count": adam.count}
    for prefix, vector in {"params": state["params"], "adam/0/mu": adam.mu, "adam/0/nu": adam.nu}.items():
        whole |= {f"{prefix}/{name}": leaf for name, leaf in unflat(vector).items()}
    save_universal(path, whole)  # a flat dict under the names of the nested state
save_flat(folder / "flat start", flat_state)
report["flat_bits"] = bits(load_universal(folder / "flat start", like(meshes[1, 4]))) == bits(start)
flat_state, report["resumed"]["zero"] = train(flat_state, 10, flat_step)
save_flat(folder / "flat", flat_state)
report["resumed"]["zero"] += train(load_universal(folder / "flat", like(meshes[1, 4])), 10)[1]
report["uninterrupted"] = rest
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    process = run(SCRIPT, tmp_path_factory.mktemp("meshes"))
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_every_mesh_to_every_mesh_to_the_bit(report):
    """Parameters, both moments, count, step and random key; on the shardings asked for."""
    assert report["round_trips"] == 15
    for check in ("same_bits", "on_target", "key_type", "small_shards"):
        assert report[check], check


def test_zero_slices_with_padding_to_a_mesh_to_the_bit(report):
    assert report["flat_length"] == 114  # 112 numbers on 3 ranks
    assert report["flat_bits"]


@pytest.mark.parametrize("layout", ["(2, 2)", "(1, 4)", "zero"])
def test_training_goes_on_as_if_uninterrupted(report, layout):
    """Twenty Adam steps after the resize; only the order of sums differs, in float64."""
    expected = np.array(report["uninterrupted"])
    assert np.ptp(expected) > 1e-2  # the losses move, so that a lost moment or key would show
    np.testing.assert_allclose(report["resumed"][layout], expected, rtol=1e-9)


# Interruption

KILLED = """
import os, signal, sys
import jax.numpy as jnp
from ergodax.distributed import save_universal

folder, calls = sys.argv[1], 0
save_universal(folder, {"a": jnp.zeros(1000), "n": 0})
original = os.rename

def rename(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

os.rename = os.replace = rename
save_universal(folder, {"a": jnp.ones(1000), "n": 1})
"""


def test_a_save_that_is_killed_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """Killed just before the last move of a file, which is the commit; then saved over."""
    moves, original = [], os.rename
    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, lambda *args, **kwargs: moves.append(args) or original(*args, **kwargs))
        save_universal(tmp_path / "count", {"n": 0})
    assert moves
    folder = tmp_path / "killed"
    assert run(KILLED, folder, len(moves)).returncode == -signal.SIGKILL
    assert any("tmp" in path.name for path in folder.iterdir())
    equal(load_universal(folder), {"a": np.zeros(1000, np.float64), "n": np.asarray(0)})
    save_universal(folder, {"a": np.full(1000, 2.0), "n": 2})
    assert load_universal(folder)["n"] == 2


def test_saving_again_replaces(tmp_path):
    for i in range(3):
        save_universal(tmp_path, {"a": np.full(3, i), "only" + str(i): i})
    assert load_universal(tmp_path).keys() == {"a", "only2"}
    assert len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == 1


# Trees


class State(NamedTuple):
    model: eqx.Module
    average: None
    moments: optax.OptState
    keys: jax.Array
    host: np.ndarray
    epoch: int
    rate: float
    empty: jax.Array
    name: str


def state(seed):
    model = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(seed))
    bf16 = jnp.arange(seed, seed + 3, dtype=jnp.bfloat16)
    moments = (optax.scale_by_adam().init(eqx.filter(model, eqx.is_array)), bf16)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 2)
    return State(model, None, moments, keys, np.arange(seed, seed + 2, dtype=np.int8), seed, seed / 7, jnp.zeros((0, 3)), "a")


def test_modules_keys_and_leaves_that_are_no_arrays(tmp_path):
    """An Equinox module with functions, `None`, optax state, keys of another kind, NumPy, Python numbers, an empty array, text."""
    saved = state(5)
    save_universal(tmp_path, saved)
    equal(load_universal(tmp_path, state(1)), saved)
    loaded = load_universal(tmp_path, eqx.filter_eval_shape(state, 1))
    equal(loaded._replace(host=np.asarray(loaded.host), epoch=int(loaded.epoch), rate=float(loaded.rate)), saved)


def test_structs_of_a_state_made_by_eval_shape(tmp_path):
    def make(seed):
        params = {"w": jax.random.normal(jax.random.key(seed), (3, 2)), "skip": None}
        return {"params": params, "adam": optax.adam(1e-3).init(params), "key": jax.random.key(seed)}

    save_universal(tmp_path, make(3))
    equal(load_universal(tmp_path, jax.eval_shape(make, 0)), make(3))


def test_onto_two_devices_and_beside_arrays_bound_to_none(tmp_path):
    """A leaf of `like` that is bound to no device stays so, and works in one program with sharded ones."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    keys = jax.random.split(jax.random.key(0), 4)
    save_universal(tmp_path, {"w": jnp.arange(8.0), "step": jnp.asarray(3), "keys": keys})
    sharding = NamedSharding(mesh, P("x"))
    loaded = load_universal(tmp_path, {"w": jax.device_put(jnp.zeros(8), sharding), "step": jnp.asarray(0), "keys": jax.device_put(keys, sharding)})
    assert loaded["w"].sharding == loaded["keys"].sharding == sharding
    assert jnp.array_equal(loaded["keys"], keys)
    assert not loaded["step"].committed
    assert jax.jit(lambda s: s["w"][s["step"]])(loaded) == 3


@pytest.mark.parametrize("bound", [False, True])
def test_dtype_follows_the_target(tmp_path, bound):
    values = np.linspace(-3, 3, 101) * np.pi
    save_universal(tmp_path, {"a": values, "n": np.arange(4)})
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), P()) if bound else None
    like = {"a": jax.ShapeDtypeStruct((101,), jnp.bfloat16, sharding=sharding), "n": jax.ShapeDtypeStruct((4,), jnp.int32, sharding=sharding)}
    equal(load_universal(tmp_path, like), {"a": jnp.asarray(values).astype(jnp.bfloat16), "n": jnp.arange(4, dtype=jnp.int32)})


def test_a_part_of_the_leaves(tmp_path):
    save_universal(tmp_path, {"params": {"w": np.ones(2), "b": np.zeros(3)}, "adam": {"w": np.full(2, 7.0)}})
    equal(load_universal(tmp_path, {"params": {"w": np.zeros(2)}}), {"params": {"w": np.ones(2)}})
    equal(load_universal(tmp_path), {"params/w": np.ones(2), "params/b": np.zeros(3), "adam/w": np.full(2, 7.0)})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"b": np.zeros(3)}, "holds no leaf `b`; it has a, k."),
        ({"a": np.zeros(4)}, r"leaf `a` has shape \(3,\) in .*, but \(4,\) was asked for."),
        ({"a": np.zeros(3, int)}, "leaf `a` is float64 in .*, which does not become int64."),
        ({"k": jax.random.key(0, impl="rbg")}, r"leaf `k` has shape \(2,\) in .*, but \(4,\) was asked for."),
        (
            {"a": jax.ShapeDtypeStruct((3,), float, sharding=NamedSharding(Mesh(np.array(jax.devices()[:2]), ("x",)), P("x")))},
            "leaf `a`: .*divi",
        ),
        (
            {"a": jax.ShapeDtypeStruct((3,), float, sharding=NamedSharding(jax.sharding.AbstractMesh((1,), ("x",)), P("x")))},
            "leaf `a` needs a sharding over devices",
        ),
    ],
)
def test_targets_that_do_not_fit(tmp_path, like, message):
    save_universal(tmp_path, {"a": np.ones(3), "k": jax.random.key(0)})
    with pytest.raises(ValueError, match=message):
        load_universal(tmp_path, like)


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no complete checkpoint"):
        load_universal(tmp_path / "nowhere", {"a": np.ones(3)})
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "0.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        load_universal(tmp_path, {"a": np.ones(3)})
    save_universal(tmp_path, {"a": np.ones(3)})
    (tmp_path / "0" / "default" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        load_universal(tmp_path, {"a": np.ones(3)})
    save_universal(tmp_path, {"a": np.ones(3)})
    (tmp_path / "1" / "default" / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match="could not be read"):
        load_universal(tmp_path, {"a": np.ones(3)})


def test_states_that_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no array"):
        save_universal(tmp_path, {"f": jnp.tanh, "none": None})
    with pytest.raises(ValueError, match="two leaves are named `a/b`"):
        save_universal(tmp_path, {"a": {"b": 1}, "a/b": 2, "c": 3})


# Patterns


def rows(*numbers):
    return np.array(numbers)[:, None] * np.ones(3)


def test_fused_sub_parameters_of_unequal_size():
    """Q, K, V of 8, 4, 4 rows on two ranks. Joining the ranks' rows, as for a leaf of one part, gives another leaf."""
    qkv = rows(*range(16))
    pattern = Fragmented(parts=(8, 4, 4))
    ranks = pattern.split(qkv, 2)
    np.testing.assert_array_equal(ranks[0], rows(0, 1, 2, 3, 8, 9, 12, 13))
    np.testing.assert_array_equal(ranks[1], rows(4, 5, 6, 7, 10, 11, 14, 15))
    np.testing.assert_array_equal(pattern.union(ranks), qkv)
    assert not np.array_equal(Fragmented().union(ranks), qkv)
    assert not np.array_equal(np.concatenate(ranks), qkv)
    again = Fragmented(1, parts=(8, 4, 4)).split(qkv.T, 4)
    np.testing.assert_array_equal(again[2], rows(4, 5, 10, 14).T)
    np.testing.assert_array_equal(Fragmented(1, parts=(8, 4, 4)).union(again), qkv.T)


def test_experts():
    """Two experts of four hidden units: [expert, hidden, dim] cut along the hidden units, and the same stacked to [expert · hidden, dim]."""
    experts = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    cut = Fragmented(1).split(experts, 2)
    np.testing.assert_array_equal(cut[1], experts[:, 2:])
    stacked = Fragmented(parts=(4, 4)).split(experts.reshape(8, 3), 2)
    np.testing.assert_array_equal(stacked[1], cut[1].reshape(4, 3))
    np.testing.assert_array_equal(Fragmented(parts=(4, 4)).union(stacked).reshape(2, 4, 3), experts)


def test_pieces_of_different_size_are_joined():
    np.testing.assert_array_equal(Fragmented().union([rows(0, 1), rows(2)]), rows(0, 1, 2))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
def test_the_mean_of_diverged_copies(dtype):
    copies = [np.array([1.0, -2.0, 256.0], dtype), np.array([2.0, 4.0, 1.0], dtype), np.array([6.0, 1.0, 1.0], dtype)]
    mean = Averaged().union(copies)  # a sum in bfloat16 would lose the ones beside 256
    assert mean.dtype == dtype
    np.testing.assert_array_equal(mean.astype(float), [3.0, 1.0, 86.0])
    np.testing.assert_array_equal(Averaged().union(copies[:2]).astype(float), [1.5, 1.0, float(np.array(128.5).astype(dtype))])


def test_vocabulary_padding_is_stripped_and_made_anew():
    table = rows(*range(1, 11))
    pattern = Vocabulary(10, multiple=4)
    ranks = pattern.split(table, 2)
    assert [rank.shape for rank in ranks] == [(8, 3), (8, 3)]
    assert not ranks[1][2:].any()
    ranks[1][2:] = np.nan  # what training left there does not matter
    np.testing.assert_array_equal(pattern.union(ranks), table)
    assert [rank.shape[0] for rank in Vocabulary(10).split(table, 4)] == [3, 3, 3, 3]


def test_copies_must_be_equal_to_the_bit():
    nan = np.array([np.nan, 1.0])
    np.testing.assert_array_equal(Replicated().union([nan, None, nan.copy()]), nan)
    with pytest.raises(ValueError, match=r"copies 0 and 1 must be equal, but entry 1 is 1.0 and 1.0000000000000002."):
        Replicated().union([nan, np.nextafter(nan, 2.0)])


LEAVES = {"w": np.arange(1.0, 7.0).reshape(2, 3), "b": np.array(7.0), "v": np.arange(8.0, 12.0)}  # 11 numbers
SHAPES = {name: leaf.shape for name, leaf in LEAVES.items()}


def test_zero_stages_1_and_2():
    vectors = ZeroFlat().split(LEAVES, 4)
    np.testing.assert_array_equal(vectors, [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 0]])
    vectors[3][2] = np.nan
    equal(ZeroFlat().union(vectors, SHAPES), LEAVES)
    aligned = ZeroFlat(alignment=2).split(LEAVES, 4)
    assert [len(vector) for vector in aligned] == [4, 4, 4, 4]
    equal(ZeroFlat(alignment=2).union(aligned, SHAPES), LEAVES)
    with pytest.raises(ValueError, match=r"vectors of length 3 on 4 ranks, but theirs is \(4,\)"):
        ZeroFlat().union(aligned, SHAPES)


def test_zero_stage_3():
    vectors = ZeroPerLeaf().split(LEAVES, 4)
    np.testing.assert_array_equal(vectors, [[1, 2, 7, 8], [3, 4, 0, 9], [5, 6, 0, 10], [0, 0, 0, 11]])
    for i, j in [(3, 0), (3, 1), (1, 2), (2, 2), (3, 2)]:
        vectors[i][j] = np.nan
    equal(ZeroPerLeaf().union(vectors, SHAPES), LEAVES)
    with pytest.raises(ValueError, match=r"vectors of length 4 on 4 ranks, but theirs is \(3,\)"):
        ZeroPerLeaf().union(ZeroFlat().split(LEAVES, 4), SHAPES)


TABLE = [
    (".*qkv", Fragmented(parts=(8, 4, 4))),
    (".*out", Fragmented(1)),
    (".*embedding", Vocabulary(5)),
    (".*norm", Averaged()),
    ("head", Unique(1)),
    ("step", Replicated()),
]


def atoms():
    draw = np.random.default_rng(0).normal
    named = {f"{prefix}/{name}": draw(size=shape) for prefix in ("params", "mu", "nu") for name, shape in MODEL.items()}
    return named | {"head": draw(size=3), "step": np.asarray(12)}


MODEL = {"qkv": (16, 3), "out": (3, 8), "embedding": (5, 3), "norm": (3,)}


@pytest.mark.parametrize("zero", [ZeroFlat(), ZeroFlat(alignment=2), ZeroPerLeaf()])
def test_a_job_over_tensor_pipeline_and_data_parallel_ranks(zero, tmp_path):
    """Atoms → 2 tensor × 2 pipeline × 3 data ranks with flat slices, a file each → atoms, to the bit; then through a checkpoint."""
    stages = [(".*qkv|.*norm|head", Unique(0)), (".*out|.*embedding", Unique(1)), ("step", Replicated())]
    layouts = {}
    for tp, fragments in enumerate(split_atoms(atoms(), TABLE, 2)):
        for pp, stage in enumerate(split_atoms(fragments, stages, 2)):
            step = stage.pop("step")
            layouts[tp, pp] = {name: leaf.shape for name, leaf in stage.items()}
            for dp, vector in enumerate(zero.split(stage, 3)):
                np.savez(tmp_path / f"{tp}{pp}{dp}.npz", flat=vector, step=step)
    tensor = []
    for tp in range(2):
        pipeline = []
        for pp in range(2):
            files = [np.load(tmp_path / f"{tp}{pp}{dp}.npz") for dp in range(3)]
            step = union_fragments([{"step": file["step"]} for file in files], [("step", Replicated())])
            pipeline.append(step | zero.union([file["flat"] for file in files], layouts[tp, pp]))
        tensor.append(union_fragments(pipeline, [(".*", Replicated())]))
    equal(dict(sorted(union_fragments(tensor, TABLE).items())), dict(sorted(atoms().items())))
    save_universal(tmp_path / "universal", union_fragments(tensor, TABLE))
    nested = {prefix: {name: np.zeros(shape) for name, shape in MODEL.items()} for prefix in ("params", "mu", "nu")}
    loaded = load_universal(tmp_path / "universal", nested | {"head": np.zeros(3), "step": 0})
    assert loaded["step"] == 12
    np.testing.assert_array_equal(loaded["nu"]["qkv"], atoms()["nu/qkv"])


def test_patterns_under_jit_and_on_jax_arrays():
    table = [("w", Fragmented(parts=(4, 2))), ("v", Vocabulary(3)), ("m", Averaged()), ("c", Replicated())]
    tree = {"w": jnp.arange(12.0).reshape(6, 2), "v": jnp.arange(3.0), "m": jnp.ones(2), "c": jnp.zeros(1)}
    equal(jax.jit(lambda tree: union_fragments(split_atoms(tree, table, 2), table))(tree), tree)
    equal(jax.jit(lambda tree: ZeroPerLeaf().union(ZeroPerLeaf().split(tree, 4), {k: v.shape for k, v in tree.items()}))(tree), tree)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([("a", Replicated())], "leaf `ab` needs one pattern, but none match it."),
        ([("a.*", Replicated()), (".*b", Unique())], r"leaf `ab` needs one pattern, but \['a\.\*', '\.\*b'\] match it."),
        ([(".*", Replicated()), ("c", Unique())], r"patterns \['c'\] match no leaf; there are a, ab."),
        ([("a", Replicated()), ("ab", Unique())], r"leaf `ab`: exactly one rank must hold it, but ranks \[0, 1\] do."),
        ([("a", Replicated()), ("ab", Fragmented(1))], "leaf `ab`: the fragments do not fit together"),
        ([("a", Replicated()), ("ab", Fragmented(parts=(3, 5)))], "leaf `ab`: 2 ranks must divide each of the parts"),
        ([("a", Replicated()), ("ab", Fragmented(parts=(4, 2)))], "leaf `ab`: .* sum to 6, but dimension 0 has size 8."),
        ([("a", Replicated()), ("ab", Vocabulary(9))], "leaf `ab`: the vocabulary has 9 rows, but the ranks hold 8."),
        ([("a", Averaged()), ("ab", Replicated())], "leaf `a`: only floating-point leaves have a mean, got int64."),
    ],
)
def test_tables_that_do_not_fit(table, message):
    ranks = [{"a": np.arange(2), "ab": np.arange(4.0)}] * 2
    with pytest.raises(ValueError, match=message):
        union_fragments(ranks, table)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"step": 11, "w": np.zeros((2, 3))}, "leaf `step`: copies 0 and 1 must be equal, but entry 0 is 10 and 11."),
        ({"step": 10}, r"leaf `w`: ranks \[1\] of 2 hold none."),
        ({"step": 10, "w": np.zeros((2, 4))}, r"leaf `w`: the fragments do not fit .* float64\[2, 3\], float64\[2, 4\]."),
        ({"step": 10, "w": np.zeros((2, 3), np.float32)}, r"leaf `w`: the fragments do not fit .* float64\[2, 3\], float32\[2, 3\]."),
    ],
)
def test_ranks_that_do_not_fit(other, message):
    with pytest.raises(ValueError, match=message):
        union_fragments([{"step": 10, "w": np.zeros((2, 3))}, other], [("step", Replicated()), ("w", Fragmented())])


def test_parts_need_pieces_of_equal_size():
    with pytest.raises(ValueError, match="do not fit together"):
        Fragmented(parts=(4, 2)).union([np.zeros(4), np.zeros(2)])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Fragmented(), "3 ranks must divide each of the parts"),
        (Fragmented(2), "cut along dimension 2"),
        (Vocabulary(5), "has 5 rows"),
        (Unique(3), "belongs to rank 3, but there are 3 ranks"),
    ],
)
def test_atoms_that_cannot_be_cut(pattern, message):
    with pytest.raises(ValueError, match=f"leaf `w`: .*{message}"):
        split_atoms({"w": np.zeros((4, 2))}, [("w", pattern)], 3)


def test_flat_vectors_have_one_dtype():
    with pytest.raises(ValueError, match="must share a dtype, got float32, float64"):
        ZeroFlat().split({"a": np.zeros(2), "b": np.zeros(2, np.float32)}, 2)
    with pytest.raises(ValueError, match="hold none"):
        ZeroFlat().union([], {"a": (2,)})
