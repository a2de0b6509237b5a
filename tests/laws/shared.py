"""Data and networks that rows of several rooms share."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ergodax.data import GaussianMixture


POINTS = jax.random.normal(jax.random.key(0), (4, 2))


BATCHES = jax.random.normal(jax.random.key(1), (4, 6, 2))


class Affine(eqx.Module):
    """A stand-in for a network, smooth in everything."""

    weight: jax.Array

    def __call__(self, t, x, args):
        return jnp.tanh(self.weight.astype(x.dtype) @ x) + t


NETWORK = Affine(jnp.array([[0.5, -0.3], [0.2, 0.8]]))


def two_clusters(dtype):
    return GaussianMixture.isotropic(jnp.array([0.4, 0.6], dtype), jnp.array([[1.0, 0.0], [-1.0, 0.5]], dtype), jnp.array([0.3, 0.5], dtype))
