"""Search spaces: what runs they hold, what they are drawn from, what they refuse, and which leaves are traced."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import stats

from ergodax.core import space, traced


def test_grid_zip_and_product():
    assert space.grid({"optim.rate": [1, 2]}, seed=range(2)) == [
        {"optim.rate": 1, "seed": 0},
        {"optim.rate": 1, "seed": 1},
        {"optim.rate": 2, "seed": 0},
        {"optim.rate": 2, "seed": 1},
    ]
    assert space.zip(a=[1, 2], b="xy") == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    both = space.product(space.zip(a=[1, 2], b="xy"), space.grid(seed=[0, 1]))
    assert both == [{"a": a, "b": b, "seed": seed} for a, b in ((1, "x"), (2, "y")) for seed in (0, 1)]


@pytest.mark.parametrize("draw", [space.random, space.sobol])
def test_draws_follow_their_distributions(draw):
    """Kolmogorov–Smirnov for what is continuous, χ² for what is not; p > 0.001 with a fixed seed."""
    runs = draw(1024, {"a.b": space.LogUniform(1e-4, 1e-1)}, u=space.Uniform(-1, 3), n=space.Integers(2, 7), c=space.Choice(["x", "y", "z"]))
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    assert stats.kstest(np.log10(columns["a.b"]), stats.uniform(-4, 3).cdf).pvalue > 1e-3
    assert stats.kstest(columns["u"], stats.uniform(-1, 4).cdf).pvalue > 1e-3
    for name, values in (("n", range(2, 7)), ("c", "xyz")):
        assert stats.chisquare([columns[name].count(value) for value in values]).pvalue > 1e-3
    assert {type(value) for value in columns["n"]} == {int}
    assert {type(value) for value in columns["u"]} == {float}
    assert draw(8, u=space.Uniform(0, 1)) == draw(8, u=space.Uniform(0, 1))
    assert draw(8, u=space.Uniform(0, 1)) != draw(8, u=space.Uniform(0, 1), random_seed=1)


def test_sobol_covers_evenly():
    """Each of 64 equal boxes of the square holds one of 64 points: what a (0, 6, 2)-net in base 2 is."""
    runs = space.sobol(64, a=space.Uniform(0, 1), b=space.Uniform(0, 1))
    assert len({(int(8 * run["a"]), int(8 * run["b"])) for run in runs}) == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: space.zip(a=[1, 2], b=[1]), r"must have the same length, got \{'a': 2, 'b': 1\}"),
        (lambda: space.grid(a=[]), "needs at least one value, got none for `a`"),
        (lambda: space.product(space.grid(a=[1]), space.grid(a=[2])), "must set different leaves"),
        (lambda: space.random(0, a=space.Uniform(0, 1)), "`num_runs` must be an integer of at least 1"),
        (lambda: space.LogUniform(0.0, 1.0), r"bounds of LogUniform must be positive, got 0.0 and 1.0"),
        (lambda: space.Uniform(2, 1), "Uniform needs low < high, got 2 and 1"),
        (lambda: space.Integers(3, 3), "Integers needs low < high"),
        (lambda: space.Choice([]), "at least one value"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    inner: Inner = Inner()
    seed: int = traced(0)
    flag: bool = traced(False)
    solver: object = None


def test_leaves_by_name():
    changed = space.replace(Config(), {"inner.rate": 1.0, "seed": 3})
    assert (changed.inner.rate, changed.inner.steps, changed.seed) == (1.0, 3, 3)
    assert space.value(changed, "inner.rate") == 1.0
    assert Config().inner.rate == 0.1
    with pytest.raises(ValueError, match=r"`inner.rat` is not a field of Inner; it has rate, steps"):
        space.value(Config(), "inner.rat")


def test_what_is_traced():
    override = {"inner.rate": 1, "inner.steps": 4, "seed": 2, "flag": True, "solver": None}
    static, names = space.split(Config(), override)
    assert static == {"inner.steps": 4, "solver": None}
    assert names == ["inner.rate", "seed", "flag"]
    assert space.leaf(Config(), "inner.rate", 1).dtype == np.float64
    assert space.split(Config(), {"solver": jax.numpy.ones(3)})[1] == ["solver"]


def test_signatures_tell_programs_apart():
    def signature(**override):
        return space.signature(Config(), override)

    assert signature(seed=1) == signature(seed=2)
    assert signature(solver=1) != signature(solver=True)
    assert signature(solver=np.ones(2)) != signature(solver=np.ones(3))
