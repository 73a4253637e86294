"""The runner: killed and resumed, one run at a time, failures told, copies fit to commit."""

import io
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from toys import ROOT, STUCK, alive, journal, project, rsstudy, start, wait_for

from rsstudy.common import code
from rsstudy.common.settings import load_profile
from rsstudy.runner import study
from rsstudy.training.plan import TrainingPlan
from rsstudy.tuning.methods import methods
from rsstudy.tuning.run import run_key

ONE = 'journal("one"); write("01_one", 1)'
# the second notebook writes its result, then waits for a file that lets it end: then a test stops the run
TWO = """import os, time
from pathlib import Path
journal(f"two:{os.getpid()}"); write("02_two", read("01_one") + 1)
while not Path("go").exists(): time.sleep(0.05)
"""
THREE = 'journal("three"); write("03_three", read("02_two") + 1)'


def in_the_middle(folder):
    """A run of the toy study that is inside its second notebook; with the process number of that notebook's kernel."""
    project(folder, one=ONE, two=TWO, three=THREE)
    run = start(folder, "run")
    wait_for(lambda: len(journal(folder)) == 2, run)
    return run, int(journal(folder)[1].split(":")[1])


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed(tmp_path, kind):
    """Stopped in the second notebook by any means, the next call does not repeat the first and finishes the rest."""
    run, kernel = in_the_middle(tmp_path)
    run.send_signal(kind)
    _, said = run.communicate(timeout=STUCK)
    assert run.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 130)
    if kind != signal.SIGKILL:
        assert "rsstudy: stopped" in said and "Traceback" not in said, said
    wait_for(lambda: not alive(kernel))  # the kernel does not outlive its run
    assert not (tmp_path / "results/local/nano/02_two.ipynb").exists()
    (tmp_path / "go").touch()
    again = rsstudy(tmp_path, "run")
    assert again.returncode == 0, again.stderr
    assert "[1/3] 01_one: done before" in again.stderr
    assert [word.split(":")[0] for word in journal(tmp_path)] == ["one", "two", "two", "three"]
    assert (tmp_path / "results/local/nano/03_three.json").read_text() == "3"
    assert sorted(f.name for f in (tmp_path / "results/local/nano").glob("*.ipynb")) == [
        "01_one.ipynb",
        "02_two.ipynb",
        "03_three.ipynb",
    ]


def test_second_run_refuses(tmp_path):
    """Two runs on one results folder: the second says so and touches nothing.

    The lock of a killed run does not count.
    """
    run, _ = in_the_middle(tmp_path)
    try:
        second = rsstudy(tmp_path, "run")
        assert second.returncode == 2 and f"in use by another run (process {run.pid})" in second.stderr, second.stderr
        assert second.stderr.count("\n") == 1
    finally:
        run.kill()
        run.communicate()
    (tmp_path / "go").touch()
    assert rsstudy(tmp_path, "run", "--only", "01_one").returncode == 0


def test_done_before_and_stale(tmp_path, monkeypatch):
    """Nothing is run twice without reason; a changed setting, notebook, table, library or result is a reason."""
    ran = []

    def execute(
        path, partial, parameters, live, label
    ):  # in place of a kernel: writes the notebook's result and remembers that it ran
        ran.append(path.stem)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        (tmp_path / "results/local/nano" / f"{path.stem}.json").write_text("1")
        return nbformat.v4.new_notebook()

    monkeypatch.setattr(study, "execute", execute)
    monkeypatch.setattr(study, "code_digest", lambda *modules: library)

    def run(only=(), force=False, **settings):
        ran.clear()
        study.run_study(
            "nano",
            dict(results=f"{tmp_path}/results/local", work=f"{tmp_path}/runs") | settings,
            only,
            force,
            tmp_path / "nbs",
            io.StringIO(),
        )
        return [name[3:] for name in ran]

    library = "one version"
    project(tmp_path, one=ONE, two=TWO, three=THREE)
    assert run() == ["one", "two", "three"]
    assert run() == []
    (tmp_path / "results/local/nano/03_three.json").unlink()
    assert run() == ["three"]
    (tmp_path / "results/local/nano/02_two.json").write_text("2")
    assert run() == ["two"]  # 03 read what is there again now
    assert run(["02_two"], force=True) == ["two"]
    assert run(rank=4) == ["one", "two", "three"]
    project(tmp_path, one=ONE, two=TWO + "\nchanged = 1", three=THREE)
    assert run(rank=4) == ["two", "three"]
    library = "another version"
    assert run(rank=4) == ["one", "two", "three"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/captions.csv").write_text("a table")
    data = dict(data=f"{tmp_path}/data")
    assert run(**data) == ["one", "two", "three"] and run(**data) == []
    (tmp_path / "data/captions.csv").write_text("another table")
    assert run(**data) == ["one", "two", "three"]


def test_old_figures_go(tmp_path):
    """A figure that a notebook does not draw any more is removed when it has run; the figures of others stay."""
    project(tmp_path, one='for f in ("a", "b"): (P.results_dir/f"01_one_{f}.png").write_text(f)')
    rsstudy(tmp_path, "run").check_returncode()
    (tmp_path / "results/local/nano/02_two_c.png").write_text("c")
    for file in (tmp_path / "results/local/nano").glob("*.png"):
        os.utime(file, (time.time() - 60,) * 2)
    project(tmp_path, one='(P.results_dir/"01_one_a.png").write_text("a")')
    rsstudy(tmp_path, "run").check_returncode()
    assert sorted(f.name for f in (tmp_path / "results/local/nano").glob("*.png")) == ["01_one_a.png", "02_two_c.png"]


def test_failure(tmp_path):
    """A failing cell: notebook, cell and reason in one line, and exit status 2 for what a request can cause.

    The partial notebook is kept, the first notebook is not repeated.
    """
    project(tmp_path, one=ONE, two='journal("two"); raise ValueError("images are too few\\nonly 3 are left")')
    run = rsstudy(tmp_path, "run")
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "02_two: cell 3 failed: ValueError: only 3 are left" in run.stderr
    partial = tmp_path / "runs/nano/failed/02_two.ipynb"
    assert str(partial) in run.stderr
    assert any(
        o.output_type == "error" for c in nbformat.read(partial, 4).cells if c.cell_type == "code" for o in c.outputs
    )
    assert not (tmp_path / "results/local/nano/02_two.ipynb").exists()
    rsstudy(tmp_path, "run")
    assert journal(tmp_path) == ["one", "two", "two"]


def test_copy_is_slim(tmp_path):
    """The committed copy has no progress bar, no bare image, no folder of this machine; figures and tables stay."""
    code = """import sys, time
from tqdm import tqdm
for i in tqdm(range(50), desc="training"): time.sleep(0.01)
print("results are in", P.results_dir.resolve())
import matplotlib.pyplot as plt, numpy as np
from PIL import Image
plt.plot([1, 2]); plt.show()
display(Image.fromarray(np.zeros((8, 8, 3), np.uint8)))
"""
    project(tmp_path, one="%matplotlib inline\n" + code)
    run = rsstudy(tmp_path, "run")
    assert run.returncode == 0, run.stderr
    assert "training: 100%" in run.stderr  # seen while it ran
    text = (tmp_path / "results/local/nano/01_one.ipynb").read_text()
    assert str(tmp_path) not in text and "training: " not in text.replace('desc=\\"training', "")
    nb = nbformat.reads(text, 4)
    nbformat.validate(nb)
    images = [o for c in nb.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) == 1 and "Figure" in images[0].data["text/plain"]
    assert "results are in results/nano" in text


def forget():
    """The library's code is read again."""
    code.module_code.cache_clear()
    code.code_digest.cache_clear()


def keys_with(folder, monkeypatch, change=lambda module, code: code, notebooks=None):
    """Keys of the real chapters, and of a LoRA run, as if the library's code were changed."""
    files = {}

    def module_file(name):
        if name not in files:
            source = (ROOT / Path(*name.split("."))).with_suffix(".py")
            files[name] = folder / f"{len(files)}.py"
            files[name].write_text(change(name, source.read_text()) if source.is_file() else "")
        return files[name]

    folder.mkdir()
    monkeypatch.setattr(code, "_module_file", module_file)
    forget()
    P = load_profile("nano", results=str(folder / "results"), work=str(folder / "runs"))
    toy = SimpleNamespace(material="the same")
    run = run_key(P, methods(P)["lora"], toy, TrainingPlan.of(P, lr=1e-3, seed=0))
    keys = study.notebook_keys(P, notebooks or study.study_notebooks())
    forget()
    return {name[:2]: keys[name] for name in keys}, run


def test_what_stales_a_result(tmp_path, monkeypatch):
    """Prose, docstrings and comments re-run nothing, the training step re-trains.

    A metric re-scores without training; a chapter waits for what it reads.
    """

    def keys(name, **more):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        return keys_with(tmp_path / "x", monkeypatch, **more)

    before, run = keys("as it is")
    assert keys("again") == (before, run)

    def words(module, text):
        return '"""Other words."""\n# and a comment\n' + text.partition("\n")[2]

    assert keys("docstrings", change=words) == (before, run)

    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("lib"))
    path = tmp_path / "nbs/01_eda.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells[0].source += " And one more sentence."
    nbformat.write(nb, path)
    assert keys("prose", notebooks=study.study_notebooks(tmp_path / "nbs")) == (before, run)

    def stale(module):
        found, trained = keys(
            module, change=lambda name, text: text + ("\nADDED = 1\n" if name == f"rsstudy.{module}" else "")
        )
        return {name for name in found if found[name] != before[name]}, trained != run

    assert stale("training.step") == ({"03", "04", "05", "06", "07"}, True)
    scored, trained = stale("metrics.cider")
    assert {"02", "03", "04", "05", "07"} <= scored and not trained
    assert stale("tuning.lora")[1] and not stale("tuning.adapter")[1]
    assert stale("report.comparison") == ({"07"}, False)
    assert stale("runner.study") == (set(), False)
