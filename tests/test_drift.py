"""The tree agrees with itself: the library is what the notebooks export, and the notebooks are clean."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_ALONE = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".*.tmp")


def digests(folder):
    """Every file's path and digest, what tools leave behind excepted."""
    files = [
        f
        for part in ("nbs", "rsstudy")
        for f in sorted((folder / part).rglob("*"))
        if f.is_file() and "__pycache__" not in f.parts
    ]
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files + [folder / "pyproject.toml", folder / "README.md"]
    }


def test_export_and_clean_change_nothing(tmp_path):
    """`nbdev-export` and `nbdev-clean` on a copy of the tree leave it as it is."""
    for part in ("nbs", "rsstudy"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=LEFT_ALONE)
    for part in ("pyproject.toml", "README.md", "LICENSE", "settings.ini"):
        shutil.copy(ROOT / part, tmp_path)
    before = digests(tmp_path)
    tools = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(PYTHONPATH=str(tmp_path))
    for tool in ("nbdev-export", "nbdev-clean"):
        subprocess.run([Path(sys.executable).with_name(tool)], cwd=tmp_path, env=tools, check=True, timeout=900)
    after = digests(tmp_path)
    assert sorted(before) == sorted(after), "files came or went"
    assert [f for f in before if before[f] != after[f]] == [], "run `nbdev-export` and `nbdev-clean`"


def test_every_module_has_its_notebook():
    """No module without a notebook, and none too long to read at a sitting."""
    for module in sorted((ROOT / "rsstudy").rglob("*.py")):
        if module.name in ("__init__.py", "_modidx.py"):
            continue
        text = module.read_text(encoding="utf-8")
        source = text.split("File to edit: ")[1].split(".ipynb")[0] + ".ipynb"
        assert (module.parent / source).resolve().is_file(), f"{module} is exported from {source}, which is not there"
        assert text.count("\n") <= 400, f"{module} has {text.count(chr(10))} lines: split the idea"
