"""The choice of a learning rate, and the keys under which runs are kept: what decides, and what does not."""

import dataclasses

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

import rsstudy.tuning.run
from rsstudy.common.settings import load_profile
from rsstudy.model.base import load_base
from rsstudy.model.generate import Captioner
from rsstudy.training.data import StudyData, add_features
from rsstudy.training.plan import TrainingPlan
from rsstudy.tuning.chapter import PlannedMethod, choose_rates, run_methods
from rsstudy.tuning.methods import methods
from rsstudy.tuning.run import run_key

GRID = "1e-3,3e-3,1e-2"


def study_of(n=4):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)) for _ in range(n)]
    captions = [[f"a lake {i} .", "a lake ."] for i in range(n)]
    rows = Dataset.from_dict(dict(image_id=[str(i) for i in range(n)], image=images, captions=captions))
    return StudyData(rows, rows, rows, captions, digest="one")


@pytest.fixture
def P(tmp_path):
    return load_profile(
        "nano", work=str(tmp_path), lr_grid_lora=GRID, sweep_images=3, sweep_epochs=2, seeds="5,6", processes=1
    )


def sweep(P, method, data):
    rates, tried = choose_rates(P, {method.name: PlannedMethod(method, data, P.seeds)}, progress=False)
    return rates[method.name], tried[method.name]


@pytest.fixture
def trained(monkeypatch):
    "Training gives what `outcomes` says for a learning rate; the plans and rows that were trained are noted."
    seen = []
    outcomes = {}

    def fit(captioner, train_rows, val_rows, plan, folder, key, progress=True, **options):
        seen.append((plan, len(train_rows), len(val_rows)))
        loss, cider, collapse = outcomes[plan.lr]
        evaluations = [dict(step=0, val_loss=9.0, val_cider=0.9), dict(step=9, val_loss=loss, val_cider=cider)]
        return dict(evaluations=evaluations, collapse=collapse)

    monkeypatch.setattr(rsstudy.tuning.run, "fit", fit)
    return seen, outcomes


@pytest.mark.parametrize(
    ("outcomes", "best"),
    [
        ([(1.0, 0.2, None), (2.0, 0.9, None), (0.5, 0.4, None)], 3e-3),  # by CIDEr, whatever the loss
        ([(1.0, 0.5, None), (2.0, 0.5, None), (0.5, 0.5, None)], 1e-2),  # a tie: the lowest loss
        ([(1.0, 0.2, None), (2.0, 0.1, None), (0.5, 0.9, "one word")], 1e-3),  # one that collapsed is no candidate
        ([(1.0, None, None), (2.0, None, None), (3.0, 0.0, None)], 1e-3),  # no caption: counts as zero
    ],
)
def test_the_rate_is_chosen_by_validation_captions_then_loss(P, trained, outcomes, best):
    trained[1].update(zip((1e-3, 3e-3, 1e-2), outcomes))
    lr, tried = sweep(P, methods(P)["lora"], study_of())
    assert lr == best
    assert [(t["val_loss"], t["val_cider"], t["collapse"]) for t in tried] == outcomes


def test_beginnings_of_the_first_seeds_run_on_a_part_of_the_images(P, trained):
    seen, outcomes = trained
    outcomes.update(dict.fromkeys((1e-3, 3e-3, 1e-2), (1.0, 0.5, None)))
    sweep(P, methods(P)["lora"], study_of())
    assert [(plan.lr, plan.seed, plan.epochs, plan.stop_step) for plan, *_ in seen] == [
        (lr, 5, P.epochs, 2) for lr in (1e-3, 3e-3, 1e-2)
    ]  # two epochs of a step each
    images = {number for _, number, _ in seen}
    assert images == {3}


def test_a_rate_is_tried_once_and_again_where_something_changed(P, trained):
    seen, outcomes = trained
    outcomes.update(dict.fromkeys((1e-3, 3e-3, 1e-2, 3e-2), (1.0, 0.5, None)))
    method, data = methods(P)["lora"], study_of()
    first = sweep(P, method, data)
    assert sweep(P, method, data) == first and len(seen) == 3
    wider = dataclasses.replace(P, lr_grid_lora=(1e-3, 3e-3, 1e-2, 3e-2))
    sweep(wider, methods(wider)["lora"], data)
    assert [plan.lr for plan, *_ in seen[3:]] == [3e-2]
    sweep(dataclasses.replace(P, sweep_images=2), method, data)
    assert [number for _, number, _ in seen[4:]] == [2, 2, 2]


def test_a_given_rate_is_taken_and_none_is_an_error(P, trained):
    method = methods(P)["lora"]
    assert sweep(dataclasses.replace(P, lr=0.5), method, study_of()) == (0.5, [])
    trained[1].update(dict.fromkeys((1e-3, 3e-3, 1e-2), (9.0, 0.0, "its captions are one sentence")))
    with pytest.raises(ValueError, match=r"'lora' collapsed at every learning rate .* its captions are one sentence"):
        sweep(P, method, study_of())
    with pytest.raises(ValueError, match="'lora' has no learning rates to try"):
        sweep(P, dataclasses.replace(method, lr_grid=()), study_of())


def test_a_key_stands_for_what_decides_a_run(P):
    data, method = study_of(), methods(P)["lora"]
    plan = TrainingPlan.of(P, lr=1e-3, seed=0)
    key = run_key(P, method, data, plan)
    assert key == run_key(P, method, study_of(), plan)
    other_rank = dataclasses.replace(P, rank=2)
    others = dict(
        lr=run_key(P, method, data, dataclasses.replace(plan, lr=2e-3)),
        seed=run_key(P, method, data, dataclasses.replace(plan, seed=1)),
        epochs=run_key(P, method, data, dataclasses.replace(plan, epochs=plan.epochs + 1)),
        prompt=run_key(dataclasses.replace(P, prompt="describe en"), method, data, plan),
        precision=run_key(dataclasses.replace(P, precision="bfloat16"), method, data, plan),
        images=run_key(P, method, dataclasses.replace(data, digest="another"), plan),
        captions=run_key(P, method, dataclasses.replace(data, captions=[["a road ."]] * 4), plan),
        validation=run_key(P, method, dataclasses.replace(data, val=data.val.select([1, 0])), plan),
        rank=run_key(P, methods(other_rank)["lora"], data, plan),
        method=run_key(P, methods(P)["adapter"], data, plan),
    )
    assert len({key, *others.values()}) == 1 + len(others), others


def test_a_key_does_not_stand_for_what_decides_nothing(P):
    data, method = study_of(), methods(P)["lora"]
    key = run_key(P, method, data, TrainingPlan.of(P, lr=1e-3, seed=0))
    for other in (
        dict(track="tensorboard"),
        dict(processes=2),
        dict(resamples=5),
        dict(xai_images=3),
        dict(results="elsewhere"),
    ):
        Q = dataclasses.replace(P, **other)
        assert run_key(Q, methods(Q)["lora"], data, TrainingPlan.of(Q, lr=1e-3, seed=0)) == key, other


def result_of(value):
    "All but what it cost."
    if isinstance(value, dict):
        return {k: result_of(v) for k, v in value.items() if k not in ("cost", "seconds")}
    return value.tolist() if isinstance(value, np.ndarray) else value


def test_results_do_not_depend_on_how_many_run_at_once(tmp_path):
    "The same captions, losses and scores; a variant takes its method's rate; the file of features serves all."
    results = []
    for at_once in (1, 2):
        P = load_profile(
            "nano", work=str(tmp_path / str(at_once)), lr_grid_lora="1e-3,1e-2", sweep_images=2, sweep_epochs=1,
            seeds="0,1", epochs=1, batch_images=2, max_new_tokens=6, task_images=2, processes=at_once, data="riscm",
        )  # fmt: skip
        data = add_features(study_of(), Captioner(*load_base(P)), P.work_dir / "features", progress=False)
        plans = methods(P)
        wanted = dict(
            lora=PlannedMethod(plans["lora"], data, P.seeds),
            vision=PlannedMethod(plans["lora_vision"], data, (0,), rate_of="lora"),
        )
        results.append(run_methods(P, wanted, progress=False))
    for name, one in results[0].items():
        two = results[1][name]
        assert (one["lr"], one["sweep"]) == (two["lr"], two["sweep"])
        for a, b in zip(one["runs"], two["runs"], strict=True):
            assert result_of(a) == result_of(b)
    assert [run["seed"] for run in results[0]["lora"]["runs"]] == [0, 1] and results[0]["vision"]["sweep"] == []
