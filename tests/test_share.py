"""A tuned model as a colleague gets it.

The card's own lines, run where rsstudy cannot be imported, give the captions of this project.
"""

import argparse
import dataclasses
import errno
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import rsstudy.sharing.export
import rsstudy.tuning.captioners
from rsstudy.commands import export
from rsstudy.common.settings import load_profile
from rsstudy.model.generate import generate_captions
from rsstudy.sharing.export import export_run
from rsstudy.sharing.portable import add_adapters
from rsstudy.tuning.adapter import Adapted, Bottleneck
from rsstudy.tuning.captioners import load_captioner
from rsstudy.tuning.method import attach
from rsstudy.tuning.methods import method_of
from rsstudy.tuning.saved import save_tuned, tuned_folder

# run -> its method, its settings; and what is exported: the run, --merge
RUNS = dict(
    lora={},
    dora={},
    lora_vision=dict(init="pissa"),
    qlora={},
    prompt=dict(length=4),
    adapter=dict(activation="silu"),
    full={},
)
EXPORTS = {
    "lora": ("lora", False),
    "qlora": ("qlora", False),
    "prompt": ("prompt", False),
    "adapter": ("adapter", False),
    "full": ("full", False),
    "dora": ("dora", False),
    "lora-merged": ("lora", True),
    "qlora-merged": ("qlora", True),
    "prompt-merged": ("prompt", True),
    "pissa-merged": ("lora_vision", True),
}
BEAMS = {"prompt": 2}  # greedy otherwise; with beams probabilities count, not their order alone
PLAIN = r"""
import json, sys
sys.modules['rsstudy'] = None  # importing it is an error
found = {}
for name, (folder, code) in json.load(open(sys.argv[1])).items():
    sys.path.insert(0, folder)
    sys.modules.pop('adapter', None)
    found[name] = []
    names = {}
    for image in sys.argv[3:]:
        mine = code.replace('"image.png"', repr(image)).replace('folder, image = "."', f'folder, image = {folder!r}')
        exec(mine, names)
        found[name].append(names['caption'])
        code = '\n'.join(line for line in code.splitlines() if line[:8] not in ('model = ', 'processo'))  # loaded once
    sys.path.remove(folder)
json.dump(found, open(sys.argv[2], 'w'))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models this small are slower on several threads than on one."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("share")


@pytest.fixture(scope="module")
def P(root):
    return dataclasses.replace(
        load_profile("nano"), work=str(root / "runs"), results=str(root / "results"), max_new_tokens=6
    )


@pytest.fixture(scope="module")
def photos(root):
    "Coloured blocks in files, of different sizes."
    paths = [root / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(
            np.kron(
                np.random.default_rng(i).integers(0, 256, (7, 7, 3), np.uint8), np.ones((32, 24 + 8 * i, 1), np.uint8)
            )
        ).save(path)
    return paths


def captions(captioner, photos):
    return generate_captions(
        captioner,
        [Image.open(p).convert("RGB") for p in photos],
        max_new_tokens=6,
        num_beams=BEAMS.get(captioner.method, 1),
    )


@pytest.fixture(scope="module")
def runs(P, photos):
    "Method -> captions of a run of it, its weights moved away from where they start."
    found = {}
    for kind, settings in RUNS.items():
        method = method_of(P, dict(method=kind, settings=settings))
        captioner = attach(P, method, seed=3)
        torch.manual_seed(0)
        with torch.no_grad():
            far = (
                4 if kind == "prompt" else 0.5
            )  # as training leaves soft vectors: so long that a tied output layer would say them
            for weight in (p for p in captioner.model.parameters() if p.requires_grad):
                weight.add_(torch.randn_like(weight) * (far * weight.std() if weight.any() else 0.1))
        save_tuned(captioner, method, tuned_folder(P, kind, 3), seed=3, lr=0.1, base="paligemma-nano")
        found[kind] = captions(captioner, photos)
    return found


@pytest.fixture(scope="module")
def exports(root, P, runs):
    "Name -> export, captions of the run it was made of."
    return {
        name: (
            export_run(
                dataclasses.replace(P, num_beams=BEAMS.get(kind, 1)),
                f"{kind}-seed3",
                root / "exports" / name,
                merge=merge,
            ),
            runs[kind],
        )
        for name, (kind, merge) in EXPORTS.items()
    }


def snippet(folder):
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)[1]


@pytest.fixture(scope="module")
def plain(root, exports, photos):
    "What the cards' lines write, in one process for all."
    (root / "lines.json").write_text(
        json.dumps({name: (str(folder), snippet(folder)) for name, (folder, _) in exports.items()})
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, root / "lines.json", root / "plain.json", *photos],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((root / "plain.json").read_text())


@pytest.mark.parametrize("name", EXPORTS)
def test_the_cards_lines_give_the_same_captions_without_rsstudy(plain, exports, name):
    assert plain[name] == exports[name][1]


def test_the_captions_are_the_tuned_models_own(runs, P, photos):
    runs = runs | dict(none=captions(load_captioner(P), photos))
    assert len({tuple(own) for own in runs.values()}) == len(runs) and all(map(all, runs.values()))


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_loads_again(exports, P, photos, name):
    folder, own = exports[name]
    captioner = load_captioner(P, folder)
    assert (captions(captioner, photos), captioner.method) == (own, EXPORTS[name][0])


def test_five_lines_and_no_others(exports):
    for folder, _ in exports.values():
        setting, use = snippet(folder).strip().split("\n\n")
        assert (
            len(use.splitlines()) == 5 and "rsstudy" not in setting + use and "trust_remote_code" not in setting + use
        )


def test_what_an_export_holds(exports, root):
    for name, (folder, _) in exports.items():
        files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}
        assert {
            "README.md",
            "method.json",
            "generation_config.json",
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        } < files
        form = json.loads((folder / "method.json").read_text())["form"]
        assert ("base/model.safetensors" in files) == (form != "merged") and ("model.safetensors" in files) == (
            form == "merged"
        )
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files or form != "peft"
        for file in files:
            content = (folder / file).read_bytes()
            for machine in (
                str(root),
                str(Path(rsstudy.sharing.export.__file__).parent),
                str(Path.home()) + "/",
                "/tmp/",
            ):
                assert machine.encode() not in content, f"{name}: {file} names {machine}"
            assert (folder / file).stat().st_mode & 0o444 == 0o444 & ~_umask(), (
                f"{name}: {file} cannot be read by others"
            )
    assert not [p for p in (root / "exports").iterdir() if p.name.startswith(".")]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_adapter_file_is_the_projects_own_class(exports):
    text, found = (exports["adapter"][0] / "adapter.py").read_text(), {}
    exec(text, found)
    torch.manual_seed(0)
    ours = Bottleneck(8, 3, "relu")
    torch.nn.init.normal_(ours.up.weight)
    theirs, x = found["Bottleneck"](8, 3, "relu"), torch.randn(2, 8)
    theirs.load_state_dict(ours.state_dict())
    layer = torch.nn.Linear(8, 8)
    assert torch.equal(Adapted(layer, ours)(x), found["Adapted"](layer, theirs)(x))
    for part in (Bottleneck, Adapted, add_adapters):
        assert inspect.getsource(part) in text


def test_header_is_the_hubs(exports):
    from huggingface_hub import ModelCard

    for folder, _ in exports.values():
        data = ModelCard.load(folder / "README.md").data
        assert (data.license, data.pipeline_tag, data.base_model) == ("apache-2.0", "image-to-text", None)
        assert data.library_name == ("peft" if (folder / "adapter_config.json").is_file() else "transformers")


def test_the_command(P, root, exports, capsys):
    top = argparse.ArgumentParser()
    export.grammar(top.add_subparsers())
    args = top.parse_args(
        ["export", str(tuned_folder(P, "prompt", 3)), "--out", str(root / "by command"), "--set", f"results={root}"]
    )
    assert args.run(args) == 0
    assert (
        str(root / "by command") in capsys.readouterr().out
        and (root / "by command/adapter_model.safetensors").is_file()
    )


@pytest.fixture
def tuned(P, tmp_path, runs):
    "A profile of its own with a run of prompt tuning and one of adapters in it."
    there = dataclasses.replace(P, work=str(tmp_path / "runs"))
    for kind in ("prompt", "adapter"):
        shutil.copytree(tuned_folder(P, kind, 3), tuned_folder(there, kind, 3))
    return there


@pytest.mark.parametrize(
    "words, error, expected",
    [
        (dict(run="magic"), ValueError, "unknown run 'magic': give a folder of tuned weights"),
        (dict(run="none"), ValueError, "unknown run 'none'"),
        (
            dict(run="runs/nano/weights/magic-seed0"),
            FileNotFoundError,
            "there is no folder runs/nano/weights/magic-seed0 to export",
        ),
        (
            dict(run="lora"),
            FileNotFoundError,
            "'lora' with seed 0 has not been tuned under the profile nano: "
            "`rsstudy tune lora --profile nano` does that",
        ),
        (
            dict(run="prompt"),
            FileNotFoundError,
            "'prompt' with seed 0 has not been tuned under the profile nano (there are prompt-seed3)",
        ),
        (
            dict(run="adapter-seed3", merge=True),
            ValueError,
            "'adapter' cannot be merged: a bottleneck adapter is no sum of weights",
        ),
        (
            dict(run="prompt-seed3", push="anna/my model"),
            ValueError,
            "--push 'anna/my model' is no name of a repository",
        ),
        (
            dict(run="prompt-seed3", out="FULL"),
            FileExistsError,
            "is not empty and holds more than an earlier export: give another folder, or --force",
        ),
        (dict(run="prompt-seed3", out="FILE/there"), NotADirectoryError, "FILE is a file"),
        (dict(run="prompt-seed3", out="runs", force=True), ValueError, "holds the run or the current folder"),
        (dict(run="prompt-seed3", out=".", force=True), ValueError, "holds the run or the current folder"),
    ],
)
def test_bad_request_is_one_sentence(tuned, tmp_path, monkeypatch, words, error, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL/mine.txt").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        export_run(tuned, **words)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before and (tmp_path / "FULL/mine.txt").read_text() == "mine"


def change(folder, **facts):
    path = folder / "method.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize(
    "damage, error, expected",
    [
        (lambda f: (f / "adapter.safetensors").write_bytes(b"\x08\0\0"), ValueError, "are damaged"),
        (lambda f: (f / "method.json").write_text("{"), ValueError, "method.json is not JSON"),
        (lambda f: (f / "method.json").unlink(), FileNotFoundError, "has no method.json"),
        (lambda f: change(f, settings=dict(length=5)), ValueError, "which does not fit"),
        (lambda f: change(f, settings=dict(size=5)), ValueError, "the settings size: it has length, start"),
        (
            lambda f: change(f, base_version="0123456789abcdef"),
            ValueError,
            "were tuned on version 0123456789abcdef of 'paligemma-nano', which is now",
        ),
        (
            lambda f: change(f, base="/gone/paligemma"),
            FileNotFoundError,
            "tuned on the base in /gone/paligemma, which is not there any more",
        ),
        (lambda f: (f / "run.json").write_text("{"), ValueError, "run.json is not JSON"),
    ],
)
def test_damaged_run_is_one_sentence_and_leaves_nothing(tuned, tmp_path, damage, error, expected):
    damage(tuned_folder(tuned, "prompt", 3))
    with pytest.raises(error) as caught:
        export_run(tuned, "prompt-seed3", tmp_path / "out")
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_another_profiles_run(tuned, tmp_path):
    with pytest.raises(ValueError, match="was tuned under the profile nano, not riscm-nano"):
        export_run(dataclasses.replace(tuned, name="riscm-nano"), tuned_folder(tuned, "prompt", 3), tmp_path / "out")


def test_full_disk_and_broken_export_leave_the_earlier_one(tuned, tmp_path, monkeypatch):
    folder = export_run(tuned, "prompt-seed3", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rsstudy.sharing.export, "_copy_base", full)
    with pytest.raises(OSError, match=r"the disk of .* is full"):
        export_run(tuned, "prompt-seed3", folder)
    monkeypatch.setattr(rsstudy.sharing.export, "_copy_base", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_run(tuned, "prompt-seed3", folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "runs"]


class Hub:
    "Stands for huggingface_hub.HfApi."

    sent: ClassVar[list] = []

    def create_repo(self, repo, private, exist_ok):
        self.sent.append(("create", repo, private, exist_ok))
        return types.SimpleNamespace(repo_id=f"anna/{repo}")

    def repo_info(self, repo_id):
        return types.SimpleNamespace(private=repo_id == "anna/captioner")

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.sent.append(("upload", repo_id, folder_path, sorted(p.name for p in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    monkeypatch.setattr(rsstudy.sharing.export, "hub_reachable", lambda: True)
    monkeypatch.setattr(Hub, "sent", [])


def test_push_sends_the_export(tuned, tmp_path, hub):
    folder = export_run(tuned, "prompt-seed3", tmp_path / "out", push="captioner", private=True)
    assert Hub.sent[0] == ("create", "captioner", True, True)
    assert Hub.sent[1] == ("upload", "anna/captioner", str(folder), sorted(p.name for p in folder.iterdir()))


def test_nothing_private_is_sent_to_a_public_repository(tuned, tmp_path, hub):
    with pytest.raises(RuntimeError, match="'known' exists and is public, so nothing was sent"):
        export_run(tuned, "prompt-seed3", tmp_path / "out", push="known", private=True)
    assert [what for what, *_ in Hub.sent] == ["create"]


@pytest.mark.parametrize(
    "what, expected",
    [
        (("rsstudy.sharing.export.hub_reachable", lambda: False), "the hub cannot be reached from here"),
        (("huggingface_hub.get_token", lambda: None), "--push needs a login: make a write token, run `hf auth login`"),
        (
            (
                "huggingface_hub.HfApi.upload_folder",
                lambda *_, **__: (_ for _ in ()).throw(ConnectionError("cut\noff")),
            ),
            "'captioner' could not be pushed (ConnectionError: cut)",
        ),
    ],
)
def test_push_that_fails_leaves_the_export(tuned, tmp_path, hub, monkeypatch, what, expected):
    monkeypatch.setattr(*what)
    with pytest.raises(RuntimeError) as caught:
        export_run(tuned, "prompt-seed3", tmp_path / "out", push="captioner")
    assert (
        expected in str(caught.value)
        and f"the export is in {tmp_path}/out" in str(caught.value)
        and "\n" not in str(caught.value)
    )
    assert (tmp_path / "out/README.md").is_file()


def test_an_export_on_the_hub_is_a_model(exports, P, photos, monkeypatch):
    folder, own = exports["prompt"]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, local_files_only: str(folder / file))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, local_files_only: str(folder))
    assert captions(load_captioner(P, "anna/captioner"), photos) == own
