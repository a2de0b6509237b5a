"""The catalogue holds what it says, and everything public is in it; the command line reads it."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ergodax
from ergodax import catalog
from ergodax.__main__ import main


ROOT = Path(__file__).parent.parent
METHODS = catalog.load()
FAMILIES = tuple(name for name in ergodax.__all__ if name not in ("core", "data", "testing"))


def each(methods=METHODS):
    return pytest.mark.parametrize("method", methods, ids=[method.slug for method in methods])


def public_names(family: str) -> set[str]:
    room = getattr(ergodax, family)
    return {name for name, value in vars(room).items() if not name.startswith("_") and not inspect.ismodule(value)}


def test_slugs_are_sorted_and_unique():
    slugs = [method.slug for method in METHODS]
    assert slugs == sorted(set(slugs))
    assert len({method.arxiv for method in METHODS}) == len(slugs)


@each()
def test_fields(method):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", method.slug)
    assert method.title == method.title.strip() != ""
    assert method.authors
    assert all(" " in author for author in method.authors)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", method.arxiv)
    posted = 2000 + int(method.arxiv[:2])
    assert posted <= method.year <= posted + 3
    assert method.family in FAMILIES
    assert method.socket
    assert method.objects
    assert method.left_out == "" or method.left_out.endswith(".")


@each()
def test_objects(method):
    for dotted in method.objects:
        obj = catalog.resolve(dotted)
        assert inspect.getdoc(obj), f"{dotted} has no docstring"
        assert obj.__name__ == dotted.rpartition(".")[2]


@each()
def test_files(method):
    assert re.search(r"^def test_", (ROOT / method.test).read_text(), re.MULTILINE), f"{method.test} defines no test"
    assert method.experiment == "" or (ROOT / method.experiment).is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_public_name_is_a_method_or_an_engine(family):
    prefix = f"ergodax.{family}."
    methods = {dotted.removeprefix(prefix) for method in METHODS for dotted in method.objects if dotted.startswith(prefix)}
    engines = catalog.engines()[family]
    assert list(engines) == sorted(set(engines))
    assert methods.isdisjoint(engines)
    assert public_names(family) == methods | set(engines)


def test_families():
    assert tuple(catalog.engines()) == FAMILIES


def test_find_and_cite():
    method = catalog.find("min_snr")
    assert catalog.reference(method) == "Hang et al. (2023). Efficient Diffusion Training via Min-SNR Weighting Strategy. arXiv:2303.09556."
    two = dataclasses.replace(method, authors=("Ada Lovelace", "Carl Friedrich Gauss"))
    assert catalog.reference(two).startswith("Lovelace and Gauss (2023).")
    entry = catalog.citation(two)
    assert entry.startswith("@misc{min_snr,\n  title = {{Efficient Diffusion")
    assert "  author = {Ada Lovelace and Carl Friedrich Gauss},\n" in entry
    assert entry.count("{") == entry.count("}")
    with pytest.raises(ValueError, match="there is no method 'min_snrr'; did you mean min_snr"):
        catalog.find("min_snrr")


def test_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [method.slug for method in METHODS]
    assert lines[-1] == f"{len(METHODS)} methods"
    assert main(["list", "--family", "schedules"]) == 0
    assert "wsd_schedule" in (out := capsys.readouterr().out)
    assert "min_snr" not in out
    assert main(["list", "--search", "DIFFUSION tiankai"]) == 0
    assert capsys.readouterr().out.split()[0] == "min_snr"
    assert main(["list", "--search", "no such words"]) == 0
    assert capsys.readouterr().out == "0 methods\n"


def test_list_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    main(["list"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 90


@each()
def test_show(method, capsys):
    assert main(["show", method.slug]) == 0
    out = capsys.readouterr().out
    for part in (method.url, method.test, f"@misc{{{method.slug},", *(f"\n{dotted}" for dotted in method.objects)):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "minsnr"], "there is no method 'minsnr'; did you mean min_snr?"),
        (["list", "--family", "difusion"], "there is no family 'difusion'; did you mean diffusion? (families: diffusion, distributed,"),
        (["list", "--family", "?"], "there is no family '?' (families: "),
        ([], "the following arguments are required: command"),
    ],
)
def test_unknown_names(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line_is_light_and_survives_a_closed_pipe():
    """`list` imports no JAX, and a reader that leaves early gets no traceback."""
    code = "import sys; from ergodax.__main__ import main; main(['list']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run([sys.executable, "-m", "ergodax", "list"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
