"""The study on a real Ray cluster of two machines with one core each, both of them here.

Workers are killed, a machine is lost, failures are told, it is stopped and resumed.
"""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from functools import partial

import nbformat
import pytest
from toys import STUCK, alive, command, journal, project, rsstudy, start, wait_for

from rsstudy.runner.execute import KernelDied
from rsstudy.runner.ray import run_on_ray
from rsstudy.runner.study import run_study

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")

# Each toy notebook notes its kernel's and its worker's process numbers.
NOTE = 'import os; note = lambda word: journal(f"{word}:{os.getpid()}:{os.getppid()}")\n'


def meet(me, other, name, value):
    """A notebook that waits for another one to run, and then for a file.

    Two of these end only when they run at the same time.
    """
    return (
        NOTE
        + f'''import time
from pathlib import Path
note("{me}")
end = time.monotonic() + 200
while "{other}:" not in Path("runs/journal.txt").read_text() or not Path("go").exists():
    assert time.monotonic() < end
    time.sleep(0.05)
write("{name}", {value})
'''
    )


ONE, TWO = meet("one", "two", "01_one", 1), meet("two", "one", "02_two", 2)
THREE = NOTE + 'note("three"); write("03_three", read("01_one") + read("02_two"))'


@pytest.fixture(scope="module")
def machines():
    """A cluster of two machines; the second can be taken away."""
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster = Cluster(
        initialize_head=True,
        head_node_args=dict(
            num_cpus=1, include_dashboard=False, object_store_memory=10**8, _system_config=dict(worker_niceness=0)
        ),
    )
    cluster.lost = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def on_cluster(machines):
    return "run", "--engine", "ray", "--address", machines.address


def in_the_middle(folder, machines, **more):
    """A run that is inside its first two notebooks at once, and the process numbers of their kernels and workers."""
    project(folder, **(dict(one=ONE, two=TWO, three=THREE) | more))
    run = start(folder, *on_cluster(machines))
    wait_for(lambda: len(journal(folder)) == 2, run)
    return run, {
        word: (int(kernel), int(worker)) for word, kernel, worker in (line.split(":") for line in journal(folder))
    }


def content(folder):
    """All that a run leaves, seconds and random cell ids apart: results, executed notebooks, keys, names of outputs."""
    results = {f.name: f.read_text() for f in (folder / "results/local/nano").glob("*.json")}
    for file in (folder / "results/local/nano").glob("*.ipynb"):
        nb = nbformat.read(file, 4)
        nb.metadata.papermill.pop("duration")
        results[file.name] = (
            [(cell.source, cell.get("outputs"), cell.metadata.get("tags")) for cell in nb.cells],
            dict(nb.metadata),
        )
    states = {f.name: json.loads(f.read_text()) for f in (folder / "runs/nano/state").iterdir()}
    return results | {name: (state["key"], sorted(state["outputs"])) for name, state in states.items()}


def test_worker_killed(tmp_path, machines):
    """A worker killed in mid-run: its notebook is started again, which is said.

    Everything ends as with the local engine, and what that has finished is skipped.
    """
    run, first = in_the_middle(tmp_path / "ray", machines)
    os.kill(first["two"][1], signal.SIGKILL)
    wait_for(lambda: len(journal(tmp_path / "ray")) == 3, run)
    assert not alive(first["two"][0])  # the killed worker's kernel does not write beside the new one
    (tmp_path / "ray/go").touch()
    _, said = run.communicate(timeout=STUCK)
    assert run.returncode == 0, said
    again = (
        r"\[2/3\] 02_two: started again on \S+, process \d+, retry 1 of 3: "
        rf"the worker before it was lost \(process {first['two'][1]} on \S+\) \(at \d+:\d\d\)\n"
    )
    assert re.search(again, said), said
    assert said.count("done in") == 3 and "01_one: started again" not in said and "Traceback" not in said, said
    assert [line.split(":")[0] for line in sorted(journal(tmp_path / "ray")[:2]) + journal(tmp_path / "ray")[2:]] == [
        "one",
        "two",
        "two",
        "three",
    ]

    project(tmp_path / "local", one=ONE, two=TWO, three=THREE)
    (tmp_path / "local/go").touch()
    (tmp_path / "local/runs/journal.txt").write_text("one: two:\n")  # nobody to meet
    rsstudy(tmp_path / "local", "run").check_returncode()
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert rsstudy(tmp_path / "local", *on_cluster(machines)).stderr.count("done before") == 3


def test_failure(tmp_path, machines):
    """A failing cell is not repeated, and told as by the local engine.

    What runs beside it ends, what needs it does not start.
    """
    project(
        tmp_path,
        one='import time; journal("one"); time.sleep(2); write("01_one", 1)',
        two='journal("two"); raise ValueError("images are too few\\nonly 3 are left")',
        three=THREE,
    )
    run = rsstudy(tmp_path, *on_cluster(machines))
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    told = rsstudy(tmp_path, "run")
    assert told.stderr.splitlines()[-1] == run.stderr.splitlines()[-1]
    up_to_there = tmp_path / "runs/nano/failed/02_two.ipynb"
    sentence = f"02_two: cell 3 failed: ValueError: only 3 are left (the notebook up to there: {up_to_there})"
    assert run.stderr.splitlines()[-1] == f"rsstudy: {sentence}"
    assert "[1/3] 01_one: done before" in told.stderr  # it went on to its end on the cluster
    assert sorted(journal(tmp_path)) == ["one", "two", "two"]  # once with each engine


def test_lost_for_good(tmp_path, machines, monkeypatch):
    """A notebook that takes its kernel with it each time is given up."""
    project(tmp_path, one='import os; journal("one"); os.kill(os.getpid(), 9)')
    monkeypatch.chdir(tmp_path)
    log = io.StringIO()
    with pytest.raises(KernelDied, match="01_one: cell 3 failed: the kernel ended"):
        run_study(out=log, engine=partial(run_on_ray, address=machines.address, retries=1))
    assert (
        journal(tmp_path) == ["one"] * 2 and "retry 1 of 1: the kernel ended, killed or out of memory" in log.getvalue()
    ), log.getvalue()
    assert not ray.is_initialized()


def test_stopped_and_resumed(tmp_path, machines):
    """Ctrl-C on a cluster: the kernels end, and the local engine finishes the study.

    Until then no second run may use the folder.
    """
    run, first = in_the_middle(tmp_path, machines)
    second = rsstudy(tmp_path, *on_cluster(machines))
    assert second.returncode == 2 and f"in use by another run (process {run.pid})" in second.stderr, second.stderr
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=STUCK)
    assert run.returncode == 130 and "rsstudy: stopped" in said and "Traceback" not in said, said
    wait_for(lambda: not any(alive(kernel) for kernel, _ in first.values()))
    (tmp_path / "go").touch()
    assert rsstudy(tmp_path, "run").stderr.count("done in") == 3


def test_machine_lost(tmp_path, machines):
    """One of two machines goes in mid-run: its notebook is started again on the other one."""
    run, first = in_the_middle(tmp_path, machines)
    machines.remove_node(machines.lost, allow_graceful=False)
    wait_for(lambda: not all(alive(worker) for _, worker in first.values()))
    (tmp_path / "go").touch()
    _, said = run.communicate(timeout=STUCK)
    assert run.returncode == 0 and said.count("started again") == 1, said
    assert (tmp_path / "results/local/nano/03_three.json").read_text() == "3"


def test_wrong_requests(tmp_path):
    """What cannot work is said in one sentence, before anything runs."""
    project(tmp_path, one='journal("one")')
    without = [
        sys.executable,
        "-c",
        "import sys; sys.modules['ray'] = None; from rsstudy.commands.main import main; sys.exit(main())",
        "run",
        "--engine",
        "ray",
    ]
    for words, sentence in (
        (without, "--engine ray needs the package ray"),
        (command("run", "--cpus", "2"), "--cpus belongs to --engine ray"),
    ):
        run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=STUCK)
        assert run.returncode == 2 and run.stderr.startswith(f"rsstudy: {sentence}") and run.stderr.count("\n") == 1, (
            run.stderr
        )
    assert journal(tmp_path) == [] and not (tmp_path / "results").exists()
