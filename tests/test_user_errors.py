"""Whatever a user can do wrong: one sentence on standard error that says what was wrong and what is allowed.

The exit status is 2, and there is no traceback and nothing written.
"""

import contextlib
import errno
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import httpx
import numpy as np
import pytest
import tifffile
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image

from rsstudy.commands.main import main

ROOT = Path(__file__).resolve().parents[1]
HEAD = "source,split,image,caption_1,caption_2,caption_3,caption_4,caption_5\n"


def table(folder, rows="", head=HEAD, images=("x.jpg",), content=None):
    """A data folder in RISC's layout; `content` makes each image a file of these bytes."""
    (folder / "resized").mkdir(parents=True)
    (folder / "captions.csv").write_text(head + rows)
    for name in images:
        if content is None:
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
                folder / "resized" / name
            )
        else:
            (folder / "resized" / name).write_bytes(content)


def add_study(place):
    shutil.copy(ROOT / "settings.ini", place)
    (place / "nbs").mkdir()
    for notebook in (ROOT / "nbs").glob("0*.ipynb"):
        shutil.copy(notebook, place / "nbs")


def add_data_folders(place):
    (place / "empty").mkdir()
    table(place / "no_columns", head="a,b\n")
    table(place / "no_rows")
    table(place / "broken", "UCM,train,x.jpg,a,b,c,d,e\n", content=b"no image")
    table(place / "only_test", "UCM,test,x.jpg,a lake .,b,c,d,e\n")
    shutil.copytree(place / "only_test", place / "no_folder")
    shutil.rmtree(place / "no_folder/resized")


def add_images(place):
    noise = np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place / "photo.png")
    Image.new("RGB", (64, 64), (9, 9, 9)).save(place / "flat.png")
    (place / "text.png").write_text("hello")
    (place / "broken.zip").write_text("no archive")
    tifffile.imwrite(place / "deep.tif", noise.integers(0, 65536, (64, 64, 3), dtype=np.uint16), photometric="rgb")


def add_caption_files(place):
    for name, lines in dict(
        good=[dict(image="a.jpg", caption="x")],
        people=[dict(image="a.jpg", captions=["x"])],
        others=[dict(image="b.jpg", captions=["x"])],
    ).items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "bad.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n{"image": "a.jpg"\n')


def add_models(place):
    for name, config in dict(llama='{"model_type": "llama"}', scrap="{", bare='{"model_type": "paligemma"}').items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(config)


def add_runs(place):
    "Tuned weights, some of them damaged or of another base."
    from rsstudy.common.settings import load_profile
    from rsstudy.tuning.method import attach
    from rsstudy.tuning.methods import methods
    from rsstudy.tuning.saved import save_tuned

    P = load_profile("nano")
    for run in ("prompt-seed3", "adapter-seed0"):
        method = methods(P)[run.split("-")[0]]
        save_tuned(attach(P, method), method, place / "runs/nano/weights" / run, base=P.base_model)
    damaged = place / "runs/nano/weights/prompt-seed5"
    shutil.copytree(place / "runs/nano/weights/prompt-seed3", damaged)
    with open(damaged / "adapter.safetensors", "r+b") as file:
        file.truncate(100)
    other = place / "runs/nano/weights/prompt-seed6"
    shutil.copytree(place / "runs/nano/weights/prompt-seed3", other)
    facts = json.loads((other / "method.json").read_text())
    (other / "method.json").write_text(json.dumps(facts | dict(base_version="0123")))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's folder with everything that can be wrong in it."""
    place = tmp_path_factory.mktemp("place")
    add_study(place)
    add_data_folders(place)
    add_images(place)
    add_caption_files(place)
    add_models(place)
    add_runs(place)
    return place


def hub_answer(kind, status):
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co")))


def hub(error):
    return [
        patch("rsstudy.model.available.hub_reachable", return_value=True),
        patch("huggingface_hub.HfApi.auth_check", side_effect=error),
    ]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "scores.json")


def denied(*args, **kwargs):
    raise PermissionError(errno.EACCES, "Permission denied", "scores.json")


def crowded(*args, **kwargs):
    raise MemoryError()


WORLDS = {  # what is to be different in the world
    "offline": [patch("rsstudy.model.available.hub_reachable", return_value=False)],
    "gated": hub(hub_answer(GatedRepoError, 403)),
    "unknown to the hub": hub(hub_answer(RepositoryNotFoundError, 404)),
    "hub down": hub(ConnectionError("reset by peer")),
    "disk full": [patch("rsstudy.common.files.os.replace", side_effect=full)],
    "no permission": [patch("rsstudy.common.files.os.replace", side_effect=denied)],
    "rasterio hidden": [
        patch("rsstudy.imagery.views.has_rasterio", return_value=False),
        patch("rsstudy.imagery.rasters.has_rasterio", return_value=False),
    ],
    "out of memory": [patch("rsstudy.metrics.registry.score_captions", side_effect=crowded)],
    "disk nearly full": [patch("rsstudy.runner.request.shutil.disk_usage", return_value=SimpleNamespace(free=5e6))],
    "folders locked": [patch("rsstudy.runner.request.os.access", return_value=False)],
} | {f"without {package}": [patch.dict(sys.modules, {package: None})] for package in ("ray", "wandb", "gradio")}

TINY = "--set train_images=4 --set val_images=2 --set test_images=2"
# A command, in brackets what is different in the world, and below it how the sentence begins
TABLE = f"""
fly
  argument COMMAND: invalid choice: 'fly'
run --onyl 03_lora
  unrecognized arguments: --onyl 03_lora
tune
  the following arguments are required: METHOD
run --profile nanno
  unknown profile 'nanno': settings.ini has nano, riscm-nano, paligemma
run --set rnak=4
  unknown setting 'rnak': the settings are data, split
run --set rank
  --set wants SETTING=VALUE, as in --set lr=1e-4, got 'rank'
run --set rank=four
  setting 'rank' must be int, got 'four'
run --set rank=0
  setting 'rank' must be at least 1, got 0
run --set lr=-1
  setting 'lr' must be above 0, got -1.0
run --set warmup=2
  setting 'warmup' must be at least 0 and below 1, got 2.0
run --set strict=maybe
  setting 'strict' must be true or false, got 'maybe'
run --set precision=float16
  setting 'precision' must be one of auto, float32, bfloat16, got 'float16'
run --set split=leave
  setting 'split' must be one of file, seeded, official, or leave_SOURCE_out
run --seeds 0,one
  setting 'seeds' must be a comma-separated list of int, got '0,one'
run --seeds 0 --set seeds=1
  setting 'seeds' is given twice: '0' and '1'
run --set tasks=juggling
  setting 'tasks' names an unknown task 'juggling': the tasks are coco_captions
run --set results=photo.png/x
  PLACE/photo.png/x/nano is to be a folder, and PLACE/photo.png is a file: name another folder with --set results=FOLDER
run --only 03_lroa
  unknown notebook '03_lroa': the study has 01_eda
run --only 07_comparison
  07_comparison reads
run --address auto
  --address belongs to --engine ray
run --engine ray --cpus 0
  --cpus must be at least 1, got 0
run  (folders locked)
  PLACE/results/local/nano cannot be written, as PLACE does not allow it: name another folder
run  (disk nearly full)
  PLACE/results/local/nano has 5 MB of disk left and a study needs 200
run --engine ray  (without ray)
  --engine ray needs the package ray: pip install
run --track wandb  (without wandb)
  setting 'track' asks for wandb, which is not installed: pip install wandb
run --data nowhere
  the data folder nowhere does not exist (looked for in
run --data empty
  the data folder empty holds no captions.csv
run --data hub:
  setting 'data' names no dataset after hub:
run --set base_model=/no/such
  base model '/no/such' cannot be loaded: there is no such folder
run --set base_model=llama
  base model 'llama' cannot be loaded: it is a model of type 'llama'
run --set base_model=scrap
  base model 'scrap' cannot be loaded: its config.json is not JSON
run --set base_model=bare
  base model 'bare' cannot be loaded: the folder holds no weights in *.safetensors
run --set base_model=nobody/x  (offline)
  base model 'nobody/x' cannot be loaded: it is not on this machine and the hub cannot be reached
run --set base_model=nobody/x  (gated)
  base model 'nobody/x' cannot be loaded: it is gated: accept its licence at https://huggingface.co/nobody/x
run --set base_model=nobody/x  (unknown to the hub)
  base model 'nobody/x' cannot be loaded: the hub knows no such model
run --set base_model=nobody/x  (hub down)
  base model 'nobody/x' cannot be loaded: the hub does not answer (ConnectionError)
tune lroa
  unknown method 'lroa': the methods are lora, qlora
tune lora --data no_columns
  PLACE/no_columns/captions.csv lacks the columns image, caption_1
tune lora --data no_rows
  no_rows has no good row
tune lora --data no_folder
  the folder of images
tune lora --data broken
  broken has no good row: broken/captions.csv: 1 of 1 rows are bad (1 unreadable image)
tune lora --data broken --set strict=true
  broken/captions.csv: 1 of 1 rows are bad (1 unreadable image); line of captions.csv 2
tune lora --data only_test
  split 'train' is empty: the data has
tune lora --data only_test --set split=leave_XYZ_out
  split 'leave_XYZ_out': only_test has no source XYZ, only UCM
tune prompt --set prompt_length=500 {TINY}
  prompt_length 500 needs as many <unused..> tokens, the vocabulary has 64
tune qlora --set lora_init=pissa {TINY}
  method 'qlora': lora_init 'pissa' moves a part of the base's weights into LoRA, which a base in 4 bits cannot do
tune lora --set lora_init=olora --set rank=64 {TINY}
  lora_init 'olora' allows a rank of at most 32
table
  PLACE/results/local/nano/07_comparison.json is missing: make it with `rsstudy run --profile nano --only 07_comparison`
table --style word
  argument --style: invalid choice: 'word'
serve  (without gradio)
  the page needs Gradio, which is not installed: pip install 'rsstudy[serve]'
serve --port 0
  --port must be from 1 to 65535, got 0
serve --host 192.0.2.1
  --host 192.0.2.1 is no name or address of an interface of this machine
serve --max-mb 0
  --max-mb must be above 0 and at most 1000, got 0
serve --model lora --seed 7
  the model 'lora' with seed 7 has not been tuned under the profile nano
serve --model loar
  unknown model 'loar': give paligemma-nano-riscm, none, lora
serve --model no_rows
  no_rows holds no model: it needs method.json
notebooks .
  settings.ini is there already and nothing was copied: name another folder
notebooks text.png
  text.png is a file: name a folder for the notebooks
bench train --rounds 0
  --rounds must be at least 1, got 0
bench metrics --data nowhere
  the data folder nowhere
caption no.png
  no.png does not exist: give image files, folders, patterns in quotes or zip archives
caption empty
  the folder empty holds no images: files that end in
caption "*.xyz"
  no image matches *.xyz
caption broken.zip
  broken.zip is no zip archive that can be read
caption photo.png --out c.txt
  --out c.txt: captions are written as .jsonl, .csv, .geojson, got .txt
caption photo.png --out no/c.csv
  --out no/c.csv: the folder no does not exist
caption photo.png --out good.jsonl
  --out good.jsonl exists and was not written by this command
caption photo.png --bands 4,3
  --bands 4,3: give three band numbers from 1 on
caption photo.png --percentiles 98,2
  --percentiles 98,2: give two numbers from 0 to 100
caption photo.png --tile 8
  --tile 8: a tile has 32 pixels a side or more
caption photo.png --tile 64 --overlap 64
  --overlap 64: it must be 0 or more and below the 64 pixels
caption photo.png --method shap
  --method belongs to --explain
caption photo.png --address auto
  --address belongs to --engine ray
caption photo.png --engine ray  (without ray)
  --engine ray needs the package ray: pip install
caption photo.png --model magic
  unknown model 'magic': give paligemma-nano-riscm, none, lora
caption deep.tif --out d.jsonl  (rasterio hidden)
  deep.tif: GeoTIFFs need rasterio, which is not installed: pip install 'rsstudy[geo]'
explain no.png
  image no.png does not exist
explain empty
  image empty is no file
explain text.png
  image text.png cannot be read
explain flat.png
  flat.png is a constant image
explain photo.png --method magic
  unknown attribution method 'magic': the methods are integrated_gradients
explain photo.png --caption "a lake" --words river
  'river' is not in the caption; its words are: a, lake
explain photo.png --out text.png
  --out text.png: text.png is no folder
explain photo.png --model lora
  the model 'lora' with seed 0 has not been tuned under the profile nano: `rsstudy tune lora --profile nano`
explain photo.png --model lroa
  unknown model 'lroa': give paligemma-nano-riscm, none, lora
diagnose magic
  magic holds no run of the study: it needs run.json
diagnose lora
  PLACE/runs/nano/weights/lora-seed0 holds no run of the study: it needs run.json
export magic
  unknown run 'magic': give a folder of tuned weights such as
export runs/nano/weights/magic-seed0
  there is no folder runs/nano/weights/magic-seed0 to export
export lora
  'lora' with seed 0 has not been tuned under the profile nano: `rsstudy tune lora --profile nano`
export prompt
  'prompt' with seed 0 has not been tuned under the profile nano (there are prompt-seed3, prompt-seed5, prompt-seed6)
export adapter --merge
  'adapter' cannot be merged: a bottleneck adapter is no sum of weights
export prompt-seed3 --out no_rows
  --out no_rows is not empty and holds more than an earlier export
export prompt-seed3 --out text.png/x
  --out text.png/x: text.png is a file
export prompt-seed3 --out .
  --out . holds the run or the current folder
export runs/nano/weights/prompt-seed3 --profile riscm-nano
  runs/nano/weights/prompt-seed3 was tuned under the profile nano, not riscm-nano
export prompt-seed3 --push "a/b c"
  --push 'a/b c' is no name of a repository
export prompt-seed3 --private
  --private says how a repository on the hub is made: it needs --push
export prompt-seed5
  the weights in PLACE/runs/nano/weights/prompt-seed5 are damaged
explain photo.png --model prompt --seed 6
  the weights in PLACE/runs/nano/weights/prompt-seed6 were tuned on version 0123 of 'paligemma-nano', which is now
explain photo.png --model a/b/c
  there is no folder a/b/c
explain photo.png --model no_rows
  no_rows holds no model: it needs method.json
explain photo.png --model text.png
  text.png is a file: give the folder that holds the model
score no.jsonl --references people.jsonl
  no.jsonl is missing
score bad.jsonl --references people.jsonl
  bad.jsonl line 2: not JSON
score good.jsonl --references others.jsonl
  good.jsonl line 1: image 'a.jpg' is not among the 1 images of the references
score good.jsonl good.jsonl --references people.jsonl
  predictions are given twice: good.jsonl
score good.jsonl --references people.jsonl --metrics blue
  unknown metric 'blue': allowed are bleu
score good.jsonl --references people.jsonl --split test
  people.jsonl has no images of split 'test': it names no splits
score good.jsonl --references people.jsonl --out empty
  --out empty is a folder: with one file of predictions it names a file
score photo.png --references people.jsonl
  photo.png: predictions are .jsonl, .csv or .json, got .png
score good.jsonl --references people.jsonl --resamples 0
  --resamples must be at least 1, got 0
score good.jsonl --references people.jsonl --metrics bleu --out scores.json  (disk full)
  no space left on the disk for scores.json: make room and give the same command again
score good.jsonl --references people.jsonl --metrics bleu --out scores.json  (no permission)
  no permission for scores.json: choose another place
score good.jsonl --references people.jsonl --metrics bleu  (out of memory)
  out of memory: take smaller portions
"""
ERRORS = re.findall(r"^(\S.*?)(?:  \((.+)\))?\n  (.+)$", TABLE, re.M)


@contextlib.contextmanager
def world(name):
    with contextlib.ExitStack() as stack:
        for change in WORLDS.get(name, []):
            stack.enter_context(change)
        yield


def listing(folder):
    "All files but those of runs: the drawn world, kept for the next command."
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    return sorted(str(path) for path in paths if "runs" not in path.parts)


def one_sentence(words, capsys):
    """Runs a command that must be refused; what it said."""
    try:
        status = main(shlex.split(words))
    except SystemExit as left:
        status = left.code
    output = capsys.readouterr()
    lines = [line for line in output.err.replace("\r", "\n").splitlines() if line.startswith("rsstudy: ")]
    assert status == 2 and len(lines) == 1, output.err
    assert output.err.rstrip().endswith(lines[0]) and "Traceback" not in output.err and output.out == "", output
    return lines[0].removeprefix("rsstudy: ")


@pytest.mark.parametrize(
    "words, change, sentence", ERRORS, ids=[f"{words} {sentence}"[:70] for words, _, sentence in ERRORS]
)
def test_user_error_is_one_sentence(place, words, change, sentence, monkeypatch, capsys):
    assert not change or change in WORLDS, change
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = listing(place)
    with world(change):
        answer = one_sentence(words, capsys)
    assert answer.startswith(sentence.replace("PLACE", str(place))), answer
    assert listing(place) == before


@pytest.mark.parametrize(
    "text, sentence",
    [
        (b"rank = 4\n[nano]\n", "PLACE/settings.ini line 1: 'rank = 4' stands before the first section"),
        (b"[nano]\nrank = 4\nrank = 8\n", "PLACE/settings.ini line 3: setting 'rank' is given twice in section [nano]"),
        (b"[nano]\n[nano]\n", "PLACE/settings.ini line 2: section [nano] is there twice"),
        (b"[nano]\nrank\n", "PLACE/settings.ini line 2: 'rank' is neither SETTING = VALUE nor [SECTION]"),
        (b"[nano]\nrank = 4\xff\n", "PLACE/settings.ini is not text in UTF-8"),
        (b"", "unknown profile 'nano': settings.ini has none"),
        (b"[nano]\nrank = 4\n", "setting 'data' is missing in section [nano]"),
        (b"[DEFAULT]\nlib_name = x\n[nano]\n", "unknown setting 'lib_name': the settings are"),
    ],
)
def test_settings_file(tmp_path, text, sentence, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_bytes(text)
    answer = one_sentence("run", capsys)
    assert answer.startswith(sentence.replace("PLACE", str(tmp_path))), answer


def test_debug_shows_the_traceback(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match="setting 'rank' must be at least 1"):
        main("run --set rank=0 --debug".split())


def test_there_are_enough_of_them():
    assert len(ERRORS) >= 40 and len(set(ERRORS)) == len(ERRORS)
