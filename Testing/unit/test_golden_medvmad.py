"""MedVMAD: our parts, with its preset, give what its published code gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import CLOSE, everywhere, golden, golden_clip, method_weights, tiny_spec, whole_golden

from MedAnomalyCLIPLib.clip.prompts import CoOpPrompts
from MedAnomalyCLIPLib.clip.text import encode_embeddings
from MedAnomalyCLIPLib.detectors.detector import Aligned, AnomalyDetector, HeadFeatures
from MedAnomalyCLIPLib.detectors.published import load_published
from MedAnomalyCLIPLib.detectors.scoring import anomaly_map, two_class_cosines
from MedAnomalyCLIPLib.detectors.text import create_prompts
from MedAnomalyCLIPLib.training.losses import dice_loss, focal_loss

SIZE, GRID, TAPS = 112, (8, 8), (6, 12, 18, 24)

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def arrays():
    return golden("medvmad")


def spec_for(**tower):
    """The preset with the shorter prompts that the golden numbers were made with."""
    spec = tiny_spec("medvmad", "medvmad", SIZE, TAPS)
    text = replace(spec.text, length=6, deep_depth=3, deep_length=3)
    return replace(spec, text=text, tower=replace(spec.tower, **tower))


def published(arrays, spec):
    detector = AnomalyDetector(spec).eval()
    load_published(detector, "medvmad", method_weights(arrays), golden_clip(arrays, spec))
    return detector


@pytest.fixture
def replayed(monkeypatch, arrays):
    """Detectors that see the published features, so that all that follows them is compared alone."""
    heads = [
        HeadFeatures(tuple(stored[:, :, 1:]), tuple(stored[:, :, 0]))
        for stored in (arrays["out/seg_aligned[:, :2]"], arrays["out/det_aligned[:, :2]"])
    ]
    monkeypatch.setattr(
        AnomalyDetector,
        "align",
        lambda self, images, features, text: Aligned(*heads, GRID, torch.zeros(2, 32)),
    )


NO_IMAGES = torch.zeros(2, 3, SIZE, SIZE)


def test_prompts_are_the_published_tokens_and_embeddings(arrays):
    spec = spec_for()
    clip = golden_clip(arrays, spec)
    prompts = create_prompts(spec.text, spec.tower, clip)
    assert torch.equal(prompts.token_ids, arrays["in/token_ids"].long())
    prompts.normal.copy_(arrays["method/ctx_pos"][0])
    prompts.abnormal.copy_(arrays["method/ctx_neg"][0])
    torch.testing.assert_close(prompts.embeddings(clip), arrays["out/prompt_embeddings"], **CLOSE)


def test_text_bank_is_the_published_one(arrays):
    detector = published(arrays, spec_for())
    torch.testing.assert_close(detector.text_bank, arrays["out/text_features"], **CLOSE)


def test_without_deep_vectors_the_text_is_the_published_text_without(arrays):
    spec = spec_for()
    clip = golden_clip(arrays, spec)
    prompts = CoOpPrompts(spec.tower, clip, spec.text.normal, spec.text.abnormal, 6)
    prompts.normal.copy_(arrays["method/ctx_pos"][0])
    prompts.abnormal.copy_(arrays["method/ctx_neg"][0])
    features = encode_embeddings(clip, prompts.embeddings(clip), prompts.token_ids)
    torch.testing.assert_close(features, arrays["out/text_features_raw_no_deep"], **CLOSE)


def test_both_heads_see_the_published_features_before_and_after_the_first_pair_changed_the_stream(arrays):
    """The first two of four taps: the second has the output of the first in its stream."""
    seen = published(arrays, spec_for()).align(arrays["in/image[:1]"])
    for i in (0, 1):
        for head, key in ((seen.segmentation, "seg"), (seen.detection, "det")):
            stored = arrays[f"out/{key}_aligned[:, :2]"][i, :1]
            torch.testing.assert_close(head.patches[i], stored[:, 1:], **CLOSE)
            torch.testing.assert_close(head.classes[i], stored[:, 0], **CLOSE)


def test_map_is_the_mean_of_what_is_published_as_a_sum_before_and_after_smoothing(arrays, replayed):
    spec = spec_for()
    for sigma, key in ((0.0, "out/map_sum"), (spec.smoothing, "out/map_smoothed")):
        maps = published(arrays, replace(spec, smoothing=sigma))(NO_IMAGES, everywhere(2, SIZE)).map
        torch.testing.assert_close(4 * maps[:, ::5, ::5], arrays[f"{key}[:2, ::5, ::5]"], **CLOSE)


def test_score_is_the_mean_of_what_is_published_as_a_sum(arrays, replayed):
    score = published(arrays, spec_for())(NO_IMAGES, everywhere(2, SIZE)).score
    torch.testing.assert_close(4 * score, arrays["out/image_score[:2]"], **CLOSE)


def test_dice_of_a_batch_is_published_by_image_and_of_one_image_by_rows(arrays):
    """Ours is taken over whole images at any batch size, theirs over the rows of an image that is alone."""
    mask = arrays["in/mask[:2]"][:, 0].float()
    stored = arrays["out/seg_aligned[:, :2]"][:, :, 1:]
    for i, features in enumerate(stored):
        cosines = two_class_cosines(features, arrays["out/text_features"])
        maps = anomaly_map([cosines], GRID, SIZE, scale=1.0, fusion="softmax_then_mean")
        torch.testing.assert_close(dice_loss(maps, mask), arrays["loss/dice_abnormal_per_tap"][i], **CLOSE)
        normal = arrays["loss/dice_normal_per_tap"][i]
        torch.testing.assert_close(dice_loss(1 - maps, 1 - mask), normal, **CLOSE)
        torch.testing.assert_close(focal_loss(maps, mask), arrays["loss/focal_per_tap"][i], **CLOSE)
        rows = arrays["loss/rowwise_dice_abnormal_batch1_per_tap"][i]
        torch.testing.assert_close(dice_loss(maps[1][:, None], mask[1][:, None]), rows, **CLOSE)
        assert abs(float(dice_loss(maps[1:2], mask[1:2]) - rows)) > 0.005


def test_what_the_published_code_saves_and_never_reads_is_left_out(arrays):
    spec = spec_for()
    unread = {
        "token_prefix_pos": torch.zeros(1, 1, 1, 32),
        "compound_prompt_projections.0.weight": torch.zeros(896, 32),
    }
    load_published(
        AnomalyDetector(spec), "medvmad", {**method_weights(arrays), **unread}, golden_clip(arrays, spec)
    )


@pytest.mark.parametrize(("attention", "prefix"), [(False, "out"), (True, "derived_attention_restored")])
def test_at_full_depth_images_give_the_published_maps_and_scores(attention, prefix):
    whole = whole_golden("medvmad")
    detector = published(whole, spec_for(attention=attention))
    detection = detector(whole["in/image"], everywhere(3, SIZE))
    torch.testing.assert_close(4 * detection.map, whole[f"{prefix}/map_smoothed"], **CLOSE)
    torch.testing.assert_close(4 * detection.score, whole[f"{prefix}/image_score"], **CLOSE)
