"""Numeric checks that a wrong coefficient fails: convergence order by regression, means by z-score, traces by count."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def count_traces(fn: Callable) -> tuple[Callable, Callable[[], int]]:
    """`fn`, and a function that says how often Python ran it: under `jax.jit`, the number of traces."""
    calls = [0]

    @functools.wraps(fn)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return fn(*args, **kwargs)

    return counted, lambda: calls[0]


def convergence_order(num_steps: Sequence[int], errors: Sequence[float]) -> float:
    """p of error ∝ N⁻ᵖ, the slope of a least-squares line in log-log."""
    slope, _ = np.polyfit(np.log(np.asarray(num_steps, float)), np.log(np.asarray(errors, float)), 1)
    return -float(slope)


def z_scores(samples: Any, expected: Any) -> np.ndarray:
    """(mean - expected)/standard error along the first axis, of the shape of one sample. Independent samples only."""
    samples = np.asarray(samples, float)
    error = samples.std(axis=0, ddof=1) / np.sqrt(samples.shape[0])
    return np.asarray((samples.mean(axis=0) - np.asarray(expected, float)) / error)


def assert_mean(samples: Any, expected: Any, z: float = 4.5) -> None:
    """The mean of independent samples is `expected` within `z` standard errors (4.5: seven in a million by chance, per entry)."""
    scores = z_scores(samples, expected)
    worst = np.abs(scores).max()
    assert worst < z, f"a mean is {worst:.1f} standard errors from what was expected (at most {z})"


def assert_covariance(samples: Any, expected: Any, z: float = 4.5) -> None:
    """The covariance of independent samples (n, d) about their own mean is `expected` (d, d) within `z` standard errors per entry."""
    samples = np.asarray(samples, float)
    centred = samples - samples.mean(axis=0)
    n = samples.shape[0]
    assert_mean(centred[:, :, None] * centred[:, None, :] * (n / (n - 1)), expected, z)


__all__ = ["assert_covariance", "assert_mean", "convergence_order", "count_traces", "z_scores"]
