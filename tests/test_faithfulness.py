"""Faithfulness: our formulas against those of Quantus and captum on a toy classifier.

And every score on the shipped model and the drawn world.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rsstudy.attribution.answer import grid_regions
from rsstudy.attribution.controls import centred_blob, random_map
from rsstudy.attribution.integrated_gradients import integrated_gradients
from rsstudy.attribution.scorer import Scorer, caption_scorer, fill_image
from rsstudy.attribution.words import caption_target
from rsstudy.faithfulness.counterfactual import counterfactual_faithfulness, lost_log_probability, object_shares
from rsstudy.faithfulness.infidelity import hidden_sets, infidelity, infidelity_scores, max_sensitivity
from rsstudy.faithfulness.masks import energy_in_mask, iou_at_area, pointing_game
from rsstudy.faithfulness.randomised import randomisation_scores, randomisation_test
from rsstudy.faithfulness.removal import area, removal_curves, removal_scores
from rsstudy.faithfulness.road import impute, impute_blocks, road_scores
from rsstudy.scenes.scene import draw_scene
from rsstudy.scenes.text import NOUNS
from rsstudy.scenes.without import scene_pairs
from rsstudy.scenes.world import ensure_world


@pytest.fixture(scope="module")
def toy():
    "A small random classifier of 16 x 16 images with 3 classes, an image, and a signed map of class 1."
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(4 * 256, 3)
    ).eval()
    pixels = torch.rand(1, 3, 16, 16)
    scorer = Scorer(lambda p: model(p)[:, 1:2], pixels, ["class 1"], grid=16)
    x = pixels.clone().requires_grad_()
    heat = (torch.autograd.grad(model(x)[0, 1], x)[0] * pixels).sum(1).numpy()  # (1, H, W)
    mask = np.zeros((16, 16), bool)
    mask[3:9, 5:12] = True
    return model, scorer, heat, mask


def quantus():
    pytest.importorskip("cv2", exc_type=ImportError)  # Quantus imports it
    return pytest.importorskip(
        "quantus", exc_type=ImportError, reason="the reference needs quantus: pip install 'rsstudy[dev]'"
    )


def test_deletion_is_pixel_flipping(toy):
    "On a gray image, because Quantus removes channels one by one."
    q, (model, scorer, heat, _) = quantus(), toy

    class Gray(torch.nn.Module):
        def forward(self, p):
            return model(p.expand(-1, 3, -1, -1))

    gray = scorer.pixels[:, :1] - scorer.pixels[:, :1].min()  # the black of Quantus is the darkest pixel
    theirs = q.PixelFlipping(
        features_in_step=32,
        perturb_baseline="black",
        abs=False,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )(
        model=Gray().eval(),
        x_batch=gray.numpy(),
        y_batch=np.array([1]),
        a_batch=heat[:, None],
        device="cpu",
        softmax=False,
    )
    ours = removal_curves(
        replace(scorer, pixels=gray.expand(-1, 3, -1, -1).contiguous()),
        heat[None],
        shares=np.linspace(0, 1, 9),
        fill="black",
    ).deletion[0, 0]
    assert np.allclose(np.ravel(theirs[0]), ours[1:], atol=1e-5)
    assert np.isclose(area(ours, np.linspace(0, 1, 9)), np.trapezoid(ours, dx=1 / 8))


def test_mask_scores_are_those_of_quantus(toy):
    q, (model, scorer, heat, mask) = quantus(), toy

    def score(metric, positive):
        options = dict(abs=False, normalise=False, disable_warnings=True, display_progressbar=False)
        found = metric(**options)(
            model=model,
            x_batch=scorer.pixels.numpy(),
            y_batch=np.array([1]),
            a_batch=positive[None, None],
            s_batch=mask[None, None],
            device="cpu",
        )
        return float(np.ravel(found)[0])

    for h in (heat[0], np.abs(heat[0]), np.where(mask, 2, 1) * np.abs(heat[0])):
        positive = np.maximum(h, 0)
        hit = score(q.RelevanceRankAccuracy, positive)
        assert np.isclose(iou_at_area(positive, mask), hit / (2 - hit))
        assert np.isclose(energy_in_mask(h, mask), score(q.RelevanceMassAccuracy, positive))
        assert pointing_game(h, mask) == bool(score(q.PointingGame, positive))


def test_imputation_is_that_of_quantus(toy):
    quantus()
    from quantus.functions.perturb_func import noisy_linear_imputation

    image, rng = toy[1].pixels[0].double().numpy(), np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        hidden = rng.random((16, 16)) < share
        assert np.allclose(
            impute(image, hidden, noise=0), noisy_linear_imputation(image, np.flatnonzero(hidden), noise=0), atol=1e-8
        )
    assert np.isclose(
        (impute(image, hidden, noise=0.1) - impute(image, hidden, noise=0))[:, hidden].std(), 0.1, rtol=0.2
    )


def test_infidelity_is_that_of_captum(toy):
    from captum.metrics import infidelity as theirs
    from captum.metrics import infidelity_perturb_func_decorator

    model, scorer, heat, _ = toy
    fill, regions, sets = fill_image(scorer, "black"), grid_regions((16, 16), 16), hidden_sets(256, 24, rng=3)
    left = iter(sets)

    @infidelity_perturb_func_decorator(multiply_by_inputs=True)
    def hide(inputs, baselines=None):
        hidden = torch.from_numpy(np.stack([next(left) for _ in range(len(inputs))]))[:, regions][:, None]
        return torch.where(hidden, fill.expand_as(inputs), inputs)

    each = torch.from_numpy(np.repeat(heat[:, None] / 3, 3, 1)).float()  # captum wants a value a channel
    value = theirs(
        lambda p: model(p)[:, 1],
        hide,
        scorer.pixels,
        each,
        baselines=fill,
        n_perturb_samples=24,
        max_examples_per_batch=24,
        normalize=True,
    )
    dropped = scorer.evaluate(scorer.pixels) - scorer.evaluate(
        torch.where(torch.from_numpy(~sets)[:, regions][:, None], scorer.pixels, fill)
    )
    assert np.isclose(value.item(), infidelity(sets @ heat[0].ravel().astype(float), dropped[:, 0]), rtol=1e-3)
    found = infidelity_scores(scorer, np.stack([heat, -heat, heat * 9]), 24, "black", seed=3)
    assert (
        np.allclose(found["infidelity.v1"][[0, 2], 0], value.item(), rtol=1e-3)
        and found["infidelity_share.v1"][1, 0] > 0.99
    )


def test_max_sensitivity_is_that_of_captum(toy):
    from captum.metrics import sensitivity_max

    model, scorer, _, _ = toy

    @torch.enable_grad()
    def heat(pixels):
        x = (pixels[0] if isinstance(pixels, tuple) else pixels).clone().requires_grad_()
        return torch.autograd.grad(model(x)[:, 1].sum(), x)[0]

    rng = np.random.default_rng(5)

    def noisy(inputs):
        return torch.cat(
            [
                x[None] + torch.from_numpy(rng.uniform(-0.1, 0.1, (1, 3, 16, 16))).float()
                for x in (inputs[0] if isinstance(inputs, tuple) else inputs)
            ]
        )

    value = sensitivity_max(
        lambda x: (heat(x),),
        scorer.pixels,
        perturb_func=noisy,
        n_perturb_samples=6,
        norm_ord=2,
        max_examples_per_batch=6,
    ).item()
    ours = max_sensitivity(scorer, lambda s: heat(s.pixels).numpy(), radius=0.1, samples=6, seed=5)
    assert np.isclose(ours[0], value, rtol=1e-4)


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    "A drawn ship scene under the shipped base: scorer, target, processor, maps of three methods, pairs."
    from rsstudy.common.settings import load_profile
    from rsstudy.model.base import load_base

    world = ensure_world(tmp_path_factory.mktemp("f") / "w", "target", 0, 0, 45, progress=False)
    name = next(k for k, v in json.loads((world / "lands.json").read_text()).items() if v == "ship")
    pairs = scene_pairs(world, [name])[name]
    model, processor = load_base(load_profile("nano"))[:2]
    target = caption_target(processor, pairs[0].image, "caption en", "several white ships are on the sea .")
    scorer = caption_scorer(model.eval(), target, [target.span("ships")])
    found = [integrated_gradients(scorer, 8, most=8), random_map(scorer), centred_blob(scorer)]
    return scorer, target, processor, np.stack([a.heat for a in found]), pairs


def test_scores_on_the_model(explained):
    scorer, _, _, heats, _ = explained
    scores, curves = removal_scores(scorer, heats, control=1, shares=(0, 0.25, 0.5, 0.75, 1))
    scores |= road_scores(scorer, heats, 1, shares=(0.1, 0.5))[0] | infidelity_scores(scorer, heats, 16)
    assert all(v.shape == (3, 1) and np.isfinite(v).all() for v in scores.values()) and len(scores) == 16
    for gain in ("deletion_gain.v1", "insertion_gain.v1", "deletion_gain.mean.v1", "road_gain.v1"):
        assert scores[gain][1, 0] == 0
    assert np.allclose(
        curves["blur"].deletion[:, 0, 0], curves["mean"].deletion[:, 0, 0], atol=1e-3
    )  # both start at the whole image
    assert ((scores["infidelity_share.v1"] >= 0) & (scores["infidelity_share.v1"] <= 1 + 1e-6)).all()


def test_blocks_hardly_change_the_imputation(explained):
    scorer, _, _, _heats, _ = explained
    image, hidden = scorer.pixels[0].double().numpy(), (np.arange(256) % 3 == 0)[grid_regions((224, 224), 16)]
    exact = impute(image, hidden, 0)
    error = np.abs(impute_blocks(image, hidden, 2, 0.0) - exact)[:, hidden].mean()
    assert error < 0.1 * np.abs(image - exact)[:, hidden].mean() or error < 0.02


def test_randomising_the_model_changes_its_maps_and_not_the_controls(explained):
    scorer, _, _, _, _ = explained
    before = [p.clone() for p in scorer.model.parameters()]
    rows = randomisation_test(
        scorer.model,
        dict(ig=lambda: integrated_gradients(scorer, 4, most=4), blob=lambda: centred_blob(scorer)),
        scorer.grid,
        groups=3,
    )
    assert len(rows) == 6 and all(torch.equal(a, b) for a, b in zip(before, scorer.model.parameters()))
    assert np.allclose(list(randomisation_scores(rows)["blob", "ships"].values()), 1)
    assert randomisation_scores(rows)["ig", "ships"]["randomised_spearman.v1"] < 0.9


def test_without_its_ships_a_picture_has_no_ships(explained):
    scorer, target, processor, heats, pairs = explained
    assert [p.noun for p in pairs if p.noun in ("ship", "sea")] == ["ship"]
    losses = lost_log_probability(scorer, processor, target, pairs)
    ship = [p.noun for p in pairs].index("ship")
    assert losses.shape == (len(pairs), 1) and losses[ship, 0] > 0  # the word is less likely without what it names
    shares = object_shares(heats, [p.mask for p in pairs])["share"]
    assert shares.shape == (3, 1, len(pairs)) and ((shares >= 0) & (shares <= 1)).all()
    with pytest.raises(ValueError, match="another picture"):
        lost_log_probability(
            scorer, processor, caption_target(processor, pairs[0].image[::-1], "caption en", target.caption), pairs
        )
    with pytest.raises(ValueError, match="at least one pair"):
        lost_log_probability(scorer, processor, target, [])
    many = counterfactual_faithfulness([losses[:, 0]] * 3, [shares[0, 0]] * 3, 20)
    assert -1 <= many.low <= many.value <= many.high <= 1


@pytest.mark.parametrize("domain", ["source", "target"])
def test_pairs_are_the_drawn_scenes(domain):
    "The complete picture is the world's own, bit for bit, and nothing changes where nothing changed hands."
    from rsstudy.scenes.without import draw_pair

    for land, noun in dict(airport="plane", harbor="boat", church="church", river="river").items():
        scene, p = draw_scene(9, domain, land), draw_pair(9, domain, land, noun)
        assert (
            noun in NOUNS
            and np.array_equal(p.image, scene.image)
            and np.array_equal(p.without[~p.changed], scene.image[~p.changed])
        )
        assert p.changed[p.mask].mean() > 0.9 and p.outside < 0.5
