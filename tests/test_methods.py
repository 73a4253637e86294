"""What must hold for every tuning method: no leak, the base's masks, labels, gradients, round trip, repeatability."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from rsstudy.common.settings import load_profile
from rsstudy.model.base import load_base
from rsstudy.model.forward import caption_loss, pixel_tensor
from rsstudy.model.generate import Captioner, generate_captions
from rsstudy.model.pack import encode_example, pack
from rsstudy.model.parts import core
from rsstudy.training.fit import fit
from rsstudy.training.loader import CaptionRows
from rsstudy.training.plan import TrainingPlan
from rsstudy.tuning.method import attach
from rsstudy.tuning.methods import methods
from rsstudy.tuning.prompt import PromptTuning
from rsstudy.tuning.saved import save_tuned, tuned_folder

P = load_profile("nano", prompt_length=4, adapter_width=8, rank=4)
NAMES = list(methods(P))
TUNED = [name for name in NAMES if name != "none"]
VARIANTS = {  # options of a method -> the method, the settings that differ
    "rslora": ("lora", dict(rslora=True)),
    "pissa": ("lora", dict(lora_init="pissa")),
    "olora": ("lora", dict(lora_init="olora", rslora=True)),
    "pissa of all parts": ("lora_vision", dict(lora_init="pissa")),
    "dora from pissa": ("dora", dict(lora_init="pissa")),
    "prompt from a word": ("prompt", dict(prompt_text="runway")),
    "relu adapter": ("adapter", dict(adapter_activation="relu")),
    "silu adapter": ("adapter_pfeiffer", dict(adapter_activation="silu")),
}
CASES = {name: (name, {}) for name in TUNED} | VARIANTS
CAPTIONS = [
    "two planes are parked near a runway .",
    "two planes .",
    "a gray runway with two white planes .",
    "two planes .",
    "some trees near a runway .",
]


def images(n=4):
    rng = np.random.default_rng(0)
    return [np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((28, 28, 1), np.uint8)) for _ in range(n)]


def case(name, **more):
    "Settings and method of a case."
    name, changes = CASES.get(name, (name, {}))
    settings = dataclasses.replace(P, **changes, **more)
    return settings, methods(settings)[name]


def disturbed(name):
    "A captioner whose trained parameters have left their start, as after training."
    captioner = attach(*case(name), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in captioner.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return captioner


def written_out(captioner, caption):
    "One caption as PaliGemma's own processor writes it."
    return captioner.processor(
        images=images(1), text=[f"<image>{captioner.prompt}"], suffix=[caption], return_tensors="pt"
    )


def logits_of(captioner, inputs):
    with torch.no_grad():
        return core(captioner.model)(**{k: v for k, v in inputs.items() if k != "labels"}).logits


@pytest.mark.parametrize("name", NAMES)
def test_no_leak(name):
    captioner = disturbed(name)
    inputs = written_out(captioner, CAPTIONS[0])
    before = logits_of(captioner, inputs)
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][0, -2] = captioner.processor.tokenizer.convert_tokens_to_ids("▁river")
    after = logits_of(captioner, changed)
    assert not torch.equal(before[0, -2:], after[0, -2:])
    assert torch.equal(before[0, :-2], after[0, :-2])


@pytest.mark.parametrize("name", NAMES)
def test_prefix_is_bidirectional(name):
    captioner = disturbed(name)
    inputs = written_out(captioner, CAPTIONS[0])
    last_of_prefix = int((inputs["token_type_ids"][0] == 0).sum()) - 2
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][0, last_of_prefix] = captioner.processor.tokenizer.convert_tokens_to_ids("▁river")
    assert not torch.equal(logits_of(captioner, inputs)[0, 0], logits_of(captioner, changed)[0, 0])


@pytest.mark.parametrize("name", [*NAMES, *VARIANTS])
def test_starts_as_the_base(name):
    _, method = case(name)
    if method.name == "prompt":
        method = PromptTuning(length=4, start=None)  # from words it starts as those words, which its notebook tests
    captioner = attach(P, method)
    base = Captioner(*load_base(P, **method.base_options(P)), captioner.prompt)
    inputs = written_out(captioner, CAPTIONS[0])
    moves_weights = (
        getattr(method, "init", "default") != "default"
    )  # then the base's weights are rounded once more; the largest logit is 17
    torch.testing.assert_close(
        logits_of(captioner, inputs), logits_of(base, inputs), rtol=0, atol=2e-4 if moves_weights else 1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_the_caption(name):
    captioner = attach(*case(name))
    tokenizer = captioner.processor.tokenizer
    inputs = written_out(captioner, CAPTIONS[0])
    labelled = inputs["labels"][0][inputs["labels"][0] != -100].tolist()
    packed = pack([encode_example(captioner.processor, captioner.prompt, CAPTIONS[:1])], tokenizer.eos_token_id)
    assert (
        labelled
        == packed["targets"].tolist()
        == [*tokenizer(CAPTIONS[0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    )


@pytest.mark.parametrize("name", NAMES)
def test_shared_prefix_equals_five_sequences(name):
    captioner = disturbed(name)
    eos, pixels = captioner.processor.tokenizer.eos_token_id, pixel_tensor(captioner.processor, images(1))

    def loss(captions):
        return caption_loss(
            captioner.model,
            pack([encode_example(captioner.processor, captioner.prompt, captions)], eos) | dict(pixel_values=pixels),
        )

    with torch.no_grad():
        (shared, count), separate = loss(CAPTIONS), [loss([caption]) for caption in CAPTIONS]
    assert count == sum(n for _, n in separate)
    torch.testing.assert_close(shared, sum(total for total, _ in separate), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_what_the_method_names(name):
    (_, method), captioner = case(name), disturbed(name)
    rows = CaptionRows(captioner, images(), [CAPTIONS] * 4)
    total, count = caption_loss(captioner.model, rows.collate([rows[i] for i in range(4)]))
    (total / count).backward()
    for parameter_name, parameter in captioner.model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == bool(re.fullmatch(method.trains, parameter_name)), parameter_name


LOAD = """
import json, sys
sys.path.insert(0, sys.argv[2])
from test_methods import CASES, case, images
from rsstudy.model.generate import generate_captions
from rsstudy.tuning.methods import load_tuned

def captions(name):
    settings, method = case(name, work=f'{sys.argv[1]}/{name}')
    return generate_captions(load_tuned(settings, method.name, 0), images(), max_new_tokens=8)

print(json.dumps({name: captions(name) for name in CASES}))
"""


def test_round_trip_in_a_fresh_process(tmp_path):
    captions = {}
    for name in CASES:
        (there, method), captioner = case(name, work=str(tmp_path / name)), disturbed(name)
        save_tuned(captioner, method, tuned_folder(there, method.name, 0), seed=0)
        captions[name] = generate_captions(captioner, images(), max_new_tokens=8)
    said = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), str(__import__("pathlib").Path(__file__).parent)],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert json.loads(said.stdout.splitlines()[-1]) == captions


@pytest.mark.parametrize("name", ["lora", "lora_vision", "dora", "rslora", "pissa", "olora", "dora from pissa"])
def test_merged_gives_the_same_captions(name):
    captioner = disturbed(name)
    before = generate_captions(captioner, images(), max_new_tokens=8)
    merged = dataclasses.replace(captioner, model=captioner.model.merge_and_unload())
    assert generate_captions(merged, images(), max_new_tokens=8) == before


def test_a_saved_start_in_the_weights_needs_no_decomposition():
    """What is saved of a PiSSA run is plain LoRA of twice the rank.

    Where the decomposition comes out otherwise, the loaded model does not.
    """
    captioner, (settings, method) = disturbed("pissa"), case("pissa")
    saved = method.tensors(captioner.model)
    a = next(value for name, value in saved.items() if ".lora_A." in name)
    loaded = method.loaded()
    assert a.shape[0] == loaded.rank == 2 * method.rank and loaded.init == "default" and loaded.alpha == loaded.rank
    again = attach(settings, loaded, seed=5)
    again.model.load_state_dict(saved, strict=False)
    inputs = written_out(captioner, CAPTIONS[0])
    torch.testing.assert_close(logits_of(again, inputs), logits_of(captioner, inputs), rtol=0, atol=1e-3)


def test_a_start_in_the_weights_is_refused_on_four_bits():
    for init in ("pissa", "olora"):
        settings = dataclasses.replace(P, lora_init=init)
        refused = (
            f"method 'qlora': lora_init '{init}' moves a part of the base's weights into LoRA, which a base in 4 bits"
        )
        with pytest.raises(ValueError, match=refused):
            attach(settings, methods(settings)["qlora"])


def test_the_default_profile_keeps_the_recipes():
    "Options are off by default; what the committed results were made with stays what it is."
    known = methods(load_profile("nano"))
    for name in ("lora", "qlora", "lora_vision", "dora"):
        assert (known[name].rslora, known[name].init, known[name].plus) == (False, "default", 1)
    assert known["prompt"].settings() == PromptTuning().settings()
    assert [known[name].activation for name in ("adapter", "adapter_pfeiffer")] == ["gelu", "gelu"]
    assert methods(dataclasses.replace(P, lora_plus=16.0))["lora"].settings()["plus"] == 16


@pytest.mark.parametrize("name", TUNED)
def test_same_seed_same_result(name):
    def tuned():
        captioner = attach(P, methods(P)[name], seed=3)
        rows = CaptionRows(captioner, images(), [CAPTIONS] * 4)
        history = fit(
            captioner,
            rows,
            rows,
            TrainingPlan(lr=1e-3, epochs=1, batch_images=2, seed=3, val_captions=1, max_new_tokens=2),
        )
        return history["losses"], methods(P)[name].tensors(captioner.model)

    (losses, first), (again, second) = tuned(), tuned()
    assert losses == again
    assert all(torch.equal(first[key], second[key]) for key in first | second)
