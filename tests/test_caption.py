"""Captioning anything, as its user meets it: killed and resumed, broken files, archives, rasters, a cluster."""

import contextlib
import csv
import json
import logging
import os
import signal
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import NO_RISCM, RISCM, STUCK, command, wait_for

from rsstudy.commands.main import main
from rsstudy.common.settings import load_profile
from rsstudy.data.captionfiles import read_predictions
from rsstudy.imagery.captioning import caption_paths
from rsstudy.model.base import load_base
from rsstudy.model.generate import Captioner

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--set", "generate_batch=4", "--model", "none")


@pytest.fixture(scope="module")
def captioner():
    return Captioner(*load_base(load_profile("nano")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two dozen images in two folders, with a broken one and one of 16 bits among them."
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for i in range(22):
        blocks = np.kron(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((40, 40, 1), np.uint8))
        Image.fromarray(blocks).save(
            folder / ("more" if i % 2 else ".") / f"{i:02d}.{('png', 'jpg', 'webp', 'bmp', 'tif')[i % 5]}"
        )
    Image.fromarray(np.arange(200 * 300, dtype=np.uint16).reshape(200, 300) // 20 + 500).save(folder / "deep.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    return folder


def files(folder, out):
    "What a run leaves, byte for byte, without the names of folders."
    return {
        p.name.removeprefix(out): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.name.startswith(out)
    }


@pytest.fixture(scope="module")
def whole(photos, captioner, tmp_path_factory):
    "What an uninterrupted run leaves."
    folder = tmp_path_factory.mktemp("whole")
    done = caption_paths(
        photos, folder / "c.jsonl", captioner, P=load_profile("nano", generate_batch=4), progress=False
    )
    assert done.counts == dict(jobs=24, captions=23, unreadable=1, left_out=0, no_heat_map=0)
    return files(folder, "c.jsonl")


def test_command(photos, whole, tmp_path, capsys):
    "The command does what the function does; names what could not be read; says so in its status; is done once."
    words = ["caption", str(photos), "--out", str(tmp_path / "c.jsonl"), *SMALL]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "captions: 100%" in said.err and "image/s" in said.err and "<00:00" in said.err  # rate and remaining time
    assert (
        f"23 captions in {tmp_path / 'c.jsonl'}" in said.err and f"{photos}/broken.jpg: it cannot be read" in said.err
    )
    assert files(tmp_path, "c.jsonl")[""] == whole[""] and len(read_predictions(tmp_path / "c.jsonl")) == 23
    before = (tmp_path / "c.jsonl").stat().st_mtime_ns
    assert (
        main(words) == 1
        and "written before" in capsys.readouterr().err
        and (tmp_path / "c.jsonl").stat().st_mtime_ns == before
    )
    assert main([*words, "--force"]) == 1 and files(tmp_path, "c.jsonl")[""] == whole[""]


SLOW = """
import sys, time, rsstudy.imagery.captioning as c
real = c.caption_block
def slow(*args):
    time.sleep(.3)
    return real(*args)
c.caption_block = slow
from rsstudy.commands.main import main
sys.exit(main())
"""


def test_killed(photos, whole, tmp_path, capsys):
    """Killed in the middle, the same command ends with the bytes of a run that was never killed.

    Another request does not mix with it.
    """
    words = ["caption", str(photos), "--out", str(tmp_path / "c.jsonl"), *SMALL]
    state = tmp_path / "c.jsonl.part" / "state.json"
    run = subprocess.Popen([sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: run.poll() is not None or (state.is_file() and json.loads(state.read_text())["jobs"] >= 8))
    second = main(words)
    run.kill()
    run.communicate()
    assert second == 2 and f"is in use by another run (process {run.pid})" in capsys.readouterr().err
    assert 8 <= json.loads(state.read_text())["jobs"] < 24
    with open(tmp_path / "c.jsonl.part" / "c.jsonl", "a") as file:
        file.write('{"half')  # as a kill in the middle of a write would leave it
    assert (
        main([*words, "--model", "paligemma-nano"]) == 2
        and 'was begun with model "none", now it is "paligemma-nano"' in capsys.readouterr().err
    )
    assert main(words) == 1
    assert {k: v for k, v in files(tmp_path, "c.jsonl").items() if "run" not in k} == {
        k: v for k, v in whole.items() if "run" not in k
    }
    assert not (tmp_path / "c.jsonl.part").exists()


def test_forms(photos, captioner, tmp_path, capsys):
    "An archive, a pattern and a file that is named twice; CSV and GeoJSON; scored as they are."
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("00.png", "10.png"):
            archive.write(photos / name, f"inner/{name}")
        archive.writestr("../evil.png", (photos / "00.png").read_bytes())
    given = [tmp_path / "a.zip", f"{photos}/1*.png", photos / "10.png"]
    found = caption_paths(given, tmp_path / "c.csv", captioner, progress=False)
    names = [f"{tmp_path}/a.zip/inner/00.png", f"{tmp_path}/a.zip/inner/10.png", f"{photos}/10.png"]
    with open(tmp_path / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image"] for row in rows) == sorted(names) and found.status == 1
    assert "leads out of the archive" in json.loads((tmp_path / "c.csv.failed.jsonl").read_text())["unreadable"]
    by_name = {row["image"]: row["caption"] for row in rows}
    assert by_name[names[1]] == by_name[names[2]]  # the same image, in the archive and beside it
    caption_paths(given, tmp_path / "c.geojson", captioner, progress=False)
    features = json.loads((tmp_path / "c.geojson").read_text())["features"]
    assert {f["properties"]["image"]: f["properties"]["caption"] for f in features} == by_name and all(
        f["geometry"] is None for f in features
    )
    (tmp_path / "human.jsonl").write_text(
        "".join(json.dumps(dict(image=f"inner/{Path(n).name}", captions=["a tree ."])) + "\n" for n in names[:2])
    )
    (tmp_path / "two.csv").write_bytes(
        b"".join(
            line
            for line in (tmp_path / "c.csv").read_bytes().splitlines(True)
            if line.startswith(b"image,") or b"inner" in line
        )
    )
    assert (
        main(
            [
                "score",
                str(tmp_path / "two.csv"),
                "--references",
                str(tmp_path / "human.jsonl"),
                "--metrics",
                "bleu",
                "--resamples",
                "10",
            ]
        )
        == 0
    )
    assert "bleu" in capsys.readouterr().out


def scene(path, side=1000):
    "A satellite scene: four bands of 16 bits, turned by 20 degrees in UTM, without data in its left part."
    rasterio = pytest.importorskip("rasterio", reason="rasters need rasterio: pip install 'rsstudy[geo]'")
    from affine import Affine

    values = np.kron(
        np.random.default_rng(0).integers(800, 4000, (4, side // 50, side // 50)), np.ones((1, 50, 50), int)
    ).astype(np.uint16)
    values[:, :, : side * 45 // 100] = 0
    transform = Affine.translation(500_000, 5_500_000) * Affine.rotation(-20) * Affine.scale(10, -10)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=side,
        height=side,
        count=4,
        dtype="uint16",
        transform=transform,
        crs="EPSG:32633",
        nodata=0,
        tiled=True,
    ) as file:
        file.write(values)
    return path


def test_scene(tmp_path, captioner):
    """A GeoTIFF above 896 pixels is cut by itself, and outlines lie where they should.

    Tiles without data are left out, which is said and no failure.
    """
    done = caption_paths(
        scene(tmp_path / "scene.tif"), tmp_path / "c.geojson", captioner, bands=(4, 3, 2), explain=True, progress=False
    )
    assert (done.status, done.counts) == (0, dict(jobs=9, captions=6, unreadable=0, left_out=3, no_heat_map=0))
    assert "3 left out, with too little valid data" in done.text() and "0.4%" not in done.text()
    features = json.loads((tmp_path / "c.geojson").read_text())["features"]
    assert [f["properties"]["tile"] for f in features] == [[x, y, 448, 448] for y in (0, 392, 552) for x in (392, 552)]
    from rasterio.warp import transform

    for f in features:
        x, y, w, h = f["properties"]["tile"]
        ring = np.array(f["geometry"]["coordinates"][0])
        angle = np.deg2rad(-20)
        corners = (
            np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]).T
            @ (np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)]) * [10, -10]).T
        )
        east, north = transform("EPSG:4326", "EPSG:32633", *ring.T.tolist())
        for e, n in corners.T + [500_000, 5_500_000]:
            assert np.hypot(np.array(east) - e, np.array(north) - n).min() < 0.1  # metres
    picture = tmp_path / features[0]["properties"]["heat_map"]
    with Image.open(picture) as image:
        assert image.size[0] > 600 and np.ptp(np.asarray(image)) > 200
    assert len(list(picture.parent.iterdir())) == 6


def test_without_rasterio(photos, tmp_path, captioner, monkeypatch):
    "A plain TIFF is captioned all the same, a located one too, with a word; one that Pillow would spoil is refused."
    rasterio = pytest.importorskip("rasterio", reason="writes a GeoTIFF: pip install 'rsstudy[geo]'")
    with rasterio.open(
        tmp_path / "eight.tif",
        "w",
        driver="GTiff",
        width=300,
        height=200,
        count=3,
        dtype="uint8",
        crs="EPSG:32633",
        transform=rasterio.transform.from_origin(5e5, 5e6, 1, 1),
    ) as file:
        file.write(np.random.default_rng(0).integers(0, 255, (3, 200, 300), dtype=np.uint8))
    scene(tmp_path / "deep.tif", 100)
    for module in ("rsstudy.imagery.rasters", "rsstudy.imagery.views"):
        monkeypatch.setattr(f"{module}.has_rasterio", lambda: False)
    with pytest.warns(UserWarning, match="get no footprint"):
        done = caption_paths(
            [tmp_path / "eight.tif", photos / "04.tif"], tmp_path / "c.jsonl", captioner, progress=False
        )
    assert done.counts["captions"] == 2
    with pytest.raises(
        RuntimeError, match=r"deep.tif: GeoTIFFs need rasterio, which is not installed: pip install 'rsstudy\[geo\]'"
    ):
        caption_paths(tmp_path / "deep.tif", tmp_path / "d.jsonl", captioner, progress=False)


def test_a_long_list_takes_no_more_memory_than_a_short_one(tmp_path):
    "The list of images lies on disk: Python's own memory has the same peak for a hundred times as many."
    import tracemalloc

    from rsstudy.imagery.sources import Place, read_jobs, write_jobs

    def peak(count):
        tracemalloc.start()
        try:
            assert (
                write_jobs(
                    tmp_path / f"{count}.sqlite", ((f"{i}.png", Place(f"/photos/{i}.png")) for i in range(count))
                )
                == count
            )
            assert sum(map(len, read_jobs(tmp_path / f"{count}.sqlite"))) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is loaded once
    assert peak(30_000) < peak(300) + 200_000


@pytest.mark.parametrize(
    "words, said",
    [
        (["no.png"], "no.png does not exist: give image files, folders"),
        (["EMPTY"], "holds no images: files that end in"),
        (["PHOTOS/*.xyz"], "no image matches"),
        (["PHOTOS", "--out", "c.txt"], "captions are written as .jsonl, .csv, .geojson, got .txt"),
        (["PHOTOS", "--out", "no/c.csv"], "no does not exist"),
        (["PHOTOS", "--out", "EMPTY/a/c.csv"], "a does not exist"),
        (["PHOTOS", "--out", "FOLDER.csv"], "is a folder: name a file in it"),
        (["PHOTOS", "--out", "MINE.csv"], "exists and was not written by this command"),
        (["PHOTOS", "--model", "magic"], "unknown model 'magic'"),
        (["PHOTOS", "--model", "lora", "--set", "work=/nonexistent"], "has not been tuned under the profile nano"),
        (["PHOTOS", "--bands", "4,3"], "--bands 4,3: give three band numbers"),
        (["PHOTOS", "--bands", "red"], "--bands red: give band numbers"),
        (["SCENE", "--bands", "9,1,1"], "has no band 9, it has 4"),
        (["SCENE", "--percentiles", "none"], "has pixels of kind uint16, which need percentiles"),
        (["PHOTOS", "--percentiles", "98,2"], "--percentiles 98,2: give two numbers"),
        (["PHOTOS", "--tile", "8"], "--tile 8: a tile has 32 pixels"),
        (["PHOTOS", "--tile", "64", "--overlap", "64"], "--overlap 64: it must be 0 or more and below the 64"),
        (["PHOTOS", "--valid", "2"], "--valid 2: give a share"),
        (["PHOTOS", "--method", "shap"], "--method belongs to --explain"),
        (["PHOTOS", "--explain", "--method", "lime"], "unknown attribution method 'lime'"),
        (["PHOTOS", "--explain", "MINE.csv"], "MINE.csv is no folder"),
        (["PHOTOS", "--address", "auto"], "--address belongs to --engine ray"),
        (["BROKEN.zip"], "is no zip archive that can be read"),
    ],
)
def test_bad_request_is_one_sentence(photos, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.csv").mkdir()
    for name in ("mine.csv", "broken.zip"):
        (tmp_path / name).write_text("mine")
    if "SCENE" in words:
        scene(tmp_path / "scene.tif", 100)
    monkeypatch.setattr("rsstudy.imagery.captioning.run_local", lambda *a, **k: pytest.fail("the model was loaded"))
    names = dict(PHOTOS=str(photos), EMPTY="empty", FOLDER="folder", MINE="mine", BROKEN="broken", SCENE="scene.tif")
    status = main(["caption", *(next((w.replace(k, v) for k, v in names.items() if k in w), w) for w in words)])
    error = [
        line
        for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
        if line and not line.startswith("listing")
    ]
    replaced = next((said.replace(k, v) for k, v in names.items() if k in said), said)
    assert status == 2 and len(error) == 1 and error[0].startswith("rsstudy: ") and replaced in error[0], error
    assert not list(tmp_path.glob("*.part")) and (tmp_path / "mine.csv").read_text() == "mine"


def test_full_disk(photos, captioner, whole, tmp_path, monkeypatch):
    "What does not fit is not lost: the same call goes on when there is room."
    real, count = os.fsync, iter(range(100))

    def fsync(handle):
        if next(count) >= 5:
            raise OSError(28, "No space left on device")
        real(handle)

    again = partial(
        caption_paths, photos, tmp_path / "c.jsonl", captioner, P=load_profile("nano", generate_batch=4), progress=False
    )
    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match=r"no space left on the disk for .*c\.jsonl: 8 captions are safe"):
        again()
    monkeypatch.setattr("os.fsync", real)
    again()
    assert files(tmp_path, "c.jsonl")[""] == whole[""]


def test_real_images(captioner, tmp_path):
    "A few of the published photographs; the model's caption of one is what it writes of that one alone."
    from rsstudy.model.generate import generate_captions

    data = RISCM / "resized"
    if not data.is_dir():
        pytest.skip(NO_RISCM)
    done = caption_paths(f"{data}/*_1000?.jpg", tmp_path / "c.jsonl", captioner, progress=False)
    rows = read_predictions(tmp_path / "c.jsonl")
    assert done.status == 0 and len(rows) == done.counts["captions"] > 0
    beams = load_profile("nano").num_beams
    assert rows[0].captions == generate_captions(captioner, [Image.open(rows[0].image)], num_beams=beams)


@pytest.fixture(scope="module")
def machines():
    "A cluster of two machines with a core each, both of them here."
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rsstudy[ray]'")
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster = Cluster(
        initialize_head=True,
        head_node_args=dict(
            num_cpus=1, include_dashboard=False, object_store_memory=10**8, _system_config=dict(worker_niceness=0)
        ),
    )
    cluster.add_node(num_cpus=1, object_store_memory=10**8)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def workers():
    "Process numbers of the copies of the model."
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"ray::MapWorker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def test_cluster(photos, whole, machines, tmp_path):
    "Ray Data on two machines, a worker killed in the middle: the bytes of the local engine."
    words = command(
        "caption", photos, "--out", tmp_path / "c.jsonl", "--engine", "ray", "--address", machines.address, *SMALL
    )
    before = set(workers())
    run = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1")
    )
    wait_for(lambda: run.poll() is not None or set(workers()) - before)
    with contextlib.suppress(ProcessLookupError):
        os.kill(min(set(workers()) - before), signal.SIGKILL)
    _, said = run.communicate(timeout=STUCK)
    assert run.returncode == 1 and "23 captions in" in said and "Traceback" not in said, said
    assert {k: v for k, v in files(tmp_path, "c.jsonl").items() if "run" not in k} == {
        k: v for k, v in whole.items() if "run" not in k
    }
