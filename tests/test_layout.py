"""The house: a module's path is its notebook's without numbers, imports run downhill, every name is defined once."""

import ast
import graphlib
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "nbs/lib"
FOLDERS = [folder.name[3:] for folder in sorted(LIB.iterdir()) if folder.is_dir() and re.match(r"\d\d_", folder.name)]
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
PARTS = sorted(LIB.glob("*/[0-9]*.ipynb"))
NAMED_BY_COMMAND = {"commands", "study"}  # a command's module has the command's name, a chapter's the chapter's


def exported_module(notebook):
    code = ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    return next((found[1] for cell in code if (found := re.search(r"default_exp (\S+)", cell))), None)


def modules():
    "Module, such as `metrics.cider` -> its syntax tree."
    files = [f for f in sorted((ROOT / "rsstudy").glob("*/*.py")) if f.name != "__init__.py"]
    return {f"{f.parent.name}.{f.stem}": ast.parse(f.read_bytes()) for f in files}


def imports(name, tree):
    "Modules of the package that a module imports, inside functions too, and the names it takes from each."
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        above = ["rsstudy", *name.split(".")[:-1]]
        base = above[: len(above) + 1 - node.level] if node.level else []
        path = [*base, *(node.module or "").split(".")]
        if path[0] != "rsstudy":
            continue
        for alias in node.names:
            inner = [*filter(None, path[1:]), alias.name]
            yield (".".join(inner), None) if ".".join(inner) in MODULES else (".".join(inner[:-1]), alias.name)


MODULES = modules()


@pytest.mark.parametrize("notebook", PARTS + CHAPTERS, ids=lambda p: p.stem)
def test_a_modules_path_is_its_notebooks_without_numbers(notebook):
    module = exported_module(notebook)
    if notebook in CHAPTERS:
        assert module in (None, f"study.{notebook.stem[3:]}")
    else:
        assert module == f"{notebook.parent.name[3:]}.{notebook.stem[3:]}"


def test_every_module_comes_from_a_notebook():
    assert set(MODULES) == {exported_module(n) for n in PARTS + CHAPTERS} - {None}


def test_numbers_are_given_once():
    for folder in [LIB, *filter(Path.is_dir, LIB.iterdir())]:
        numbers = [p.name[:2] for p in folder.iterdir() if re.match(r"\d\d_", p.name)]
        assert len(numbers) == len(set(numbers)), folder


def test_a_folder_imports_only_from_lower_folders():
    floors = [*FOLDERS, "study"]
    for name, tree in MODULES.items():
        for other, _ in imports(name, tree):
            if other not in MODULES:
                continue
            mine, theirs = name.split(".")[0], other.split(".")[0]
            assert floors.index(theirs) <= floors.index(mine), f"{name} imports {other}"
            assert theirs != "study", f"{name} imports the chapter {other}"


def test_notebooks_of_parts_import_no_chapter():
    for notebook in PARTS:
        assert "rsstudy.study" not in notebook.read_text(), notebook


def test_no_circle():
    graph = {name: {other for other, _ in imports(name, tree) if other in MODULES} for name, tree in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def defined(tree):
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def test_names_are_imported_from_where_they_are_defined():
    for name, tree in MODULES.items():
        for other, taken in imports(name, tree):
            if taken and other in MODULES:
                assert taken in set(defined(MODULES[other])), f"{name} takes {taken} from {other}, which imports it"


def test_no_two_modules_of_one_name():
    seen = defaultdict(list)
    for name in MODULES:
        if name.split(".")[0] not in NAMED_BY_COMMAND:
            seen[name.split(".")[1]].append(name)
    assert {k: v for k, v in seen.items() if len(v) > 1} == {}


def test_no_two_public_definitions_of_one_name():
    seen = defaultdict(list)
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                seen[node.name].append(name)
    every_command = {"grammar", "main"}  # what each module of a command, and each module that is run by itself, defines
    assert {k: v for k, v in seen.items() if len(v) > 1 and k not in every_command} == {}


def test_links_between_notebooks_lead_somewhere():
    dead = []
    for path in [*LIB.rglob("*.ipynb"), *LIB.parent.glob("*.ipynb")]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                links = re.findall(r"\]\(([^):]+\.ipynb)", "".join(cell["source"]))
                dead += [f"{path.name}: {link}" for link in links if not (path.parent / link).exists()]
    assert dead == []


def test_functions_fit_on_a_screen():
    long = {}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                lines = node.end_lineno - body[0].lineno + 1
                if lines > 40:
                    long[f"{name}.{node.name}"] = lines
    assert long == {}


def test_the_index_has_a_line_for_every_folder():
    listed = re.findall(r"^- \[`(\w+)`\]", (LIB / "README.md").read_text(), re.M)
    assert listed == sorted(p.name for p in LIB.iterdir() if p.is_dir() and p.name[0].isdigit())
