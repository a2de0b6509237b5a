"""The laws every plug obeys, as reusable checks. Describe the plug once, as a `Plug`, then `check_all(plug, folder)`.

Equalities are checked in float64 to a relative 1e-9 of the largest value (compiled and eager code, batched and single code round differently), so
run them with `jax_enable_x64`; the dtype law runs in float32 under it, where a stray float64 constant shows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ..core.check import require
from .numeric import count_traces


@dataclasses.dataclass(frozen=True)
class Plug:
    """A method as the laws see it.

    - `apply(hyper, x, key) -> pytree of arrays`: pure, on ONE example.
    - `batch`: examples along a leading axis of even length.
    - `hyper`: each sweepable hyper-parameter with at least two values; the first is the default.
    - `random`: whether the key matters.
    - `differentiable`: whether gradients of the output's sum to `x` and to the hyper-parameters mean anything.
    - `check_vma`: whether it passes `shard_map`'s check of varying axes; some library loops do not, though they run right without it.
    """

    apply: Callable[[Mapping[str, Any], Any, jax.Array], Any]
    batch: Any
    hyper: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    random: bool = False
    differentiable: bool = True
    check_vma: bool = True

    def defaults(self, dtype=jnp.float64) -> dict[str, jax.Array]:
        """The first value of every hyper-parameter."""
        return {name: jnp.asarray(values[0], dtype) for name, values in self.hyper.items()}

    @property
    def size(self) -> int:
        """The number of examples."""
        return jax.tree.leaves(self.batch)[0].shape[0]

    def example(self, i: int = 0) -> Any:
        """One of them."""
        return jax.tree.map(lambda a: a[i], self.batch)

    @functools.cached_property
    def compiled(self) -> Callable:
        """`apply`, compiled once for all laws."""
        return jax.jit(self.apply)

    @functools.cached_property
    def mapped(self) -> Callable:
        """`apply` over examples and keys, compiled once for all laws."""
        return jax.jit(jax.vmap(self.apply, in_axes=(None, 0, 0)))


_KEY = 20261122


def _assert_close(actual, expected, what):
    assert jax.tree.structure(actual) == jax.tree.structure(expected), f"{what}: another structure"
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        a, b = np.asarray(a), np.asarray(b)
        scale = max(1.0, float(np.abs(b).max())) if b.size else 1.0
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * scale, err_msg=what)


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def check_jit(plug: Plug) -> None:
    """Compiled equals eager."""
    args = plug.defaults(), plug.example(), jax.random.key(_KEY)
    _assert_close(plug.compiled(*args), plug.apply(*args), "jit and eager differ")


def check_one_trace(plug: Plug) -> None:
    """A second call with other values of the same shapes compiles nothing."""
    counted, traces = count_traces(plug.apply)
    compiled = jax.jit(counted)
    compiled(plug.defaults(), plug.example(0), jax.random.key(0))
    compiled({name: jnp.asarray(values[1], jnp.float64) for name, values in plug.hyper.items()}, plug.example(1), jax.random.key(1))
    assert traces() == 1, f"traced {traces()} times"


def check_batch(plug: Plug) -> None:
    """vmap over examples equals a loop over them."""
    hyper, keys = plug.defaults(), jax.random.split(jax.random.key(_KEY), plug.size)
    together = plug.mapped(hyper, plug.batch, keys)
    alone = [plug.compiled(hyper, plug.example(i), keys[i]) for i in range(plug.size)]
    _assert_close(together, _stack(alone), "vmap over examples differs from the loop")


def check_hyper(plug: Plug) -> None:
    """vmap over hyper-parameters, each with its values and the others at their defaults, equals a loop; and every value matters."""
    if not plug.hyper:
        return
    key, x, defaults = jax.random.key(_KEY), plug.example(), plug.defaults()
    runs = [(name, defaults | {name: jnp.asarray(value, jnp.float64)}) for name, values in plug.hyper.items() for value in values]
    together = jax.jit(jax.vmap(plug.apply, in_axes=(0, None, None)))(_stack([hyper for _, hyper in runs]), x, key)
    alone = [plug.compiled(hyper, x, key) for _, hyper in runs]
    _assert_close(together, _stack(alone), "vmap over hyper-parameters differs from the loop")
    for name in plug.hyper:
        outputs = [output for (changed, _), output in zip(runs, alone) if changed == name]
        first, second = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in outputs[:2])
        assert not np.array_equal(first, second), f"`{name}` changes nothing"


def check_key(plug: Plug) -> None:
    """The same key gives the same result; another key gives another one exactly where the plug is random."""
    hyper, x = plug.defaults(), plug.example()
    first, again, other = (jax.tree.leaves(plug.compiled(hyper, x, jax.random.key(seed))) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again)), "the same key gave another result"
    assert all(np.array_equal(a, b) for a, b in zip(first, other)) != plug.random, "the key does not act as `random` says"


def check_dtype(plug: Plug) -> None:
    """float32 in, float32 out, also when float64 is enabled."""
    x = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, plug.example())
    out = jax.eval_shape(plug.apply, plug.defaults(jnp.float32), x, jax.random.key(0))
    wrong = {str(leaf.dtype) for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32}
    assert not wrong, f"float32 in, {wrong} out"


def check_gradient(plug: Plug) -> None:
    """Gradients to the example and the hyper-parameters are finite, and equal to finite differences along a random direction."""
    if not plug.differentiable:
        return
    key, inputs = jax.random.key(_KEY), (plug.defaults(), plug.example())

    def total(inputs):
        hyper, x = inputs
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(plug.compiled(hyper, x, key)))

    gradient = jax.jit(jax.grad(total))(inputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), "a gradient is not finite"
    leaves, structure = jax.tree.flatten(inputs)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    step = [1e-6 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    ends = [jax.tree.unflatten(structure, [leaf + sign * d for leaf, d in zip(leaves, step)]) for sign in (1, -1)]
    difference = (total(ends[0]) - total(ends[1])) / 2
    expected = sum(jnp.vdot(d, g) for d, g in zip(step, jax.tree.leaves(gradient)))
    # A central difference of length h errs by h² f''' and by rounding / h: about 1e-10 of the value here, so 1e-4 of the difference is ample.
    np.testing.assert_allclose(difference, expected, rtol=1e-4, atol=1e-13 * max(1.0, float(abs(total(inputs))) * 1e3))


def check_devices(plug: Plug) -> None:
    """`shard_map` over two devices equals one device."""
    devices = jax.local_devices()[:2]
    assert len(devices) == 2, "this law needs two devices: set XLA_FLAGS=--xla_force_host_platform_device_count=2"
    hyper, keys = plug.defaults(), jax.random.split(jax.random.key(_KEY), plug.size)
    mapped, spec = jax.vmap(plug.apply, in_axes=(None, 0, 0)), PartitionSpec("batch")
    sharded = jax.shard_map(
        mapped, mesh=Mesh(np.array(devices), ("batch",)), in_specs=(PartitionSpec(), spec, spec), out_specs=spec, check_vma=plug.check_vma
    )
    _assert_close(jax.jit(sharded)(hyper, plug.batch, keys), plug.mapped(hyper, plug.batch, keys), "two devices differ from one")


def check_checkpoint(plug: Plug, folder: Path) -> None:
    """What the plug returns (its state, for a kernel or an optimiser) survives orbax to the bit."""
    orbax = require("orbax.checkpoint", "experiments")
    state = {"state": plug.compiled(plug.defaults(), plug.example(), jax.random.key(_KEY))}
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder.absolute() / "state", state)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True))


#: The laws that take a plug alone; `check_checkpoint` takes a folder too.
LAWS = (check_jit, check_one_trace, check_batch, check_hyper, check_key, check_dtype, check_gradient, check_devices)


def check_all(plug: Plug, folder: Path) -> None:
    """Every law, one after the other."""
    for law in LAWS:
        law(plug)
    check_checkpoint(plug, folder)


__all__ = [
    "LAWS",
    "Plug",
    "check_all",
    "check_batch",
    "check_checkpoint",
    "check_devices",
    "check_dtype",
    "check_gradient",
    "check_hyper",
    "check_jit",
    "check_key",
    "check_one_trace",
]
