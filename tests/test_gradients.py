"""The gradient of a packed batch is that of its captions one by one, for every method.

And chunks of the vocabulary's loss change nothing.
"""

import pytest
import torch
from exact import CAPTIONS, distance, gradients, images, keep_float64, one_by_one, processed

from rsstudy.common.settings import load_profile
from rsstudy.model import forward as batches
from rsstudy.model.forward import caption_loss
from rsstudy.model.generate import Captioner
from rsstudy.model.nano import nano_model, nano_processor
from rsstudy.model.pack import encode_example, pack
from rsstudy.tuning.method import attach
from rsstudy.tuning.methods import methods

P = load_profile("nano", prompt_length=4, adapter_width=8, rank=4)
TUNED = [name for name in methods(P) if name != "none"]
EACH = [CAPTIONS, CAPTIONS[:2]]  # five captions of one image, two of them alike; two of another


def moved(captioner):
    "The captioner, its parameters off their start (LoRA's B is zero there and hides A), in float64."
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in captioner.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    captioner.model.double()
    return captioner


def packed(captioner, captions=EACH):
    "A batch of the captions with the processor's own pixels."
    processor = captioner.processor
    rows = [encode_example(processor, captioner.prompt, texts) for texts in captions]
    pixels = processor.image_processor(images=images(len(captions)), return_tensors="pt")["pixel_values"]
    return pack(rows, processor.tokenizer.eos_token_id) | dict(pixel_values=pixels)


@pytest.mark.parametrize("name", TUNED)
def test_packed_gradient_is_that_of_single_captions(name, monkeypatch):
    keep_float64(monkeypatch)
    captioner = moved(attach(P, methods(P)[name]))
    total, count = caption_loss(captioner.model, packed(captioner))
    found = gradients(captioner.model, total)
    separate = one_by_one(captioner, images(), EACH)
    assert count == sum(
        (processed(captioner, images(1)[0], text)["labels"] != -100).sum() for texts in EACH for text in texts
    )
    # bitsandbytes multiplies 4-bit matrices in float32 whatever it is given:
    # there, float32's rounding is what can be asked for (1.8e-7 where this was measured)
    tolerance = 1e-5 if name == "qlora" else 1e-9
    assert abs(total.item() / separate.item() - 1) < tolerance
    assert distance(found, gradients(captioner.model, separate)) < tolerance


@pytest.mark.parametrize("name", ["lora", "full"])
def test_as_shipped_the_gradients_differ_by_float32_rounding_only(name):
    captioner = moved(attach(P, methods(P)[name]))
    found = gradients(captioner.model, caption_loss(captioner.model, packed(captioner))[0])
    whole = sum(g.norm() ** 2 for g in found.values()) ** 0.5
    wanted = gradients(captioner.model, one_by_one(captioner, images(), EACH))
    assert all((found[name] - wanted[name]).norm() < 1e-6 * whole for name in wanted)


@pytest.mark.parametrize("cap", [None, 1.5], ids=["plain", "soft cap"])
@pytest.mark.parametrize("head", ["frozen", "tied", "own"])
def test_chunks_change_nothing(cap, head, monkeypatch, chunk=7):
    captioner = Captioner(nano_model(), nano_processor())
    model = moved(captioner).model
    model.config.get_text_config().final_logit_softcapping = cap
    if head == "own":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    if head == "frozen":
        model.lm_head.requires_grad_(False)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == (head != "own")
    batch = packed(captioner)
    batch["features"] = torch.randn(2, 64, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, count = caption_loss(model, batch, 0)
    wanted = gradients(model, plain / count)
    seen, logits = [], batches.head_logits
    monkeypatch.setattr(batches, "head_logits", lambda model, hidden: seen.append(len(hidden)) or logits(model, hidden))
    total, count = caption_loss(model, batch, chunk)
    assert abs(total.item() / plain.item() - 1) < 1e-12
    assert distance(gradients(model, total / count), wanted) < 1e-12
    assert max(seen) <= chunk and sum(seen[1:]) == len(
        batch["targets"]
    )  # the first call only asks which parameters the head has
    with torch.no_grad():
        assert abs(caption_loss(model, batch, chunk)[0].item() / plain.item() - 1) < 1e-12


@pytest.mark.parametrize("name", ["prompt", "full", "lora"])
def test_chunks_under_a_method(name):
    "Tuned tokens are tied to the head, too: their gradient comes through the chunks."
    captioner = moved(attach(P, methods(P)[name]))
    batch = packed(captioner)
    wanted, found = (gradients(captioner.model, caption_loss(captioner.model, batch, chunk)[0]) for chunk in (0, 7))
    assert distance(found, wanted) < 1e-12


def test_chunks_under_autocast():
    captioner = attach(P, methods(P)["full"])
    batch = packed(captioner)

    def under(chunk):
        with torch.autocast("cpu", torch.bfloat16):
            total, count = caption_loss(captioner.model, batch, chunk)
        return total.item(), gradients(captioner.model, total / count)

    (plain, wanted), (total, found) = under(0), under(7)
    assert all(g.dtype == torch.float32 for g in found.values())
    assert abs(total / plain - 1) < 1e-6
    whole = sum(g.norm() ** 2 for g in wanted.values()) ** 0.5
    assert all(
        (found[name] - wanted[name]).norm() < 2e-2 * whole for name in wanted
    )  # the order of bfloat16 roundings differs


def test_default_chunk_holds_the_budget(monkeypatch):
    captioner = Captioner(nano_model(), nano_processor())
    batch, seen, logits = packed(captioner), [], batches.head_logits
    vocabulary = captioner.model.config.get_text_config().vocab_size
    monkeypatch.setattr(batches, "head_logits", lambda model, hidden: seen.append(len(hidden)) or logits(model, hidden))
    with torch.no_grad():
        caption_loss(captioner.model, batch)
        assert seen == [len(batch["targets"])]  # the nano model is one chunk
        monkeypatch.setattr(batches, "LOGITS_BYTES", 10 * 4 * vocabulary)
        caption_loss(captioner.model, batch)
    assert max(seen[1:]) <= 10 and sum(seen[1:]) == len(batch["targets"])
