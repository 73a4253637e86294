"""07_comparison on made-up chapters in the chapters' own schema: run by the runner, its JSON checked row by row."""

import json

import numpy as np
import pytest
from toys import ROOT, rsstudy

from rsstudy.metrics.bleu import bleu_from_counts
from rsstudy.report.tidy import compare_results
from rsstudy.stats.intervals import paired_difference
from rsstudy.stats.rows import swap_sides
from rsstudy.tuning.methods import compared_methods

LEVELS = dict(none=0.2, lora=0.9, lora_vision=1.0, qlora=0.88, prompt=0.6, adapter=0.95, adapter_pfeiffer=0.9, full=1.1)
TRAINED = dict(
    none=0,
    lora=60_000,
    lora_vision=110_000,
    qlora=60_000,
    prompt=2_000,
    adapter=90_000,
    adapter_pfeiffer=45_000,
    full=3_800_000,
)
CHAPTERS = {
    "02_baseline": ["none"],
    "03_lora": ["lora", "qlora", "lora_vision"],
    "04_prompt_tuning": ["prompt"],
    "05_adapter": ["adapter", "adapter_pfeiffer", "full"],
}


def write_chapters(folder, n=120, sources=("NWPU", "RSICD", "UCM")):
    """Made-up results of 02 to 06 in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    hard = np.random.default_rng(0).normal(0, 0.4, n)  # an image that is hard for one method is hard for all

    def run(name, seed):
        rng = np.random.default_rng([list(LEVELS).index(name), seed or 0])
        cider = (LEVELS[name] + hard + rng.normal(0, 0.2, n)).clip(0)
        length = rng.integers(8, 15, n)
        guess = np.stack([length - k for k in range(4)], 1)
        correct = rng.binomial(guess, (LEVELS[name] * 0.6 / np.arange(1, 5)).clip(0, 1))
        counts = np.column_stack([correct, guess, length, np.full(n, 11)])
        per_image = {
            "cider-coco.v1": cider.tolist(),
            "meteor-nltk.v1": (cider / 4).tolist(),
            "rouge_l-coco.v1": (cider / 3).clip(0, 1).tolist(),
            "bertscore_f1-minilm.v1": (0.5 + cider / 5).tolist(),
            "empty.v1": [0] * n,
            "bleu_counts": counts.tolist(),
        }
        scores = (
            {k: float(np.mean(v)) for k, v in per_image.items() if k != "bleu_counts"}
            | {f"bleu{k}-coco.v1": float(bleu_from_counts(counts.sum(0))[k - 1]) for k in range(1, 5)}
            | {"distinct.v1": 0.5}
        )
        return dict(
            seed=seed,
            scores=scores,
            per_image=per_image,
            history=dict(best_val_loss=2.5),
            predictions=["a plane"] * n,
            info=dict(images=n, tokenizer="ptb.v2"),
        )

    for chapter, names in CHAPTERS.items():
        methods = {
            name: dict(
                label=name,
                config={},
                lr=1e-3,
                sweep=[],
                runs=[run(name, s) for s in ([None] if name == "none" else [0, 1, 2])],
                cost=dict(
                    trainable_parameters=TRAINED[name],
                    operations=TRAINED[name] * 10**6,
                    peak_memory_bytes=2 * 10**9,
                    adapter_bytes=4 * TRAINED[name],
                ),
            )
            for name in names
        }
        data = dict(
            manifest=dict(settings=dict(rank=8)),
            image_ids=[f"{i}.jpg" for i in range(n)],
            sources=[sources[i % len(sources)] for i in range(n)],
            methods=methods,
        )
        if chapter == "02_baseline":
            data["covariates"] = dict(source=data["sources"], words=["under 8", "8 to under 10"] * (n // 2))
        (folder / f"{chapter}.json").write_text(json.dumps(data))
    leakage = dict(clean=data["image_ids"][: n // 2], caption_unseen=data["image_ids"][: n // 4], pairs={})
    (folder / "01_eda.json").write_text(json.dumps(dict(manifest=dict(settings=dict(rank=8)), leakage=leakage)))
    rng = np.random.default_rng(1)
    rows = [
        dict(
            method=m,
            attribution=a,
            metric=metric,
            value=(v := float(rng.normal(0.3 * (a not in ("random", "blob")), 0.1))),
            low=v - 0.15,
            high=v + 0.15,
            n=24,
        )
        for m in ("none", "lora", "qlora", "prompt", "adapter", "full")
        for a in ("integrated_gradients", "grad_cam", "shap", "pixelshap", "random", "blob")
        for metric in ("deletion_gain.v1", "insertion_gain.v1", "pointing_game.v1")
    ]
    (folder / "06_xai.json").write_text(json.dumps(dict(manifest=dict(settings=dict(rank=8)), faithfulness=rows)))


def run_comparison(tmp_path, *words):
    return rsstudy(
        ROOT,
        "run",
        "--only",
        "07_comparison",
        "--set",
        f"results={tmp_path}/results/local",
        "--set",
        f"work={tmp_path}/runs",
        "--set",
        "resamples=200",
        *words,
    )


def test_comparison(tmp_path):
    """Every row the comparison promises, the figures, and the table on the terminal."""
    write_chapters(tmp_path / "results/local/nano")
    run = run_comparison(tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "results/local/nano/07_comparison.json").read_text())
    methods, groups = (
        ["none", "lora", "qlora", "prompt", "adapter", "full"],
        {"all", "NWPU", "RSICD", "UCM", "subset:clean", "subset:caption_unseen"},
    )
    assert [r["method"] for r in result["cost"]] == methods
    assert {(r["method"], r["source"]) for r in result["scores"]} == {(m, s) for m in methods for s in groups}
    for row in result["scores"]:
        assert set(row) == {"kind", "method", "source", "metric", "value", "low", "high", "n", "seed"}
        if row["low"] is not None:
            assert row["low"] <= row["value"] <= row["high"], row
    full = [r for r in result["scores"] if (r["method"], r["source"], r["metric"]) == ("full", "all", "cider-coco.v1")]
    assert [r["seed"] for r in full] == [0, 1, 2, None]
    chapter = json.loads((tmp_path / "results/local/nano/05_adapter.json").read_text())
    for row, source_run in zip(full, chapter["methods"]["full"]["runs"]):
        assert row["value"] == pytest.approx(source_run["scores"]["cider-coco.v1"], rel=1e-5)
    assert full[3]["value"] == pytest.approx(np.mean([r["value"] for r in full[:3]]), rel=1e-5)
    paired = [r for r in result["differences"] if r["metric"] == "cider-coco.v1" and r["source"] == "all"]
    assert {(r["method"], r["against"]): r["verdict"] for r in paired}["full", "none"] == "better"
    assert {(r["method"], r["against"]): r["verdict"] for r in paired}["qlora", "lora"] == "tie"
    for row in result["differences"]:
        assert row["p"] <= row["p_holm"] <= 1 and 0 <= row["wins"] <= 1
        assert row["verdict"] == (
            "tie"
            if row["low"] <= 0 <= row["high"] or row["p_holm"] >= 0.05
            else "better"
            if row["value"] > 0
            else "worse"
        ), row
    assert {r["method"] for r in result["variants"]["scores"]} == {"lora_vision", "adapter_pfeiffer"}
    figures = sorted(f.name for f in (tmp_path / "results/local/nano").glob("*.png"))
    assert figures == [f"07_comparison_{name}.png" for name in ("faithfulness", "quality_cost", "sources")]
    assert "Quality, cost and faithfulness: 120 test images, 3 seeds" in run.stdout and all(
        name in run.stdout for name in figures
    )


def test_other_images_are_refused(tmp_path):
    """Chapters that scored different images cannot be compared, and the message says which."""
    write_chapters(tmp_path / "results/local/nano")
    other = json.loads((tmp_path / "results/local/nano/04_prompt_tuning.json").read_text())
    other["image_ids"].reverse()
    (tmp_path / "results/local/nano/04_prompt_tuning.json").write_text(json.dumps(other))
    run = run_comparison(tmp_path)
    assert run.returncode == 2 and "04_prompt_tuning scored other images than 02_baseline" in run.stderr


def test_missing_chapter_is_named(tmp_path):
    """`--only 07_comparison` without the adapter chapter says so before anything runs."""
    write_chapters(tmp_path / "results/local/nano")
    (tmp_path / "results/local/nano/05_adapter.json").unlink()
    run = run_comparison(tmp_path)
    assert run.returncode == 2 and "run 05_adapter first" in run.stderr and run.stderr.count("\n") == 1


def test_more_than_scores(tmp_path):
    """Floors, subsets, failures and forgetting: rows where the chapters bring them, and none where they do not."""
    write_chapters(tmp_path)
    results = {f.stem: json.loads(f.read_text()) for f in tmp_path.glob("*.json") if f.stem != "01_eda"}
    plain = compare_results(results, 100, 500)
    assert (
        plain["forgetting"] == []
        and {r["kind"] for r in plain["scores"]} == {"method"}
        and not any(r["source"].startswith("subset") for r in plain["scores"])
    )

    n, base = 120, results["02_baseline"]["methods"]["none"]["runs"][0]
    results["02_baseline"]["floors"] = {
        name: dict(label=name, scores=base["scores"], per_image=base["per_image"]) for name in ("frequent", "human")
    }
    results["02_baseline"]["floors"]["human"]["images"] = list(range(n))  # all have a second opinion
    results["01_eda"] = dict(
        leakage=dict(
            clean=[f"{i}.jpg" for i in range(0, n, 2)],
            caption_unseen=[f"{i}.jpg" for i in range(30)] + ["not scored.jpg"],
        )
    )
    for name, entry in ((m, e) for r in results.values() for m, e in r.get("methods", {}).items()):
        for run in entry["runs"]:
            rng = np.random.default_rng([run["seed"] or 0, list(LEVELS).index(name)])
            run["per_image"]["count_error.v1"] = np.stack(
                [rng.binomial(3, 0.8 if name == "none" else 0.3, n), np.full(n, 3)], 1
            ).tolist()  # wrong, claims
            right = (rng.random(60) < (0.9 if name in ("none", "lora") else 0.2)).astype(float)
            run["transfer"] = dict(
                questions=dict(metric="accuracy-exact.v1", value=right.mean(), per_item=right.tolist()),
                far=dict(task="far", missing="the hub does not answer"),
            )
    result = json.loads(json.dumps(compare_results(results, 200, 2000)))

    floors = [r for r in result["scores"] if r["kind"] == "floor"]
    assert (
        {r["method"] for r in floors} == {"frequent", "human"}
        and {r["seed"] for r in floors} == {None}
        and result["labels"]["human"] == "human"
    )

    def of(method):
        return {
            (r["source"], r["metric"], k): r[k]
            for r in result["scores"]
            if r["method"] == method and r["seed"] is None and r["low"] is not None
            for k in ("value", "low", "high")
        }

    assert of("human") == pytest.approx(of("none"), rel=1e-9)  # the same captions have the same rows, interval included
    assert {r["source"]: r["n"] for r in result["scores"]} == dict(all=120, NWPU=40, RSICD=40, UCM=40) | {
        "subset:clean": 60,
        "subset:caption_unseen": 30,
    }
    assert not {r["method"] for r in result["differences"]} & {"frequent", "human"}  # floors are shown, not tested

    errors = [
        r
        for r in result["scores"]
        if (r["method"], r["source"], r["metric"], r["seed"]) == ("lora", "all", "count_error.v1", 1)
    ]
    counts = np.array(
        next(r for r in results["03_lora"]["methods"]["lora"]["runs"] if r["seed"] == 1)["per_image"]["count_error.v1"]
    ).sum(0)
    assert errors[0]["value"] == pytest.approx(counts[0] / counts[1])
    error = {
        (r["method"], r["against"]): r
        for r in result["differences"]
        if (r["source"], r["metric"]) == ("all", "count_error.v1")
    }
    assert (
        error["lora", "none"]["value"] < 0
        and error["lora", "none"]["verdict"] == "better"
        and swap_sides(error["lora", "none"])["verdict"] == "worse"
    )  # fewer errors are better
    # against the base, against the strongest floor, with each other, variants against their method
    assert len(error) == 5 + 5 + 10 + 2

    forgotten = {r["method"]: r for r in result["forgetting"]}
    assert set(forgotten) == set(LEVELS) - {"none", "lora_vision", "adapter_pfeiffer"} and {
        r["task"] for r in result["forgetting"]
    } == {"questions"}  # what was not asked has no row
    assert (
        forgotten["full"]["verdict"] == "worse"
        and forgotten["lora"]["verdict"] == "tie"
        and forgotten["full"]["n"] == 60
    )
    for r in result["forgetting"]:
        assert (
            r["value"] == pytest.approx(r["after"] - r["before"])
            and r["low"] <= r["value"] <= r["high"]
            and r["p"] <= r["p_holm"]
        )


def test_three_lucky_seeds_are_a_tie(tmp_path):
    """A method whose seeds fall far apart is not better than one that they overlap, however sure the images are.

    Five agreeing seeds are.
    """
    rng, n = np.random.default_rng(0), 400
    hard = rng.normal(1, 0.4, n)

    def make(levels):
        return [
            dict(
                seed=s,
                scores={"cider-coco.v1": 0.0},
                per_image={"cider-coco.v1": (hard + level + rng.normal(0, 0.2, n)).tolist()},
            )
            for s, level in enumerate(levels)
        ]

    def compared(levels):
        methods = dict(none=make([0.0]), lora=make([0.0, 0.01, -0.01]), full=make(levels))
        chapter = dict(
            image_ids=list(map(str, range(n))),
            sources=["unknown"] * n,
            methods={name: dict(runs=runs) for name, runs in methods.items()},
        )
        rows = compare_results({"02_baseline": chapter}, 400, 2000)["differences"]
        return next(r for r in rows if (r["method"], r["against"]) == ("full", "lora")), methods

    lucky, methods = compared([0.05, 0.1, 0.6])
    steady, _ = compared([0.23, 0.24, 0.25, 0.26, 0.27])
    assert lucky["value"] == pytest.approx(0.25, abs=0.03) and lucky["verdict"] == "tie"
    assert steady["value"] == pytest.approx(0.25, abs=0.03) and steady["verdict"] == "better"
    values = [np.array([run["per_image"]["cider-coco.v1"] for run in methods[m]]) for m in ("full", "lora")]
    kept = paired_difference(*values, seeds="kept")
    assert kept.low > 0 and lucky["high"] - lucky["low"] > 3 * (
        kept.high - kept.low
    )  # the images alone would have called it


def test_methods_come_in_their_order(tmp_path):
    """Rows name the later method first, whatever order the files are in."""
    write_chapters(tmp_path)
    results = {f.stem: json.loads(f.read_text()) for f in sorted(tmp_path.glob("*.json"), reverse=True)}
    order, rows = (
        [*compared_methods(), "lora_vision", "adapter_pfeiffer"],
        compare_results(results, 50, 50)["differences"],
    )
    assert all(
        order.index(r["against"]) < order.index(r["method"])
        for r in rows
        if {r["method"], r["against"]} <= set(compared_methods())
    )
