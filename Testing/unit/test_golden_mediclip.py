"""MediCLIP: our parts, with its preset, give what its published code gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import CLOSE, everywhere, golden, golden_clip, method_weights, tiny_spec, whole_golden

from MedAnomalyCLIPLib.clip.prompts import CoOpPrompts
from MedAnomalyCLIPLib.clip.text import encode_embeddings
from MedAnomalyCLIPLib.clip.towers import TappedTokens
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.detectors.published import load_published
from MedAnomalyCLIPLib.detectors.text import create_prompts
from MedAnomalyCLIPLib.training.losses import dice_loss, focal_loss

SIZE, GRID, TAPS = 112, (8, 8), (12, 18, 24)

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def arrays():
    return golden("mediclip")


def spec_for(preset="mediclip", **text):
    spec = tiny_spec(preset, "mediclip", SIZE, TAPS)
    return replace(spec, text=replace(spec.text, **text))


def published(arrays, spec, preset="mediclip"):
    detector = AnomalyDetector(spec).eval()
    load_published(detector, preset, method_weights(arrays), golden_clip(arrays, spec))
    return detector


@pytest.fixture
def replayed(monkeypatch, arrays):
    """Vision towers that give the published tokens, so that all that follows them is compared alone."""
    stored = arrays["out/tap_tokens"]
    tokens = TappedTokens(tuple(stored[:, :, 1:]), tuple(stored[:, :, 0]), torch.zeros(2, 32), GRID)
    monkeypatch.setattr(
        "MedAnomalyCLIPLib.clip.towers.TappedClipViT.forward", lambda self, images, inject: tokens
    )


NO_IMAGES = torch.zeros(2, 3, SIZE, SIZE)


def test_phrases_and_placeholders_are_the_published_tokens(arrays):
    spec = spec_for()
    prompts = create_prompts(spec.text, spec.tower, golden_clip(arrays, spec))
    stored = torch.cat([arrays["in/token_ids_normal"], arrays["in/token_ids_abnormal"]])
    assert torch.equal(prompts.token_ids, stored.long())


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ({}, "out/text_features"),
        ({"causal": True}, "derived/text_features_causal"),
        ({"position": "around"}, "out/text_features_middle"),
        ({"position": "after"}, "out/text_features_front"),
    ],
)
def test_text_bank_is_the_published_one(arrays, text, key):
    torch.testing.assert_close(published(arrays, spec_for(**text)).text_bank, arrays[key].T, **CLOSE)


@pytest.mark.parametrize(("activation", "prefix"), [("quick_gelu", "out"), ("gelu", "out_gelu")])
def test_features_of_each_phrase_are_the_published_ones(arrays, activation, prefix):
    spec = spec_for()
    clip = golden_clip(arrays, replace(spec, tower=replace(spec.tower, activation=activation)))
    prompts = CoOpPrompts(spec.tower, clip, causal=False)
    prompts.normal.copy_(arrays["method/ctx/normal_end"])
    prompts.abnormal.copy_(arrays["method/ctx/abnormal_end"])
    features = encode_embeddings(clip, prompts.embeddings(clip), prompts.token_ids, causal=False)
    torch.testing.assert_close(features[:10], arrays[f"{prefix}/text_eot_normal"], **CLOSE)
    torch.testing.assert_close(features[10:], arrays[f"{prefix}/text_eot_abnormal"], **CLOSE)


@pytest.mark.parametrize(
    ("change", "causal", "key"),
    [
        ({}, False, "out/anomaly_map"),
        ({"scale": 1 / 0.07}, False, "out/anomaly_map_tau007"),
        (
            {"scale": 1 / 0.07, "fusion": "softmax_then_mean"},
            False,
            "derived/anomaly_map_tau007_softmax_then_mean",
        ),
        ({}, True, "derived/anomaly_map_causal"),
    ],
)
def test_maps_are_the_published_ones(arrays, replayed, change, causal, key):
    detector = published(arrays, replace(spec_for(causal=causal), **change))
    maps = detector(NO_IMAGES, everywhere(2, SIZE)).map
    torch.testing.assert_close(maps[:, ::5, ::5], arrays[f"{key}[..., ::5, ::5]"][:, 1], **CLOSE)


def test_score_is_the_published_maximum(arrays, replayed):
    for scale, key in ((1.0, "out/image_score"), (1 / 0.07, "out/image_score_tau007")):
        detector = published(arrays, replace(spec_for(), scale=scale))
        torch.testing.assert_close(detector(NO_IMAGES, everywhere(2, SIZE)).score, arrays[key], **CLOSE)


def test_the_papers_preset_has_its_temperature_order_and_mask(arrays):
    spec = spec_for("mediclip_paper")
    assert (spec.scale, spec.fusion, spec.text.causal) == (1 / 0.07, "softmax_then_mean", True)
    bank = published(arrays, spec, "mediclip_paper").text_bank
    torch.testing.assert_close(bank, arrays["derived/text_features_causal"].T, **CLOSE)


def test_losses_are_the_published_ones(arrays, replayed):
    maps = published(arrays, spec_for())(NO_IMAGES, everywhere(2, SIZE)).map
    mask = arrays["in/mask"].float()
    torch.testing.assert_close(focal_loss(maps, mask), arrays["loss/focal"].float(), **CLOSE)
    torch.testing.assert_close(dice_loss(maps, mask), arrays["loss/dice"].float(), **CLOSE)


@pytest.mark.parametrize(("activation", "prefix"), [("quick_gelu", "out"), ("gelu", "out_gelu")])
def test_at_full_depth_images_give_the_published_maps_and_scores(activation, prefix):
    whole = whole_golden("mediclip")
    spec = spec_for()
    detector = published(whole, replace(spec, tower=replace(spec.tower, activation=activation)))
    detection = detector(whole["in/image"], everywhere(2, SIZE))
    torch.testing.assert_close(detection.map, whole[f"{prefix}/anomaly_map"][:, 1], **CLOSE)
    torch.testing.assert_close(detection.score, whole[f"{prefix}/image_score"], **CLOSE)
