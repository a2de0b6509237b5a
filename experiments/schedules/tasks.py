"""Four small real tasks to train on: what `bake_off.py` compares schedules on."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ergodax import data, nn
from ergodax.core import Fit, FlowMatchingPath, VelocityPrediction
from ergodax.core.check import check_count, check_range
from ergodax.diffusion import DenoisingLoss
from ergodax.nn.layers import Linear, normalise
from ergodax.schedules import l1_norm


MODULES = ("difflib", "functools", "pickle", "threading")  # of the standard library: the text
CONTEXT, HEADS = 32, 2  # of the transformer
LETTERS = 96  # printable ASCII and the end of a line


@dataclasses.dataclass(frozen=True)
class Size:
    """A task: the updates of its full budget, and the peaks that are tried."""

    steps: int = 1000
    batch_size: int = 32
    width: int = 32
    peaks: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    judged: int = 200  # held-out examples, and as many of the training set
    lanes: int | None = None  # runs vmapped together on a device, default: measured

    def __post_init__(self):
        check_count("steps", self.steps)
        for name in ("batch_size", "judged"):
            check_count(name, getattr(self, name))
        check_count("width", self.width, low=4)
        check_range("peaks", self.peaks, low=0.0, open_low=True)
        if list(self.peaks) != sorted(set(self.peaks)):
            raise ValueError(f"`peaks` must increase, got {self.peaks}.")
        if self.steps % 100:
            raise ValueError(f"`steps` must be a multiple of 100, so that every budget is whole, got {self.steps}.")


class Classifier(eqx.Module):
    """An MLP, or with one layer logistic regression."""

    layers: tuple[Linear, ...]

    def __call__(self, x):
        """Logits."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class Transformer(eqx.Module):
    """One causal layer; the embedding of letters is also what reads them out."""

    letters: jax.Array
    places: jax.Array
    qkv: Linear
    out: Linear
    hidden: Linear
    back: Linear

    def __init__(self, width, key):
        keys = jax.random.split(key, 6)
        self.letters = 0.1 * jax.random.normal(keys[0], (LETTERS, width))
        self.places = 0.1 * jax.random.normal(keys[1], (CONTEXT, width))
        self.qkv = Linear(width, 3 * width, bias=False, key=keys[2])
        self.out = Linear(width, width, key=keys[3])
        self.hidden = Linear(width, 4 * width, key=keys[4])
        self.back = Linear(4 * width, width, key=keys[5])

    def __call__(self, text):
        """Logits of the letter after each of (batch, CONTEXT)."""
        h = jax.nn.one_hot(text, LETTERS) @ self.letters + self.places  # a gather's gradient is slow on CPU
        q, k, v = jnp.split(self.qkv(normalise(h)).reshape(*text.shape, HEADS, -1), 3, axis=-1)
        h = h + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape))
        h = h + self.back(jax.nn.gelu(self.hidden(normalise(h))))
        return normalise(h) @ self.letters.T


class Task(NamedTuple):
    """What is trained, and how.

    - `loss`: `(model, batch, key) -> (scalar, {})`; `accuracy`: `(model, batch) -> share`, or None.
    - `optimiser`: from a rate or a schedule. `norm`, `power`: which norm its refined schedule is made of, and the power of it.
    """

    init: Callable
    loss: Callable
    train: Any
    held_out: Any
    optimiser: Callable
    norm: Callable = l1_norm
    power: float = 1.0
    accuracy: Callable | None = None

    def fit(self, batch_size: int, schedule: optax.Schedule, seed, optimiser: Callable | None = None) -> Fit:
        """A run, not yet made. Runs of one seed share start and batches."""
        optimiser = (optimiser or self.optimiser)(schedule)
        size = len(jax.tree.leaves(self.train)[0])

        def batch(key, step):
            rows = jax.random.randint(key, (batch_size,), 0, size)
            return jax.tree.map(lambda a: a[rows], self.train)

        return Fit(self.loss, self.init(jax.random.key(seed)), optimiser, batch)

    def measure(self, model, failed_at) -> dict[str, jax.Array]:
        """Held-out loss and accuracy, and the loss on as many training examples."""
        size = len(jax.tree.leaves(self.held_out)[0])
        seen, key = jax.tree.map(lambda a: a[:size], self.train), jax.random.key(0)
        failed = failed_at >= 0  # the model is then the last good one
        losses = {"loss": self.loss(model, self.held_out, key)[0], "training loss": self.loss(model, seen, key)[0]}
        accuracy = jnp.array(jnp.nan) if self.accuracy is None else self.accuracy(model, self.held_out)
        return {name: jnp.where(failed, jnp.inf, loss) for name, loss in losses.items()} | {"accuracy": accuracy}


def cross_entropy(model, batch, key=None, ridge=0.0):
    """Of a classifier, and ridge/2 |weights|²."""
    x, y = batch
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))) if ridge else 0.0
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(x), y)) + ridge / 2 * penalty, {}


def right(model, batch):
    """Share of labels that are the most likely ones."""
    return jnp.mean(jnp.argmax(model(batch[0]), -1) == batch[1])


def digits_task(size: Size) -> Task:
    """The classifier."""
    split = data.digits()
    train, held_out = ((x.reshape(len(x), -1), y) for x, y in ((split.train_x, split.train_y), (split.test_x, split.test_y)))

    def init(key):
        keys = jax.random.split(key)
        return Classifier((Linear(64, size.width, key=keys[0]), Linear(size.width, 10, key=keys[1])))

    return Task(init, cross_entropy, train, held_out, lambda rate: optax.sgd(rate, momentum=0.9), optax.tree.norm, 2.0, right)


def text_task(size: Size) -> Task:
    """Letters of the standard library; every twentieth window is held out."""
    source = "".join((Path(os.__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
    codes = np.array([95 if letter == "\n" else ord(letter) - 32 for letter in source if letter == "\n" or 32 <= ord(letter) < 127], np.int32)
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    windows = np.random.default_rng(0).permutation(windows)
    cut = len(windows) // 20
    train, held_out = ((jnp.asarray(part[:, :-1]), jnp.asarray(part[:, 1:])) for part in (windows[cut:], windows[:cut]))
    return Task(lambda key: Transformer(size.width, key), cross_entropy, train, held_out, lambda rate: optax.adam(rate, b2=0.98), accuracy=right)


def flow_task(size: Size) -> Task:
    """Flow matching; the held-out loss is over four draws of noise and time for each image, the same for all."""
    split = data.digits()
    held_out = (jnp.tile(split.test_x, (4, 1, 1, 1)), jnp.tile(split.test_y, 4))
    loss = DenoisingLoss(FlowMatchingPath(), VelocityPrediction())

    def init(key):
        return nn.TimeMLP((8, 8, 1), size.width, 2, num_classes=10, key=key)

    return Task(init, loss, (split.train_x, split.train_y), held_out, optax.adam)


def table_task(size: Size) -> Task:
    """Standardised columns; every fifth row is held out."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    test = np.arange(len(x)) % 5 == 4
    x = (x - x[~test].mean(0)) / x[~test].std(0)
    train, held_out = ((jnp.asarray(x[rows], jnp.float32), jnp.asarray(y[rows], jnp.int32)) for rows in (~test, test))

    def loss(model, batch, key):
        return cross_entropy(model, batch, key, ridge=1e-2)

    return Task(lambda key: Classifier((Linear(x.shape[1], 2),)), loss, train, held_out, optax.sgd, optax.tree.norm, 2.0, right)


MAKE = {"digits": digits_task, "text": text_task, "flow": flow_task, "table": table_task}


def make_task(name: str, size: Size) -> Task:
    """A task, with as many held-out examples as are judged."""
    task = MAKE[name](size)
    return task._replace(held_out=jax.tree.map(lambda a: a[: size.judged], task.held_out))
