"""Explanations for people: hostile text, every method on the page, and the page used in a real browser."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from rsstudy.attribution.attributions import ATTRIBUTIONS, controls
from rsstudy.commands.main import main, parser
from rsstudy.common.settings import load_profile
from rsstudy.explain.image import explain_image
from rsstudy.model.generate import Captioner
from rsstudy.model.nano import nano_model, nano_processor
from rsstudy.tuning.method import attach
from rsstudy.tuning.methods import methods

SMALL = dict(ig_steps=1, shap_evaluations=32, segments=9, pixelshap_samples=32, rise_masks=8, noise_samples=2)
QUICK = [w for s in ("ig_steps=2", "shap_evaluations=8", "segments=9", "pixelshap_samples=8") for w in ("--set", s)]
PROMPT = "caption &lt;b&gt;<img/src=x/onerror=alert(3)> en"
CAPTION = "<script>alert(1)</script> two airplanes & a $runway$ ."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("explain")


@pytest.fixture(scope="module")
def photo(folder):
    "Coloured blocks in a file whose name is markup."
    blocks = np.kron(
        np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8), np.ones((32, 40, 1), np.uint8)
    )
    Image.fromarray(blocks).save(folder / "<img src=x onerror=alert(2)>.png")
    return folder / "<img src=x onerror=alert(2)>.png"


@pytest.fixture(scope="module")
def written(folder, photo):
    "The page that the command writes, for a hostile caption."
    words = [
        "explain",
        str(photo),
        "--caption",
        CAPTION,
        "--words",
        "airplanes,runway",
        "--method",
        "grad_cam,shap,gradient_x_input",
        "--out",
        str(folder / "out"),
        "--set",
        f"prompt={PROMPT}",
        *QUICK,
    ]
    assert main(words) == 0
    files = sorted(p.name for p in (folder / "out").iterdir())
    assert files == [
        f"{photo.stem}-paligemma-nano-riscm.html",
        f"{photo.stem}-paligemma-nano-riscm.png",
    ]  # and no temporary file
    with Image.open(folder / "out" / files[1]) as figure:
        assert min(figure.size) > 300
    return folder / "out" / files[0]


def test_page_is_self_contained_and_escaped(written):
    text = written.read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>", text) == ['<script type="application/json" id="data">', "<script>"]
    assert "&lt;script&gt;" in text and "<img src=x" not in text and "default-src 'none'" in text
    assert (
        not re.search(r'(?:src|href)="(?!data:)', text)
        and "url(" not in text
        and "http" not in re.sub(r'http-equiv="', "", text)
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert list(data) == ["grad_cam", "shap", "gradient_x_input"] and all(len(m["pieces"]) == 3 for m in data.values())
    assert len(text) < 1_000_000


def test_same_scale_for_all_words_of_a_method(written):
    data = json.loads(re.search(r'id="data">(.*?)</script>', written.read_text(encoding="utf-8"), re.S)[1])
    for m in data.values():
        assert m["pieces"][0]["ends"] == m["pieces"][1]["ends"] and m["pieces"][0]["scale"] == m["pieces"][1]["scale"]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["no.png"], "image no.png does not exist"),
        (["PHOTO", "--method", "lime"], "unknown attribution method 'lime'"),
        (["PHOTO", "--model", "magic"], "unknown model 'magic'"),
        (["PHOTO", "--model", "lora", "--set", "work=/nonexistent"], "has not been tuned under the profile nano"),
        (["PHOTO", "--caption", "two airplanes .", "--words", "ship"], "its words are: two, airplanes"),
        (["PHOTO", "--caption", " "], "the caption is empty"),
        (["PHOTO", "--out", "PHOTO"], "is no folder"),
        (["CONSTANT", "--caption", "a plane ."], "constant image"),
        (
            [
                "PHOTO",
                "--caption",
                "a plane .",
                "--method",
                "pixelshap",
                "--set",
                "segments=30",
                "--set",
                "pixelshap_samples=20",
            ],
            "parts need at least",
        ),
        (
            [
                "PHOTO",
                "--caption",
                "a plane .",
                "--method",
                "kernel_shap",
                "--set",
                "segments=30",
                "--set",
                "shap_evaluations=20",
            ],
            "segments need at least",
        ),
    ],
)
def test_bad_request_is_one_sentence(photo, folder, capsys, words, expected):
    Image.new("RGB", (40, 30), "teal").save(folder / "constant.png")
    files = dict(PHOTO=str(photo), CONSTANT=str(folder / "constant.png"))
    given = {words[i + 1].split("=")[0] for i, w in enumerate(words) if w == "--set"}  # a setting may be given once
    quick = [w for pair in zip(QUICK[::2], QUICK[1::2]) if pair[1].split("=")[0] not in given for w in pair]
    status = main(["explain", *(files.get(w, w) for w in words), *quick])
    error = [
        line
        for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
        if line and not line.startswith("Loading weights")
    ]
    assert status == 2 and len(error) == 1 and error[0].startswith("rsstudy: ") and expected in error[0], error


def test_one_image_too_many_is_one_sentence(photo, capsys, monkeypatch):
    import torch

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("rsstudy.explain.image.explain", full)
    assert main(["explain", str(photo), "--caption", "a plane .", *QUICK]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rsstudy: out of memory with a single image at a time"), error


@pytest.fixture
def blocks(monkeypatch):
    "An image, and no gains over random maps, which take most of the time and are tested elsewhere."
    monkeypatch.setattr(
        "rsstudy.explain.image.gains_over_chance", lambda scorer, maps: (np.zeros((len(maps), 2, 2)), np.zeros((2, 2)))
    )
    return np.kron(np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8), np.ones((32, 32, 1), np.uint8))


def test_every_method_reaches_the_page(blocks):
    P, help_text = (
        load_profile("nano", **SMALL),
        parser()._subparsers._group_actions[0].choices["explain"].format_help(),
    )
    e = explain_image(
        Captioner(nano_model(0).eval(), nano_processor()),
        blocks,
        "two airplanes .",
        ["airplanes"],
        list(ATTRIBUTIONS),
        P,
    )
    assert list(e.found) == list(ATTRIBUTIONS) and not e.failed and all(m in help_text for m in ATTRIBUTIONS)
    data = json.loads(re.search(r'id="data">(.*?)</script>', e.html(), re.S)[1])
    unit = {
        m: re.search(
            r"the last colour is \S+( nats per 1,000 pixels| nats|) or beyond( \(no unit\)|)", d["pieces"][0]["scale"]
        ).groups()
        for m, d in data.items()
    }
    assert (
        {m for m, (nats, none) in unit.items() if none}
        == {m for m, (nats, none) in unit.items() if not nats}
        == {"grad_cam", "layer_cam", "attention_rollout", "gradient_attention", *controls()}
    )
    assert {m for m, (nats, _) in unit.items() if nats == " nats"} == {
        "occlusion",
        "rise",
    }  # drops and means, which share nothing out
    for method, d in data.items():
        own = method in ("integrated_gradients", "gradient_x_input")
        assert [part["name"] for part in d["pieces"][0]["prompt"]] == ["caption", "en", "the photo"]
        assert ("By SHAP of prompt and photo" in d["pieces"][0]["note"]) != own
        sums = [row for row in d["pieces"][0]["facts"] if row[0] == "sum of the map"]
        assert len(sums) == (method in ("integrated_gradients", "ig_tokens", "shap", "kernel_shap", "pixelshap"))
        assert ("likely" in d["pieces"][0]["says"]) == (method not in controls())


@pytest.mark.parametrize("name", ["qlora", "prompt"])
def test_tuned_model(blocks, name):
    "Four-bit weights pass gradients on; a soft prompt is one part, by gradients and by SHAP alike."
    P = load_profile("nano", **SMALL)
    captioner = attach(P, methods(P)[name])
    e = explain_image(captioner, blocks, "two airplanes .", ["airplanes"], ["gradient_x_input", "grad_cam"], P)
    data = json.loads(re.search(r'id="data">(.*?)</script>', e.html(), re.S)[1])
    for d in data.values():
        assert [part["name"] for part in d["pieces"][0]["prompt"]] == ["soft prompt"] * (name == "prompt") + [
            "caption",
            "en",
            "the photo",
        ]
        assert any(part["value"] not in ("+0.00 nats", "\u22120.00 nats") for part in d["pieces"][0]["prompt"][:-1])


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

    def shown():
        return page.get_attribute("#map", "src")

    def maps(method):
        return [piece["map"] for piece in data[method]["pieces"]]

    assert len({*maps("shap")}) == 3
    assert page.text_content(".caption") == CAPTION and page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert shown() == maps("grad_cam")[2] and page.evaluate("document.getElementById('map').naturalWidth") == 112
    assert (
        page.evaluate(
            "(p => Math.abs(p.width / p.height - p.naturalWidth / p.naturalHeight))(document.getElementById('photo'))"
        )
        < 0.02
    )
    first, second = page.locator(".caption button").all()
    first.hover()
    assert (
        shown() == maps("grad_cam")[0]
        and "airplanes" in page.text_content("#says")
        and "airplanes" in page.get_attribute("#map", "alt")
    )
    page.mouse.move(5, 5)
    assert shown() == maps("grad_cam")[2]  # back to what was kept
    first.focus()
    page.keyboard.press("Tab")
    assert shown() == maps("grad_cam")[1]  # the keyboard shows the next word
    page.keyboard.press("Enter")
    page.locator("input[value=shap]").check()
    assert second.get_attribute("aria-pressed") == "true" and shown() == maps("shap")[1]
    assert data["shap"]["pieces"][1]["facts"][-1][1] in page.text_content("#facts")
    page.locator("#opacity").fill("40")
    assert page.evaluate("getComputedStyle(document.getElementById('map')).opacity") == "0.4"
    page.locator("summary").click()
    assert page.locator(".all tbody tr").count() == 9 and page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert page.evaluate("[...document.images].every(i => i.alt)")


def test_prompt_in_a_browser(opened):
    """What the prompt's words add follows word and method, by mouse and by keyboard.

    It is read out, and it is text whatever it says.
    """
    page, data = opened, json.loads(opened.text_content("#data"))
    bars, names = page.locator("#prompt li"), [part["name"] for part in data["shap"]["pieces"][0]["prompt"]]

    def agrees(method, u):
        parts = data[method]["pieces"][u]["prompt"]
        assert [[s.text_content() for s in bar.locator("span").all()] for bar in bars.all()] == [
            [p["name"], p["value"]] for p in parts
        ]
        assert [t.get_attribute("aria-label") for t in page.locator("#prompt [role=img]").all()] == [
            p["says"] for p in parts
        ]
        assert page.text_content("#note") == data[method]["pieces"][u]["note"]
        boxes = page.evaluate("""[...document.querySelectorAll('.track')].map(track => {
            const a = track.getBoundingClientRect(), b = track.firstChild.getBoundingClientRect();
            const colour = getComputedStyle(track.firstChild).backgroundColor.replaceAll(' ', '');
            return [(b.left - a.left) / a.width, (b.right - a.left) / a.width, colour]; })""")
        for (left, right, colour), p in zip(boxes, parts):
            low, high = sorted((0.5, 0.5 + p["share"] / 2))
            assert abs(left - low) < 0.03 and abs(right - high) < 0.03 and colour == p["colour"]

    assert (
        names == ["caption", "&lt;b&gt;", "soft prompt", "en", "the photo"] and page.locator("#prompt img").count() == 0
    )
    agrees("grad_cam", 2)
    first, _second = page.locator(".caption button").all()
    first.hover()
    agrees("grad_cam", 0)
    page.mouse.move(5, 5)
    agrees("grad_cam", 2)
    first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    agrees("grad_cam", 1)
    page.locator("input[value=shap]").focus()
    page.keyboard.press("ArrowRight")  # to the next method, which explains the prompt itself
    agrees("gradient_x_input", 1)
    assert (
        "SHAP" not in page.text_content("#note")
        and data["gradient_x_input"]["pieces"][1]["prompt"] != data["shap"]["pieces"][1]["prompt"]
    )
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390


def test_in_a_notebook_the_page_keeps_to_its_frame(browser, written):
    "The rich display: srcdoc in a sandbox works, and the surrounding page keeps its own styles."
    import html

    page, text = browser.new_page(), html.escape(written.read_text(encoding="utf-8"))
    page.set_content(
        f'<h1>mine</h1><iframe sandbox="allow-scripts" srcdoc="{text}" width=800 height=780></iframe>',
    )
    frame = page.frame_locator("iframe")
    frame.locator(".caption button").first.hover()
    assert "airplanes" in frame.locator("#says").text_content()
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).fontSize") == "32px"
    page.close()
