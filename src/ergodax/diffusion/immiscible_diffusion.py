"""Immiscible diffusion: noise assignment within a batch. Li, Jiang, Kodaira, Tomizuka, Keutzer, Xu 2024 (arXiv:2406.12303), algorithm 1.

In every batch the noises are reordered by the linear assignment that minimises the total distance between data and noise,

    min over permutations π of Σ_b ‖x_b - ε_{π(b)}‖   (the distance itself, not its square),

and training goes on as before. The set of noises, hence their marginal law, is unchanged; only the coupling is. (The released code multiplies both by
0.1 first, so that float16 does not overflow; the assignment does not depend on it, and here sums are not taken in float16.)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core.assignment import optimal_assignment, squared_distances
from ..core.types import PRNGKey, PyTree


def immiscible_assignment(
    data: Float[Array, "n *x"],
    noise: Float[Array, "n *x"],
    distance_dtype: jax.typing.DTypeLike | None = None,
    *,
    condition: PyTree = None,
) -> Int[Array, " n"]:
    """The permutation π: example b goes with `noise[π[b]]`. Exact (Hungarian algorithm, O(n³)).

    - `data`, `noise`: shape (n, *x).
    - `distance_dtype`: the dtype that data and noise are rounded to before distances are taken (the paper uses float16); default: as they come.
    - `condition`: a pytree of leading axis n, such as labels: noise goes only to examples whose condition equals that of the example it was drawn
      for.

    Raises `ValueError` if the shapes differ.
    """
    if data.shape != noise.shape:
        raise ValueError(f"data and noise must have the same shape, got {data.shape} and {noise.shape}.")
    if distance_dtype is not None:
        # Rounded as the paper does, but summed in the working precision: float16 overflows on large images.
        data, noise = (a.astype(distance_dtype).astype(a.dtype) for a in (data, noise))
    return optimal_assignment(jnp.sqrt(squared_distances(data, noise)), condition)


class Immiscible(eqx.Module):
    """The coupling `(key, data, noise, args) -> reordered noise`, for `DenoisingLoss`. No gradient flows through the assignment.

    - `within_condition` (static, default False as in the paper): reorder noise only among examples with equal `args`. A conditional model needs this:
      assignment across the batch makes the noise depend on the label, while sampling starts from noise that does not, and conditioning is lost (on
      the 8 × 8 digits class accuracy fell from 0.98 to 0.64). Within a label the noise stays N(0, I).
    - `distance_dtype` (static): see `immiscible_assignment`.
    - `axis_name` (static): inside `shard_map`, the mesh axis that a batch is spread over. The whole batch is then assigned at once, on every device
      alike, as the released code does; without it each device assigns its own part. (Under `jax.jit` with sharded arrays the batch is whole anyway.)
    """

    within_condition: bool = eqx.field(static=True, default=False)
    distance_dtype: jax.typing.DTypeLike | None = eqx.field(static=True, default=None)
    axis_name: str | None = eqx.field(static=True, default=None)

    def __call__(self, key: PRNGKey, data: Float[Array, "n *x"], noise: Float[Array, "n *x"], args: PyTree) -> Float[Array, "n *x"]:
        """The rows of `noise`, reordered. Deterministic; `key` is not used."""
        condition, n = args if self.within_condition else None, len(data)
        if self.axis_name is not None:
            data, noise, condition = jax.tree.map(lambda part: jax.lax.all_gather(part, self.axis_name, tiled=True), (data, noise, condition))
        chosen = immiscible_assignment(*jax.lax.stop_gradient((data, noise)), self.distance_dtype, condition=condition)
        if self.axis_name is not None:
            chosen = jax.lax.dynamic_slice_in_dim(chosen, n * jax.lax.axis_index(self.axis_name), n)
        return noise[chosen]


__all__ = ["Immiscible", "immiscible_assignment"]
