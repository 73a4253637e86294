"""Explanations for people: bad requests in one sentence, hostile text, and the page used in a real browser."""
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from rsstudy.cli import main

QUICK = [w for s in ("ig_steps=2", "shap_evaluations=8", "segments=9", "pixelshap_samples=8") for w in ("--set", s)]
CAPTION = "<script>alert(1)</script> two airplanes & a $runway$ ."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("explain")


@pytest.fixture(scope="module")
def photo(folder):
    "Coloured blocks in a file whose name is markup."
    blocks = np.kron(np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8), np.ones((32, 40, 1), np.uint8))
    Image.fromarray(blocks).save(folder / "<img src=x onerror=alert(2)>.png")
    return folder / "<img src=x onerror=alert(2)>.png"


@pytest.fixture(scope="module")
def written(folder, photo):
    "The page that the command writes, for a hostile caption."
    words = ["explain", str(photo), "--caption", CAPTION, "--words", "airplanes,runway", "--method", "grad_cam,shap,blob", "--out", str(folder / "out"), *QUICK]
    assert main(words) == 0
    files = sorted(p.name for p in (folder / "out").iterdir())
    assert files == [f"{photo.stem}-none.html", f"{photo.stem}-none.png"] # and no temporary file
    with Image.open(folder / "out" / files[1]) as figure: assert min(figure.size) > 300
    return folder / "out" / files[0]


def test_page_is_self_contained_and_escaped(written):
    text = written.read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>", text) == ['<script type="application/json" id="data">', "<script>"]
    assert "&lt;script&gt;" in text and "<img src=x" not in text and "default-src 'none'" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "url(" not in text and "http" not in re.sub(r'http-equiv="', "", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert list(data) == ["grad_cam", "shap", "blob"] and all(len(m["pieces"]) == 3 for m in data.values())
    assert len(text) < 1_000_000


def test_same_scale_for_all_words_of_a_method(written):
    data = json.loads(re.search(r'id="data">(.*?)</script>', written.read_text(encoding="utf-8"), re.S)[1])
    for m in data.values(): assert m["pieces"][0]["ends"] == m["pieces"][1]["ends"] and m["pieces"][0]["scale"] == m["pieces"][1]["scale"]


@pytest.mark.parametrize("words, expected", [
    (["no.png"], "image no.png does not exist"),
    (["PHOTO", "--method", "lime"], "unknown attribution method 'lime'"),
    (["PHOTO", "--model", "magic"], "unknown model 'magic'"),
    (["PHOTO", "--model", "lora", "--set", "work=/nonexistent"], "has not been tuned under the profile nano"),
    (["PHOTO", "--caption", "two airplanes .", "--words", "ship"], "its words are: two, airplanes"),
    (["PHOTO", "--caption", " "], "the caption is empty"),
    (["PHOTO", "--out", "PHOTO"], "is no folder"),
])
def test_bad_request_is_one_sentence(photo, capsys, words, expected):
    status = main(["explain", *(str(photo) if w == "PHOTO" else w for w in words), *QUICK])
    error = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line and not line.startswith("Loading weights")]
    assert status == 2 and len(error) == 1 and error[0].startswith("rsstudy: ") and expected in error[0], error


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright: pip install 'rsstudy[dev]'")
    where = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not where: pytest.skip("the browser test needs Chromium on the path")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, written):
    "The page on a telephone, 390 px wide, and everything it complained of or asked for."
    context = browser.new_context(viewport=dict(width=390, height=844), offline=True)
    page, said = context.new_page(), []
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("dialog", lambda d: (said.append(d.message), d.dismiss()))
    page.on("request", lambda r: said.append(r.url[:80]) if not r.url.startswith(("data:", "file:")) else None)
    page.goto(written.as_uri())
    yield page
    context.close()
    assert said == []


def test_in_a_browser(opened):
    page = opened
    data = json.loads(page.text_content("#data"))
    shown = lambda: page.get_attribute("#map", "src")
    maps = lambda method: [piece["map"] for piece in data[method]["pieces"]]
    assert len({*maps("shap")}) == 3
    assert page.text_content(".caption") == CAPTION and page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert shown() == maps("grad_cam")[2] and page.evaluate("document.getElementById('map').naturalWidth") == 112
    assert page.evaluate("(p => Math.abs(p.width / p.height - p.naturalWidth / p.naturalHeight))(document.getElementById('photo'))") < .02
    first, second = page.locator(".caption button").all()
    first.hover()
    assert shown() == maps("grad_cam")[0] and "airplanes" in page.text_content("#says") and "airplanes" in page.get_attribute("#map", "alt")
    page.mouse.move(5, 5)
    assert shown() == maps("grad_cam")[2] # back to what was kept
    first.focus()
    page.keyboard.press("Tab")
    assert shown() == maps("grad_cam")[1] # the keyboard shows the next word
    page.keyboard.press("Enter")
    page.locator("input[value=shap]").check()
    assert second.get_attribute("aria-pressed") == "true" and shown() == maps("shap")[1]
    assert data["shap"]["pieces"][1]["facts"][-1][1] in page.text_content("#facts")
    page.locator("#opacity").fill("40")
    assert page.evaluate("getComputedStyle(document.getElementById('map')).opacity") == "0.4"
    page.locator("summary").click()
    assert page.locator(".all tbody tr").count() == 9 and page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert page.evaluate("[...document.images].every(i => i.alt)")


def test_in_a_notebook_the_page_keeps_to_its_frame(browser, written):
    "The rich display: srcdoc in a sandbox works, and the surrounding page keeps its own styles."
    import html
    page = browser.new_page()
    page.set_content(f'<h1>mine</h1><iframe sandbox="allow-scripts" srcdoc="{html.escape(written.read_text(encoding="utf-8"))}" width=800 height=780></iframe>')
    frame = page.frame_locator("iframe")
    frame.locator(".caption button").first.hover()
    assert "airplanes" in frame.locator("#says").text_content()
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).fontSize") == "32px"
    page.close()
