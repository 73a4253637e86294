"""The base's own tasks: their files, their rows wherever they are from, their scores, and what tuning does to them."""

import copy
import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import rsstudy.evaluation.tasks as tasks
from rsstudy.common.settings import load_profile
from rsstudy.evaluation.answers import normalise_answer, vqa_accuracy
from rsstudy.evaluation.task_files import TASK_FILES, read_spec, task_names
from rsstudy.model.base import load_base
from rsstudy.model.generate import Captioner, generate_captions

NAMES = ["coco_captions", "nocaps", "rsvqa_hr", "rsvqa_lr", "scenes_captions", "scenes_questions", "textvqa", "vqav2"]


@pytest.fixture(scope="module")
def P(tmp_path_factory):
    return load_profile("nano", work=str(tmp_path_factory.mktemp("work")))


@pytest.fixture(scope="module")
def base(P):
    return Captioner(*load_base(P))


@pytest.fixture(scope="module")
def scenes(P):
    return tasks.source_tasks(P, 24)


@pytest.fixture(scope="module")
def before(base, scenes):
    return {name: tasks.run_task(base, task) for name, task in scenes.items()}


def write_folder(folder, rows):
    "A task's folder with a gray image for every name."
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(sorted({row["image"] for row in rows})):
        Image.new("RGB", (40, 30), (10 * i, 90, 90)).save(folder / name)
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_every_task_file_is_sound():
    assert task_names() == NAMES
    for name in NAMES:
        spec = read_spec(TASK_FILES / f"{name}.json")
        reported = spec["reported"]
        assert spec["name"] == name and spec["version"] >= 1 and reported["note"]
        if reported["value"] is not None:  # a number has a source, and says of which model it is
            assert reported["source"] and reported["model"] and reported["split"] and reported["fine_tuned"] is True
            assert float(reported["printed"]) == pytest.approx(100 * reported["value"])


def test_a_broken_task_file_names_itself_and_the_key(tmp_path):
    sound = json.loads((TASK_FILES / "vqav2.json").read_text())

    def error(change):
        spec = copy.deepcopy(sound)
        change(spec)
        (tmp_path / "vqav2.json").write_text(json.dumps(spec))
        with pytest.raises(ValueError, match=r"task file vqav2\.json: ") as caught:
            read_spec(tmp_path / "vqav2.json")
        return str(caught.value)

    def without(key, part=None):
        return error(lambda spec: (spec[part] if part else spec).pop(key))

    for key in sound:
        assert f"key '{key}' is missing" in without(key)
    for part in ("reported", "columns"):
        for key in sound[part]:
            assert f"key '{part}.{key}' is missing" in without(key, part)
    assert "unknown key 'colour'" in error(lambda spec: spec.update(colour=1))
    assert "key 'version' is '1', of the wrong type" in error(lambda spec: spec.update(version="1"))
    assert "version and max_new_tokens must be at least 1" in error(lambda spec: spec.update(version=0))
    assert "key 'metric' is 'bleu', allowed: cider, vqa_accuracy" in error(lambda spec: spec.update(metric="bleu"))
    assert "key 'name' is 'other', allowed: vqav2" in error(lambda spec: spec.update(name="other"))
    assert "does not go with metric 'vqa_accuracy'" in error(lambda spec: spec.update(prompt="caption en"))
    assert "needs hub and columns" in error(lambda spec: spec.update(hub=None))
    (tmp_path / "vqav2.json").write_text("{")
    with pytest.raises(ValueError, match=r"vqav2\.json: not JSON"):
        read_spec(tmp_path / "vqav2.json")


@pytest.mark.parametrize(
    "said, compared",
    [  # what the official evaluation's functions give
        ("The two dogs.", "2 dogs"),
        ("a  cat, and dog", "cat and dog"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("1,000 a-b", "1000 ab"),
        ("x-b", "x b"),
        ("2.5", "2.5"),
        ("3. base", "3 base"),
        ("U.S.A.", "usa"),
        (".5", ".5"),
        ("dont", "don't"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("None", "0"),
        ("it's 5:30", "it's 5:30"),
        ("lets", "lets"),
        ("." * 33, "."),
        ("é (一)", "é 一"),
        ("the", ""),
        ("", ""),
    ],
)
def test_answers_are_compared_as_officially(said, compared):
    assert normalise_answer(said) == compared


@pytest.mark.parametrize(
    "said, answers, value",
    [
        ("yes", ["yes"] * 10, 1),
        ("no", ["yes"] * 10, 0),
        ("2", ["two"] * 10, 0),  # all agree: nothing is normalised
        ("2", ["two"] * 9 + ["a few"], 1),
        ("a dog", ["dog"] * 3 + ["cat"] * 7, (3 * 2 / 3 + 7) / 10),
        ("dog", ["dogs"] + ["cat"] * 9, 0),
        ("dog", ["The dog!"] + ["cat"] * 9, 9 / 10 / 3),
    ],
)
def test_vqa_accuracy_by_hand(said, answers, value):
    assert vqa_accuracy(said, answers) == pytest.approx(value, abs=1e-12)


def test_a_folder_makes_the_round_trip(tmp_path, P, base):
    rows = [
        dict(
            image=f"{i}.png",
            question=f"how many ponds {i}",
            answers=["2"] * 9 + ["two"],
            type="number" if i else "other",
        )
        for i in (0, 1, 2, 2)
    ]
    folder = write_folder(tmp_path / "mine", rows)
    task = tasks.load_task("vqav2", folder, P=P)
    assert [(item.image.name, item.prompt, item.references, item.type) for item in task.items] == [
        (r["image"], f"answer en {r['question']}", r["answers"], r["type"]) for r in rows
    ]
    fewer = [
        {item.image.name for item in tasks.load_task("vqav2", folder, n=2, seed=seed, P=P).items}
        for seed in (0, 0, 1, 2, 3)
    ]
    assert all(len(names) == 2 for names in fewer) and fewer[0] == fewer[1] and len(set(map(frozenset, fewer))) > 1
    result = tasks.run_task(base, task, batch_size=2)
    assert (
        result["metric"] == "vqa_accuracy-official.v1"
        and result["n"] == 4
        and result["images"] == ["0.png", "1.png", "2.png", "2.png"]
    )
    assert {kind: part["n"] for kind, part in result["by_type"].items()} == {"number": 3, "other": 1}
    assert result["per_item"] == [
        vqa_accuracy(said, item.references) for said, item in zip(result["predictions"], task.items)
    ]
    assert result["reported"]["value"] == 0.8319 and json.loads(json.dumps(result)) == result
    write_folder(P.work_dir / "tasks" / "textvqa", rows)  # found where the study looks
    assert tasks.load_task("textvqa", P=P).origin == "folder textvqa"


def test_accuracy_by_type_is_the_mean_of_the_types(tmp_path, P, base, monkeypatch):
    folder = write_folder(
        tmp_path / "rs",
        [
            dict(image="a.png", question="q", answers=[a], type=t)
            for a, t in (("yes", "comp"), ("no", "comp"), ("yes", "comp"), ("yes", "presence"), ("5", "count"))
        ],
    )
    monkeypatch.setattr(tasks, "_said", lambda captioner, task, *_: ["Yes"] * len(task.items))
    result = tasks.run_task(base, tasks.load_task("rsvqa_hr", folder, P=P))
    assert (
        result["per_item"] == [1, 0, 1, 1]
        and result["value"] == pytest.approx((2 / 3 + 1) / 2)
        and result["metric"] == "accuracy-exact_by_type.v1"
    )


def test_unknown_and_unreachable_tasks(P, base, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown task 'vqa': the tasks are " + ", ".join(NAMES)):
        tasks.load_task("vqa", P=P)
    with pytest.raises(FileNotFoundError, match=r"holds no task\.jsonl"):
        tasks.load_task("vqav2", tmp_path, P=P)
    monkeypatch.setattr(tasks, "hub_reachable", lambda: False)
    with pytest.warns(UserWarning, match="task nocaps: not asked: the hub of lmms-lab/NoCaps cannot be reached"):
        found = tasks.transfer(P, base, ("nocaps",))
    assert found["nocaps"].keys() == {"task", "version", "missing"}


@pytest.fixture
def hub(monkeypatch):
    "A hub that streams eight questions about six photographs."
    import datasets

    def picture(i):
        out = io.BytesIO()
        Image.new("RGB", (50, 40 + i)).save(out, "JPEG")
        return dict(bytes=out.getvalue(), path=None)

    rows = [
        dict(
            image=picture(i),
            question=f"is it {i}",
            answers=[dict(answer=a, answer_confidence="yes", answer_id=k) for k, a in enumerate(["no"] * 10)],
            answer_type="yes/no",
            more=i,
        )
        for i in (0, 1, 2, 3, 4, 5, 5, 0)
    ]
    data, asked = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()), []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or data.to_iterable_dataset()
    )
    monkeypatch.setattr(tasks, "hub_reachable", lambda: True)
    return asked


def test_a_hub_is_read_once_and_only_as_far_as_needed(hub, tmp_path):
    P = load_profile("nano", work=str(tmp_path))
    task = tasks.load_task("vqav2", n=3, P=P)
    assert (
        len({item.image for item in task.items}) == 3
        and {item.references[0] for item in task.items} == {"no"}
        and {item.type for item in task.items} == {"yes/no"}
    )
    assert [Image.open(item.image).size[0] for item in task.items] == [50] * len(task.items)
    ((args, options),) = hub
    assert args == ("lmms-lab/VQAv2",) and options == dict(
        split="validation", streaming=True, revision="32665d35052eb4a6d4414851c3c829a72754915a"
    )
    again = tasks.load_task("vqav2", n=3, P=P)
    assert again == task and len(hub) == 1 and "32665d35" in again.origin
    assert len(tasks.load_task("vqav2", P=P).items) == 8  # all
    assert not list((P.work_dir / "tasks").glob(".*"))  # nothing half-written


def test_a_hub_that_breaks_leaves_nothing(hub, tmp_path, monkeypatch, base):
    import datasets

    P = load_profile("nano", work=str(tmp_path))

    class Gone(Exception):
        pass

    Gone.__module__ = "httpx._exceptions"

    def broken(*args, **options):
        raise Gone("no route")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.warns(UserWarning, match="could not be read, Gone: no route"):
        assert "missing" in tasks.transfer(P, base, ("vqav2",))["vqav2"]
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *args, **options: datasets.Dataset.from_list([dict(image="x", text="y")]).to_iterable_dataset(),
    )
    with pytest.raises(ValueError, match="lmms-lab/VQAv2 has no column 'question': it has image, text"):
        tasks.load_task("vqav2", P=P)
    assert not (P.work_dir / "tasks").exists() or not list((P.work_dir / "tasks").iterdir())


def test_the_base_knows_its_own_world(scenes, before):
    questions, captions = before["scenes_questions"], before["scenes_captions"]
    answers = {}
    for item in scenes["scenes_questions"].items:
        answers.setdefault(item.type, []).append(item.references[0])
    floor = sum(Counter(some).most_common(1)[0][1] for some in answers.values()) / questions["n"]
    assert (
        floor < 0.6
        and questions["value"] > floor + 0.25
        and questions["by_type"].keys() == answers.keys() == {"how many", "is there", "what color", "what is"}
    )
    assert (
        captions["n"] == 24 and captions["value"] > 2 and captions["by_type"].keys() == {"nature", "transport", "urban"}
    )
    for result in before.values():
        assert result["value"] == pytest.approx(np.mean(result["per_item"]))
        assert sum(part["value"] * part["n"] for part in result["by_type"].values()) == pytest.approx(
            result["value"] * result["n"]
        )


def test_features_of_an_image_are_shared_without_a_change(base, scenes, before):
    "The same answers as from pixels, question by question."
    items = scenes["scenes_questions"].items[:20]
    said = generate_captions(
        base, [Image.open(item.image) for item in items], prompts=[item.prompt for item in items], max_new_tokens=8
    )
    assert said == before["scenes_questions"]["predictions"][:20]


def test_small_chunks_and_batches_change_nothing(base, scenes, before, monkeypatch):
    monkeypatch.setattr(tasks, "ROWS", 7)
    assert (
        tasks.run_task(base, scenes["scenes_captions"], batch_size=3)["predictions"]
        == before["scenes_captions"]["predictions"]
    )


def test_scenes_are_no_training_scenes(P):
    "Pre-training drew worlds 100 and 101, its tests 9,000."
    assert (
        tasks.WORLD_SEED > 10_000
        and json.loads((P.work_dir / "tasks" / "scenes-24-seed0" / "world.json").read_text())["seed"]
        == tasks.WORLD_SEED
    )


def test_forgetting_is_seen(P, base, scenes, before):
    "Weights that move lose answers; the task's prompt is asked, not the captioner's."
    assert (
        tasks.run_task(Captioner(base.model, base.processor, prompt="write en"), scenes["scenes_captions"])["per_item"]
        == before["scenes_captions"]["per_item"]
    )
    broken = Captioner(*load_base(P))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in broken.model.parameters():
            p.add_(p.std() * torch.randn_like(p))
    assert tasks.run_task(broken, scenes["scenes_captions"])["value"] < before["scenes_captions"]["value"] - 1


def test_prompt_tuning_forgets_nothing(P, scenes, before):
    "Whatever the soft vectors are, without them the base answers."
    from rsstudy.tuning.method import attach
    from rsstudy.tuning.methods import methods

    tuned = attach(P, methods(P)["prompt"])
    with torch.no_grad():
        for p in tuned.model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    for name, task in scenes.items():
        assert tasks.run_task(tuned, task)["predictions"] == before[name]["predictions"]
