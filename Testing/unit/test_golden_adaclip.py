"""AdaCLIP and DiffusionCLIP: our parts, with their presets, give what their published code gives.

The published code rounds prompts to half precision. Ours does not; where the stored numbers contain the
rounding, the tests put it in, and one test states what it changes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import (
    CLOSE,
    everywhere,
    golden,
    golden_clip,
    method_weights,
    round_prompts,
    tiny_spec,
    use_clusters,
    whole_golden,
)
from torch.nn import functional as F

from MedAnomalyCLIPLib.clip.towers import TappedClipViT, TappedTokens
from MedAnomalyCLIPLib.detectors import clusters
from MedAnomalyCLIPLib.detectors.clusters import k_means, mean_of_centres
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.detectors.published import NAMES, load_published, renamed
from MedAnomalyCLIPLib.detectors.specification import DetectorSpec, FeatureFusionSpec, VisualPromptSpec
from MedAnomalyCLIPLib.detectors.stream import GatedFusion, HybridPrompts
from MedAnomalyCLIPLib.detectors.text import HybridText
from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest

SIZE, GRID, TAPS, CHANNELS = 112, (8, 8), (2, 4, 6, 8), (8, 10, 12, 12)
LOOSE = {"atol": 1e-4, "rtol": 2e-5}  # logits are scaled by 100

pytestmark = pytest.mark.usefixtures("no_gradients")


def spec_for(system="adaclip"):
    """The preset, smaller where the golden numbers are."""
    spec = tiny_spec(system, system, SIZE, TAPS)
    fused = spec.feature_fusion and replace(spec.feature_fusion, channels=CHANNELS)
    return replace(
        spec,
        text=replace(spec.text, name="brain"),
        clusters=replace(spec.clusters, count=5),
        feature_fusion=fused,
    )


def published(arrays, spec, system="adaclip"):
    detector = AnomalyDetector(spec).eval()
    load_published(detector, system, method_weights(arrays), golden_clip(arrays, spec))
    return detector


@pytest.fixture
def rounded(monkeypatch):
    """Prompts rounded to half precision, as published."""
    round_prompts(monkeypatch)


@pytest.fixture
def their_clusters(monkeypatch):
    """Clusters as stored."""

    def use(arrays, image=1):
        use_clusters(monkeypatch, arrays[f"out/hsf_cluster_labels_img{image}"])

    return use


@pytest.fixture(scope="module")
def ada():
    return golden("adaclip")


@pytest.fixture(scope="module")
def diffusion():
    return golden("diffusionclip")


@pytest.fixture
def hybrid_text(ada):
    """Text side with published weights, whose key mapping is the converter's."""
    spec = spec_for()
    text = HybridText(spec.text, spec.tower, 32)
    ours = renamed(method_weights(ada), NAMES["adaclip"])
    prompts = {key[13:]: value for key, value in ours.items() if key.startswith("text.prompts.")}
    text.prompts.load_state_dict(prompts)
    clip = golden_clip(ada, spec)
    text.tower.load_state_dict({k: v for k, v in clip.state_dict().items() if k in text.tower.state_dict()})
    return text


def test_sentences_are_the_published_tokens(ada, hybrid_text):
    assert torch.equal(hybrid_text.sentences.token_ids, ada["in/token_ids"].long())


def test_text_of_an_image_is_the_published_one(ada, hybrid_text):
    bank = hybrid_text(ada["out/plain_pooled_img1"])
    torch.testing.assert_close(bank[0], ada["out_nohalf/text_features_img1"].T, **CLOSE)


def test_text_of_an_image_is_the_published_one_with_their_rounding(ada, hybrid_text, rounded):
    bank = hybrid_text(ada["out/plain_pooled_img1"])
    torch.testing.assert_close(bank[0], ada["out/text_features_img1"].T, **CLOSE)


def test_images_of_a_batch_keep_their_own_text(ada, hybrid_text):
    pooled = torch.cat([ada["out/plain_pooled_img1"], torch.randn(1, 32)])
    together = hybrid_text(pooled)
    torch.testing.assert_close(together[:1], hybrid_text(pooled[:1]), **CLOSE)
    assert not torch.allclose(together[0], together[1])


@pytest.fixture
def replayed(monkeypatch, ada, hybrid_text):
    """A detector whose vision tower gives the published tokens: what follows them is compared alone."""
    spec = spec_for()
    stored = ada["out/tap_tokens_img1"]
    tokens = TappedTokens(tuple(stored[:, None, 1:]), tuple(stored[:, None, 0]), ada["out/pooled_img1"], GRID)
    monkeypatch.setattr(TappedClipViT, "forward", lambda self, images, inject=None: tokens)
    detector = AnomalyDetector(replace(spec, visual_prompts=None)).eval()
    ours = renamed(method_weights(ada), NAMES["adaclip"])
    detector.load_state_dict(
        {key: value for key, value in ours.items() if key in detector.state_dict()}, strict=False
    )
    monkeypatch.setattr(HybridText, "forward", lambda self, pooled: ada["out/text_features_img1"].T[None])
    return detector


NO_IMAGE = torch.zeros(1, 3, SIZE, SIZE)


def test_map_is_the_published_one_before_and_after_smoothing(ada, replayed):
    spec = replayed.spec
    for sigma, key in ((0.0, "anomaly_map_img1"), (spec.smoothing, "anomaly_map_smoothed_img1")):
        replayed.spec = replace(spec, smoothing=sigma)
        maps = replayed(NO_IMAGE, everywhere(1, SIZE)).map
        torch.testing.assert_close(maps[0, ::5, ::5], ada[f"out/{key}[..., ::5, ::5]"], **LOOSE)


def test_score_of_class_token_and_clusters_is_the_published_one(ada, replayed, their_clusters):
    their_clusters(ada)
    score = replayed(NO_IMAGE, everywhere(1, SIZE)).score
    torch.testing.assert_close(score, ada["out/anomaly_score_img1"], **LOOSE)


def test_score_of_the_class_token_alone_is_the_published_one_without_clusters(ada, replayed):
    replayed.spec = replace(replayed.spec, clusters=replace(replayed.spec.clusters, weight=0.0))
    score = replayed(NO_IMAGE, everywhere(1, SIZE)).score
    torch.testing.assert_close(score, ada["out/anomaly_score_without_hsf_img1"], **LOOSE)


def test_patches_that_are_gathered_are_the_published_ones(ada, replayed, monkeypatch):
    gathered = []

    def watch(points, count):
        gathered.append(points)
        return k_means(points, count)

    monkeypatch.setattr(clusters, "k_means", watch)
    replayed(NO_IMAGE, everywhere(1, SIZE))
    chosen = ada["out/proj_patch_img1"][:, ada["out/hsf_top_indices_img1"].long()]
    torch.testing.assert_close(gathered[0], torch.cat(list(chosen), dim=-1), **CLOSE)


def test_mean_of_their_clusters_is_their_feature(ada):
    chosen = ada["out/proj_patch_img1"][:, ada["out/hsf_top_indices_img1"].long()].mean(0)
    feature = mean_of_centres(chosen, ada["out/hsf_cluster_labels_img1"].long())
    torch.testing.assert_close(F.normalize(feature, dim=0), ada["out/hsf_feature_img1"][0], **CLOSE)


def test_our_clusters_are_the_same_each_time_and_part_what_lies_apart():
    points = torch.eye(4).repeat(6, 1) + 0.01 * torch.randn(24, 4)
    labels = k_means(points, 4)
    assert torch.equal(labels, k_means(points, 4))
    assert all(len(labels[i::4].unique()) == 1 for i in range(4))
    assert len(labels.unique()) == 4


def test_tokens_with_prompts_and_fused_features_are_the_published_ones(diffusion, rounded):
    """Up to the first tap; the tests at full depth see what the second makes of it."""
    spec = spec_for("diffusionclip")
    spec = replace(
        spec,
        tower=replace(spec.tower, taps=TAPS[:1]),
        text=replace(spec.text, prompts="coop"),
        image_score="max_map",
        feature_fusion=replace(spec.feature_fusion, channels=CHANNELS[:1]),
    )
    detector = AnomalyDetector(spec).eval()
    state = {f"tower.{k[5:]}": v for k, v in diffusion.items() if k.startswith("clip/visual.")} | renamed(
        method_weights(diffusion), NAMES["diffusionclip"]
    )
    left = detector.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    features = [diffusion["in/sd_feature_0[1:]"]]
    inject = detector._prompts_and_features(diffusion["out/plain_pooled_img1"], features)
    tokens = detector.tower(diffusion["in/image[1:]"], inject)
    stored = diffusion["out/tap_tokens_img1[:1]"][0]
    torch.testing.assert_close(tokens.patches[0][0], stored[1:], **CLOSE)
    torch.testing.assert_close(tokens.classes[0][0], stored[0], **CLOSE)


def test_dynamic_prompts_are_the_published_ones(diffusion):
    prompts = HybridPrompts(48, 32, 5, 4, static=False)
    ours = renamed(method_weights(diffusion), NAMES["diffusionclip"])
    prompts.load_state_dict({k[15:]: v for k, v in ours.items() if k.startswith("visual_prompts.dynamic")})
    vectors = prompts(diffusion["out/plain_pooled_img1"])
    assert len(vectors) == 4
    torch.testing.assert_close(vectors[0], diffusion["out/dynamic_visual_prompts_img1"], **CLOSE)


@pytest.mark.parametrize(("resize", "moves"), [("grid", True), ("line", False)])
def test_feature_maps_keep_their_columns_only_when_resized_in_two_dimensions(resize, moves):
    """Published, a bright column of a 16 x 16 map does not arrive as a column of the 8 x 8 patches."""
    fusion = GatedFusion(1, 1, resize=resize)
    column = torch.zeros(1, 1, 16, 16)
    column[..., 11] = 1
    arrived = fusion._tokens(column, GRID)[0, :, 0].reshape(GRID).mean(0)
    assert (int(arrived.argmax()) == 5 and float(arrived.max()) > 2 * float(arrived.mean())) == moves


def test_a_gate_that_starts_at_zero_changes_nothing_at_first():
    patches, features = torch.randn(2, 64, 6), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(GatedFusion(3, 6)(patches, features, GRID), patches)


def test_features_must_be_handed_in_where_they_are_asked_for():
    detector = AnomalyDetector(spec_for("diffusionclip")).eval()
    with pytest.raises(InvalidRequest, match="4 feature maps"):
        detector(NO_IMAGE, everywhere(1, SIZE))


def test_one_map_for_each_tap_is_asked_for():
    spec = spec_for("diffusionclip")
    with pytest.raises(BundleInvalid, match="for each tap"):
        replace(spec, feature_fusion=replace(spec.feature_fusion, channels=(8,)))


def test_prompts_behind_the_patches_leave_their_number_alone(tiny_tower):
    detector = AnomalyDetector(DetectorSpec(tiny_tower, visual_prompts=VisualPromptSpec()))
    assert [p.shape[1] for p in detector.align(torch.randn(2, 3, 64, 64)).segmentation.patches] == [16, 16]


@pytest.mark.parametrize("system", ["adaclip", "diffusionclip"])
@pytest.mark.parametrize("image", [0, 1])
def test_at_full_depth_an_image_gives_the_published_map_and_score(system, image, their_clusters, monkeypatch):
    whole = whole_golden(system)
    detector = published(whole, spec_for(system), system)
    detector.spec = replace(detector.spec, smoothing=0.0)
    their_clusters(whole, image)
    here = slice(image, image + 1)
    features = [whole[f"in/sd_feature_{i}"][here] for i in range(4)] if system == "diffusionclip" else None
    maps, score, _ = detector(whole["in/image"][here], everywhere(1, SIZE), features)
    exact = whole[f"out_nohalf/anomaly_map_img{image}"]
    torch.testing.assert_close(maps[0], exact, **LOOSE)
    torch.testing.assert_close(score, whole[f"out_nohalf/anomaly_score_img{image}"], **LOOSE)
    assert 1e-4 < float((exact - whole[f"out/anomaly_map_img{image}"]).abs().max()) < 1e-3


@pytest.mark.parametrize("system", ["adaclip", "diffusionclip"])
@pytest.mark.parametrize(
    ("variant", "text", "vision"),
    [
        ("VL_S", {"dynamic": False}, VisualPromptSpec(dynamic=False)),
        ("V_D", {"prompts": "ensemble"}, VisualPromptSpec(static=False)),
        ("V_SD", {"prompts": "ensemble"}, VisualPromptSpec()),
        ("L_SD", {}, None),
        ("quickgelu", {}, VisualPromptSpec()),
    ],
)
def test_at_full_depth_each_choice_of_prompts_gives_its_published_map(system, variant, text, vision, rounded):
    whole = whole_golden(system)
    spec = spec_for(system)
    tower = replace(spec.tower, activation="quick_gelu") if variant == "quickgelu" else spec.tower
    spec = replace(spec, tower=tower, text=replace(spec.text, **text), visual_prompts=vision, smoothing=0.0)
    detector = AnomalyDetector(spec).eval()
    expected = detector.state_dict()
    weights = {
        key: value
        for key, value in method_weights(whole).items()
        if not (ours := renamed({key: value}, NAMES[system])) or next(iter(ours)) in expected
    }
    load_published(detector, system, weights, golden_clip(whole, spec))
    features = [whole[f"in/sd_feature_{i}"][1:] for i in range(4)] if system == "diffusionclip" else None
    maps = detector(whole["in/image"][1:], everywhere(1, SIZE), features).map
    torch.testing.assert_close(maps[0], whole[f"out_{variant}/anomaly_map_img1"], **LOOSE)


def test_what_one_tap_lets_in_reaches_the_taps_after_it(tiny_tower):
    spec = DetectorSpec(tiny_tower, feature_fusion=FeatureFusionSpec((3, 3), join="norm"))
    detector = AnomalyDetector(spec).eval()
    image, features = torch.randn(1, 3, 64, 64), [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)]
    first = [torch.zeros(1, 3, 4, 4), features[1]]
    with_it, without = (detector.align(image, f).segmentation.patches for f in (features, first))
    assert not torch.allclose(with_it[0], without[0])
    assert not torch.allclose(with_it[1], without[1])
