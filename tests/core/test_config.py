"""Presets and overrides, and what a person sees who mistypes one."""

import dataclasses
from typing import Literal

import pytest

from ergodax.core.config import UsageError, from_mapping, load, parse


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Config:
    inner: Inner = Inner()
    kind: Literal["a", "b"] = "a"
    steps: int = 10
    flag: bool = True

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")


@pytest.fixture
def presets(tmp_path):
    (tmp_path / "default.yaml").write_text("")
    (tmp_path / "small.yaml").write_text("inner: {rate: 1e-2, sizes: [3]}\nsteps: 2\n")
    (tmp_path / "wrong.yaml").write_text("stepz: 2\n")
    return tmp_path


def test_presets_and_overrides(presets, tmp_path):
    config, folder = parse(Config, presets, [], out=tmp_path / "runs")
    assert (config, folder) == (Config(), tmp_path / "runs" / "default")
    argv = ["--preset", "small", "--out", str(tmp_path / "x"), "--inner.rate", "0.5", "--no-flag", "--kind", "b"]
    config, folder = parse(Config, presets, argv, out=tmp_path / "runs")
    assert config == Config(Inner(0.5, (3,)), "b", 2, False)
    assert folder == tmp_path / "x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "tiny"], "unknown preset `tiny`; there are default, small, wrong."),
        (["--preset", "wrong"], "wrong.yaml: unknown field `stepz`; there are inner, kind, steps, flag."),
        (["--steps", "0"], "`steps` must be at least 1, got 0."),
        (["--steps", "many"], "many"),
        (["--stepz", "3"], "--stepz"),
        (["--kind", "c"], "'c'"),
    ],
)
def test_mistakes_end_with_code_2(presets, tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        parse(Config, presets, argv, out=tmp_path)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out


def test_types_of_a_mapping():
    assert from_mapping(Config, {"inner": {"rate": 1}}).inner.rate == 1.0
    for mapping, message in (
        ({"steps": 1.5}, "`steps` must be of type int, got 1.5"),
        ({"steps": True}, "`steps` must be of type int, got True"),
        ({"inner": 3}, "expected a mapping of fields, got 3"),
        ({"inner": {"rate": "fast"}}, "must be a number, got 'fast'"),
        ({"inner": {"sizes": ["x"]}}, "must be of type int, got 'x'"),
    ):
        with pytest.raises(UsageError, match=message):
            from_mapping(Config, mapping)


def test_load_reads_yaml(presets):
    assert load(Config, presets / "small.yaml") == Config(Inner(1e-2, (3,)), "a", 2, True)
