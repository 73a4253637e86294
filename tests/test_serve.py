"""The page for people: used in a real browser, with good files and bad ones.

Nothing leaves the machine, and nothing stays when it ends.
"""

import importlib.util
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
from PIL import Image
from toys import STUCK

from rsstudy.commands.main import main
from rsstudy.common.settings import load_profile
from rsstudy.model.generate import generate_captions
from rsstudy.tuning.captioners import SHIPPED, load_captioner
from rsstudy.tuning.method import attach
from rsstudy.tuning.methods import methods
from rsstudy.tuning.saved import save_tuned, tuned_folder

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'rsstudy[serve]'")
MOST_MB = 2
# Notes every name that the server looks up and every address that it connects to, then serves.
START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
def note(event, args):
    if event == "socket.getaddrinfo": what = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple): what = args[1][0]
    else: return
    with open(os.environ["NOTES"], "a") as file: print(what, file=file)
sys.addaudithook(note)
from rsstudy.commands.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def P(tmp_path_factory):
    "A profile under which LoRA has been tuned: weights that give other captions than the base."
    import torch

    P = load_profile("nano", work=str(tmp_path_factory.mktemp("work")), max_new_tokens=4)
    captioner, method = attach(P, methods(P)["lora"]), methods(P)["lora"]
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in captioner.model.named_parameters():
            if re.fullmatch(method.trains, name):
                value.add_(torch.randn_like(value), alpha=0.05)
    save_tuned(captioner, method, tuned_folder(P, "lora", 0), seed=0, base=P.base_model)
    return P


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Files to send, good and bad."
    folder = tmp_path_factory.mktemp("files")
    blocks = np.kron(
        np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8), np.ones((30, 40, 1), np.uint8)
    )
    Image.fromarray(blocks).save(folder / "good.tif")
    Image.fromarray(blocks).save(folder / "<img src=x onerror=alert(1)>.png")
    (folder / "<b>text.png").write_text("no image at all")
    (folder / "large.png").write_bytes(os.urandom(MOST_MB * 2**20 + 1))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1_000_000))
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 5_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )
    return folder


@pytest.fixture(scope="module")
def server(P, tmp_path_factory):
    "The command, started; at the end Ctrl-C, and a look at what it left behind and whom it asked."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    words = [
        "serve",
        "--port",
        port,
        "--max-mb",
        MOST_MB,
        "--set",
        f"work={P.work_dir.parent}",
        "--set",
        f"max_new_tokens={P.max_new_tokens}",
    ]
    environment = os.environ | dict(
        TMPDIR=str(folder),
        NOTES=str(folder / "notes"),
        HTTP_PROXY="http://127.0.0.1:9",
        GRADIO_SHARE="True",
        HF_HUB_OFFLINE="1",
    )  # the last: base models may be asked for on the hub
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
        )
    try:
        line = process.stdout.readline()
        assert line == f"rsstudy: the page is at http://127.0.0.1:{port}/ (Ctrl-C ends it)\n", (
            folder / "said"
        ).read_text()
        assert list(folder.glob("rsstudy-serve-*"))
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        assert process.wait(STUCK) == 0 and not list(folder.glob("rsstudy-serve-*"))
        asked = {*(folder / "notes").read_text().split()}
        assert asked <= {"127.0.0.1", "localhost", "None"}, asked
        assert "Traceback" not in (folder / "said").read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def opened(browser, server):
    "The page on a telephone, 390 px wide, and everything it complained of or asked of others."
    context = browser.new_context(viewport=dict(width=390, height=844))
    page, wrong = context.new_page(), []
    page.set_default_timeout(60_000)

    def own(url):
        return url.startswith((server + "/", "data:", "blob:", "about:"))

    def gradios(message):
        return (
            "/assets/" in message.location["url"] or "upload_progress" in message.location["url"]
        )  # its own, on its own account

    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and not gradios(m) else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
    page.on("request", lambda r: wrong.append(r.url[:80]) if not own(r.url) else None)
    page.goto(server)
    page.wait_for_selector("#ask")
    yield page
    context.close()
    assert wrong == []


def send(page, file):
    page.set_input_files("#picture input[type=file]", file)


def captioned(page):
    "Presses the button; the caption that comes."
    page.wait_for_selector("#ask:not([disabled])")
    page.focus("#ask")
    page.keyboard.press("Enter")
    page.wait_for_selector("#explain:not([disabled])")
    return page.input_value("#caption textarea")


def test_caption_explain_and_another_model(opened, P, files):
    page, photo = opened, next(files.glob("*onerror*"))
    with Image.open(photo) as image:
        expected = {
            name: generate_captions(load_captioner(P, name), [image.convert("RGB")], max_new_tokens=P.max_new_tokens)[0]
            for name in (SHIPPED, "lora")
        }
    assert expected[SHIPPED] != expected["lora"] and all(expected.values())
    assert [box.get_attribute("value") for box in page.locator("#model input").all()] == [
        SHIPPED,
        "untuned paligemma-nano",
        "LoRA",
    ]
    assert page.locator("#ask").is_disabled() and page.locator("#explain").is_disabled()
    send(page, photo)
    assert captioned(page) == expected[SHIPPED]
    page.locator("#ways").get_by_label("Integrated Gradients").uncheck()
    page.click("#explain")
    frame = page.frame_locator("#explanation iframe[sandbox=allow-scripts]")
    frame.locator(".caption button").first.wait_for()
    assert (
        frame.locator(".caption").text_content() == expected[SHIPPED]
        and SHIPPED in frame.locator(".meta").text_content()
    )
    shown, word = frame.locator("#map").get_attribute("src"), frame.locator(".caption button").first
    word.hover()
    assert (
        frame.locator("#map").get_attribute("src") != shown
        and word.text_content() in frame.locator("#says").text_content()
    )
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    page.locator("#model").get_by_label("LoRA").check()
    page.wait_for_selector("#explain[disabled]")
    assert (
        page.input_value("#caption textarea") == "" and page.locator("#explanation iframe").count() == 0
    )  # nothing that the other model said
    assert captioned(page) == expected["lora"]
    page.locator("#picture").get_by_label("Remove Image").click()
    page.wait_for_selector("#ask[disabled]")
    assert page.input_value("#caption textarea") == ""


def test_bad_files_are_one_sentence_and_the_server_goes_on(opened, files):
    page = opened
    for name, sentence in [
        ("<b>text.png", "This is no image that can be read: PNG, JPEG, TIFF and WEBP files are taken."),
        ("bomb.png", "The image has 30,000 x 5,000 pixels: at most 50 million are taken."),
        ("large.png", "File(s) exceed the maximum allowed size of 2.0 Mb"),
    ]:
        send(page, files / name)
        page.locator(".toast-body", has_text=sentence).wait_for()
        assert page.locator(".toast-body").count() == 1 and page.locator("#ask").is_disabled()
        page.locator(".toast-body button").last.click()
        page.wait_for_selector(".toast-body", state="detached")
        page.wait_for_timeout(300)
    send(page, files / "good.tif")
    assert captioned(page)
    assert (
        page.evaluate("document.querySelector('#picture img').naturalWidth") == 280
    )  # a TIFF, which no browser shows, is shown
    page.locator("#examples button").nth(1).click()
    page.wait_for_function("document.querySelector('#picture img').naturalWidth == 224")
    assert captioned(page)


def test_server_keeps_to_itself(server):
    def status(path, **headers):
        try:
            return (
                urllib.request.build_opener(urllib.request.ProxyHandler({}))
                .open(urllib.request.Request(server + path, headers=headers))
                .status
            )
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/") == 200
    assert status("/", Host="rebound.example") == 403
    assert status("/gradio_api/file=/etc/passwd") in (403, 404) and status(
        f"/gradio_api/file={os.path.abspath('settings.ini')}"
    ) in (403, 404)
    assert status("/monitoring/summary") != 200 and status("/gradio_api/runs") != 200


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--port", "0"], "--port must be from 1 to 65535, got 0"),
        (["--port", "TAKEN"], "port TAKEN is in use"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 is no name or address of an interface of this machine"),
        (["--max-mb", "0"], "--max-mb must be above 0"),
        (["--model", "lora", "--seed", "7"], "the model 'lora' with seed 7 has not been tuned under the profile nano"),
        (["--model", "loar"], "unknown model 'loar': give paligemma-nano-riscm, none, lora"),
        (["--model", "./nowhere"], "unknown model './nowhere'"),
        (["--model", "FOLDER"], "FOLDER holds no model"),
        (["--set", "base_model=./nowhere"], "base model './nowhere' cannot be loaded"),
        (["--profile", "pico"], "unknown profile 'pico'"),
        (["--set", "ig_steps=0"], "ig_steps"),
    ],
)
def test_bad_request_is_one_sentence(words, expected, P, tmp_path, capsys):
    with socket.socket() as taken, socket.socket() as free:
        for s in (taken, free):
            s.bind(("127.0.0.1", 0))
        taken.listen()
        names = dict(TAKEN=str(taken.getsockname()[1]), FOLDER=str(tmp_path), FREE=str(free.getsockname()[1]))
        free.close()
        usual = [] if "--port" in words else ["--port", "FREE"]
        status = main(["serve", *(names.get(w, w) for w in (*words, *usual)), "--set", f"work={P.work_dir.parent}"])
    error = capsys.readouterr().err.strip().splitlines()
    for name, value in names.items():
        expected = expected.replace(name, value)
    assert status == 2 and len(error) == 1 and error[0].startswith("rsstudy: ") and expected in error[0], error


def test_without_gradio(capsys, monkeypatch, P):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "gradio" else real(name, *more))
    assert main(["serve", "--port", "47860"]) == 2
    assert (
        capsys.readouterr().err
        == "rsstudy: the page needs Gradio, which is not installed: pip install 'rsstudy[serve]'\n"
    )
