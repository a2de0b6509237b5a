"""Training as one pure function: a scan over steps, so that a whole run jits, vmaps over seeds and hyper-parameters, and shards.

`fit` is a run from start to end. `Fit` is the same run taken in pieces, `init` then `advance`, for a host loop that shows progress and saves: the
pieces give the same numbers as the whole, because step n draws its batch and its key from (key, n) alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from .check import check_count, check_range
from .mesh import DataParallel
from .precision import in_dtype, rematerialised
from .types import PRNGKey, PyTree, Scalar


class FitState(NamedTuple):
    """Everything a run carries: arrays only, so it checkpoints as it is."""

    step: Int[Array, ""]  # steps done
    key: PRNGKey
    model: PyTree  # the trainable arrays, `None` elsewhere
    average: PyTree  # their exponential moving average, or `None`
    optimiser: PyTree
    failed_at: Int[Array, ""]  # the step whose loss or gradient was not finite, or -1


class Fitted(NamedTuple):
    """What a run gives back."""

    model: PyTree
    average: PyTree  # the averaged model; the model itself without `ema_decay`
    metrics: dict[str, Array]  # each of shape (num_steps // every,): means over `every` steps, and what `evaluate` said at their end
    failed_at: Int[Array, ""]


class Fit(eqx.Module):
    """A training run, described. Every number in the loss and the optimiser may be traced; counts are static.

    - `loss`: `loss(model, batch, key) -> (scalar, aux dict of scalars)`.
    - `model`: any pytree with inexact arrays to train: an Equinox module, or an adapter of `ergodax.core` round a Flax one.
    - `optimiser`: an optax transformation. Build it from traced rates to sweep them.
    - `data`: a pytree of arrays with one leading axis N, shuffled anew each epoch (an epoch drops its last N mod `batch_size` examples); or a
      function `batch(key, step) -> batch`.
    - `batch_size`: examples a step; needed with arrays, refused with a function.
    - `every`: metrics are means over this many steps.
    - `ema_decay`: average the weights with decay min(`ema_decay`, (1 + n)/(10 + n)) at step n, so that early weights are forgotten; None for no
      average.
    - `accumulate`: split each batch in this many parts, one after the other, and average their gradients; must divide the batch. For a loss that is
      a mean over examples, the step is the same; memory is that of one part.
    - `evaluate`: `evaluate(averaged model, key) -> dict of scalars`, called after every `every` steps with the same key, so that values compare.
    - `compute_dtype`: a narrower dtype, such as `jnp.bfloat16`, in which the model computes inside the loss; None for that of its parameters. See
      `ergodax.core.precision.InDtype`. Parameters, gradients, optimiser and average keep their dtype, and so does the loss's own arithmetic;
      `evaluate` sees the model in full precision.
    - `remat`: a policy of `jax.checkpoint_policies`, such as `nothing_saveable`: less memory for more arithmetic, layer by layer as
      `ergodax.core.precision.rematerialised` says. None: the backward pass finds all that the forward pass computed.
    - `donate`: let a compiled piece (`compiled`) write the new state where the old one was, which then can no longer be read. Default True.
    - `parallel`: spread the run over the axis "data" of a mesh: `ergodax.core.mesh.DataParallel`. None: one device.

    A step with a loss or gradient that is not finite changes nothing and stops the run there: later steps keep the last good state, `failed_at`
    names the step.
    """

    loss: Callable
    model: PyTree
    optimiser: optax.GradientTransformation
    data: PyTree
    batch_size: int | None = eqx.field(static=True, default=None)
    every: int = eqx.field(static=True, default=1)
    ema_decay: Scalar | None = None
    accumulate: int = eqx.field(static=True, default=1)
    evaluate: Callable | None = None
    compute_dtype: Any = eqx.field(static=True, default=None)
    remat: Callable | None = eqx.field(static=True, default=None)
    donate: bool = eqx.field(static=True, default=True)
    parallel: DataParallel | None = None

    def __check_init__(self):
        check_count("every", self.every)
        check_count("accumulate", self.accumulate)
        check_range("ema_decay", self.ema_decay, low=0.0, high=1.0, open_high=True)
        if self.compute_dtype is not None and not jnp.issubdtype(self.compute_dtype, jnp.floating):
            raise ValueError(f"`compute_dtype` must be a floating dtype, got {self.compute_dtype}.")
        if callable(self.data):
            if self.batch_size is not None:
                raise ValueError("`batch_size` goes with arrays; a batch function decides its own.")
            return
        sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(self.data)}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(f"the arrays of `data` must share one leading axis, got shapes {[leaf.shape for leaf in jax.tree.leaves(self.data)]}.")
        batch_size = self.batch_size or 0
        check_count("batch_size", batch_size)
        if batch_size > self._size:
            raise ValueError(f"`batch_size` {batch_size} exceeds the {self._size} examples of `data`.")
        if batch_size % self.accumulate:
            raise ValueError(f"`accumulate` must divide `batch_size`, got {self.accumulate} and {batch_size}.")
        shares = self.accumulate * (1 if self.parallel is None else self.parallel.axis_size)
        if batch_size % shares:
            raise ValueError(f'`accumulate` times the devices along "data", {shares}, must divide `batch_size`, got {batch_size}.')

    @property
    def _size(self) -> int:
        return jax.tree.leaves(self.data)[0].shape[0]

    def init(self, key: PRNGKey) -> FitState:
        """The state before the first step."""
        params = eqx.filter(self.model, eqx.is_inexact_array)
        average = None if self.ema_decay is None else params
        state = FitState(jnp.zeros((), jnp.int32), key, params, average, self.optimiser.init(params), jnp.full((), -1, jnp.int32))
        # A donated state must share no buffer with the model that was given, nor with itself.
        return jax.tree.map(jnp.copy, state)

    def advance(self, state: FitState, num_steps: int) -> tuple[FitState, dict[str, Array]]:
        """`num_steps` further steps (a multiple of `every`), and their metrics, each of shape (num_steps // every,)."""
        check_count("num_steps", num_steps)
        if num_steps % self.every:
            raise ValueError(f"`num_steps` must be a multiple of `every`, got {num_steps} and {self.every}.")
        return jax.lax.scan(lambda state, _: self._block(state), state, None, length=num_steps // self.every)

    def compiled(self, state: FitState, num_steps: int) -> Callable[[FitState], tuple[FitState, dict[str, Array]]]:
        """`advance` by `num_steps`, compiled for states like `state`. With `donate`, a state can be used once; with `parallel`, `place` it first."""
        arrays, rest = eqx.partition(self, lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
        options: dict[str, Any] = {"donate_argnums": (0,) if self.donate else ()}
        if self.parallel is not None:
            arrays = self.parallel.put(arrays)
            options["out_shardings"] = jax.tree.map(self.parallel.sharding, _specs(self.parallel, state)), self.parallel.sharding()
        # The data are an argument, not a constant of the program.
        advance = jax.jit(lambda state, arrays: eqx.combine(arrays, rest).advance(state, num_steps), **options).lower(state, arrays).compile()
        return lambda state: advance(state, arrays)

    def place(self, state: FitState) -> FitState:
        """A state that every process holds whole, moved to where the rule of `parallel` stores it; the state itself without `parallel`."""
        return state if self.parallel is None else self.parallel.put(state, _specs(self.parallel, state))

    def run(self, key: PRNGKey, num_steps: int) -> Fitted:
        """The whole run."""
        return self.result(*self.advance(self.init(key), num_steps))

    def result(self, state: FitState, metrics: dict[str, Array]) -> Fitted:
        """The trained models, whole again."""
        model = self._whole(state.model)
        return Fitted(model, model if state.average is None else self._whole(state.average), metrics, state.failed_at)

    def _whole(self, params):
        return eqx.combine(params, eqx.filter(self.model, eqx.is_inexact_array, inverse=True))

    def _block(self, state):
        """`every` steps. Their batches are drawn together, which shuffles once per epoch touched and not once per step."""
        indices = None if callable(self.data) else _epoch_indices(_data_key(state.key), state.step, self.every, self._size, self.batch_size)
        state, metrics = jax.lax.scan(lambda *carry: self._step(*carry), state, indices, length=self.every)
        metrics = jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)
        if self.evaluate is not None:
            averaged = self._whole(self._gathered(state.model if state.average is None else state.average))
            metrics |= self.evaluate(averaged, _evaluation_key(state.key))
        return state, metrics

    def _step(self, state, index):
        key_step = jax.random.fold_in(state.key, state.step)
        if index is None:
            batch = self.data(jax.random.fold_in(_data_key(state.key), state.step), state.step)
        else:
            batch = jax.tree.map(lambda a: jnp.asarray(a)[index], self.data)
        (loss, aux), gradient = self._gradient(self._gathered(state.model), batch, key_step)
        gradient = self._stored(gradient)
        norm = optax.tree.norm(gradient)
        updates, optimiser = self.optimiser.update(gradient, state.optimiser, state.model)
        model = eqx.apply_updates(state.model, updates)
        average = state.average
        if self.ema_decay is not None:
            n = state.step.astype(norm.dtype)
            decay = jnp.minimum(self.ema_decay, (1 + n) / (10 + n))
            average = jax.tree.map(lambda old, new: old + (1 - decay).astype(old.dtype) * (new - old), average, model)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = good & (state.failed_at < 0)
        new, old = (model, average, optimiser), (state.model, state.average, state.optimiser)
        model, average, optimiser = map(self._stored, jax.tree.map(lambda new, old: jnp.where(keep, new, old), new, old))
        failed_at = jnp.where(good | (state.failed_at >= 0), state.failed_at, state.step)
        return FitState(state.step + 1, state.key, model, average, optimiser, failed_at), {"loss": loss, "grad_norm": norm} | aux

    def _gradient(self, params, batch, key):
        @eqx.filter_value_and_grad(has_aux=True)
        def value_and_grad(params, batch, key):
            return self.loss(self._seen(params), batch, key)

        if self.accumulate == 1:
            return value_and_grad(params, batch if self.parallel is None else self.parallel.batch(batch), key)

        def add(total, part):
            value, gradient = value_and_grad(params, *part)
            return jax.tree.map(lambda total, g: total + g / self.accumulate, total, gradient), value

        parts = jax.tree.map(self._parts, batch)
        parts = parts if self.parallel is None else self.parallel.batch(parts, axis=1)
        gradient, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, jax.random.split(key, self.accumulate)))
        return jax.tree.map(lambda a: jnp.mean(a, axis=0), values), gradient

    def _parts(self, leaf):
        if leaf.ndim == 0 or leaf.shape[0] % self.accumulate:
            raise ValueError(f"`accumulate` must divide the leading axis of every array of a batch, got {self.accumulate} and shape {leaf.shape}.")
        return leaf.reshape(self.accumulate, -1, *leaf.shape[1:])

    def _seen(self, params):
        """The model as the loss sees it."""
        model = self._whole(params)
        if self.remat is not None:
            model = rematerialised(model, self.remat)
        return model if self.compute_dtype is None else in_dtype(model, self.compute_dtype)

    def _gathered(self, params):
        return params if self.parallel is None else self.parallel.gathered(params)

    def _stored(self, tree):
        return tree if self.parallel is None else self.parallel.stored(tree)


def fit(
    loss: Callable,
    model: PyTree,
    optimiser: optax.GradientTransformation,
    data: PyTree,
    key: PRNGKey,
    *,
    num_steps: int,
    **options: Any,
) -> Fitted:
    """A whole training run as one pure function; `options` are the other fields of `Fit`, which says what everything means.

    Wrap it in `jax.vmap` over keys or over anything the loss and the optimiser were built from; return the parts you want (under `jax.jit` and
    `jax.vmap`, arrays only: `eqx.filter(fitted.model, eqx.is_array)`).
    """
    return Fit(loss, model, optimiser, data, **options).run(key, num_steps)


def _specs(parallel, state):
    return FitState(*(parallel.specs(part) for part in state))


def _data_key(key):
    # Apart from the steps' own keys, fold_in(key, step): step is an int32, so it never gets here.
    return jax.random.fold_in(key, 2**32 - 1)


def _evaluation_key(key):
    return jax.random.fold_in(key, 2**32 - 2)


def _epoch_indices(key, start, num_steps, size, batch_size):
    """Indices (num_steps, batch_size) of steps `start` … : epoch e is permutation number e, cut in whole batches."""
    per_epoch = size // batch_size
    first = start // per_epoch
    epochs = first + jnp.arange((num_steps - 1) // per_epoch + 2, dtype=first.dtype)
    orders = jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(key, e), size))(epochs)
    batches = orders[:, : per_epoch * batch_size].reshape(-1, batch_size)
    return jax.lax.dynamic_slice_in_dim(batches, start - first * per_epoch, num_steps)


__all__ = ["Fit", "FitState", "Fitted", "fit"]
