"""How long the README's two commands take on a fresh clone, and how large the environments are that they make.

    .venv/bin/python tests/measure_commands.py [--results results]

writes commands.json beside the benchmarks of this machine. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rsstudy.bench.outcome import bench_folder
from rsstudy.common.code import code_revision, device_name, versions
from rsstudy.common.files import write_json

ROOT = Path(__file__).resolve().parents[1]
# what is made, in this order, each on top of the one before
STEPS = dict(
    study_environment=".venv/.installed-study", study="study", test_environment=".venv/.installed-all", test="test"
)


def megabytes(folder):
    files = (f for f in Path(folder).rglob("*") if f.is_file() and not f.is_symlink())
    return round(sum(f.stat().st_size for f in files) / 1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", help="folder of the results (default: that of settings.ini)")
    parser.add_argument("--only", nargs="*", default=list(STEPS), choices=list(STEPS), help="some of the steps")
    args = parser.parse_args()
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS")}
    file = bench_folder(args.results) / "commands.json"
    result = dict(name="commands", device=device_name(), steps={})
    if file.is_file():  # a step that is not made again keeps what it was measured as
        result["steps"] = json.loads(file.read_text(encoding="utf-8"))["steps"]
    made_of = dict(code=code_revision(), versions=versions())
    with tempfile.TemporaryDirectory() as top:
        clone = Path(top) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        for name in args.only:
            start = time.monotonic()
            made = subprocess.run(["make", STEPS[name]], cwd=clone, env=environment)
            seconds = round(time.monotonic() - start, 1)
            size = megabytes(clone / ".venv")
            result["steps"][name] = dict(seconds=seconds, exit=made.returncode, environment_mb=size, **made_of)
            print(name, result["steps"][name], flush=True)
            if made.returncode:
                break
        left = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True).stdout
        result["changed_files"] = left.splitlines()
    write_json(file, result)
    return max(result["steps"][name]["exit"] for name in args.only if name in result["steps"])


if __name__ == "__main__":
    sys.exit(main())
