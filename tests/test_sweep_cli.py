"""`python -m ergodax.sweep`: leaderboard, page and event files of a finished sweep and of one that still runs."""

import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import filelock
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from ergodax.core import SweepResult, grid, sweep, traced
from ergodax.core.report import Report
from ergodax.sweep import default_metric, leaderboard, main, write_page


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.5
    name: str = "<plain>"
    seed: int = traced(0)
    same: float = 1.0


def train(config):
    steps = jnp.arange(1, 4)
    curve = config.same / (config.rate - 0.25) * steps.astype(float) + config.seed.astype(float)
    return {"curve": curve, "step": 10 * steps, "accuracy": -curve[-1], "test_loss": curve[-1]}


# At rate 0.25 the loss is infinite; at rate 0.5 it is 12 + seed; at rate 1.25 it is 3 + seed.
OVERRIDES = grid(rate=[0.25, 0.5, 1.25], seed=[0, 1], same=[1.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "rates"
    sweep(train, Config(), OVERRIDES, batch_size=1, folder=path)
    return path


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The first two of six runs, both infinite, then the next two."""
    path = tmp_path_factory.mktemp("runs") / "rates"

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(train, Config(), OVERRIDES, batch_size=1, folder=path, progress=stop)
    return path


def refused(capsys, *argv):
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in argv])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_show(folder, capsys):
    assert main(["show", str(folder)]) == 0
    first, second, *table = capsys.readouterr().out.splitlines()
    assert first == f"{folder}: 6 of 6 runs done, 2 of them failed (test_loss is not finite)"
    assert second == "by test_loss, smallest first (chosen by its name; --metric takes another: accuracy, curve.final, curve.min, curve.max)"
    assert [line.split() for line in table] == [
        ["rank", "run", "rate", "seed", "test_loss"],
        ["1", "4", "1.25", "0", "3"],
        ["2", "5", "1.25", "1", "4"],
        ["3", "2", "0.5", "0", "12"],
        ["4", "3", "0.5", "1", "13"],
        ["0", "0.25", "0", "inf"],
        ["1", "0.25", "1", "inf"],
    ]
    assert len({len(line) for line in table}) == 1


def test_show_another_metric(folder, capsys):
    main(["show", str(folder), "--metric", "curve.max", "--largest", "--top", "1"])
    _, second, _, best, last = capsys.readouterr().out.splitlines()
    assert (second, best.split(), last) == ("by curve.max, largest first", ["1", "3", "0.5", "1", "13"], "and 5 more (--top 6)")


def test_show_in_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    main(["show", str(folder)])
    rows = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert rows[2].split() == ["rank", "run", "rate", "seed", "test_loss"]
    assert rows[3].split() == ["1", "4", "1.25", "0", "3"]


def test_refusals(folder, tmp_path, capsys):
    assert refused(capsys, "show", tmp_path) == f"error: {tmp_path} holds no sweep: there is no sweep.json."
    assert refused(capsys, "page", tmp_path / "none").startswith("error: ")
    assert "no metric `rate`; there are accuracy, curve.final" in refused(capsys, "show", folder, "--metric", "rate")
    assert "no metric `loss`" in refused(capsys, "page", folder, "--metric", "loss", "--out", tmp_path / "page.html")
    assert "`top` must be an integer of at least 1" in refused(capsys, "show", folder, "--top", "0")
    assert "is not empty" in refused(capsys, "tensorboard", folder, folder)
    assert list(tmp_path.iterdir()) == []
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    next((damaged / "chunks").iterdir()).write_bytes(b"PAR1")
    assert "is damaged" in refused(capsys, "show", damaged)


def test_a_running_sweep_is_read_without_its_lock_and_without_devices(unfinished):
    """From another process, for which JAX finds no platform, while this one holds the lock."""
    before = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*")}
    with filelock.FileLock(unfinished / "lock"):
        command = [sys.executable, "-m", "ergodax.sweep", "show", str(unfinished)]
        shown = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "none"}, capture_output=True, text=True, timeout=120, check=True)
    assert "4 of 6 runs done, 2 of them failed" in shown.stdout
    assert {path: path.stat().st_mtime_ns for path in unfinished.rglob("*") if path.name != "lock"} == {
        path: time for path, time in before.items() if path.name != "lock"
    }


def test_nothing_done_yet(unfinished, tmp_path, capsys):
    empty = shutil.copytree(unfinished, tmp_path / "empty", ignore=shutil.ignore_patterns("*.parquet"))
    main(["show", str(empty)])
    assert capsys.readouterr().out == f"{empty}: 0 of 6 runs done\n"
    main(["page", str(empty)])
    assert "0 of 6 runs done." in (empty / "page.html").read_text()


@pytest.mark.parametrize(
    ("metrics", "chosen"),
    [
        ({"accuracy": [1], "train_loss": [1], "test_loss": [1]}, "test_loss"),
        ({"train_loss": [1], "val/loss": [[1, 2]]}, "val/loss.final"),
        ({"loss": [[1, 2]], "score": [1], "step": [[1, 2]]}, "loss.final"),
        ({"step": [[1, 2]], "curve": [[1, 2]], "score": [1]}, "score"),
    ],
)
def test_default_metric(metrics, chosen):
    result = SweepResult(range(1), {"rate": [0.1]}, {name: np.array(values) for name, values in metrics.items()}, [], [])
    assert default_metric(result) == chosen
    assert leaderboard(result, chosen)[0]["rank"] == 1


# The page


def test_page(folder, capsys):
    main(["page", str(folder)])
    assert capsys.readouterr().out == f"{folder / 'page.html'}\n"
    page = (folder / "page.html").read_text()
    (folder / "page.html").unlink()
    assert page.count("<figure>") == 3
    assert set(re.findall(r'(?:src|href)="(.{10})', page)) == {"data:image"}
    assert "2 of 6 runs have no finite test_loss." in page
    timing = json.loads((folder / "timing.json").read_text())[0]
    assert f"{timing['cache_hits']} programs from the compile cache, {timing['seconds']:.1f} s in all." in page
    assert f"<td>{timing['groups'][0]['compile_seconds']:.4g}</td>" in page
    assert "&quot;name&quot;: &quot;&lt;plain&gt;&quot;" in page
    rows = re.findall(r"<tr>(<td.*?)</tr>", page.split('class="sortable"')[1].split("</table>")[0])
    cells = [re.findall(r"<td.*?>(.*?)</td>", row) for row in rows]
    assert [row[1] for row in cells] == ["4", "5", "2", "3", "0", "1"]
    assert cells[0][:5] == ["1", "4", "1.25", "0", "3"]


def test_page_of_results_at_hand_and_of_unfinished_ones(unfinished, tmp_path):
    write_page(unfinished, tmp_path / "part.html", metric="accuracy", largest=True)
    page = (tmp_path / "part.html").read_text()
    assert "4 of 6 runs done." in page
    assert "2 chunks took" in page
    write_page(sweep(train, Config(), OVERRIDES[2:4]), tmp_path / "memory.html")
    page = (tmp_path / "memory.html").read_text()
    assert "2 of 2 runs done." in page
    assert "<td>all values traced</td><td>2</td>" in page
    assert "Config and versions" not in page


def test_only_sortable_tables_bring_a_script(tmp_path):
    rows = [{"name": "a", "loss": 1 / 3, "flag": True, "none": None}, {"name": "b<", "loss": np.nan, "flag": False, "none": np.inf}]
    for sortable in (False, True):
        report = Report("Title")
        report.table(rows, sortable=sortable)
        report.write(tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert ("<script>" in page) == ('data-number="0.3333333333333333"' in page) == ('data-number="Infinity"' in page) == sortable
        assert "b&lt;" in page


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_sorting(tmp_path):
    """The page's own script over a table of stand-ins for the elements: numbers by value, texts after them, what is missing last either way."""
    report = Report("Title")
    report.table([{"x": value} for value in (10.0, 9.0, "b", np.nan, np.inf, "a", None, -1e-3)], sortable=True)
    report.write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    found = re.findall(r'<td(?: data-number="(.*?)")?>(.*?)</td>', page)
    cells = [{"dataset": {"number": number} if number else {}, "textContent": text} for number, text in found]
    code = f"""
const attributes = {{}}; let click;
const head = {{firstElementChild: {{addEventListener: (_, listener) => click = listener}}, getAttribute: name => attributes[name],
  setAttribute: (name, value) => attributes[name] = value, removeAttribute: name => delete attributes[name]}};
const body = {{rows: {json.dumps(cells)}.map(cell => ({{cells: [cell]}})), append(...rows) {{ this.rows = rows; }}}};
const document = {{querySelectorAll: () => [{{tHead: {{rows: [{{cells: [head]}}]}}, tBodies: [body]}}]}};
{re.search("<script>(.*?)</script>", page, re.DOTALL)[1]}
for (const _ of [1, 2]) {{ click(); console.log(attributes["aria-sort"], body.rows.map(row => row.cells[0].textContent).join(" ")); }}
"""
    shown = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert shown.splitlines() == ["ascending -0.001 9 10 inf a b nan ", "descending inf 10 9 -0.001 b a nan "]


# TensorBoard


def events(folder: Path):
    """The records of a run's event file: length, checksum, protobuf, checksum."""
    (path,) = folder.iterdir()
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard(folder, tmp_path):
    main(["tensorboard", str(folder), str(tmp_path / "events")])
    assert sorted(path.name for path in (tmp_path / "events").iterdir()) == [f"run_{run:06d}" for run in range(6)]
    scalars, hparams = {}, {}
    for event in events(tmp_path / "events" / "run_000003"):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                content = plugin_hparams_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                hparams |= {name: leaf.number_value for name, leaf in content.session_start_info.hparams.items()}
            else:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert scalars == {"curve": [(10, 5.0), (20, 9.0), (30, 13.0)], "accuracy": [(0, -13.0)], "test_loss": [(0, 13.0)]}
    assert hparams == {"rate": 0.5, "seed": 1.0, "same": 1.0}
    failed = [value.simple_value for event in events(tmp_path / "events" / "run_000000") for value in event.summary.value if value.tag == "test_loss"]
    assert failed == [np.inf]
