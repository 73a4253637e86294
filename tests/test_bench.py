"""The benchmark: it runs with little more than torch, transformers and peft, and from a profile to its JSON."""

import json
import math
import subprocess
import sys

from toys import ROOT

from rsstudy.bench.metrics import bench_scoring
from rsstudy.bench.train import bench_profile
from rsstudy.bench.xai import SAME, SWITCHES, bench_explanations
from rsstudy.bench.xai_peers import Budget
from rsstudy.common.settings import load_profile
from rsstudy.scenes.world import ensure_world

BARE = """
import importlib.abc, sys
from pathlib import Path
ABSENT = set("PIL pandas pyarrow datasets scipy sklearn skimage fastcore nbdev matplotlib seaborn nltk evaluate captum "
    "shap bert_score papermill IPython torchvision bitsandbytes ray pycocoevalcap imagehash pynvml".split())
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT: raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Absent())
import importlib.util
whole = importlib.util.find_spec
def find_spec(name, package=None): return None if name.split(".")[0] in ABSENT else whole(name, package)
importlib.util.find_spec = find_spec # how transformers and peft ask what is there
from rsstudy.bench.train import bench_gpu
bench_gpu(Path(sys.argv[1]), tiny=True, images=4, rounds=1, seconds=.01, backend="eager")
from rsstudy.bench.xai_gpu import bench_gpu_explanations
bench_gpu_explanations(Path(sys.argv[1]), tiny=True, rounds=1)
assert not ABSENT & {name.split(".")[0] for name in sys.modules}
"""


def test_bare_machine(tmp_path):
    """`bench gpu` imports nothing that a bare machine lacks.

    Without bitsandbytes it leaves QLoRA out, without shap it scores masks, and it says so.
    """
    run = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(found) == ["explanations-paligemma-tiny", "generate-paligemma-tiny", "train-paligemma-tiny-lora"]
    assert found["train-paligemma-tiny-lora"]["qlora_peer"] == "left out: bitsandbytes is not installed"
    assert found["explanations-paligemma-tiny"]["shap"] == "random masks on 16 x 16 cells: shap is not installed"
    assert 0 < found["explanations-paligemma-tiny"]["precision"]["log_probability"] < 0.05


def test_profile(tmp_path):
    """A profile's own model and images, every lever in the JSON.

    The captions are those of plain `generate`, the gradient is the usual recipe's.
    """
    P = load_profile(
        "nano",
        data=str(
            ensure_world(
                tmp_path / "scenes", domain="target", seed=0, train=6, val=2, test=3, progress=False, workers=1
            )
        ),
    )
    train, generate = (
        json.loads(bench_profile(what, P, rounds=1, seconds=0.01, images=6, folder=tmp_path).read_text())
        for what in ("train", "generate")
    )
    assert train["gradient_cosine"] > 0.9999 and train["weights"] == "paligemma-nano" and train["unit"] == "captions/s"
    assert {
        "shared_prefix",
        "suffix_logits",
        "chunked_loss",
        "cached_vision",
        "bucketing",
        "fused_optimizer",
        "kept_activations",
    } == set(train["levers"])
    assert math.isfinite(train["step"]["ratio"]) and train["ours"] == train["details"]["ours"]["captions_per_second"]
    assert (
        generate["same_captions"] == 1
        and generate["mean_tokens"] > 1
        and set(generate["levers"]) == {"cached_vision", "early_exit"}
    )
    metrics = json.loads(bench_scoring(P, rounds=1, resamples=50, folder=tmp_path).read_text())
    assert (
        metrics["details"]["references"] == 55
        and metrics["largest_difference"] < 1e-9
        and metrics["ratio"] > 0
        and metrics["details"]["intervals"]["seconds"] > 0
    )


def test_explanations(tmp_path):
    """Ours and the usual explanations of one image: the same maps from as many evaluations, every lever in the JSON."""
    P = load_profile(
        "nano",
        data=str(
            ensure_world(
                tmp_path / "scenes", domain="target", seed=0, train=2, val=1, test=1, progress=False, workers=1
            )
        ),
    )
    names = (
        "integrated_gradients",
        "pixelshap",
    )  # shap's tree of 150,528 pixels takes a minute: `make bench` plants it
    found = json.loads(
        bench_explanations(
            P, rounds=1, images=1, budget=Budget(points=3, segments=4), names=names, folder=tmp_path
        ).read_text()
    )
    assert found["name"] == "explanations-nano" and set(found["methods"]) == set(names) == set(found["reached"])
    for name, m in found["methods"].items():
        assert m["maps"]["same"] and m["maps"]["same_settings"] <= SAME and set(m["levers"]) == set(SWITCHES), name
        ours, peer = m["details"]["ours"], m["details"]["peer"]
        assert abs(ours["evaluations_behind_a_map"] - peer["evaluations_behind_a_map"]) <= 3, (
            name
        )  # ours scores the two ends of SHAP once more, the peer keeps one of them from word to word
        assert (
            ours["evaluations_a_word"] < peer["evaluations_a_word"]
            and abs(m["ratio"] * m["peer"] / m["ours"] - 1) < 1e-4
        ), name  # the file rounds
        assert found["reached"][name] == dict(all_words=m["ratio"] >= 4, one_word=m["ratio_one_word"] >= 4), name
    assert found["ratio"] == min(m["ratio"] for m in found["methods"].values())
