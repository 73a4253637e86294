"""Attribution across tuning methods: one target for all, axioms that each method promises, answers that are known."""

import dataclasses

import numpy as np
import pytest
import torch

from rsstudy.attribution.answer import grid_regions
from rsstudy.attribution.controls import centred_blob, random_map
from rsstudy.attribution.games import exact_shapley, sampled_shapley
from rsstudy.attribution.gradcam import grad_cam
from rsstudy.attribution.integrated_gradients import integrated_gradients
from rsstudy.attribution.pixelshap import pixel_shap, superpixels
from rsstudy.attribution.scorer import Scorer, caption_scorer, fill_image
from rsstudy.attribution.shap import partition_shap
from rsstudy.attribution.words import caption_target, token_log_probability
from rsstudy.common.settings import load_profile
from rsstudy.faithfulness.masks import energy_in_mask
from rsstudy.faithfulness.removal import curve_scores, removal_curves
from rsstudy.tuning.method import attach
from rsstudy.tuning.methods import compared_methods, methods

CAPTION = "several planes are parked near the terminal ."
METHODS = dict(
    integrated_gradients=lambda s: integrated_gradients(s, 4, most=4),
    grad_cam=lambda s: grad_cam(s, rectify=False),
    shap=lambda s: partition_shap(s, 12),
    pixelshap=lambda s: pixel_shap(s, grid_regions((224, 224), 2), 16),
    random=random_map,
    blob=centred_blob,
)


@pytest.fixture(scope="module")
def captioners():
    "Every method of the study, freshly attached to the shipped base when it is first asked for."

    class Attached(dict):
        def __missing__(self, name):
            P = load_profile("nano")
            self[name] = attach(P, methods(P)[name])
            return self[name]

    return Attached()


def prepare(captioner, image, caption=CAPTION):
    return caption_target(captioner.processor, image, captioner.prompt, caption)


@pytest.mark.parametrize("name", compared_methods())
def test_target_does_not_leak(captioners, image, name):
    "Another last word leaves the log-probabilities before it unchanged, bit for bit."
    model, target = captioners[name].model, prepare(captioners[name], image)
    ids = target.input_ids.clone()
    ids[0, -2] = ids[0, -3]  # the last caption token
    other = dataclasses.replace(target, input_ids=ids)
    with torch.no_grad():
        a, b = (token_log_probability(model, t, t.pixel_values) for t in (target, other))
    assert torch.equal(a[0, :-1], b[0, :-1]) and a[0, -1] != b[0, -1]


@pytest.mark.parametrize("name", compared_methods())
def test_target_is_the_models_own_loss(captioners, image, name):
    "Minus the summed log-probability is the cross-entropy that training minimises, without <eos>."
    from rsstudy.model.forward import pixel_tensor, target_logits
    from rsstudy.model.pack import encode_example, pack

    c, target = captioners[name], prepare(captioners[name], image)
    batch = pack([encode_example(c.processor, c.prompt, [CAPTION])], c.processor.tokenizer.eos_token_id)
    with torch.no_grad():
        logits = target_logits(c.model, batch | dict(pixel_values=pixel_tensor(c.processor, [image])))
        expected = logits.log_softmax(-1).gather(-1, batch["targets"][:, None])[:-1, 0]
        assert torch.allclose(token_log_probability(c.model, target, target.pixel_values)[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", compared_methods())
def test_every_attribution_works_under_every_method(captioners, image, name):
    "Gradients reach the pixels through adapters, soft prompts and 4-bit weights; every map is finite and not empty."
    target = prepare(captioners[name], image)
    scorer = caption_scorer(captioners[name].model, target, [target.span("planes"), target.span()])
    for explain in METHODS.values():
        a = explain(scorer)
        assert a.heat.shape == (2, 224, 224) and a.heat.dtype == np.float32 and a.calls >= 1
        assert np.allclose(a.log_probability, scorer.evaluate(scorer.pixels)[0], atol=1e-3)
        if a.method in ("shap", "pixelshap"):
            assert a.error.max() < 1e-6


def test_a_phrase_is_the_sum_of_its_tokens(captioners, image):
    target = prepare(captioners["none"], image)
    spans = [
        target.span("planes"),
        target.span("terminal"),
        target.span("planes are parked near the terminal"),
        target.span("parked near the"),
        target.span("are"),
    ]
    one, two, whole, rest, are = caption_scorer(captioners["none"].model, target, spans).evaluate(target.pixel_values)[
        0
    ]
    assert np.isclose(one + are + rest + two, whole, atol=1e-4)


def test_batches_change_nothing(captioners, image):
    target = prepare(captioners["none"], image)
    maps = [
        integrated_gradients(
            caption_scorer(captioners["none"].model, target, [target.span("planes")], batch=b), 6, most=6
        )
        for b in (2, 32)
    ]
    assert np.allclose(maps[0].heat, maps[1].heat, atol=1e-6 + 1e-4 * np.abs(maps[0].heat).max())


def test_more_steps_are_more_complete(captioners, image):
    target = prepare(captioners["none"], image)
    scorer = caption_scorer(captioners["none"].model, target, [target.span()])
    coarse, fine = (integrated_gradients(scorer, 8, most=most, tolerance=2e-4, batch=16) for most in (8, 256))
    assert fine.error[0] <= 2e-4 < coarse.error[0] and 9 == coarse.calls < fine.calls <= 257


@pytest.fixture
def linear():
    "A linear function of pixels: every method that shares out a difference must find weight times difference."
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 3, 16, 16)).astype(np.float32))
    pixels = torch.from_numpy(np.random.default_rng(2).random((1, 3, 16, 16), dtype=np.float32))
    scorer = Scorer(lambda p: torch.einsum("bchw,uchw->bu", p, weights), pixels, ["a", "b"], grid=4)
    return scorer, ((pixels - fill_image(scorer)) * weights).sum(1).numpy()


def test_linear_answer_is_known(linear):
    scorer, truth = linear
    cells = grid_regions((16, 16), 4)

    def total(heat):
        return np.stack([np.bincount(cells.ravel(), h.ravel()) for h in heat])

    assert np.allclose(integrated_gradients(scorer, 2).heat, truth, atol=1e-5)
    for a in (partition_shap(scorer, 3000, cells=4), pixel_shap(scorer, cells, 100)):
        assert np.allclose(total(a.heat), total(truth), atol=1e-4), a.method
        assert a.error.max() < 1e-4


def test_the_known_answer_is_the_most_faithful(linear):
    "Removing cells in the true order is better than any other map does."
    scorer, truth = linear
    maps = np.stack([truth, random_map(scorer).heat, centred_blob(scorer).heat, -truth])
    s = curve_scores(removal_curves(scorer, maps), scorer.lengths, control=1)
    for metric in ("deletion_gain.v1", "insertion_gain.v1"):
        assert (s[metric].argmax(0) == 0).all() and (s[metric][3] < 0).all()


def test_sampled_shapley_agrees_with_exact():
    "With interactions between parts: within four standard errors, and the sum exact."
    table = np.random.default_rng(0).normal(size=(64, 2))

    def game(c):
        return table[c @ (1 << np.arange(6))]

    exact = exact_shapley(game, 6)
    for seed in range(3):
        values, error = sampled_shapley(game, 6, 600, seed)
        assert (np.abs(values - exact) < 4 * error).all()
        assert np.allclose(values.sum(0), table[63] - table[0])


def test_controls_are_deterministic_and_know_nothing(linear):
    scorer, _ = linear
    other = dataclasses.replace(scorer, function=lambda p: -3 * scorer.function(p))
    for control in (random_map, centred_blob):
        assert np.array_equal(control(scorer).heat, control(other).heat)
    mask = np.zeros((16, 16), bool)
    mask[2:9, 3:12] = True
    shares = [energy_in_mask(random_map(scorer, seed).heat[0], mask) for seed in range(200)]
    assert abs(np.mean(shares) - mask.mean()) < 0.06  # chance is the object's share of the image


def test_bad_input_is_named(captioners, image):
    target = prepare(captioners["none"], image)
    with pytest.raises(ValueError, match="not in the caption"):
        target.span("ship")
    with pytest.raises(ValueError, match="caption is empty"):
        prepare(captioners["none"], image, " ")
    blank = prepare(captioners["none"], np.full((224, 224, 3), 9, np.uint8))
    scorer = caption_scorer(captioners["none"].model, blank, [blank.span("planes")])
    with pytest.raises(ValueError, match="constant image"):
        integrated_gradients(scorer, 2)
    with pytest.raises(ValueError, match="constant image"):
        pixel_shap(scorer, superpixels(blank.image), 8)
