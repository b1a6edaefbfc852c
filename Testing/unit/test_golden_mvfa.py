"""MVFA: our parts, with its preset, give what its published code gives."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from golden import CLOSE, everywhere, golden, golden_clip, method_weights, min_max, tiny_spec, whole_golden
from torch.nn import functional as F

from MedAnomalyCLIPLib.clip.ensembles import SentenceEnsemble, ensemble_sentences
from MedAnomalyCLIPLib.configuration import from_mapping, to_mapping
from MedAnomalyCLIPLib.detectors.detector import Aligned, AnomalyDetector, HeadFeatures
from MedAnomalyCLIPLib.detectors.presets import PRESETS
from MedAnomalyCLIPLib.detectors.published import load_published
from MedAnomalyCLIPLib.detectors.specification import DetectorSpec
from MedAnomalyCLIPLib.errors import BundleInvalid
from MedAnomalyCLIPLib.training.losses import dice_loss, focal_loss, image_loss

SIZE, GRID, TAPS = 120, (8, 8), (6, 12, 18, 24)
ROWS = 2 * 65  # two support images, class tokens included

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def arrays():
    return golden("mvfa")


def detector_for(preset, arrays, bank="out/text_features"):
    spec = tiny_spec(preset, "mvfa", SIZE, TAPS)
    if spec.memory is not None:
        spec = replace(spec, memory=replace(spec.memory, rows=ROWS))
    detector = AnomalyDetector(spec).eval()
    detector.text_bank.copy_(arrays[bank].T)
    return detector


def heads(stored):
    """Stored features, image by tap by token, as a head's."""
    return HeadFeatures(tuple(stored[:, i, 1:] for i in range(4)), tuple(stored[:, i, 0] for i in range(4)))


def aligned(arrays):
    return Aligned(heads(arrays["out/seg_aligned"]), heads(arrays["out/det_aligned"]), GRID, NO_POOLED)


@pytest.fixture
def replayed(monkeypatch, arrays):
    """Detectors that see the published features, so that all that follows them is compared alone."""
    monkeypatch.setattr(AnomalyDetector, "align", lambda self, images, features, text: aligned(arrays))


NO_IMAGES = torch.zeros(3, 3, SIZE, SIZE)
NO_POOLED = torch.zeros(3, 32)


def test_text_tower_gives_the_published_features(arrays):
    clip = golden_clip(arrays, tiny_spec("mvfa_zero_shot", "mvfa", SIZE, TAPS))
    features = clip.encode_text(arrays["in/token_ids_example"].long())
    torch.testing.assert_close(features, arrays["out/text_encode_example"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("Brain", "5dd04b10863971f2dcb855d2f87895e36f635197f4326a9d08d57b59134ceada"),
        ("retinal OCT", "71d96c54163dd689ea9ac0d37a0e6fe8a38474b4de89c3e805a02b501482e868"),
        ("histopathological image", "f80f1cc73d26422815b199954fb028b80f50831acd8ed1383f2d34d17e1aaa31"),
    ],
)
def test_the_420_sentences_are_the_published_ones_letter_for_letter(name, sha256):
    normal, abnormal = ensemble_sentences(name)
    assert (len(normal), len(abnormal)) == (245, 175)
    assert hashlib.sha256("\n".join(normal + abnormal).encode()).hexdigest() == sha256


@pytest.mark.parametrize(
    ("name", "key"), [("Brain", "text_features"), ("Chest X-ray film", "text_features_labelonly")]
)
def test_ensemble_bank_is_the_published_one(arrays, name, key):
    spec = tiny_spec("mvfa_zero_shot", "mvfa", SIZE, TAPS)
    bank = SentenceEnsemble(spec.tower, *ensemble_sentences(name))(golden_clip(arrays, spec))
    torch.testing.assert_close(bank, arrays[f"out/{key}"].T, **CLOSE)


def test_zero_shot_map_is_the_mean_of_what_is_published_as_a_sum(arrays, replayed):
    maps = detector_for("mvfa_zero_shot", arrays)(NO_IMAGES, everywhere(3, SIZE)).map
    torch.testing.assert_close(4 * maps[:, ::5, ::5], arrays["out/zero_map_sum[..., ::5, ::5]"], **CLOSE)


def test_zero_shot_score_is_the_mean_of_what_is_published_as_a_sum(arrays, replayed):
    score = detector_for("mvfa_zero_shot", arrays)(NO_IMAGES, everywhere(3, SIZE)).score
    torch.testing.assert_close(4 * score, arrays["out/zero_image_score_raw"], **CLOSE)


def test_score_of_patches_leaves_padding_out(arrays, replayed):
    valid = everywhere(3, SIZE)
    valid[:, SIZE // 2 :] = False
    upper = heads(arrays["out/det_aligned"]).patches
    probability = [
        (100 * F.normalize(p[:, :32], dim=-1) @ arrays["out/text_features"]).softmax(-1)[..., 1]
        for p in upper
    ]
    score = detector_for("mvfa_zero_shot", arrays)(NO_IMAGES, valid).score
    torch.testing.assert_close(score, torch.stack(probability).mean((0, 2)), **CLOSE)


def remembering(preset, arrays, head, bank="out/text_features"):
    detector = detector_for(preset, arrays, bank)
    detector.memory.fill(arrays[f"out/mem_bank_{head}"])
    return detector


def test_memory_map_is_the_mean_of_what_is_published_as_a_sum(arrays):
    detector = remembering("mvfa_few_shot", arrays, "seg")
    distances = detector.memory(detector.map_head(aligned(arrays)).patches)
    maps = detector.distance_map(distances, GRID)
    torch.testing.assert_close(4 * maps[:, ::5, ::5], arrays["out/few_map_sum[..., ::5, ::5]"], **CLOSE)


def test_with_ranges_of_the_test_set_maps_and_scores_are_the_published_ones(arrays, replayed):
    """Published, but of no use on a new image: the ranges come from all three test images together."""
    detector = remembering("mvfa_few_shot", arrays, "seg")
    seen = aligned(arrays)
    text = detector.map_features(seen, detector.text_bank)
    memory = detector.distance_map(detector.memory(seen.segmentation.patches), GRID)
    detector.map_fusion.learn(text, memory)
    maps, scores, _ = detector(NO_IMAGES, everywhere(3, SIZE))
    torch.testing.assert_close(maps[:, ::5, ::5], arrays["out/few_fused_map[..., ::5, ::5]"], **CLOSE)
    torch.testing.assert_close(scores, arrays["out/few_image_score"], **CLOSE)


def test_without_masks_both_scores_come_from_the_detection_head(arrays, replayed):
    detector = remembering("mvfa_few_shot_labels", arrays, "det", "out/text_features_labelonly")
    seen, valid = aligned(arrays), everywhere(3, SIZE)
    text = detector.patch_score(seen, detector.text_bank, valid)
    memory = detector.distance_score(detector.memory(seen.detection.patches), GRID, valid)
    torch.testing.assert_close(4 * text, arrays["out/labelonly_text_score_raw"], **CLOSE)
    torch.testing.assert_close(4 * memory, arrays["out/labelonly_memory_score_raw"], **CLOSE)
    detector.score_fusion.learn(text, memory)
    torch.testing.assert_close(
        detector(NO_IMAGES, valid).score, arrays["out/labelonly_image_score"], atol=1e-4, rtol=1e-4
    )


def test_zero_shot_score_of_a_test_set_scaled_by_itself_says_nothing_about_one_image(arrays):
    """The published last step: the lowest score becomes 0 and the highest 1, whatever they were."""
    theirs = arrays["out/zero_image_score_minmax"]
    torch.testing.assert_close(min_max(arrays["out/zero_image_score_raw"]), theirs, **CLOSE)
    assert (float(theirs.min()), float(theirs.max())) == (0.0, 1.0)


def test_losses_of_each_tap_are_the_published_ones(arrays):
    mask = arrays["in/mask_test[1:2]"][0].float()
    for i, features in enumerate(aligned(arrays).segmentation.patches):
        logits = 100 * F.normalize(features[1:2], dim=-1) @ arrays["out/text_features"]
        logits = F.interpolate(logits.mT.unflatten(2, GRID), size=SIZE, mode="bilinear", align_corners=True)
        probability = logits.softmax(1)[:, 1]
        torch.testing.assert_close(
            focal_loss(probability, mask), arrays["loss/img1_focal_per_tap"][i], **CLOSE
        )
        torch.testing.assert_close(dice_loss(probability, mask), arrays["loss/img1_dice_per_tap"][i], **CLOSE)


def test_image_loss_takes_probabilities_as_they_are_not_through_a_sigmoid_again(arrays):
    """Published, a certain and right "abnormal" still costs 0.313, a certain and right "normal" 0.693."""
    label = arrays["in/label_test"][1:2].float()
    for i, features in enumerate(aligned(arrays).detection.patches):
        logits = 100 * F.normalize(features[1:2], dim=-1) @ arrays["out/text_features"]
        probability = logits.softmax(-1)[..., 1].mean(1)
        theirs = F.binary_cross_entropy_with_logits(probability, label)
        torch.testing.assert_close(theirs, arrays["loss/img1_bce_per_tap"][i], **CLOSE)
        ours = -(label * probability.log() + (1 - label) * (1 - probability).log()).mean()
        torch.testing.assert_close(image_loss(probability, label), ours, **CLOSE)
    sure = torch.tensor([1.0, 0.0])
    assert F.binary_cross_entropy_with_logits(sure, sure, reduction="none").tolist() == pytest.approx(
        [0.3133, 0.6931], abs=1e-4
    )
    assert float(image_loss(sure, sure)) == pytest.approx(0, abs=1e-5)


def brain(spec):
    return replace(spec, text=replace(spec.text, name="Brain"))


def test_published_names_are_all_accounted_for(arrays):
    spec = brain(tiny_spec("mvfa_zero_shot", "mvfa", SIZE, TAPS))
    detector, clip = AnomalyDetector(spec), golden_clip(arrays, spec)
    weights = method_weights(arrays)
    load_published(detector, "mvfa_zero_shot", weights, clip)
    assert torch.equal(detector.adapters[2].detection.up.weight, weights["det_adapters/2.fc2.0.weight"])
    torch.testing.assert_close(detector.text_bank, arrays["out/text_features"].T, **CLOSE)

    stray = torch.zeros(1)
    with pytest.raises(BundleInvalid, match=r"seg_adapters/0\.fc3\.weight"):
        load_published(detector, "mvfa_zero_shot", {**weights, "seg_adapters/0.fc3.weight": stray}, clip)
    with pytest.raises(BundleInvalid, match=r"adapters\.4\.segmentation\.down\.weight has no place"):
        load_published(detector, "mvfa_zero_shot", {**weights, "seg_adapters/4.fc1.0.weight": stray}, clip)
    del weights["det_adapters/2.fc2.0.weight"]
    with pytest.raises(BundleInvalid, match=r"adapters\.2\.detection\.up\.weight is missing"):
        load_published(detector, "mvfa_zero_shot", weights, clip)


def test_presets_come_back_from_json():
    for preset in PRESETS.values():
        data = json.loads(json.dumps(to_mapping(preset.detector)))
        assert from_mapping(DetectorSpec, data, "detector") == preset.detector


@pytest.mark.parametrize(("activation", "prefix"), [("gelu", "out"), ("quick_gelu", "out_quickgelu")])
def test_at_full_depth_images_give_the_published_features_maps_and_scores(activation, prefix):
    whole = whole_golden("mvfa")
    spec = brain(tiny_spec("mvfa_zero_shot", "mvfa", SIZE, TAPS))
    spec = replace(spec, tower=replace(spec.tower, activation=activation))
    detector = AnomalyDetector(spec).eval()
    load_published(detector, "mvfa_zero_shot", method_weights(whole), golden_clip(whole, spec))
    torch.testing.assert_close(detector.text_bank, whole[f"{prefix}/text_features"].T, **CLOSE)
    seen = detector.align(whole["in/image_test"])
    if prefix == "out":
        for i in range(4):
            for head, key in ((seen.segmentation, "seg"), (seen.detection, "det")):
                stored = whole[f"out/{key}_aligned"]
                torch.testing.assert_close(head.patches[i], stored[:, i, 1:], **CLOSE)
                torch.testing.assert_close(head.classes[i], stored[:, i, 0], **CLOSE)
    maps, scores, _ = detector(whole["in/image_test"], everywhere(3, SIZE))
    torch.testing.assert_close(4 * maps, whole[f"{prefix}/zero_map_sum"], atol=1e-4, rtol=2e-5)
    torch.testing.assert_close(4 * scores, whole[f"{prefix}/zero_image_score_raw"], **CLOSE)
