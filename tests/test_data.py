"""Captions from folders and hub datasets: every kind of bad input, and the real images where they are at hand.

The real data is looked for in $RSSTUDY_RISCM; without it those tests are skipped.
"""

import csv
import dataclasses
import json
import os
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from toys import NO_RISCM, RISCM

from rsstudy.common.files import FALLBACKS
from rsstudy.common.settings import load_profile
from rsstudy.data.badrows import KINDS, BadRows
from rsstudy.data.duplicates import group_digests, leakage, near_duplicates, thumbnails
from rsstudy.data.load import load_captions, profile_subset, subset
from rsstudy.data.splits import seeded_split
from rsstudy.data.table import CAPTION_COLUMNS, HUB, draw_folder
from rsstudy.model.clip import ClipScorer, tiny_clip
from rsstudy.training.captions import choose_all

real = pytest.mark.skipif(not (RISCM / "captions.csv").is_file(), reason=NO_RISCM)
FIVE = "one .,two .,three .,four .,five ."
pytestmark = pytest.mark.filterwarnings(
    "ignore:bad rows", "ignore:source", "ignore:split", "ignore:official", "ignore:left out", "ignore:.* images"
)


@pytest.fixture
def folder(tmp_path):
    return draw_folder(tmp_path / "data", 10)


def profile(data, **settings):
    return load_profile("nano", data=str(data), **settings)


def load(data, **settings):
    return load_captions(profile(data, **settings), progress=False)


def add(folder, *lines):
    with open(folder / "captions.csv", "ab") as f:
        for line in lines:
            f.write(line if isinstance(line, bytes) else line.encode() + b"\n")


def problems(data):
    return [(b.row, b.kind) for b in sorted(data.report)]


# -- the schema


def test_schema_and_lazy_images(folder):
    data = load(folder)
    assert data.dataset.column_names == ["image_id", "source", "split", "image", "captions"]
    row = data.dataset[3]
    assert (row["image_id"], row["source"], row["split"], row["image"].size, row["image"].mode) == (
        "UCM_3.jpg",
        "UCM",
        "train",
        (16, 16),
        "RGB",
    )
    assert row["captions"] == [f"caption {j} of image 3 ." for j in range(5)]
    cell = data.dataset.data.column("image")[3].as_py()
    assert cell["bytes"] is None and cell["path"].endswith("UCM_3.jpg")  # no pixels in the table


def test_grey_images_come_as_rgb(folder):
    Image.new("L", (16, 16), 90).save(folder / "resized" / "UCM_0.jpg")
    assert load(folder).dataset[0]["image"].mode == "RGB"


def test_digest_follows_the_data_and_not_its_place(folder, tmp_path):
    there = draw_folder(tmp_path / "elsewhere", 10)
    before = load(folder).digest
    assert load(there).digest == before
    lines = (there / "captions.csv").read_text().splitlines()
    (there / "captions.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert load(there).digest == before  # nor the order of rows
    Image.new("RGB", (16, 16)).save(there / "resized" / "UCM_0.jpg")
    assert load(there).digest != before
    assert load(folder, clean=False).digest != before
    assert load(folder, split="seeded").digest != before


# -- bad rows


def spoil(name):
    """Each spoils a drawn folder in one way; returns the row's line and its kind."""

    def truncated(f):
        path = f / "resized" / "UCM_2.jpg"
        path.write_bytes(path.read_bytes()[:-20])
        return 4, "unreadable image"

    def html(f):
        (f / "resized" / "UCM_2.jpg").write_text("<html>404</html>")
        return 4, "unreadable image"

    def empty(f):
        (f / "resized" / "UCM_2.jpg").write_bytes(b"")
        return 4, "unreadable image"

    def missing(f):
        (f / "resized" / "UCM_2.jpg").unlink()
        return 4, "missing image"

    def directory(f):
        (f / "resized" / "UCM_2.jpg").unlink()
        (f / "resized" / "UCM_2.jpg").mkdir()
        return 4, "missing image"

    def pipe(f):
        (f / "resized" / "UCM_2.jpg").unlink()
        os.mkfifo(f / "resized" / "UCM_2.jpg")
        return 4, "missing image"

    def link(f):
        (f / "resized" / "UCM_2.jpg").rename(f / "secret.jpg")
        (f / "resized" / "UCM_2.jpg").symlink_to("../secret.jpg")
        return 4, "path leaving the folder"

    def ring(f):
        (f / "resized" / "UCM_2.jpg").unlink()
        (f / "resized" / "UCM_2.jpg").symlink_to("UCM_2.jpg")
        return 4, "missing image"

    def parent(f):
        add(f, f"UCM,train,../captions.csv,{FIVE}")
        return 12, "path leaving the folder"

    def absolute(f):
        add(f, f"UCM,train,/etc/hostname,{FIVE}")
        return 12, "path leaving the folder"

    def windows(f):
        add(f, f"UCM,train,C:\\x.jpg,{FIVE}")
        return 12, "path leaving the folder"

    def nameless(f):
        add(f, f"UCM,train,,{FIVE}")
        return 12, "missing image"

    def blank(f):
        add(f, "UCM,train,UCM_0.jpg,a,b, ,d,e")
        return 12, "empty caption"

    def invisible(f):
        add(f, "UCM,train,UCM_0.jpg,a,b,c,\u200b,e")
        return 12, "empty caption"

    def short(f):
        add(f, "UCM,train,UCM_0.jpg,a,b,c,d")
        return 12, "wrong number of fields"

    def long(f):
        add(f, f"UCM,train,UCM_0.jpg,{FIVE},six")
        return 12, "wrong number of fields"

    def quote(f):
        add(f, 'UCM,train,UCM_0.jpg,"never closed,b,c,d,e', f"UCM,train,UCM_1.jpg,{FIVE}")
        return 12, "wrong number of fields"

    def latin1(f):
        add(f, "UCM,train,UCM_0.jpg,caf\xe9,b,c,d,e\n".encode("latin-1"))
        return 12, "not UTF-8"

    def twice(f):
        add(f, f"UCM,train,UCM_0.jpg,{FIVE}")
        return 12, "duplicate id"

    def two_splits(f):
        add(f, f"UCM,test,UCM_0.jpg,{FIVE}")
        return 12, "image in two splits"

    def same_bytes(f):
        (f / "resized" / "copy.jpg").write_bytes((f / "resized" / "UCM_0.jpg").read_bytes())
        add(f, f"UCM,test,copy.jpg,{FIVE}")
        return 12, "image in two splits"

    def no_split(f):
        add(f, f"UCM,holdout,UCM_0.jpg,{FIVE}")
        return 12, "unknown split"

    ways = {k: v for k, v in locals().items() if callable(v)}
    return ways if name is None else ways[name]


@pytest.mark.parametrize("way", spoil(None))
def test_a_bad_row_is_dropped_and_named(folder, way):
    bad = spoil(way)(folder)
    FALLBACKS.pop("bad rows", None)
    with pytest.warns(UserWarning, match="bad rows: dropped"):
        data = load(folder)
    assert problems(data) == [bad]
    assert len(data) == data.report.total - data.report.dropped == (9 if bad[0] == 4 else 10)
    assert (
        str(bad[0]) in data.report.summary() and bad[1] in FALLBACKS["bad rows"]
    )  # it is in every manifest from here on
    assert bad[1] in data.report.table()
    assert BadRows.from_json(json.loads(json.dumps(data.report.to_json()))).summary() == data.report.summary()
    with pytest.raises(ValueError, match=f"1 of {data.report.total} rows are bad .1 {bad[1]}."):
        load(folder, strict=True)


def test_every_kind_of_problem_is_tested(tmp_path):
    found = {spoil(way)(draw_folder(tmp_path / way, 10))[1] for way in spoil(None)}
    assert found == set(KINDS)


def test_all_problems_are_in_one_report(folder):
    for way in ("truncated", "blank", "latin1", "two_splits", "parent"):
        spoil(way)(folder)
    data = load(folder)
    assert problems(data) == [
        (4, "unreadable image"),
        (12, "empty caption"),
        (13, "not UTF-8"),
        (14, "image in two splits"),
        (15, "path leaving the folder"),
    ]
    assert data.report.counts().keys() == {k for _, k in problems(data)}
    with pytest.raises(ValueError, match="5 of 14 rows are bad"):
        load(folder, strict=True)


def test_a_bad_row_does_not_take_the_good_ones_place(folder):
    lines = (folder / "captions.csv").read_text().splitlines()
    (folder / "captions.csv").write_text("\n".join([lines[0], "UCM,train,UCM_0.jpg,a,b,,d,e", *lines[1:]]) + "\n")
    data = load(folder)
    assert problems(data) == [(2, "empty caption")] and "UCM_0.jpg" in data.dataset["image_id"][:]


def test_harmless_oddities(folder):
    text = (folder / "captions.csv").read_text().replace("\n", "\r\n").replace("UCM,val,", " UCM , Validation ,")
    (folder / "captions.csv").write_bytes(
        b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n"
    )  # byte-order mark, CRLF, blank lines, padded cells
    (folder / "resized" / "in.jpg").symlink_to("UCM_1.jpg")  # a link inside the folder
    Image.new("RGB", (16, 16)).save(folder / "resized" / "p.png")
    add(folder, f"UCM,train,p.png,{FIVE}")
    data = load(folder)
    assert problems(data) == [] and Counter(data.dataset["split"][:]) == dict(train=9, val=1, test=1)


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "has none"),
        ("source,split,image,caption_1,caption_2\n", "lacks the columns caption_3, caption_4, caption_5"),
        ("source,split,caption_1,caption_2,caption_3,caption_4,caption_5\n", "lacks the column image"),
        ("image,image," + ",".join(CAPTION_COLUMNS) + "\n", "a column twice"),
        ("source;split;image;caption_1\n", "lacks the columns"),
        ("source,split,image," + ",".join(CAPTION_COLUMNS) + "\n", "no good row"),
    ],
)
def test_a_table_without_its_columns(folder, text, message):
    (folder / "captions.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_table_in_utf16(folder):
    (folder / "captions.csv").write_text((folder / "captions.csv").read_text(), encoding="utf-16")
    with pytest.raises(ValueError, match="UTF-16"):
        load(folder)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load(tmp_path / "absent")
    (folder / "resized").rename(folder / "images")
    with pytest.raises(FileNotFoundError, match="resized"):
        load(folder)
    (folder / "captions.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"captions\.csv"):
        load(folder)


# -- splits and subsets


def test_seeded_split_keeps_equal_images_together(tmp_path):
    folder = draw_folder(tmp_path / "data", 60)
    for i in range(20):
        (folder / "resized" / f"copy_{i}.jpg").write_bytes((folder / "resized" / f"UCM_{i}.jpg").read_bytes())
        add(folder, f"UCM,test,copy_{i}.jpg,{FIVE}")
    data = load(folder, split="seeded", split_seed=3)
    of = dict(zip(data.dataset["image_id"][:], data.dataset["split"][:]))
    assert problems(data) == [] and all(of[f"copy_{i}.jpg"] == of[f"UCM_{i}.jpg"] for i in range(20))
    sizes = Counter(of.values())
    assert abs(sizes["val"] - 8) <= 1 and abs(sizes["test"] - 8) <= 1 and sizes["train"] >= 62
    assert of == dict(zip(data.dataset["image_id"][:], load(folder, split="seeded", split_seed=3).dataset["split"][:]))
    assert of != dict(zip(data.dataset["image_id"][:], load(folder, split="seeded", split_seed=4).dataset["split"][:]))


def test_seeded_split_is_80_10_10():
    assert Counter(seeded_split([f"{i}" for i in range(44_521)], 0)) == dict(train=35_617, val=4_452, test=4_452)


def test_a_table_without_splits_is_split_and_says_so(folder):
    with open(folder / "captions.csv", newline="") as file:
        rows = list(csv.reader(file))
    with open(folder / "captions.csv", "w", newline="") as f:
        csv.writer(f).writerows(row[2:] for row in rows)
    FALLBACKS.pop("split", None), FALLBACKS.pop("source", None)
    with pytest.warns(UserWarning) as said:
        data = load(folder)
    assert any("80/10/10" in str(w.message) for w in said) and any("'unknown'" in str(w.message) for w in said)
    assert (
        data.split == "seeded"
        and set(data.dataset["source"][:]) == {"unknown"}
        and set(data.dataset["split"][:]) == {"train", "val", "test"}
    )


def test_subsets_are_nested_and_seeded(tmp_path):
    data = load(draw_folder(tmp_path / "data", 40))
    parts = [subset(data, "train", n, 5)["image_id"][:] for n in (3, 10, 0)]
    assert parts[0] == parts[1][:3] and parts[1] == parts[2][:10] and len(parts[2]) == 32
    assert subset(data, "train", 10, 6)["image_id"][:] != parts[1]
    assert len(profile_subset(data, profile("scenes", val_images=2), "val")) == 2
    FALLBACKS.pop("test images", None)
    with pytest.warns(UserWarning, match="9 wanted, the data has 4"):
        assert len(subset(data, "test", 9)) == 4


# -- protocols


def under(data, split, **settings):  # the protocols' names are checked by the loader too
    return load_captions(dataclasses.replace(profile(data, **settings), split=split), progress=False)


def split_counts(data):
    return Counter(zip(data.dataset["source"][:], data.dataset["split"][:]))


@pytest.fixture
def three(tmp_path):
    """30 images, ten each of UCM, RSICD and NWPU: 8 train, 1 val, 1 test."""
    folder = draw_folder(tmp_path / "three", 30)
    lines = (folder / "captions.csv").read_text().splitlines()
    named = [line.replace("UCM", ("UCM", "RSICD", "NWPU")[i // 10], 1) for i, line in enumerate(lines[1:])]
    (folder / "captions.csv").write_text("\n".join([lines[0], *named]) + "\n")
    return folder


def test_official_exchanges_val_and_test_of_rsicd(three):
    for topic in ("official split", "official images"):
        FALLBACKS.pop(topic, None)
    with pytest.warns(UserWarning) as said:
        data, file = under(three, "official"), under(three, "file")
    assert any("what RISCM calls val is RSICD's test" in str(w.message) for w in said) and any(
        "UCM 1 of 210 test" in str(w.message) for w in said
    )
    assert "RSICD" in FALLBACKS["official split"]  # every manifest from here on says so
    changed = {
        a: (b, c)
        for a, b, c in zip(data.dataset["image_id"][:], file.dataset["split"][:], data.dataset["split"][:])
        if b != c
    }
    assert changed == {
        "UCM_18.jpg": ("val", "test"),
        "UCM_19.jpg": ("test", "val"),
    }  # the images of RSICD, whatever their names
    assert data.split == data.facts()["split"] == "official" and data.digest != file.digest and len(data) == len(file)


def test_leave_one_source_out(three):
    data = under(three, "leave_NWPU_out")
    assert split_counts(data) == {
        ("UCM", "train"): 8,
        ("UCM", "val"): 1,
        ("RSICD", "train"): 8,
        ("RSICD", "val"): 1,
        ("NWPU", "test"): 1,
    }
    assert len(data.hashes) == len(data.sizes) == len(data) == 19 and data.left_out == 11 and data.report.dropped == 0
    assert len({under(three, f"leave_{s}_out").digest for s in ("NWPU", "UCM", "RSICD")}) == 3
    assert "leave_NWPU_out" in under(three, "leave_NWPU_out").split and "NWPU" in FALLBACKS["left out"]
    assert set(subset(data, "test")["source"][:]) == {"NWPU"}


@pytest.mark.parametrize(
    "split,message",
    [
        ("leave_WHU_out", "has no source WHU, only NWPU, RSICD, UCM"),
        ("leave__out", "must be file, seeded, official or leave_<SOURCE>_out"),
    ],
)
def test_protocols_that_cannot_be(three, split, message):
    with pytest.raises(ValueError, match=message):
        under(three, split)


def test_protocols_need_sources_and_official_needs_splits(three, folder, cache):
    table = (three / "captions.csv").read_text()
    rows = list(csv.reader(table.splitlines()))
    for kept, split, message in (
        (1, "official", r"'official' needs the source of every image.*names none for 30 of 30"),
        (1, "leave_UCM_out", "needs the source of every image"),
        (None, "official", "starts from the table's own splits"),
    ):
        with open(three / "captions.csv", "w", newline="") as f:
            csv.writer(f).writerows(row[1:] if kept else row[:1] + row[2:] for row in rows)
        with pytest.raises(ValueError, match=message):
            under(three, split)
    data = under(three, "leave_UCM_out")  # without the table's splits, drawn ones serve
    assert set(subset(data, "test")["source"][:]) == {"UCM"} and "UCM" not in subset(data, "train")["source"][:]
    (three / "captions.csv").write_text(table.replace("UCM,train,UCM_0.jpg", ",train,UCM_0.jpg"))  # one nameless row
    with pytest.raises(ValueError, match="names none for 1 of 30"):
        under(three, "leave_NWPU_out")
    hub = parquet(cache / "hub", folder)
    for split in ("official", "leave_UCM_out"):
        with pytest.raises(ValueError, match="needs the source of every image"):
            under(hub, split)
    with pytest.raises(ValueError, match=r"known for NWPU, RSICD, UCM, and .* has nature"):
        (three / "captions.csv").write_text(table.replace("UCM,train,UCM_0.jpg", "nature,train,UCM_0.jpg"))
        under(three, "official")


def test_leaks_and_a_split_without_them(tmp_path):
    folder = draw_folder(tmp_path / "data", 60, side=64)
    for i in range(12):  # brighter, compressed again, turned: in test
        image = Image.open(folder / "resized" / f"UCM_{i}.jpg").point(lambda v: min(255, v * 1.1))
        (image if i < 6 else image.transpose(Image.Transpose.ROTATE_90)).save(
            folder / "resized" / f"copy_{i}.jpg", quality=60
        )
        add(
            folder,
            f"NWPU,test,copy_{i}.jpg," + (f"Caption 0 of image {i} .,two .,three .,four .,five ." if i < 3 else FIVE),
        )
    data = load(folder)
    pairs = near_duplicates(data.hashes, thumbnails(data.dataset, progress=False))
    found = leakage(data.dataset, pairs)
    trained = [i for i in range(12) if i not in (8, 9)]
    assert found["pairs"]["near"] == {"train-test": {"NWPU-UCM": 6}}
    assert found["pairs"]["turned"] == {
        "train-test": {"NWPU-UCM": 4},
        "val-test": {"NWPU-UCM": 1},
        "test": {"NWPU-UCM": 1},
    }
    test = [i for i, s in zip(data.dataset["image_id"][:], data.dataset["split"][:]) if s == "test"]
    assert found["clean"] == [i for i in test if i not in {f"copy_{k}.jpg" for k in trained}]
    assert found["caption_unseen"] == [i for i in test if i not in ("copy_0.jpg", "copy_1.jpg", "copy_2.jpg")]
    assert found["captions_seen"]["NWPU"]["captions"] == pytest.approx(3 / 60)
    loose, tight = seeded_split(data.hashes, 0), seeded_split(group_digests(data.hashes, pairs), 0)

    def torn(split):
        return sum(split[a] != split[b] for a, b in zip(pairs["a"], pairs["b"]))

    assert torn(tight) == 0 < torn(loose) and abs(Counter(tight)["test"] - 7) <= 1


# -- the hub


def parquet(folder, source, name="train", cells=lambda path: dict(bytes=path.read_bytes(), path=None), **columns):
    """The drawn images as `caglarmert/full_riscm` has them: image, caption_1 .. caption_5."""
    import datasets

    with open(source / "captions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = (
        dict(image=[cells(source / "resized" / r["image"]) for r in rows])
        | {c: [r[c] for r in rows] for c in CAPTION_COLUMNS}
        | columns
    )
    features = datasets.Features(
        {"image": datasets.Image()} | {c: datasets.Value("string") for c in table if c != "image"}
    )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return f"hub:{folder}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_a_hub_dataset(folder, cache):
    data = load(parquet(cache / "hub", folder), split="seeded")
    assert data.dataset.column_names == ["image_id", "source", "split", "image", "captions"]
    row = data.dataset[7]
    assert (row["image_id"], row["source"], row["image"].size) == ("row-000007", "unknown", (16, 16))
    assert row["captions"][0] == "caption 0 of image 7 ."
    assert Counter(data.dataset["split"][:]) == dict(train=8, val=1, test=1)


def test_bad_rows_of_a_hub_dataset(folder, cache):
    def cells(path):
        if path.name == "UCM_1.jpg":
            return None
        return dict(bytes=path.read_bytes()[:-30] if path.name == "UCM_4.jpg" else path.read_bytes(), path=None)

    captions = [f"caption of {i}" for i in range(9)] + [None]
    data = load(parquet(cache / "hub", folder, cells=cells, caption_3=captions))
    assert problems(data) == [(1, "missing image"), (4, "unreadable image"), (9, "empty caption")]
    assert [r["image_id"] for r in data.dataset] == [f"row-{i:06d}" for i in (0, 2, 3, 5, 6, 7, 8)]
    original = np.asarray(Image.open(folder / "resized" / "UCM_5.jpg"))
    assert (np.asarray(data.dataset[3]["image"]) == original).all()  # image and captions stay together
    with pytest.raises(ValueError, match="3 of 10 rows are bad"):
        load(f"hub:{cache / 'hub'}", strict=True)


def test_a_hub_dataset_with_splits_of_its_own(tmp_path, cache):
    for i, name in enumerate(("train", "validation", "test")):
        where = parquet(cache / "hub", draw_folder(tmp_path / name, 2 + i, side=16 + i), name=name)
    assert Counter(load(where).dataset["split"][:]) == dict(train=2, val=3, test=4)


def test_a_hub_dataset_that_is_not_one(folder, cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="cannot load the dataset"):
        load(f"hub:{cache}/absent")
    with pytest.raises(ValueError, match="lacks the columns caption_4, caption_5"):
        import datasets

        (cache / "poor" / "data").mkdir(parents=True)
        columns = dict(image=["a"]) | {c: ["x"] for c in CAPTION_COLUMNS[:3]}
        datasets.Dataset.from_dict(columns).to_parquet(cache / "poor" / "data" / "train-00000-of-00001.parquet")
        load(f"hub:{cache / 'poor'}")
    assert HUB == "caglarmert/full_riscm"


# -- caption choice


def test_choice_over_a_dataset(folder, tmp_path):
    data = load(folder).dataset
    assert choose_all(data) == data["captions"][:]
    for how in ("first", "longest", "random"):
        chosen = choose_all(data, how, seed=1)
        assert all(len(c) == 1 and c[0] in own for c, own in zip(chosen, data["captions"])) and chosen == choose_all(
            data, how, seed=1
        )
    scorer = ClipScorer(tiny_clip(tmp_path / "clip"), device="cpu")
    nearest = choose_all(data, "clip", clip=scorer, batch=4, progress=False)
    assert nearest == choose_all(data, "clip", clip=scorer, batch=1, progress=False)
    with pytest.raises(ValueError, match="cannot load"):
        ClipScorer(str(tmp_path / "absent"))


# -- the whole of RISC(M), in numbers


def resident_peak_while(work):
    """Runs `work`; its result, its seconds, and the most memory in bytes that it added to the process.

    Added, because other tests leave theirs behind.
    """
    import psutil

    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    try:
        return work(), time.perf_counter() - start, peak
    finally:
        done.set()
        thread.join()


def test_a_table_of_the_size_of_riscm(tmp_path):
    """44,521 rows in at most 10 s and 1 GB.

    Images are small here and distinct; the real ones cost what `test_real_data` measures.
    """
    n = 44_521
    (tmp_path / "resized").mkdir()
    whole = (draw_folder(tmp_path / "one", 1, side=64) / "resized" / "UCM_0.jpg").read_bytes()
    with open(tmp_path / "captions.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["source", "split", "image", *CAPTION_COLUMNS])
        for i in range(n):
            table.writerow(
                [
                    "NWPU",
                    ("train", "val", "test")[i % 3],
                    f"{i}.jpg",
                    *[f"Many buildings and {i} green trees are in  a residential area {j} ." for j in range(5)],
                ]
            )
            (tmp_path / "resized" / f"{i}.jpg").write_bytes(whole + b"%d" % i)
    (tmp_path / "resized" / "7.jpg").write_bytes(whole[:-10])
    data, seconds, peak = resident_peak_while(lambda: load(tmp_path))
    assert problems(data) == [(9, "unreadable image")] and len(data) == n - 1
    print(f"{n:,} rows: {seconds:.1f} s, peak {peak[0] / 1e6:.0f} MB")
    assert seconds < 10 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))  # a busy machine is given its time
    assert peak[0] < 0.8e9


@real
def test_real_data():
    data, seconds, peak = resident_peak_while(lambda: load(RISCM))
    print(f"{len(data):,} real images: {seconds:.1f} s, peak {peak[0] / 1e6:.0f} MB")
    assert problems(data) == [] and len(data) == 14_237
    of = Counter(zip(data.dataset["source"][:], data.dataset["split"][:]))
    assert of == {
        ("NWPU", "val"): 1282,
        ("NWPU", "test"): 586,
        ("RSICD", "train"): 8734,
        ("RSICD", "val"): 1093,
        ("RSICD", "test"): 547,
        ("UCM", "train"): 1680,
        ("UCM", "val"): 210,
        ("UCM", "test"): 105,
    }
    assert (data.sizes == 224).all()
    assert sum(n == 2 for n in Counter(data.hashes).values()) == 2
    assert seconds * 44_521 / 14_237 < 10 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1)) and peak[0] < 0.8e9


@real
def test_real_protocols():
    official, left = split_counts(under(RISCM, "official")), split_counts(under(RISCM, "leave_NWPU_out"))
    assert [official["RSICD", s] for s in ("train", "val", "test")] == [
        8734,
        547,
        1093,
    ]  # 1,093: the published test, whole
    assert [official[s, "test"] for s in ("UCM", "NWPU")] == [105, 586]
    assert left == {
        ("RSICD", "train"): 8734,
        ("UCM", "train"): 1680,
        ("RSICD", "val"): 1093,
        ("UCM", "val"): 210,
        ("NWPU", "test"): 586,
    }


@real
def test_real_captions():
    from rsstudy.data.explore import caption_lengths, distinct_captions, shared_captions

    dataset = load(RISCM).dataset
    sources, distinct = np.array(dataset["source"][:]), distinct_captions(dataset["captions"][:])
    assert [
        int((distinct[sources == s] == k).sum()) for s, k in (("RSICD", 1), ("RSICD", 5), ("NWPU", 5), ("UCM", 5))
    ] == [4699, 674, 1843, 1542]
    words, verbatim = (shared_captions(dataset, punctuation=p)["test"] for p in (False, True))
    assert [round(words[s], 3) for s in ("UCM", "RSICD", "NWPU")] == [0.528, 0.312, 0.011]
    assert [round(verbatim[s], 3) for s in ("UCM", "RSICD", "NWPU")] == [0.510, 0.312, 0.011]
    assert caption_lengths(dataset["captions"][:]).max() == 25


@real
def test_real_near_duplicates():
    from rsstudy.data.duplicates import duplicate_images, thumbnails

    data = load(RISCM)
    names = [
        "UCM_101.jpg",
        "UCM_102.jpg",
        "RSICD_6753.jpg",
        "RSICD_6825.jpg",
        "NWPU_1365.jpg",
        "NWPU_1272.jpg",
        "RSICD_45.jpg",
        "NWPU_30697.jpg",
    ]
    ids = data.dataset["image_id"][:]
    rows = [ids.index(n) for n in names]
    part = dataclasses.replace(data, dataset=data.dataset.select(rows), hashes=[data.hashes[r] for r in rows])
    found = duplicate_images(part, thumbnails(part.dataset, progress=False))
    assert found["identical"] == dict(within=1, across=0, splits={"train": 1})
    assert found["near"] == dict(within=1, across=1, splits={"train": 1, "val-test": 1})
