"""PaliGemma and PaliGemma 2, for several image sizes, as tiny random models: what holds for one holds for all.

A mix checkpoint is a pt checkpoint's architecture with other weights.
The windows are shorter than the rows and the caps low enough to be felt, which tests here make sure of.
"""

import dataclasses
import re

import pytest
import torch
from exact import CAPTIONS, distance, gradients, images, keep_float64, one_by_one, processed
from transformers import PaliGemmaForConditionalGeneration

from rsstudy.common.settings import load_profile
from rsstudy.model.base import load_base
from rsstudy.model.forward import caption_loss, pixel_tensor, target_logits
from rsstudy.model.generate import Captioner, generate_captions, generate_ids
from rsstudy.model.nano import nano_config, nano_processor
from rsstudy.model.pack import attention_masks, encode_example, pack
from rsstudy.model.parts import DECODER, PROJECTOR, VISION, linear_layers
from rsstudy.tuning.method import attach
from rsstudy.tuning.methods import load_tuned, methods
from rsstudy.tuning.saved import save_tuned, tuned_folder

KINDS = {
    "paligemma": (1, 224),
    "paligemma2": (2, 224),
    "paligemma2 of 112 pixels": (2, 112),
}  # Gemma's generation, image side
OPTIONS = dict(prompt_length=4, adapter_width=8, rank=4)
TUNED = [name for name in methods(load_profile("nano", **OPTIONS)) if name != "none"]
EACH = [CAPTIONS[:2] + CAPTIONS[3:4], CAPTIONS[2:3]]  # 'two planes .' twice


def build(gemma, side):
    """A tiny model and its processor.

    Its layers outweigh its embedding, so that captions differ, and its logits reach the cap.
    """
    processor = nano_processor()
    tokens = (side // 28) ** 2
    processor.image_processor.size, processor.image_processor.image_seq_length, processor.image_seq_length = (
        dict(height=side, width=side),
        tokens,
        tokens,
    )
    config = nano_config(len(processor.tokenizer), gemma)
    config.vision_config.image_size, config.vision_config.num_image_tokens, config.text_config.num_image_tokens = (
        side,
        tokens,
        tokens,
    )
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim > 1:
                parameter.mul_(5)
        model.model.language_model.norm.weight.add_(9)
    return model, processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A function that gives the folder of a kind's base model."
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("base")
            for part in build(*KINDS[kind]):
                part.save_pretrained(made[kind])
        return made[kind]

    return of


def base(folder, kind):
    "A captioner loaded as a profile loads it, and images of its size."
    return Captioner(*load_base(load_profile("nano", base_model=str(folder(kind))))), images(2, KINDS[kind][1])


def packed(captioner, pictures, captions=EACH):
    processor = captioner.processor
    rows = [encode_example(processor, captioner.prompt, texts) for texts in captions]
    return pack(rows, processor.tokenizer.eos_token_id) | dict(pixel_values=pixel_tensor(processor, pictures))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_the_models_own_forward_pass(kind, folder, monkeypatch):
    keep_float64(monkeypatch)
    captioner, pictures = base(folder, kind)
    captioner.model.double().requires_grad_(True)
    batch = packed(captioner, pictures)
    batch["pixel_values"] = captioner.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert batch["position_ids"].max() > 24  # the window
    separate = one_by_one(captioner, pictures, EACH)
    wanted = gradients(captioner.model, separate)
    for chunk in (0, 7):
        total, _ = caption_loss(captioner.model, batch, chunk)
        assert abs(total.item() / separate.item() - 1) < 1e-9
        assert distance(gradients(captioner.model, total), wanted) < 1e-9


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "paligemma"])
def test_window_and_caps_are_felt(kind, folder, monkeypatch):
    "Without the window or without either cap the loss is another: the test above would notice."
    captioner, pictures = base(folder, kind)
    batch, text = packed(captioner, pictures), captioner.model.config.text_config
    with torch.no_grad():
        loss = caption_loss(captioner.model, batch)[0].item()

    def moved():  # by how much, of the loss
        with torch.no_grad():
            return abs(caption_loss(captioner.model, batch)[0].item() / loss - 1)

    assert moved() == 0
    for name, far in dict(final_logit_softcapping=1000.0, sliding_window=1000).items():
        with monkeypatch.context() as patch:
            patch.setattr(text, name, far)
            assert moved() > 1e-4, name
    for layer in captioner.model.model.language_model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert moved() > 1e-4


def test_the_masks_are_transformers_own(folder, monkeypatch):
    "One caption a row: what PaliGemma's forward hands to the decoder is what `attention_masks` builds."
    captioner, pictures = base(folder, "paligemma2")
    inputs, seen = processed(captioner, pictures[0], CAPTIONS[0]), {}
    decoder, forward = captioner.model.model.language_model, captioner.model.model.language_model.forward
    monkeypatch.setattr(decoder, "forward", lambda *args, **kwargs: seen.update(kwargs) or forward(*args, **kwargs))
    with torch.no_grad():
        captioner.model(**inputs)
    theirs = {
        kind: (mask[0, 0] == 0)[:-1, :-1] for kind, mask in seen["attention_mask"].items()
    }  # <eos> is not read in a packed row
    ours = {
        kind: mask[0, 0] == 0
        for kind, mask in attention_masks(captioner.model, packed(captioner, pictures[:1], [CAPTIONS[:1]])).items()
    }
    assert ours.keys() == theirs.keys() == {"full_attention", "sliding_attention"}
    assert all(torch.equal(ours[kind], theirs[kind]) for kind in theirs)
    assert not torch.equal(ours["full_attention"], ours["sliding_attention"])


@pytest.mark.parametrize("kind", KINDS)
def test_no_caption_sees_another_or_what_follows(kind, folder):
    captioner, pictures = base(folder, kind)
    batch = packed(captioner, pictures)
    at = int(
        (batch["blocks"][0] == 2).nonzero()[0]
    )  # the first token of the first image's second caption, "two planes ."
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][0, at] = captioner.processor.tokenizer.convert_tokens_to_ids("▁river")
    with torch.no_grad():
        before, after = (target_logits(captioner.model, b) for b in (batch, changed))
    differs = (before != after).any(1).tolist()
    own = (
        len(captioner.processor.tokenizer(CAPTIONS[0], add_special_tokens=False).input_ids) + 1
    )  # targets of the first caption
    length = len(captioner.processor.tokenizer(CAPTIONS[1], add_special_tokens=False).input_ids)
    assert [i for i, d in enumerate(differs) if d] == list(
        range(own + 1, own + 1 + length)
    )  # those that follow the token in its own caption


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_those_of_plain_generate(kind, folder):
    captioner, pictures = base(folder, kind)
    found = generate_ids(captioner, pictures, max_new_tokens=12)
    for image, ids in zip(pictures, found):
        inputs = captioner.processor(images=[image], text=[f"<image>{captioner.prompt}"], return_tensors="pt")
        inputs.pop("labels", None)
        plain = captioner.model.generate(**inputs, max_new_tokens=12, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ].tolist()
        assert ids == (plain[: plain.index(1)] if 1 in plain else plain)
        # and the packed row foretells each of them
        row = pack(
            [dataclasses.replace(encode_example(captioner.processor, captioner.prompt, ["a"]), captions=[ids])], 1
        )
        with torch.no_grad():
            logits = target_logits(captioner.model, row | dict(pixel_values=pixel_tensor(captioner.processor, [image])))
        assert logits.argmax(1)[: len(ids)].tolist() == ids
    assert len({tuple(ids) for ids in found}) == 2  # the images make a difference


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_find_the_layers(kind, folder):
    captioner, _ = base(folder, kind)
    assert [len(linear_layers(captioner.model, pattern)) for pattern in (DECODER, VISION, PROJECTOR)] == [
        4 * 7,
        6 * 6,
        1,
    ]


@pytest.mark.parametrize("name", TUNED)
def test_every_method_tunes_paligemma_2(name, folder, tmp_path):
    P = load_profile("nano", base_model=str(folder("paligemma2")), work=str(tmp_path), **OPTIONS)
    method, pictures = methods(P)[name], images(2)
    captioner = attach(P, method, seed=0)
    if name != "prompt":  # which starts as words
        before = Captioner(*load_base(P, **method.base_options(P)), captioner.prompt)
        with torch.no_grad():
            start, wanted = (target_logits(c.model, packed(c, pictures)) for c in (captioner, before))
        torch.testing.assert_close(start, wanted, rtol=0, atol=1e-5)
    batch, trained = packed(captioner, pictures), [p for p in captioner.model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-2 if name == "prompt" else 3e-3), []
    for _ in range(3):
        total, count = caption_loss(captioner.model, batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    assert losses[-1] < losses[0]
    for parameter_name, parameter in captioner.model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == bool(re.fullmatch(method.trains, parameter_name)), parameter_name
    save_tuned(captioner, method, tuned_folder(P, name, 0))
    assert generate_captions(load_tuned(P, name, 0), pictures, max_new_tokens=8) == generate_captions(
        captioner, pictures, max_new_tokens=8
    )
