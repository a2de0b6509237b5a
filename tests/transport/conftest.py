"""Two mixtures in the plane, their exact fields and their draws."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from ergodax.transport import MixtureInterpolantFields


class Mixture(NamedTuple):
    weights: jax.Array
    means: jax.Array
    covariances: jax.Array

    def sample(self, key, n):
        key_component, key_noise = jax.random.split(key)
        k = jax.random.choice(key_component, self.weights.size, (n,), p=self.weights)
        noise = jax.random.normal(key_noise, (n, self.means.shape[1]))
        return self.means[k] + jnp.einsum("nij,nj->ni", jnp.linalg.cholesky(self.covariances)[k], noise)

    @property
    def mean(self):
        return self.weights @ self.means

    @property
    def covariance(self):
        centred = self.means - self.mean
        return jnp.einsum("k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None, :])


SOURCE = Mixture(
    jnp.array([0.4, 0.6]),
    jnp.array([[-1.0, 0.5], [0.8, -0.4]]),
    jnp.array([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]]),
)
TARGET = Mixture(
    jnp.array([0.3, 0.5, 0.2]),
    jnp.array([[1.5, 1.0], [-1.2, 0.9], [0.2, -1.6]]),
    jnp.array([[[0.3, 0.1], [0.1, 0.4]], [[0.4, -0.2], [-0.2, 0.5]], [[0.35, 0.0], [0.0, 0.3]]]),
)


def first_component(mixture):
    return Mixture(jnp.ones(1), mixture.means[:1], mixture.covariances[:1])


@pytest.fixture
def mixtures():
    return SOURCE, TARGET


@pytest.fixture
def gaussians():
    return first_component(SOURCE), first_component(TARGET)


@pytest.fixture
def fields_of():
    """`fields_of(interpolant, (source, target))`: the exact fields."""
    return lambda interpolant, ends: MixtureInterpolantFields(interpolant, *ends[0], *ends[1])
