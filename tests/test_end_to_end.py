"""The seven notebooks, one after the other through the command line, on the smallest study there is."""

import json
import subprocess

import pytest
from toys import command

from rsstudy.evaluation.floors import FLOORS

TINY = dict(
    train_images=8,
    val_images=4,
    test_images=8,
    epochs=1,
    batch_images=4,
    lr=1e-3,
    xai_images=1,
    ig_steps=4,
    shap_evaluations=12,
    segments=4,
    pixelshap_samples=8,
    rise_masks=8,
    noise_samples=2,
    xai_checks=0,
    resamples=20,
    rank=2,
    prompt_length=4,
    adapter_width=4,
    max_new_tokens=12,
    task_images=4,
)
NOTEBOOKS = ["01_eda", "02_baseline", "03_lora", "04_prompt_tuning", "05_adapter", "06_xai", "07_comparison"]
METHODS = {"none", "lora", "qlora", "prompt", "adapter", "full"}


def tiny(folder):
    "The settings, as words of the command line."
    settings = TINY | dict(results=folder / "results", work=folder / "runs")
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def run(folder):
    words = command("run", "--seeds", "0", *tiny(folder))
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    said = run(folder)
    assert said.returncode == 0, (said.stdout + said.stderr)[-4000:]
    return folder, said


def result(study, notebook):
    return json.loads((study[0] / "results" / "nano" / f"{notebook}.json").read_text())


def test_every_notebook_leaves_its_result(study):
    for notebook in NOTEBOOKS:
        manifest = result(study, notebook)["manifest"]
        assert manifest["settings"]["train_images"] == 8 and manifest["versions"]["torch"] and manifest["seconds"] > 0
        assert (study[0] / "results" / "nano" / f"{notebook}.ipynb").is_file()


def test_the_comparison_is_tidy(study):
    found = result(study, "07_comparison")
    assert (
        {row["method"] for row in found["scores"] if row["kind"] == "method"}
        == METHODS
        == {row["method"] for row in found["cost"]}
    )
    tuned_towers = {f"consensus_{name}" for name in ("full", "lora_vision")}  # neighbours by a tower that was tuned
    assert {row["method"] for row in found["scores"] if row["kind"] == "floor"} == set(FLOORS) | tuned_towers
    assert {row["method"] for row in found["faithfulness"]} == METHODS | {
        "lora_vision"
    }  # the one variant that is explained as well
    for row in found["scores"]:
        assert set(row) == {"kind", "method", "source", "metric", "value", "low", "high", "n", "seed"}
    for row in found["cost"]:
        costs = {"trainable_parameters", "operations", "peak_memory_bytes", "adapter_bytes"}
        assert set(row) == {"method", "validation_loss"} | costs
    for row in found["faithfulness"]:
        assert set(row) == {"method", "attribution", "metric", "value", "low", "high", "n"}
    assert "all" in {row["source"] for row in found["scores"]}


def test_the_final_table_is_printed(study):
    labels = result(study, "07_comparison")["labels"]
    lines = study[1].stdout.splitlines()
    assert [m for m in METHODS if not any(line.startswith(labels[m] + " ") for line in lines)] == []


def test_a_kept_run_is_diagnosed(study):
    words = command("diagnose", "lora", *tiny(study[0]))
    said = subprocess.run(words, cwd=study[0], capture_output=True, text=True)
    lines = said.stdout.splitlines()
    history = result(study, "03_lora")["methods"]["lora"]["runs"][0]["history"]
    assert lines[0].startswith("LoRA, seed 0: ") and f"training loss {history['losses'][0]:.3f}" in lines[1]
    assert "on 4 validation images: CIDEr" in said.stdout
    assert said.returncode == (not lines[-1].endswith("nothing is wrong with what can be seen of this run"))


def test_nothing_is_run_twice(study):
    again = run(study[0])
    assert again.returncode == 0
    for notebook in NOTEBOOKS:
        assert f"{notebook}: done before" in again.stdout + again.stderr
