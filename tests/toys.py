"""Toy studies: a folder that looks like the project to the runner, with trivial notebooks."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
RISCM = Path(os.environ.get("RSSTUDY_RISCM") or "/none")  # folder with captions.csv and resized/
NO_RISCM = "needs the real images: set RSSTUDY_RISCM to a folder with captions.csv and resized/"

# What a toy notebook starts with: its parameters, its results folder, and a journal that tells what ran and how often.
HEAD = """import json
from rsstudy.common.settings import notebook_profile
P = notebook_profile(globals())
P.results_dir.mkdir(parents=True, exist_ok=True)
def journal(word):
    with open(P.work_dir.parent/'journal.txt', 'a') as f: f.write(word + '\\n')
def write(name, value): (P.results_dir/f'{name}.json').write_text(json.dumps(value))
def read(name): return json.loads((P.results_dir/f'{name}.json').read_text())
"""


def project(folder, **sources):
    """A toy project: settings.ini, nbs/NN_name.ipynb for every source, and a journal in runs/."""
    folder = Path(folder)
    (folder / "nbs").mkdir(parents=True, exist_ok=True)
    (folder / "runs").mkdir(exist_ok=True)
    shutil.copy(ROOT / "settings.ini", folder)
    for i, (name, code) in enumerate(sources.items()):
        cells = [
            new_code_cell('profile = "nano"  # settings.ini section', metadata=dict(tags=["parameters"])),
            new_code_cell(HEAD),
            new_code_cell(code),
        ]
        nbformat.write(new_notebook(cells=cells), folder / "nbs" / f"{i + 1:02d}_{name}.ipynb")
    return folder


# The command line of this very interpreter. Whoever was started in the background ignores Ctrl-C, and so would its
# children: a test that sends it says that it counts.
RUN = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from rsstudy.commands.main import main
sys.exit(main())"""


def command(*words):
    return [sys.executable, "-c", RUN, *map(str, words)]


STUCK = 900  # seconds without what a test waits for: it is stuck, on however slow a machine


def rsstudy(folder, *words):
    """Runs the command in a folder to its end."""
    return subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, timeout=STUCK)


def start(folder, *words):
    """Starts the command in a folder."""
    return subprocess.Popen(command(*words), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def journal(folder):
    file = Path(folder) / "runs" / "journal.txt"
    return file.read_text().split() if file.is_file() else []


def wait_for(condition, run=None):
    """Waits until `condition()` is true; a process that ends before that fails the test at once, with what it said."""
    end = time.monotonic() + STUCK
    while not condition():
        if run is not None and run.poll() is not None and not condition():
            raise AssertionError(f"ended with {run.returncode}: {run.communicate()[1]}")
        assert time.monotonic() < end, f"stuck: {STUCK} s without what the test waits for"
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        not Path(f"/proc/{pid}/stat").is_file()
        or Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    )
