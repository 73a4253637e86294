"""What the exactness tests share.

Pictures, transformers' own loss of captions written out one by one, and an arithmetic without float32 in it.
"""

import numpy as np
import torch
import torch.nn.functional as F

from rsstudy.model.parts import core

CAPTIONS = [
    "two planes are parked near a runway .",
    "two planes .",
    "a gray runway with two white planes .",
    "two planes .",
    "some trees near a runway .",
]


def images(n=2, size=224):
    rng, side = np.random.default_rng(0), size // 8
    return [np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((side, side, 1), np.uint8)) for _ in range(n)]


def keep_float64(monkeypatch):
    """Lets transformers' casts to float32, in norms and in the softmax of plain attention, leave float64 alone.

    For a float32 model they are exact; a float64 model they would round.
    So two ways of computing one thing can be compared to float64's last digits.
    """
    to_float, softmax = torch.Tensor.float, F.softmax
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))
    monkeypatch.setattr(
        F,
        "softmax",
        lambda x, dim=None, dtype=None, **k: softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype, **k),
    )


def processed(captioner, image, caption):
    "An image and a caption as PaliGemma's own processor writes them, with its labels."
    return captioner.processor(
        images=[image], text=[f"<image>{captioner.prompt}"], suffix=[caption], return_tensors="pt"
    )


def one_by_one(captioner, pictures, captions):
    "Sum of the losses in nats, a sequence a caption, by the model's own forward pass and the processor's labels."
    total = 0.0
    for image, texts in zip(pictures, captions):
        for text in texts:
            inputs = processed(captioner, image, text)
            labels = inputs.pop("labels")
            total = total + F.cross_entropy(
                core(captioner.model)(**inputs).logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
            )
    return total


def gradients(model, loss):
    "Gradient of a loss for every parameter that has one."
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found, wanted, floor=1e-6):
    """Largest relative distance of two sets of gradients, tensor by tensor.

    A tensor smaller than `floor` of the whole is measured against that.
    SigLIP's key biases have no gradient at all, as a softmax does not see a shift, only its rounding.
    """
    assert found.keys() == wanted.keys()
    whole = sum(g.norm() ** 2 for g in wanted.values()) ** 0.5
    return max(
        float((found[name] - wanted[name]).norm() / torch.maximum(wanted[name].norm(), floor * whole))
        for name in wanted
    )
