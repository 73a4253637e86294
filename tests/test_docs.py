"""The site as its readers meet it, and how-to pages that do what they say.

It is built without a warning, no link is dead, no host is asked, it can be read on a telephone and in the dark.
"""

import functools
import html.parser
import http.server
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from rsstudy.common.settings import load_profile
from rsstudy.runner.study import is_appendix

ROOT = Path(__file__).resolve().parents[1]
PROFILES = dict(study="nano", real="riscm-nano")
HOWTO = sorted((ROOT / "docs/howto").glob("*.md"))
EXTERNAL = ("http:", "https:", "mailto:")


class Page(html.parser.HTMLParser):
    "What a page links to, what it loads, its anchors, and its images with the figure they are in."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.images, self.captions, self.depth = set(), [], [], [], 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if "id" in a:
            self.ids.add(a["id"])
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in ("script", "iframe", "audio", "video", "source", "embed") and a.get("src"):
            self.loads.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(a["href"])
        self.depth += tag == "figure"
        self.captions += tag == "figcaption"
        if tag == "img":
            self.loads.append(a["src"])
            self.images.append((a["src"], a.get("alt") or "", self.depth > 0))

    def handle_endtag(self, tag):
        self.depth -= tag == "figure"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The whole site, built afresh."
    missing = [name for name in ("sphinx", "myst_nb", "furo", "latex2mathml") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"building the site needs {', '.join(missing)}: pip install 'rsstudy[docs]'")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, ROOT / "docs/build.py", "--out", out], capture_output=True, text=True, timeout=900
    )
    assert built.returncode == 0, built.stderr[-4000:]
    assert "pages" in built.stdout
    return out / "html"


@pytest.fixture(scope="module")
def pages(site):  # name -> parsed page
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}


def test_all_is_there_and_light(site, pages):
    assert {
        "index.html",
        "search.html",
        "genindex.html",
        "glossary.html",
        "cite.html",
        "commands.html",
        "api/index.html",
    } <= pages.keys()
    stems = [p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb")]
    chapters = {f"{folder}/{stem}.html" for folder in PROFILES for stem in stems if not is_appendix(stem)}
    appendices = {
        f"{folder}/{stem}.html"
        for folder, name in PROFILES.items()
        for stem in stems
        if is_appendix(stem) and (ROOT / "results" / name / f"{stem}.ipynb").is_file()
    }
    modules = {
        "api/" + p.relative_to(ROOT / "rsstudy").with_suffix("").as_posix().replace("/", ".") + ".html"
        for p in (ROOT / "rsstudy").rglob("*.py")
        if p.stem[0] != "_"
    }
    assert len(chapters) == 14 and chapters | appendices | modules <= pages.keys(), sorted(
        (chapters | appendices | modules) - pages.keys()
    )
    assert sum(f.stat().st_size for f in site.rglob("*") if f.is_file()) < 25e6


def test_every_internal_link_resolves(site, pages):
    dead = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            if link.startswith((*EXTERNAL, "data:")):
                continue
            target, anchor = urldefrag(urljoin("/" + name, link))
            target = unquote(target).partition("?")[0].lstrip("/")
            if target in pages:
                dead += [(name, link)] * (anchor != "" and unquote(anchor) not in pages[target].ids)
            elif not (site / target).is_file():
                dead.append((name, link))
    assert not dead, dead[:10]


def test_nothing_is_asked_of_another_host(site, pages):
    assert not [
        (name, load) for name, page in pages.items() for load in page.loads if load.startswith((*EXTERNAL, "//"))
    ]
    sheets = {
        p.name: re.findall(r'(?:@import\s+["\']|url\(["\']?)(?:https?:)?//[^)"\']+', p.read_text(encoding="utf-8"))
        for p in site.rglob("*.css")
    }
    assert not any(sheets.values()), sheets


def test_every_figure_has_caption_and_text(pages):
    for name, page in pages.items():
        assert all(alt and inside for _, alt, inside in page.images), name
        assert page.captions >= len(page.images), name
    assert len(pages["index.html"].images) == len(pages["findings.html"].images) == 1
    assert all(page.images for name, page in pages.items() if name.startswith(("study/", "real/")))


@pytest.fixture(scope="module")
def address(site):
    "The site on a server of this machine."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def opened(browser, address, **options):
    "A page that notes what the console says and which other host is asked."
    page, said = browser.new_context(**options).new_page(), []
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: r.url.startswith((address, "data:")) or said.append(f"asked {r.url}"))
    page.on("response", lambda r: r.status < 400 or said.append(f"{r.status} for {r.url}"))
    return page, said


def test_every_page_fits_telephone_and_desktop(browser, address, pages):
    page, said = opened(browser, address, viewport=dict(width=390, height=844))
    wide = []
    for name in pages:
        page.goto(address + name, wait_until="load")
        for width in (390, 1280):
            page.set_viewport_size(dict(width=width, height=844))
            needed = page.evaluate("document.documentElement.scrollWidth")
            if needed > width:
                wide.append((name, width, needed))
    assert not wide and not said, (wide[:5], said[:5])


CONTRAST = """() => {
  const bare = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = bare(getComputedStyle(e).backgroundColor);
      if (c.length == 3 || c[3] > .9) return c;
    }
    return [255, 255, 255];
  };
  const contrast = e => {
    const [a, b] = [light(bare(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  };
  const texts = 'p li td th figcaption summary dt.sig pre code a'.split(' ').map(name => 'article ' + name).join(',');
  const found = [...document.querySelectorAll(texts)].filter(e => e.innerText && e.offsetParent)
    .map(e => [contrast(e), e.tagName + '.' + e.className + ': ' + e.innerText.slice(0, 40)]);
  found.sort((x, y) => x[0] - y[0]);
  return found.slice(0, 1).concat([[found.length, 'count']]); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser, address, scheme):
    "The least contrast of any text is that which WCAG 2.1 asks for, 4.5."
    page, said = opened(browser, address, viewport=dict(width=1280, height=900), color_scheme=scheme)
    for name in (
        "index.html",
        "study/01_eda.html",
        "real/07_comparison.html",
        "api/cider.html",
        "glossary.html",
        "howto/metric.html",
    ):
        page.goto(address + name)
        (least, where), (count, _) = page.evaluate(CONTRAST)
        assert count > 10 and least >= 4.5, (name, scheme, least, where)
    assert not said


@pytest.mark.parametrize("place", ["server", "disk"])
def test_search_finds(browser, site, address, place):
    start = address if place == "server" else site.as_uri() + "/"
    page, said = opened(browser, start)
    page.goto(start + "index.html")
    page.fill("input[name=q]", "PixelSHAP")
    page.press("input[name=q]", "Enter")
    page.wait_for_selector("#search-results li a")
    page.wait_for_function("document.querySelector('#search-results').innerText.includes('matching')")
    found = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any("api/attribution.pixelshap.html" in f for f in found) and not said, (found[:5], said)


def blocks(page, language):  # of a page's Markdown
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in HOWTO if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_of_the_page_runs(page, tmp_path, monkeypatch):
    "Word for word. What a page adds to a registry is taken out again."
    from rsstudy.attribution.attributions import ATTRIBUTIONS
    from rsstudy.faithfulness.measures import MEASURES
    from rsstudy.metrics.registry import METRICS
    from rsstudy.tuning.methods import METHODS

    shutil.copy(ROOT / "settings.ini", tmp_path)  # results and work go to its folder
    monkeypatch.chdir(tmp_path)
    registries = [(r, dict(r)) for r in (ATTRIBUTIONS, METHODS, METRICS, MEASURES)]
    names = {"__name__": f"howto_{page.stem}"}
    try:
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
    finally:
        for registry, before in registries:
            registry.clear()
            registry.update(before)


PAGES = [*HOWTO, *(ROOT / "docs" / name for name in ("index.md", "running.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_of_the_page_are_in_the_grammar(page):
    "Each line is a command of this project with options and settings that it takes, or one of a few others."
    from rsstudy.commands.main import parser

    extras = re.findall(
        r"^(\w+) = \[",
        (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("[project.scripts]")[0],
        re.M,
    )
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    for line in "\n".join(blocks(page, "bash")).splitlines():
        if not (words := shlex.split(line, comments=True)):
            continue
        if words[:2] == ["accelerate", "launch"]:
            words = ["rsstudy", *words[words.index("rsstudy)") + 1 :]]
        if words[0] == "rsstudy":
            args = parser().parse_args(words[1:])
            settings = dict(s.split("=", 1) for s in getattr(args, "settings", []))
            if getattr(args, "profile", None):
                load_profile(args.profile, **settings)
        elif words[0] == "cd":
            continue
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), line
        elif words[:2] == ["pip", "install"]:
            assert all(extra in extras for extra in re.findall(r"\[([\w,]+)\]", words[2])[0].split(",")), line
        else:
            assert words == ["hf", "auth", "login"], line


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(EXTERNAL)]
    assert not [link for link in links if not (ROOT / urldefrag(link)[0]).exists()] and len(links) > 20


def test_the_table_of_the_readme_is_that_of_the_results():
    from rsstudy.common.results import read_result
    from rsstudy.report.comparison import main_table

    P = load_profile("riscm-nano", results=str(ROOT / "results"))
    table = main_table(read_result(P, "07_comparison"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[:2] == ["", "trained"])
    head, body = rows[start][1:], rows[start + 2 : start + 2 + len(table)]
    assert [row[0] for row in body] == list(table.index)
    assert [row[1:] for row in body] == table[head].astype(str).values.tolist()


def test_a_cell_becomes_a_signature(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import signatures

    source = """LIMIT = 3 # metres

def far(
    x:float, # Metres | from `here`
    *, near:bool=False,
    # In the shade?
    # Only by day
    dark:bool=False,
) -> bool: # Beyond?
    "Whether it is far."
    return x > LIMIT

def _hidden(): pass
"""
    text = signatures.document(source)
    assert (
        "{py:data} LIMIT\n:value: 3" in text
        and "{py:function} far(x: float, *, near: bool=False, dark: bool=False) -> bool" in text
    )
    assert (
        "| `x` | Metres \\| from `here` |" in text
        and "| `dark` | In the shade? Only by day |" in text
        and "| `returns` | Beyond? |" in text
        and "_hidden" not in text
        and "`near`" not in text
    )
    assert signatures.names("class A:\n    def b(self): pass\n    def _c(self): pass\n") == ["A", "A.b"]


def test_a_figure_without_a_description_stops_the_build(monkeypatch):
    pytest.importorskip("nbdev", reason="building the site needs nbdev: pip install 'rsstudy[dev]'")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from nbformat import NotebookNode

    spec = importlib.util.spec_from_file_location(
        "docs_build", ROOT / "docs/build.py"
    )  # `build` is a package of that name, too
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    cell = NotebookNode(
        source="run.figure(figure, 'mine')",
        outputs=[NotebookNode(output_type="display_data", data={"image/png": ""}, metadata={})],
    )
    with pytest.raises(ValueError, match="does not describe"):
        build.outputs(cell, iter(()), "study/01_eda")
    with pytest.raises(ValueError, match=r"shows the figure mine where docs/figures\.toml has yours"):
        build.outputs(cell, iter([("yours", "")]), "study/01_eda")
    assert build.outputs(cell, iter([("mine", "text")]), "study/01_eda")[0]["data"] == {"text/markdown": "text"}
