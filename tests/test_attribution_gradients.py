"""Gradient and attention methods under every tuning method.

Hooks and switches leave no trace, prompts are words like any other, sums are what they promise.
"""

import numpy as np
import pytest
import torch

from rsstudy.attribution.answer import at_patch_scale
from rsstudy.attribution.attention import attention_rollout, gradient_attention
from rsstudy.attribution.gradcam import layer_cam
from rsstudy.attribution.gradients import gradient_x_input, smooth_grad
from rsstudy.attribution.integrated_gradients import integrated_gradients
from rsstudy.attribution.prompt_words import prompt_words
from rsstudy.attribution.scorer import caption_scorer
from rsstudy.attribution.words import caption_target
from rsstudy.common.settings import load_profile
from rsstudy.model.parts import core
from rsstudy.tuning.method import attach
from rsstudy.tuning.methods import compared_methods, methods

CAPTION, WORDS = "several planes are parked near the terminal .", ["planes", "terminal"]


@pytest.fixture(scope="module", params=compared_methods())
def captioner(request):
    "Every method of the study, freshly attached to the shipped base."
    P = load_profile("nano")
    return attach(P, methods(P)[request.param])


def state(model):
    "What a method could leave behind: hooks, attention implementations, replaced functions."
    inner = core(model).model
    return (
        [name for name, m in model.named_modules() if m._forward_hooks],
        "get_image_features" in vars(inner),
        [m.config._attn_implementation for m in (core(model), inner, inner.vision_tower, inner.language_model)],
    )


def test_every_new_method_works_under_every_tuning_method(captioner, image):
    target, model = caption_target(captioner.processor, image, captioner.prompt, CAPTION), captioner.model
    before, scorer, prompt = (
        state(model),
        caption_scorer(model, target, WORDS),
        prompt_words(model, captioner.processor, target, WORDS),
    )
    score = scorer.evaluate(scorer.pixels)[0]
    found = [
        gradient_x_input(scorer, prompt=prompt),
        smooth_grad(scorer, 2),
        layer_cam(scorer),
        attention_rollout(scorer),
        gradient_attention(scorer),
        *(integrated_gradients(scorer, 2, at=at, most=2) for at in ("patches", "tokens")),
    ]
    for a in found:
        assert a.heat.shape == (2, 224, 224) and a.calls >= 1, a.method
        assert np.allclose(a.log_probability, score, atol=1e-3), a.method
    text = found[0].text
    assert text.shape == (2, len(found[0].prompt_words)) and np.isfinite(text).all() and text.any()
    assert "".join(captioner.prompt.split()).replace("<", "").replace(">", "") == "".join(
        found[0].prompt_words
    )  # soft tokens are words as well
    assert np.allclose(prompt.scorer.evaluate(prompt.scorer.pixels)[0], score, atol=1e-3)
    assert state(model) == before


@pytest.fixture(scope="module")
def base():
    P = load_profile("nano")
    return attach(P, methods(P)["none"])


def test_patches_are_sums_of_their_pixels(base, image):
    "The patch embedding is linear and patches do not overlap: one path seen at two scales."
    target = caption_target(base.processor, image, base.prompt, CAPTION)
    scorer = caption_scorer(base.model, target, WORDS)
    pixels, patches = (integrated_gradients(scorer, 4, at=at, most=4) for at in ("pixels", "patches"))
    fine, coarse = at_patch_scale(pixels.heat, scorer.grid), at_patch_scale(patches.heat, scorer.grid)
    assert np.abs(fine - coarse).max() < 1e-3 * np.abs(coarse).max()
    assert np.allclose(pixels.error, patches.error, rtol=1e-2, atol=1e-3)


def test_the_first_order_answer_is_the_slope(base, image):
    "Gradient x input adds up to the score's slope towards the baseline, measured in float64 by a small step."
    target = caption_target(base.processor, image, base.prompt, CAPTION)
    scorer = caption_scorer(base.model, target, WORDS)
    from rsstudy.attribution.scorer import fill_image

    change = scorer.pixels - fill_image(scorer)
    up, down = scorer.evaluate(torch.cat([scorer.pixels + s * 2e-3 * change for s in (1, -1)]))
    assert np.allclose(gradient_x_input(scorer).heat.sum((1, 2)), (up - down) / 4e-3, rtol=0.05, atol=0.05)


def test_no_gradients_are_named(base, image):
    target = caption_target(base.processor, image, base.prompt, CAPTION)
    with torch.inference_mode():
        scorer = caption_scorer(base.model, target, WORDS)
        for explain in (gradient_x_input, integrated_gradients, layer_cam, gradient_attention):
            with pytest.raises(ValueError, match="no gradient"):
                explain(scorer)
        assert attention_rollout(scorer).heat.any()  # needs none
