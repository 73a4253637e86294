"""A toy training run for `accelerate launch`: leaves its losses, its evaluations and its weights in a JSON."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from rsstudy.model import features
from rsstudy.model.generate import Captioner
from rsstudy.model.nano import nano_model, nano_processor
from rsstudy.training.checkpoint import full_value
from rsstudy.training.fit import fit
from rsstudy.training.loader import CaptionRows
from rsstudy.training.plan import TrainingPlan
from rsstudy.tuning.lora import Lora

torch.set_num_threads(1)
here, out, batch_images, micro_images = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
fill = features._fill


def counted(*args):
    with open(here / "fills.txt", "a") as file:
        file.write("filled\n")
    return fill(*args)


features._fill = counted
rng = np.random.default_rng(0)
images = [rng.integers(0, 255, (224, 224, 3), np.uint8) for _ in range(7)]
captions = [
    [f"a {'red green blue gray'.split()[i % 4]} field .", "a field near a road .", "one field"][: 1 + i % 3]
    for i in range(7)
]
torch.manual_seed(0)
captioner = Lora().attach(Captioner(nano_model(seed=0), nano_processor()))
rows = CaptionRows(captioner, images, captions, features=features.cache_features(captioner, images, here, "toy"))
plan = TrainingPlan(
    lr=2e-3,
    epochs=2,
    batch_images=batch_images,
    micro_images=micro_images,
    val_captions=2,
    max_new_tokens=4,
    patience=9,
)
history = fit(captioner, rows, rows.first(3), plan, here / out)
weights = {
    n: full_value(p) for n, p in captioner.model.named_parameters() if p.requires_grad
}  # together, where the model is sharded
if int(os.environ.get("RANK", 0)) == 0:
    weights = {n: p.tolist() for n, p in weights.items()}
    (here / f"{out}.json").write_text(
        json.dumps(dict(losses=history["losses"], val=[e["val_loss"] for e in history["evaluations"]], weights=weights))
    )
