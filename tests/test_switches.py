"""How a model is computed is one thing, what it computes another: no switch changes gradients or captions."""

import shutil

import pytest
import torch
from exact import CAPTIONS, distance, gradients, images

from rsstudy.common.settings import load_profile
from rsstudy.model.base import load_base
from rsstudy.model.forward import caption_loss, image_features, pixel_tensor, target_logits
from rsstudy.model.generate import Captioner, generate_captions
from rsstudy.model.pack import encode_example, pack
from rsstudy.model.parts import compile_layers, enable_checkpointing
from rsstudy.scenes.scene import draw_scene
from rsstudy.tuning.method import attach
from rsstudy.tuning.methods import methods

P = load_profile("nano", prompt_length=4, adapter_width=8, rank=4, lora_dropout=0.1)
LR = dict(prompt=1e-1, full=1e-3)  # enough to change the captions in a few steps; the others' is 1e-2
PICTURES = images(3)


def batch_of(captioner, step=0, features=None, **options):
    "Three images with two to four captions, other ones at every step."
    captions = [CAPTIONS[(i + step) % 3 :][: 2 + i % 2] for i in range(3)]
    rows = [encode_example(captioner.processor, captioner.prompt, texts) for texts in captions]
    picture = (
        dict(pixel_values=pixel_tensor(captioner.processor, PICTURES)) if features is None else dict(features=features)
    )
    return pack(rows, captioner.processor.tokenizer.eos_token_id, **options) | picture


def tuned(name, prepare=None, chunk=None, cached=False, layers=None, **options):
    "Losses and first gradients of a short training with dropout on, and the captions after it."
    captioner = attach(P, methods(P)[name], seed=0)
    decoder = (
        captioner.model.get_base_model().model.language_model
        if hasattr(captioner.model, "get_base_model")
        else captioner.model.model.language_model
    )
    if layers:
        decoder.layers, decoder.config.num_hidden_layers = decoder.layers[:layers], layers
    if prepare:
        prepare(captioner.model)
    trained = [p for p in captioner.model.parameters() if p.requires_grad]
    optimizer, losses, first = torch.optim.AdamW(trained, lr=LR.get(name, 1e-2)), [], None
    with torch.no_grad():
        features = image_features(captioner.model, pixel_tensor(captioner.processor, PICTURES)) if cached else None
    captioner.model.train()
    torch.manual_seed(0)
    for step in range(3):
        total, count = caption_loss(captioner.model, batch_of(captioner, step, features, **options), chunk)
        found = gradients(captioner.model, total / count)
        first = first or found
        optimizer.step()
        losses.append((total / count).item())
    return losses, first, generate_captions(captioner, PICTURES, max_new_tokens=8)


def alike(found, wanted, tolerance):
    "The same within a tolerance: losses, first gradients, and the captions exactly."
    assert found[2] == wanted[2]
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    moving = {name: g for name, g in wanted[1].items() if g.norm() > 0}  # LoRA's A has no gradient while B is zero
    assert distance({name: found[1][name] for name in moving}, moving, floor=1e-3) < 10 * tolerance


@pytest.fixture(scope="module")
def plain():
    "A function that gives a method's training without any switch."
    made = {}
    return lambda name: made.setdefault(name, tuned(name))


@pytest.mark.parametrize("name", ["lora", "qlora", "lora_vision", "prompt", "adapter", "full"])
def test_checkpointing(name, plain):
    """The lowest layers get their gradient, and dropout is repeated as it was.

    The base is frozen, the vocabulary too: the wrong kind of checkpointing would give the lowest layers none.
    """
    losses, first, captions = tuned(name, enable_checkpointing)
    assert losses == plain(name)[0]
    assert first.keys() == plain(name)[1].keys() and all(torch.equal(first[n], g) for n, g in plain(name)[1].items())
    assert captions == plain(name)[2]


@pytest.mark.parametrize("name", ["lora", "prompt", "full"])
@pytest.mark.parametrize(
    "switch", [dict(cached=True), dict(chunk=7), dict(multiple=16)], ids=["cached features", "chunks", "rounded length"]
)
def test_data_and_loss(name, switch, plain):
    if name == "full" and "cached" in switch:
        pytest.skip("full fine-tuning trains the tower: its features cannot be computed once")
    if name == "lora" and "multiple" in switch:
        return alike(tuned_without_dropout(**switch), tuned_without_dropout(), 1e-5)
    alike(tuned(name, **switch), plain(name), 1e-5)


def tuned_without_dropout(**switch):
    "Another row length draws other dropout masks, so there dropout is off."

    def off(model):
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0

    return tuned("lora", off, **switch)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU"
)
def test_compiled_layers_under_checkpointing(plain):
    "One layer is enough: the others would share its program."

    def prepare(model):
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0  # a compiled layer draws its dropout by its own generator

    def compiled(model):
        prepare(model)
        enable_checkpointing(model)
        compile_layers(model)

    alike(tuned("lora", compiled, layers=1), tuned("lora", prepare, layers=1), 1e-5)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed, "source").image for seed in range(4)]


def logits_and_captions(captioner, pictures, autocast=False):
    rows = [encode_example(captioner.processor, captioner.prompt, CAPTIONS) for _ in pictures]
    batch = pack(rows, captioner.processor.tokenizer.eos_token_id) | dict(
        pixel_values=pixel_tensor(captioner.processor, pictures)
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return target_logits(captioner.model, batch), generate_captions(captioner, pictures, max_new_tokens=20)


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bfloat16(way, scenes):
    "Within 2e-2 of the largest logit: bfloat16 has eight bits, and near a logit of 17 its numbers are 0.125 apart."
    wanted, captions = logits_and_captions(Captioner(*load_base(P)), scenes)
    captioner = Captioner(*load_base(P, dtype=torch.bfloat16 if way == "weights" else torch.float32))
    logits, found = logits_and_captions(captioner, scenes, autocast=way == "autocast")
    assert logits.dtype == torch.float32
    assert (logits - wanted).abs().max() < 2e-2 * wanted.abs().max()
    assert found == captions


def test_four_bits_are_the_dequantised_weights(scenes):
    """What 4 bits change is the weights, once; computing with them adds nothing.

    The same weights, written back as numbers, give the same logits and captions.
    """
    from bitsandbytes.functional import dequantize_4bit

    quantised = Captioner(*load_base(P, **methods(P)["qlora"].base_options(P)))
    whole = Captioner(*load_base(P))
    layers = [
        (name, layer)
        for name, layer in quantised.model.named_modules()
        if hasattr(layer, "weight") and hasattr(layer.weight, "quant_state")
    ]
    assert len(layers) == 4 * 7
    for name, layer in layers:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert not torch.equal(weight, whole.model.get_submodule(name).weight)
        whole.model.get_submodule(name).weight.data = weight
    (found, captions), (wanted, same) = (logits_and_captions(c, scenes) for c in (quantised, whole))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert captions == same
