"""For people without the repository: the wheel runs the study, and a notebook opened alone installs what it needs.

And every notebook reads well.
"""

import ast
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from toys import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
LEFT_ALONE = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".*.tmp", "_build")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# Run All: every cell of a notebook in a fresh kernel, or the first of them.
# Arguments: notebook, the kernel's folder, cells (all without), code after them.
RUN_ALL = """import sys, nbformat
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], 4)
if len(sys.argv) > 3: nb.cells = nb.cells[:int(sys.argv[3])] + [nbformat.v4.new_code_cell(sys.argv[4])]
NotebookClient(nb, kernel_name='python3', timeout=900, resources=dict(metadata=dict(path=sys.argv[2]))).execute()
print(''.join(o.get('text', '') for o in nb.cells[-1].get('outputs', [])))"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources: builds leave folders behind."""
    tree = tmp_path_factory.mktemp("sources") / "rsstudy"
    for part in ("nbs", "rsstudy", "docs", "tests"):
        shutil.copytree(ROOT / part, tree / part, ignore=LEFT_ALONE)
    for part in "pyproject.toml setup.py MANIFEST.in README.md LICENSE settings.ini constraints.txt Makefile".split():
        shutil.copy(ROOT / part, tree)
    return tree


@pytest.fixture(scope="module")
def archives(tree, tmp_path_factory):
    """The source archive, the wheel built from it, and the wheel built from the sources."""
    out = tmp_path_factory.mktemp("archives")
    for where, what in (("both", []), ("direct", ["--wheel"])):
        build = subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", "-o", out / where, *what, tree],
            capture_output=True,
            text=True,
        )
        assert build.returncode == 0, build.stderr[-2000:] + build.stdout[-2000:]
    return [
        next(out.glob(f"{where}/{name}"))
        for where, name in (("both", "*.tar.gz"), ("both", "*.whl"), ("direct", "*.whl"))
    ]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """This environment's packages without rsstudy.

    Its folder must have the usual name, by which dill knows what not to pickle.
    """
    folder = tmp_path_factory.mktemp("packages") / "site-packages"
    folder.mkdir()
    for place in (Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))):
        for item in place.iterdir():
            if not re.match(r"rsstudy|__editable__|.*\.pth$", item.name) and not (folder / item.name).exists():
                (folder / item.name).symlink_to(item)
    return folder


def bare(folder, packages, wheel=None):
    """Another environment, with the packages, and with rsstudy only from the wheel.

    Its Python, and the variables to run it with.
    """
    venv.create(folder, symlinks=True)
    python, site = folder / "bin" / "python", next(folder.glob("lib/python*/site-packages"))
    if wheel:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "--python",
                python,
                "install",
                "-q",
                "--no-deps",
                "--no-index",
                "--disable-pip-version-check",
                wheel,
            ],
            check=True,
        )
    (site / "packages.pth").write_text(f"{packages}\n")
    (folder / "kernels" / "python3").mkdir(parents=True)
    (folder / "kernels" / "python3" / "kernel.json").write_text(
        json.dumps(
            dict(
                argv=[str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                display_name="bare",
                language="python",
            )
        )
    )
    nltk = os.pathsep.join([str(Path(sys.prefix) / "nltk_data")] + os.environ.get("NLTK_DATA", "").split())
    return python, {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IN_TEST", "JUPYTER_PATH")} | dict(
        JUPYTER_PATH=str(folder), NLTK_DATA=nltk, HF_HUB_OFFLINE="1"
    )


@pytest.fixture(scope="module")
def installed(archives, packages, tmp_path_factory):
    return bare(tmp_path_factory.mktemp("installed") / "environment", packages, archives[1])


@pytest.fixture(scope="module")
def place(installed, tmp_path_factory):
    """A folder with nothing of ours, in somebody's own git repository, and the study's first notebook run in it."""
    folder = tmp_path_factory.mktemp("somebody")
    subprocess.run(
        "git init -q && git -c user.name=x -c user.email=x@x commit -q --allow-empty -m theirs",
        shell=True,
        cwd=folder,
        check=True,
    )
    run = rsstudy(installed, folder, "run", "--profile", "nano", "--only", "01_eda", "--set", "train_images=24")
    assert run.returncode == 0, run.stderr[-2000:]
    return folder


def rsstudy(installed, folder, *words):
    python, variables = installed
    return subprocess.run(
        [python.with_name("rsstudy"), *words], cwd=folder, env=variables, capture_output=True, text=True, timeout=900
    )


def test_archives(archives):
    """The wheel holds the study and no more than it, and is the same by way of the source archive."""
    source, wheel, direct = archives
    first, second = (
        {i.filename: i.CRC for i in zipfile.ZipFile(w).infolist() if not i.filename.endswith("RECORD")}
        for w in (wheel, direct)
    )
    assert first == second
    assert wheel.stat().st_size < 25e6 and wheel.name == f"rsstudy-{VERSION}-py3-none-any.whl"
    study = {f"rsstudy/study_files/{p}" for p in ("settings.ini", *(f"nbs/{n.name}" for n in NOTEBOOKS))}
    assert {n for n in first if "study_files" in n} == study
    code = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "rsstudy").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert {n for n in first if ".dist-info/" not in n} == study | code
    assert (
        len(NOTEBOOKS) == 8
        and zipfile.ZipFile(wheel).read("rsstudy/study_files/settings.ini") == (ROOT / "settings.ini").read_bytes()
    )
    with tarfile.open(source) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {
        "settings.ini",
        "setup.py",
        "constraints.txt",
        "nbs/01_eda.ipynb",
        "nbs/lib/01_common/01_settings.ipynb",
        "tests/test_package.py",
    } <= names


def test_version():
    import rsstudy as package

    assert package.__version__ == VERSION


def test_runs_without_the_repository(installed, place):
    """In an empty folder the installed package finds its own settings and notebooks, and writes to that folder."""
    shown = rsstudy(installed, place, "profiles", "--profile", "nano")
    assert shown.returncode == 0 and re.search(r"^base_model +paligemma-nano$", shown.stdout, re.M), shown.stderr
    assert sorted(p.name for p in place.iterdir()) == [".git", "results", "runs"]
    manifest = json.loads((place / "results/local/nano/01_eda.json").read_text())["manifest"]
    assert manifest["code"] == f"rsstudy {VERSION}"  # and not the commit of somebody's repository
    assert manifest["settings"]["train_images"] == 24
    copy = json.loads((place / "results/local/nano/01_eda.ipynb").read_text())
    assert not any("colab" in "".join(c["source"]) for c in copy["cells"])
    assert str(place.parent) not in (place / "results/local/nano/01_eda.ipynb").read_text()
    again = rsstudy(installed, place, "run", "--profile", "nano", "--only", "01_eda", "--set", "train_images=24")
    assert again.returncode == 0 and "01_eda: done before" in again.stderr


def test_doctor_without_the_repository(installed, place):
    python, variables = installed
    told = rsstudy(installed, place, "doctor", "--json")
    found = {f["name"]: f for f in json.loads(told.stdout)["findings"]}
    assert told.returncode == 0, [f for f in found.values() if f["needed"] and not f["fine"]]
    assert found["settings"]["says"].startswith(str(python.parents[1])) and found["results"]["says"].startswith(
        f"{place}/results"
    )
    assert f"rsstudy {VERSION}".split()[1] + ", /" in found["rsstudy"]["says"]  # no commit
    loaded = subprocess.run(
        [python, "-X", "importtime", python.with_name("rsstudy"), "doctor"],
        cwd=place,
        env=variables,
        capture_output=True,
        text=True,
    )
    modules = {
        line.rpartition("|")[2].strip() for line in loaded.stderr.splitlines() if line.startswith("import time:")
    }
    assert loaded.returncode == 0 and "rsstudy.runner.doctor" in modules and "torch" not in modules


def test_a_copy_of_ones_own(installed, place):
    """`rsstudy notebooks` gives a folder in which a notebook runs from top to bottom in JupyterLab.

    Its settings can be changed.
    """
    python, variables = installed
    said = rsstudy(installed, place, "notebooks", "mine")
    assert said.returncode == 0 and said.stdout.startswith("mine/settings.ini and 8 notebooks in mine/nbs"), said.stderr
    again = rsstudy(installed, place, "notebooks", "mine")
    assert again.returncode == 2 and again.stderr.startswith(
        "rsstudy: mine/settings.ini is there already and nothing was copied"
    )
    settings = place / "mine/settings.ini"
    settings.write_text(
        settings.read_text()
        .replace("work = runs", f"work = {place}/runs")
        .replace("train_images = 600", "train_images = 16")
    )
    run = subprocess.run(
        [python, "-c", RUN_ALL, "mine/nbs/01_eda.ipynb", "mine/nbs"],
        cwd=place,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert (
        json.loads((place / "mine/results/local/nano/01_eda.json").read_text())["manifest"]["settings"]["train_images"]
        == 16
    )
    assert sorted(p.name for p in (place / "mine").iterdir()) == ["nbs", "results", "settings.ini"]


def test_a_notebook_alone_installs_what_is_missing(tree, packages, tmp_path):
    """As in Colab: one notebook, an environment without rsstudy, an empty folder.

    The notebook's first cell installs from the repository; run again, it does nothing.
    """
    from rsstudy.runner.notebooks import repository

    subprocess.run(
        "git init -q -b main && git add -A && git -c user.name=x -c user.email=x@x commit -q -m x",
        shell=True,
        cwd=tree,
        check=True,
    )
    (tmp_path / "content").mkdir()
    shutil.copy(tree / "nbs/07_comparison.ipynb", tmp_path)
    python, variables = bare(tmp_path / "environment", packages)
    variables |= dict(
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.file://{tree}.insteadOf",
        GIT_CONFIG_VALUE_0=repository(),  # the repository is here
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )  # pip reads this 0 as: without isolation, which would need an index
    sources = ["".join(c["source"]) for c in json.loads((tmp_path / "07_comparison.ipynb").read_text())["cells"]]

    def run(last, code, **more):  # the notebook up to the cell with `last`, and some code
        until = next(i for i, source in enumerate(sources) if last in source) + 1
        done = subprocess.run(
            [python, "-c", RUN_ALL, tmp_path / "07_comparison.ipynb", tmp_path / "content", str(until), code],
            env=variables | more,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split()

    module, results, dictionary = run(
        "notebook_profile(globals())",
        "import rsstudy\n"
        "from rsstudy.metrics.wordnet import find_wordnet\n"
        "print(rsstudy.__file__, P.results_dir, find_wordnet() is not None)",
    )
    assert module.startswith(str(tmp_path / "environment")) and results == str(tmp_path / "content/results/local/nano")
    assert dictionary == "True" or not (Path(sys.prefix) / "nltk_data").is_dir()
    assert run(
        "find_spec", "import rsstudy; print(rsstudy.__file__)", GIT_CONFIG_VALUE_0="nothing", PATH="/nowhere"
    ) == [module]  # it is there: no git, no pip


def test_badges_and_first_cells_name_the_repository():
    """`python -m rsstudy.runner.notebooks` would change nothing."""
    from rsstudy.runner.notebooks import colab_badge, install_cell, is_stamp, repository

    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert ["".join(c["source"]) for c in cells if is_stamp(c)] == [
            colab_badge(repository(), path.stem),
            install_cell(repository()),
        ], path.name
        assert is_stamp(cells[1]) and is_stamp(next(c for c in cells if c["cell_type"] == "code"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_headings_make_a_table_of_contents(path):
    """One title, then parts, without a level left out."""
    text = "\n\n".join(
        "".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"
    )
    levels = [len(h) for h in re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)]
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(2) >= 3
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def lines_shown(output):
    """Lines of 120 characters that an output takes on a page, pictures left out."""
    data = output.get("data", {})
    if "text/html" in data:
        return "".join(data["text/html"]).count("<tr")
    text = (
        output.get("text")
        or data.get("text/markdown")
        or ([] if any(k.startswith("image/") for k in data) else data.get("text/plain", ""))
    )
    return sum(max(1, math.ceil(len(line) / 120)) for line in "".join(text).splitlines())


def laid_out(cell):
    "A cell's code without comments, in one layout, whatever its own; one with commands of IPython as it is."
    source = "".join(cell["source"])
    try:
        return ast.unparse(ast.parse(source))
    except SyntaxError:
        return source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_prints_more_than_a_screen(path):
    """In the notebooks as they ran, at most 40 lines a cell.

    Cells that were changed since are judged when they have run.
    """
    now = {laid_out(c) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"}
    ran = [
        (copy.parent.name, c)
        for copy in (ROOT / "results").glob(f"*/{path.name}")
        for c in json.loads(copy.read_text())["cells"]
        if c["cell_type"] == "code" and c["outputs"]
    ]
    if not ran:
        pytest.skip(f"{path.stem} has not been published yet")
    judged = [(profile, c) for profile, c in ran if laid_out(c) in now]
    assert judged  # those that were changed since the results were published are not
    assert {
        f"{profile}: {''.join(c['source'])[-80:]}": n
        for profile, c in judged
        if (n := sum(map(lines_shown, c["outputs"]))) > 40
    } == {}


def test_what_stales_no_result_is_no_part_of_the_study():
    """`RUNNER` names modules whose change leaves finished results as they are.

    It names nothing that a study notebook imports, directly or not, but what only checks requests.
    """
    from rsstudy.common.code import RUNNER, imported_modules, module_code

    code = [
        "".join(c["source"])
        for path in NOTEBOOKS
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "code" and c["metadata"].get("tags") != ["colab"]
    ]
    waiting, found = [name for cell in code for name in imported_modules(ast.parse(cell))], set()
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        waiting += module_code(name)[1]
    assert {"rsstudy.training.fit", "rsstudy.attribution.shap", "rsstudy.model.base"} <= found
    assert {n for n in found if n.startswith(RUNNER)} <= {"rsstudy.runner.request"}
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "rsstudy").rglob("*.py")]
    assert [r for r in RUNNER if not any(m.startswith(r) for m in modules)] == [], "names of modules that are gone"
