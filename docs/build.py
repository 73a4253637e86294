"""The site: nbdev reads the notebooks, Sphinx renders them.

    python docs/build.py [--out FOLDER]      FOLDER is docs/_build by default

FOLDER/html then holds the site, static files that can be put anywhere.
It is built offline and without Quarto, and nothing is run; `make docs` calls it.
The chapters are taken as they ran, from results/<profile>/.
The parts come from nbs/lib, their exported cells turned into signatures (docs/signatures.py).
A warning of Sphinx's is an error, and so is a figure that docs/figures.toml does not describe.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import signatures
from nbdev.process import NBProcessor
from nbdev.processors import hide_, hide_line, rm_header_dash, strip_ansi
from PIL import Image

from rsstudy.runner.study import is_appendix

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROFILES = {
    "nano": ("study", "the drawn world"),
    "riscm-nano": ("real", "real images"),
}  # profile -> folder of its chapters, what it ran on
PRETRAINING = "08_training/11_pretrain"
PRETRAINED = ROOT / "results/paligemma-nano/pretrain.ipynb"  # the one part that has run and left a figure
FOLDERS = re.findall(
    r"^- \[`(\w+)`\]\(\w+\): (.*)$", (ROOT / "nbs/lib/README.md").read_text(encoding="utf-8"), re.M
)  # in import order, what each holds


WRITTEN = set()  # pages of this build
RAN = {"study", "real"}  # folders of pages of executed notebooks
PROBLEMS = []  # broken links that Sphinx would not see


def write(path: Path, text: str):
    "Writes a page, unless it says that already: Sphinx renders again what is newer."
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITTEN.add(path)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def cell(kind: str, source: str, outputs=None, folded: str = "") -> dict:
    "A notebook's cell; a folded one shows a line that opens it."
    metadata = (
        dict(tags=["hide-input"], mystnb=dict(code_prompt_show=folded, code_prompt_hide=folded)) if folded else {}
    )
    made = dict(cell_type=kind, source=source, metadata=metadata)
    return made if kind == "markdown" else made | dict(outputs=outputs or [], execution_count=None)


def read(path: Path) -> list:  # Cells, with nbdev's directives in `directives_` and taken out of the source
    "A notebook through those of nbdev's processors that need no kernel."
    processor = NBProcessor(path, [strip_ansi, hide_line, rm_header_dash, hide_], rm_directives=True)
    processor.process()
    return [c for c in processor.nb.cells if "hide" not in c.directives_ and "colab" not in c.metadata.get("tags", [])]


class Site:
    "What links need to know: which page a notebook and a name are on."

    def __init__(self):
        chapters, parts = sorted((ROOT / "nbs").glob("[0-9]*.ipynb")), sorted((ROOT / "nbs/lib").glob("*/[0-9]*.ipynb"))
        self.notebooks = {p.stem: p for p in chapters} | {f"{p.parent.name}/{p.stem}": p for p in parts}
        self.cells = {stem: read(p) for stem, p in self.notebooks.items()}
        self.modules = {
            stem: c.directives_["default_exp"]
            for stem, cells in self.cells.items()
            for c in cells
            if "default_exp" in c.directives_
        }
        self.pages = {
            stem: f"study/{stem}" if self.is_chapter(stem) else f"api/{self.modules[stem]}" for stem in self.notebooks
        }
        self.names = {
            f"rsstudy.{module}.{name}"
            for stem, module in self.modules.items()
            for c in self.cells[stem]
            if "export" in c.directives_
            for name in signatures.names(c.source)
        }
        self.owners = {}  # a name without its module -> the modules that define it
        for full in self.names:
            for module in self.modules.values():
                if full.startswith(f"rsstudy.{module}."):
                    self.owners.setdefault(full[len(f"rsstudy.{module}.") :], []).append(module)

    def is_chapter(self, stem: str) -> bool:
        return self.notebooks[stem].parent.name == "nbs"

    def ran(self, stem: str, profile: str) -> bool:
        "Has a chapter a page for a profile? An appendix only where it has run."
        return not is_appendix(stem) or (ROOT / "results" / profile / f"{stem}.ipynb").is_file()

    def chapters(self, profile: str) -> list[str]:
        return [stem for stem in self.notebooks if self.is_chapter(stem) and self.ran(stem, profile)]

    def named(self, path: str, own: str) -> str | None:  # A key of `notebooks`
        "The notebook that a link on the page of the module `own` leads to."
        *folders, stem = path.split("/")
        home = next((s.partition("/")[0] for s, module in self.modules.items() if module == own), "")
        return next(
            (key for key in ("/".join([*folders[-1:], stem]), f"{home}/{stem}", stem) if key in self.notebooks), None
        )

    def linked(self, text: str, page: str) -> str:
        "Markdown with links from names in backticks to their signatures, and from notebooks to their pages."
        own = page.partition("/")[2]

        def name(found):
            said, bare = found[0], found[1]
            if bare.startswith("rsstudy.") and bare[8:] in self.modules.values():
                return f"{{py:mod}}`{bare}`"
            if bare in self.names:
                return f"{{py:obj}}`{bare[8:]} <{bare}>`"
            owners = self.owners.get(bare, [])
            home = (
                own if own in owners else owners[0] if len(owners) == 1 and re.search("[_A-Z]", bare) else None
            )  # `data` is a word more often than a name
            return f"{{py:obj}}`{bare} <rsstudy.{home}.{bare}>`" if home else said

        def notebook(found):
            stem = self.named(found[2], own)
            if not stem and page.partition("/")[0] in RAN:
                return found[1][1:-1]  # ran before the notebook had this name
            if not stem:
                PROBLEMS.append(f"{page} links to the notebook {found[2]}, which is not there")
                return found[0]
            folder, _, name = self.pages[stem].partition("/")
            if page.startswith("real/") and self.is_chapter(stem) and self.ran(stem, "riscm-nano"):
                folder = "real"
            return f"{found[1]}(/{folder}/{name}.ipynb)"

        text = re.sub(
            r"!\[([^\]]*)\]\(https?:[^)]*\)", r"\1", text
        )  # a badge is a picture from another host: its words remain
        text = re.sub(r"(\[[^\]]*\])\(([\w./-]*\d\d_\w+)\.(?:ipynb|html)\)", notebook, text)
        lines, fenced = text.split("\n"), False
        for i, line in enumerate(lines):
            if line.lstrip().startswith("```"):
                fenced = not fenced
            elif not fenced and not line.startswith("    "):
                lines[i] = re.sub(r"(?<![\[`}\w])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]])", name, line)
        return "\n".join(lines)


def figure_file(source: Path, target: Path):
    "A figure as WebP: a plot without loss, a photo nearly so."
    target = target.with_suffix(".webp")
    if target.is_file() and target.stat().st_mtime >= source.stat().st_mtime:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    photo = source.suffix == ".jpg"
    with Image.open(source) as image:
        image.convert("RGB").save(target, lossless=not photo, quality=80 if photo else 60, method=4)


def figure(profile: str, stem: str, name: str, said: dict, pages: Path, depth: str = "..") -> str:  # MyST Markdown
    "A figure of results/ with its caption and what it shows. Raises `FileNotFoundError` where it is missing."
    source = next(
        (f for end in ("png", "jpg") if (f := ROOT / "results" / profile / f"{stem}_{name}.{end}").is_file()), None
    )
    if not source:
        raise FileNotFoundError(f"results/{profile} has no figure {stem}_{name}")
    figure_file(source, pages / "figures" / profile / f"{stem}_{name}")
    return f":::{{figure}} {depth}/figures/{profile}/{stem}_{name}.webp\n:alt: {said['alt']}\n\n{said['caption']}\n:::"


def outputs(c, figures, page: str) -> list:  # a cell's outputs as the site shows them
    "Raises `ValueError` for a figure that docs/figures.toml does not describe, or has in another place."
    kept = []
    for output in c.outputs:
        data = output.get("data", {})
        if output["output_type"] == "stream" and output.get("name") == "stderr":
            continue  # progress bars and libraries' warnings
        if any(kind.startswith("image/") for kind in data):
            name, text = next(figures, ("", ""))
            if not name:
                raise ValueError(f"{page} shows a figure that docs/figures.toml does not describe")
            named = re.findall(r'run\.figure\(.*["\'](\w+)["\']', c.source)
            if named and name not in named:
                raise ValueError(f"{page} shows the figure {named[0]} where docs/figures.toml has {name}")
            data = {"text/markdown": text}
        elif "text/html" in data:
            data = {
                "text/html": re.sub(
                    r'<style scoped>.*?</style>|border="1" ', "", "".join(data["text/html"]), flags=re.S
                )
            }
        kept.append(
            {k: v for k, v in output.items() if k in ("output_type", "name", "text", "execution_count", "metadata")}
            | (dict(data=data) if data else {})
        )
    return kept


def save(path: Path, cells: list):
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.from_dict(c | dict(id=f"c{i}")) for i, c in enumerate(cells)],
        metadata=dict(
            kernelspec=dict(name="python3", display_name="Python 3", language="python"),
            language_info=dict(name="python", pygments_lexer="ipython3"),
        ),
    )
    write(path, nbformat.writes(nb))


def described(stem: str, profile: str, pages: Path):
    "The figures of a notebook in their order: name and Markdown."
    for name, said in FIGURES.get(stem, {}).items():
        yield name, figure(profile, stem, name, said, pages)


def fold(
    c, found: list
) -> str:  # what stands on the line that opens a cell of a chapter; empty for one that stays open
    "A cell with a result is shown; definitions, settings and tests are folded."
    if found:
        return ""
    if "export" in c.directives_:
        return "Code of " + ", ".join(signatures.names(c.source)) if signatures.names(c.source) else "Code"
    for tag, said in (("injected-parameters", "Settings of this run"), ("parameters", "Settings")):
        if tag in c.metadata.get("tags", []):
            return said
    return "Tests" if re.search(r"^(assert|test_|with expect_fail)", c.source, re.M) else "Code"


def colab(stem: str) -> str:  # address that opens a notebook in Colab; the repository is the one of pyproject.toml
    return f"https://colab.research.google.com/github/{REPOSITORY.removeprefix('https://github.com/')}/blob/main/nbs/{stem}.ipynb"


def title(stem: str, site: Site) -> str:  # of a chapter, numbered
    return f"{int(stem[:2])}. " + re.sub(r"^# (\d\d )?", "", site.cells[stem][0].source.split("\n")[0])


AS_IT_RAN = "As it ran on {world}{other}. {defined}[Open in Colab]({colab})."
OTHER = "; [the same chapter on {world}](/{folder}/{stem}.ipynb)"
DEFINED = "Its definitions are in {{py:mod}}`rsstudy.{module}`. "


def chapter(stem: str, profile: str, site: Site, pages: Path):
    "A chapter as it ran: prose, results and figures; definitions, settings and tests folded away."
    folder, world = PROFILES[profile]
    others = [v for k, v in PROFILES.items() if k != profile and site.ran(stem, k)]
    page, figures, cells = f"{folder}/{stem}", described(stem, profile, pages), []
    for c in read(ROOT / "results" / profile / f"{stem}.ipynb"):
        if c.cell_type == "markdown":
            source = site.linked(c.source, page)
            if not cells:  # the title
                head = f"# {title(stem, site)}" + (f", {world}" if folder == "real" else "")
                _, _, rest = source.partition("\n")
                source = f"{head}\n{rest}\n\n" + AS_IT_RAN.format(
                    world=world,
                    other="".join(OTHER.format(folder=f, world=w, stem=stem) for f, w in others),
                    defined=DEFINED.format(module=site.modules[stem]) if stem in site.modules else "",
                    colab=colab(stem),
                )
            cells.append(cell("markdown", source))
        elif c.cell_type == "code" and not signatures.only_imports(c.source):
            found = outputs(c, figures, page)
            cells.append(cell("code", c.source, found, fold(c, found)))
    if left := list(figures):
        raise ValueError(
            f"docs/figures.toml describes {len(left)} figures more than results/{profile}/{stem}.ipynb shows"
        )
    save(pages / f"{page}.ipynb", cells)


def module(stem: str, site: Site, pages: Path):
    "A module: its notebook with signatures instead of exported cells; of a chapter's notebook the signatures alone."
    name, cells = site.modules[stem], []
    page, chapter, ran = f"api/{name}", site.is_chapter(stem), stem == PRETRAINING
    figures = described(PRETRAINED.stem, "paligemma-nano", pages) if ran else iter(())

    def link(text):
        return site.linked(text, page)

    for c in read(PRETRAINED) if ran else site.cells[stem]:
        if c.cell_type == "markdown":
            if not cells:
                where = f"Written in `nbs/{'' if chapter else 'lib/'}{stem}.ipynb`" + (
                    f", which [runs as a chapter of the study](/study/{stem}.ipynb)." if chapter else "."
                )
                head, _, rest = re.sub(r"^# \d\d ", "# ", c.source).partition("\n")
                defined = ", ".join(
                    f"{{py:obj}}`{n} <rsstudy.{name}.{n}>`"
                    for c in site.cells[stem]
                    if "export" in c.directives_
                    for n in signatures.names(c.source)
                    if "." not in n
                )
                anchor = f":::{{py:module}} rsstudy.{name}\n:::"
                listed = f"`rsstudy.{name}`: {defined}\n{link(rest)}"
                cells.append(cell("markdown", f"{head}\n\n{anchor}\n\n{listed}\n\n{where}"))
            elif not chapter:
                cells.append(cell("markdown", link(c.source)))
        elif c.cell_type == "code" and "export" in c.directives_:
            if text := signatures.document(c.source, link):
                cells.append(cell("markdown", text))
            if not signatures.only_imports(c.source):
                cells.append(cell("code", c.source, folded="Source"))
        elif c.cell_type == "code" and not chapter and not signatures.only_imports(c.source):
            cells.append(cell("code", c.source, outputs(c, figures, page)))
    if left := list(figures):
        raise ValueError(f"docs/figures.toml describes {len(left)} figures more than {PRETRAINED.name} shows")
    save(pages / f"{page}.ipynb", cells)


def subtitle(stem: str, site: Site) -> str:
    return next(
        (line[2:] for line in site.cells[stem][0].source.split("\n") if line.startswith("> ")),
        site.cells[stem][0].source.split("\n")[0].lstrip("# "),
    )


def api_index(site: Site) -> str:  # MyST Markdown
    "Every module with a line of what it is for, in the order in which one imports the other."
    lines = ["# The package", "", "One page a module, in import order: a folder imports only from those above it.", ""]
    groups = {
        f"{folder[3:]}: {said}": [s for s in site.notebooks if s.startswith(f"{folder}/")] for folder, said in FOLDERS
    }
    groups["The chapters"] = [s for s in site.notebooks if site.is_chapter(s) and s in site.modules]
    for group, stems in groups.items():
        lines += [
            f"## {group}",
            "",
            *(f"- {{py:mod}}`rsstudy.{site.modules[s]}`: {site.linked(subtitle(s, site), 'api/index')}" for s in stems),
            "",
            "```{toctree}",
            ":hidden:",
            *(f"{site.modules[s]} <{site.modules[s]}>" for s in stems),
            "```",
            "",
        ]
    return "\n".join(lines)


def results(profile: str, pages: Path) -> str:  # MyST Markdown
    "The study's table and what it shows, from its results file, by the functions that print them in the terminal."
    from rsstudy.common.results import read_result
    from rsstudy.common.settings import load_profile
    from rsstudy.report.comparison import FAITHFULNESS, main_table, quality_findings, whole_scores

    result = read_result(load_profile(profile, results=str(ROOT / "results")), "07_comparison")
    said = FIGURES["07_comparison"]["quality_cost"]
    n = next(iter(whole_scores(result["scores"], "cider").values()))["n"]
    seeds = len({r["seed"] for r in result["scores"]} - {None})
    table = main_table(result)
    costs = [c for c in table if c in ("trained", "val loss", "operations", "memory", "file", *FAITHFULNESS.values())]
    quality, cost = (
        t.to_markdown(colalign=("left", *["right"] * t.shape[1]), disable_numparse=True)
        for t in (table.drop(columns=costs), table[costs])
    )
    return "\n\n".join(
        [
            f"{n:,} test images, {seeds} seeds, 95 % intervals:",
            quality,
            cost,
            figure(profile, "07_comparison", "quality_cost", said, pages, "."),
            "\n".join(f"- {line}" for line in quality_findings(result)[:4]),
        ]
    )


def commands() -> str:  # MyST Markdown
    "The command line's own help."
    from rsstudy.commands.main import parser

    os.environ["COLUMNS"] = "92"
    top = parser()
    kids = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    blocks = [("rsstudy", top)] + [(f"rsstudy {name}", kid) for name, kid in kids.items()]
    return "# The command line\n\n`rsstudy COMMAND --help` prints the same.\n\n" + "\n\n".join(
        f"## {name}\n\n```text\n{p.format_help().strip()}\n```" for name, p in blocks
    )


def thin(site: Path, pages: Path):
    """Takes out pages of an earlier build, and the tags around code that no colour is needed for.

    These tags are a third of the site's weight.
    """
    kept = {
        page.relative_to(pages).with_suffix("").as_posix() for page in WRITTEN if page.suffix in (".md", ".ipynb")
    } | {"search", "genindex"}
    for page in site.rglob("*.html"):
        if page.relative_to(site).with_suffix("").as_posix() not in kept:
            page.unlink()
            continue
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(r'<span class="(?:n|o|p|w|pre)">([^<]*)</span>', r"\1", text), encoding="utf-8")


def toctree(profile: str, site: Site) -> str:  # of a profile's chapters, MyST Markdown
    folder, world = PROFILES[profile]
    return "\n".join(
        [
            "```{toctree}",
            f":caption: The study, on {world}",
            ":hidden:",
            "",
            *(f"{title(stem, site)} <{folder}/{stem}>" for stem in site.chapters(profile)),
            "```",
        ]
    )


def pages_of(out: Path) -> Path:  # The folder that Sphinx reads
    "Writes every page."
    pages, site = out / "pages", Site()
    for stem in site.notebooks:
        if stem in site.modules:
            module(stem, site, pages)
    for profile in PROFILES:
        for stem in site.chapters(profile):
            chapter(stem, profile, site, pages)
    write(pages / "api/index.md", api_index(site))
    write(pages / "commands.md", commands())
    for profile, (folder, _) in PROFILES.items():
        write(pages / f"results_{profile}.txt", results(profile, pages))
        write(pages / f"chapters_{folder}.txt", toctree(profile, site))
    for page in [*DOCS.glob("*.md"), *DOCS.glob("howto/*.md")]:
        name = page.relative_to(DOCS)
        write(pages / name, page.read_text(encoding="utf-8").replace(ADDRESS, REPOSITORY))
    for other in (DOCS / "conf.py", ROOT / "CITATION.cff", *(DOCS / "static").iterdir()):
        write(
            pages / (other.name if other.parent in (DOCS, ROOT) else f"static/{other.name}"),
            other.read_text(encoding="utf-8").replace(ADDRESS, REPOSITORY),
        )
    for page in pages.rglob("*.*"):
        if page.suffix in (".md", ".ipynb") and page not in WRITTEN:
            page.unlink()  # of a notebook that is gone
    return pages


ADDRESS = "https://github.com/rsstudy/rsstudy"  # stands in the pages for the one that pyproject.toml names
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
FIGURES = tomllib.loads((DOCS / "figures.toml").read_text(encoding="utf-8"))


def main() -> int:
    options = argparse.ArgumentParser(description="Builds the site: static files that need no other host.")
    options.add_argument(
        "--out", type=Path, default=DOCS / "_build", help="folder for pages and site (default: docs/_build)"
    )
    out = options.parse_args().out.resolve()
    pages = pages_of(out)
    status = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-j",
            "2",
            "-b",
            "html",
            "-d",
            out / "doctrees",
            pages,
            out / "html",
        ]
    ).returncode
    thin(out / "html", pages)
    for problem in PROBLEMS:
        print(f"ERROR: {problem}", file=sys.stderr)
    status = status or int(bool(PROBLEMS))
    files = [f for f in (out / "html").rglob("*") if f.is_file()]
    if not status:
        count, megabytes = sum(f.suffix == ".html" for f in files), sum(f.stat().st_size for f in files) / 1e6
        print(f"{count} pages, {megabytes:.1f} MB: {out}/html/index.html")
    return status


if __name__ == "__main__":
    sys.exit(main())
