"""The captioner that comes with the package is the run that it says it is, and photographs get captions that fit."""

import csv
import json

import pytest
from PIL import Image
from toys import NO_RISCM, RISCM

from rsstudy.commands.main import main
from rsstudy.common.settings import load_profile
from rsstudy.model.base import base_version
from rsstudy.tuning.captioners import SHIPPED, SHIPPED_FOLDER, find_captioner
from rsstudy.tuning.saved import read_facts


def rows(*splits):
    with open(RISCM / "captions.csv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["split"] in splits]


def test_it_says_what_it_is():
    facts = read_facts(SHIPPED_FOLDER)
    assert (facts["method"], facts["profile"], facts["base"]) == ("lora", "riscm-nano", "paligemma-nano")
    assert facts["base_version"] == base_version("paligemma-nano")
    assert find_captioner(load_profile("nano"), SHIPPED) == (SHIPPED_FOLDER, "paligemma-nano")
    assert sum(f.stat().st_size for f in SHIPPED_FOLDER.iterdir()) < 2e6


def airport(row):
    return all("airport" in row[f"caption_{k}"].lower() for k in range(1, 6))


def test_photographs_of_airports_are_captioned_as_such(tmp_path):
    """Every photograph that all five people call an airport, by the command as it is typed.

    Of validation and test images of the sources that it learnt from; one in a hundred of all photographs is one.
    """
    if not RISCM.is_dir():
        pytest.skip(NO_RISCM)
    named = [r for r in rows("val", "test") if r["source"] != "NWPU" and airport(r)]
    photos = [str(RISCM / "resized" / row["image"]) for row in named]
    assert main(["caption", *photos, "--out", str(tmp_path / "c.jsonl")]) == 0
    records = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len(records) == len(photos) > 40 and {record["model"] for record in records} == {SHIPPED}
    fitting = [r for r in records if "airport" in r["caption"] or "plane" in r["caption"]]
    assert len(fitting) > 0.6 * len(records), [r["caption"] for r in records]


def test_explained_by_default(tmp_path):
    if not RISCM.is_dir():
        pytest.skip(NO_RISCM)
    photo = RISCM / "resized" / rows("test")[0]["image"]
    quick = ["--method", "grad_cam", "--words", "the", "--caption", "the road"]
    assert main(["explain", str(photo), *quick, "--out", str(tmp_path)]) == 0
    assert {p.suffix for p in tmp_path.glob(f"{photo.stem}-{SHIPPED}.*")} == {".html", ".png"}
    with Image.open(tmp_path / f"{photo.stem}-{SHIPPED}.png") as figure:
        assert min(figure.size) > 250
