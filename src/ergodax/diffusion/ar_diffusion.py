"""AR-Diffusion: a video whose frames have noise levels of their own, never falling along it. Sun, Wang, Li, Liu, Sun, Feng, Lao, Zhou, He, Liu 2025.

arXiv:2503.07418. A network sees all frames, each at its own time, earlier frames cleaner (t_1 >= … >= t_F in our t), and learns them together: it is
called as `(t, x, args)` with t of shape (F,) and x of shape (F, *frame). Between one time for all (synchronous diffusion) and one frame after the
other (autoregression) lies every schedule of this kind.

- Training, `FrameTimes` (their FoPP): draw a frame and its level uniformly, and then the other levels uniformly among all sequences through it. With
  levels 0 … T - 1 of noise, the number of non-falling tails after frame f at level l is

      N(l, f) = N(l + 1, f) + N(l, f + 1),   N(l, F) = 1,   so N(l, f) = binom(T - 1 - l + F - f, F - f),

  so each next level l' >= l is drawn with probability ∝ N(l', f + 1), and the frames before it in the mirror image.
- Sampling, `asynchronous_schedule` (their AD scheduler): in every sweep the first unfinished frame makes one more step and every later one stays
  `gap` steps behind its predecessor. gap = 0 is synchronous, gap >= T autoregressive; T + (F - 1) gap sweeps up to there.

In one line each:

    loss = FramewiseLoss(DenoisingLoss(VPPath(), DataPrediction(), times=FrameTimes(grid, num_frames)))               # loss(network, batch, key)
    x1 = integrate(asynchronous_term(network, VPPath(), grid[asynchronous_schedule(F, T, gap)], frame_ndim=3), DDIM(), x0)

The term is a `DenoiserTerm` over sweeps, on a path with one clock per frame; DDIM, `Ancestral` and the other solvers that use the model at a step's
start run on it. A frame that does not move is kept to the bit; the released sampler forgets to mask its output, and tells the network for such a
frame the time of the step before."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_increasing
from ..core.path import AffinePath
from ..core.prediction import Prediction
from ..core.term import DenoiserTerm
from ..core.types import PRNGKey, PyTree, VectorField
from .draw import draw
from .objective import DenoisingLoss


def _log_binomial(n, k):
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


class FrameTimes(eqx.Module):
    """The times of a `FramewiseLoss`, `(key, n) -> (n, frames)`: a draw of every video's levels, uniform through one frame's uniform level.

    - `grid`: times of shape (T + 1,), from noise to data, on which sampling will run; the levels are its first T.
    - `num_frames` (static): F.

    Raises `ValueError` for times that do not increase or a count below 1.
    """

    grid: Float[Array, " steps"]
    num_frames: int = eqx.field(static=True)

    def __check_init__(self):
        check_increasing("grid", self.grid)
        check_count("num_frames", self.num_frames)

    def __call__(self, key: PRNGKey, n: int) -> Float[Array, "n frames"]:
        """Times that do not increase along the frames."""

        def one(key):
            key_frame, key_level, key = jax.random.split(key, 3)
            frame = jax.random.randint(key_frame, (), 0, self.num_frames)
            level = jax.random.randint(key_level, (), 0, self.num_levels)
            return self.grid[self.num_levels - 1 - self.complete(key, frame, level)]

        return jax.vmap(one)(jax.random.split(key, n))

    @property
    def num_levels(self) -> int:
        """T."""
        return self.grid.shape[0] - 1

    def complete(self, key: PRNGKey, frame: Int[Array, ""], level: Int[Array, ""]) -> Int[Array, " frames"]:
        """Levels of noise 0 … T - 1 that do not fall along the frames, uniform among all with this `level` at `frame` (counted from 0)."""
        last, frames, levels = self.num_levels - 1, range(self.num_frames), jnp.arange(self.num_levels)
        tails = [[_log_binomial(last - i + f, f) for i in range(last + 1)] for f in reversed(frames)]
        heads = [[_log_binomial(i + f, f) for i in range(last + 1)] for f in frames]

        def extend(key, log_counts, order, allowed):
            def draw_next(neighbour, inputs):
                f, log_count, key = inputs
                drawn = jax.random.categorical(key, jnp.where(allowed(levels, neighbour), log_count, -jnp.inf))
                value = jnp.where(f == frame, level, jnp.where(order(f), drawn, neighbour)).astype(level.dtype)
                return value, value

            inputs = jnp.arange(self.num_frames), jnp.asarray(np.array(log_counts), self.grid.dtype), jax.random.split(key, self.num_frames)
            return draw_next, inputs

        key_tail, key_head = jax.random.split(key)
        after, inputs = extend(key_tail, tails, lambda f: f > frame, lambda levels, neighbour: levels >= neighbour)
        tail = jax.lax.scan(after, level, inputs)[1]
        before, inputs = extend(key_head, heads, lambda f: f < frame, lambda levels, neighbour: levels <= neighbour)
        head = jax.lax.scan(before, level, inputs, reverse=True)[1]
        return jnp.where(jnp.arange(self.num_frames) < frame, head, tail)


class FramewiseLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: a denoising loss with a time for every frame.

    - `base`: the `DenoisingLoss` to extend, with `times` that give (B, F), such as `FrameTimes`; its path, prediction, weight (of every frame),
      coupling and label dropout are used.
    - `batch`: videos of shape (B, F, *frame), or a pair (data, args).
    - `model`: `(t, x, args) -> array like x` on ONE video, t of shape (F,).

    Raises `ValueError` for times that are not one per frame.
    """

    base: DenoisingLoss

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        base, path, prediction = self.base, self.base.path, self.base.prediction
        times, data, noise, args = draw(batch, key, base.times, base.coupling, base.label_dropout, base.null)
        if times.shape != data.shape[:2]:
            raise ValueError(f"`times` must give {data.shape[:2]}, one per frame of data {data.shape}, got {times.shape}.")

        def one(t, x1, x0, condition):
            states, targets, weights = jax.vmap(
                lambda t, x1, x0: (path.interpolate(t, x1, x0), prediction.target(path, t, x1, x0), base.weight(path, prediction, t))
            )(t, x1, x0)
            squares = (model(t, states, condition) - targets) ** 2
            return jnp.mean(weights * jnp.mean(squares.reshape(len(t), -1), axis=1))

        return jnp.mean(jax.vmap(one)(times, data, noise, args)), {}


class FramewiseDenoiser(eqx.Module):
    """`ergodax.core.Denoiser` for a network of one time per frame: `(t, x, args)` with t (F,) and x (F, *frame)."""

    network: VectorField
    path: AffinePath
    prediction: Prediction

    def __call__(self, t: Float[Array, " frames"], x: Float[Array, "frames *frame"], args: PyTree = None) -> Float[Array, "frames *frame"]:
        """E[data | x], of the shape and dtype of `x`."""
        value = self.network(t, x, args)
        return jax.vmap(lambda t, x, value: self.prediction.to_denoised(self.path, t, x, value))(t, x, value)


def asynchronous_schedule(num_frames: int, num_steps: int, gap: int) -> np.ndarray:
    """Steps done by every frame before and after each sweep: integers from 0 (noise) to `num_steps` (data), of shape (sweeps + 1, num_frames).

    An index for a grid of `num_steps` + 1 times. Raises `ValueError` for counts below 1 or a negative `gap`.
    """
    check_count("num_frames", num_frames)
    check_count("num_steps", num_steps)
    check_count("gap", gap, low=0)
    rows = [np.zeros(num_frames, int)]
    while rows[-1][-1] < num_steps:
        done, row = rows[-1], np.zeros(num_frames, int)
        for f in range(num_frames):
            leads = f == 0 or done[f - 1] == num_steps
            row[f] = done[f] + 1 if leads else row[f - 1] - gap
        rows.append(np.clip(row, 0, num_steps))
    return np.stack(rows)


class AsynchronousPath(AffinePath):
    """`path` with a clock for every frame: its time s counts sweeps, and frame i stands at `frame_times[s, i]`, linear between whole s.

    - `frame_times`: (sweeps + 1, F), such as `grid[asynchronous_schedule(F, T, gap)]`.
    - `frame_ndim` (static): the number of axes of a frame; clocks have shape (F, 1, …, 1), and so act on x of shape (..., F, *frame).

    Logarithms of 0 become those of the smallest number, so that a frame which stays at either end of the path has a step of length 0.
    """

    path: AffinePath
    frame_times: Float[Array, "rows frames"]
    frame_ndim: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("frame_ndim", self.frame_ndim, low=0)
        if self.frame_times.ndim != 2 or len(self.frame_times) < 2:
            raise ValueError(f"`frame_times` must have shape (sweeps + 1, frames), got {self.frame_times.shape}.")

    def times(self, s: Float[Array, ""]) -> Float[Array, " frames"]:
        """The time of every frame at sweep `s`."""
        s = jnp.asarray(s)
        row = jnp.clip(jnp.floor(s).astype(int), 0, len(self.frame_times) - 2)
        share = (s - row.astype(s.dtype)).astype(self.frame_times.dtype)
        return (1 - share) * self.frame_times[row] + share * self.frame_times[row + 1]

    def _clock(self, clock, s):
        values = clock(self.times(s))
        return values.reshape(-1, *[1] * self.frame_ndim)

    def alpha(self, t):
        return self._clock(self.path.alpha, t)

    def sigma(self, t):
        return self._clock(self.path.sigma, t)

    def log_alpha(self, t):
        return _finite(self._clock(self.path.log_alpha, t))

    def log_sigma(self, t):
        return _finite(self._clock(self.path.log_sigma, t))

    def time(self, log_snr):
        """That of `path`: a frame's time, not the sweep."""
        return self.path.time(log_snr)


def _finite(logarithm):
    return jnp.maximum(logarithm, jnp.log(jnp.finfo(logarithm.dtype).tiny))


class _AtFrameTimes(eqx.Module):
    denoised: VectorField
    path: AsynchronousPath

    def __call__(self, s, x, args=None):
        return self.denoised(self.path.times(s).astype(x.dtype), x, args)


def asynchronous_term(denoised: VectorField, path: AffinePath, frame_times: Float[Array, "rows frames"], frame_ndim: int) -> DenoiserTerm:
    """The term of `denoised(t, x, args)`, t (F,), over the sweeps of `frame_times` (`AsynchronousPath`). Start: `path.prior(key, (F, *frame))`."""
    frames = AsynchronousPath(path, frame_times, frame_ndim)
    return DenoiserTerm(_AtFrameTimes(denoised, frames), frames, jnp.arange(len(frame_times), dtype=frame_times.dtype))


__all__ = [
    "AsynchronousPath",
    "FrameTimes",
    "FramewiseDenoiser",
    "FramewiseLoss",
    "asynchronous_schedule",
    "asynchronous_term",
]
