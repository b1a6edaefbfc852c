"""Gradients of the published losses through our parts are the published ones.

The losses are theirs too, with what ours leave out: the second sigmoid, Dice over the rows of an image that
is alone, and prompts rounded to half precision.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import (
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

from MedAnomalyCLIPLib.clip.specification import TowerSpec
from MedAnomalyCLIPLib.clip.towers import TappedTokens
from MedAnomalyCLIPLib.detectors.detector import Aligned, AnomalyDetector, HeadFeatures
from MedAnomalyCLIPLib.detectors.published import NAMES, load_published, renamed
from MedAnomalyCLIPLib.detectors.scoring import anomaly_map, two_class_cosines
from MedAnomalyCLIPLib.detectors.specification import AdapterSpec, DetectorSpec, TextSpec, VisualPromptSpec
from MedAnomalyCLIPLib.detectors.text import create_prompts
from MedAnomalyCLIPLib.training.losses import dice_loss, focal_loss, map_loss

GRID, FOUR, EIGHT = (8, 8), (6, 12, 18, 24), (2, 4, 6, 8)
NEAR = 1e-3  # of an array's maximum; the number of threads alone moves some by a tenth of it


class Published:
    """A detector with published weights, and the prompts that its text bank is learned through."""

    def __init__(self, preset, arrays, spec):
        self.preset, self.arrays = preset, arrays
        clip = golden_clip(arrays, spec)
        self.detector = AnomalyDetector(spec).eval()
        load_published(self.detector, preset, method_weights(arrays), clip)
        self.modules = {"": self.detector}
        if spec.text.prompts == "coop":
            prompts = learned_prompts(preset, arrays, spec, clip)
            self.modules["prompts."] = prompts
            self.text = prompts(clip)

    def agree(self, *only):
        """Compare stored gradients of parts, or all."""
        agree(self.preset, self.arrays, self.modules, only or ("",))

    def map_of(self, patches, text):
        """(B, S, S) of one tap alone: the published losses are sums over taps."""
        spec = self.detector.spec
        return anomaly_map(
            [two_class_cosines(patches, text)],
            GRID,
            spec.tower.image_size,
            scale=spec.scale,
            fusion="softmax_then_mean",
        )

    def score_of(self, patches, text):
        """(B,) mean probability of the patches of one tap."""
        return (self.detector.spec.scale * two_class_cosines(patches, text)).softmax(1)[:, 1].mean(1)


def learned_prompts(preset, arrays, spec, clip):
    """Prompts with published vectors."""
    prompts = create_prompts(spec.text, spec.tower, clip)
    shapes, ours = prompts.state_dict(), renamed(method_weights(arrays), NAMES[preset])
    state = {k[8:]: v.reshape(shapes[k[8:]].shape) for k, v in ours.items() if k.startswith("prompts.")}
    prompts.load_state_dict(state)
    return prompts


def agree(preset, arrays, modules, only=("",)):
    """Compare stored gradients whose names, ours, begin with one of `only`."""
    stored = renamed({k[5:]: v for k, v in arrays.items() if k.startswith("grad/")}, NAMES[preset])
    stored = {name: value for name, value in stored.items() if name.startswith(only)}
    parameters = {
        f"{prefix}{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    assert stored
    for name, theirs in stored.items():
        ours = parameters[name].grad
        ours = torch.zeros_like(theirs) if ours is None else ours.reshape(theirs.shape)
        allowed = NEAR * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, atol=allowed, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def with_gradients(system):
    return golden(system) | golden(f"{system}_gradients")


def follow(loss, stored):
    """Backwards from a loss that is the published one."""
    torch.testing.assert_close(loss, stored.to(loss), atol=1e-4, rtol=2e-5)
    loss.backward()


def mediclip(arrays):
    return Published("mediclip", arrays, tiny_spec("mediclip", "mediclip", 112, (12, 18, 24)))


def test_gradients_of_mediclip_are_the_published_ones():
    system = mediclip(arrays := with_gradients("mediclip"))
    stored = arrays["out/tap_tokens"]
    tokens = TappedTokens(tuple(stored[:, :, 1:]), tuple(stored[:, :, 0]), torch.zeros(2, 32), GRID)
    maps = system.detector.map_tokens(tokens, system.text)
    follow(map_loss(maps, arrays["in/mask"]), arrays["loss/total"])
    system.agree()


def test_gradients_of_mediclip_at_full_depth_are_the_published_ones():
    system = mediclip(arrays := whole_golden("mediclip"))
    maps = system.detector.map_features(system.detector.align(arrays["in/image"]), system.text)
    follow(map_loss(maps, arrays["in/mask"]), arrays["loss/total"])
    system.agree()


def test_gradients_of_mvfa_at_full_depth_are_the_published_ones():
    """The second half of the last adapters gets none: nothing reads the stream that it changes."""
    arrays = whole_golden("mvfa")
    spec = tiny_spec("mvfa_zero_shot", "mvfa", 120, FOUR)
    system = Published("mvfa_zero_shot", arrays, replace(spec, text=replace(spec.text, name="Brain")))
    seen, text = system.detector.align(arrays["in/image_test"][1:2]), system.detector.text_bank
    mask, label = arrays["in/mask_test"][1].float(), arrays["in/label_test"][1:2].float()
    pixels = sum(map_loss(system.map_of(p, text), mask) for p in seen.segmentation.patches)
    images = sum(
        F.binary_cross_entropy_with_logits(system.score_of(p, text), label) for p in seen.detection.patches
    )
    follow(pixels + images, arrays["loss/img1_total"])
    system.agree()
    assert not arrays["grad/det_adapters/3.fc2.0.weight"].any()
    assert arrays["grad/det_adapters/2.fc2.0.weight"].any()


def medvmad(arrays):
    spec = tiny_spec("medvmad", "medvmad", 112, FOUR)
    text = replace(spec.text, length=6, deep_depth=3, deep_length=3)
    return Published("medvmad", arrays, replace(spec, text=text))


def follow_medvmad(system, seen, mask, label):
    pixels, images = 0, 0
    for patches in seen.segmentation.patches:
        maps = system.map_of(patches, system.text)
        pixels = pixels + map_loss(maps, mask) + dice_loss(1 - maps, 1 - mask)
    for patches in seen.detection.patches:
        score = system.score_of(patches, system.text)
        images = images + F.binary_cross_entropy_with_logits(score, label)
    follow(pixels + images, system.arrays["loss/pixel_loss"] + system.arrays["loss/image_loss"])


def test_gradients_of_medvmads_prompts_are_the_published_ones():
    system = medvmad(arrays := with_gradients("medvmad"))
    heads = [
        HeadFeatures(tuple(stored[:, :, 1:]), tuple(stored[:, :, 0]))
        for stored in (arrays["out/seg_aligned[:, :2]"], arrays["out/det_aligned[:, :2]"])
    ]
    seen = Aligned(*heads, GRID, torch.zeros(2, 32))
    follow_medvmad(system, seen, arrays["in/mask[:2]"][:, 0], arrays["in/label[:2]"].float())
    system.agree("prompts.")


def test_gradients_of_medvmad_at_full_depth_are_the_published_ones():
    system = medvmad(arrays := whole_golden("medvmad"))
    seen = system.detector.align(arrays["in/image"][:2])
    follow_medvmad(system, seen, arrays["in/mask"][:2, 0].float(), arrays["in/label"][:2].float())
    system.agree()


def adaclip(arrays, name, **changes):
    spec = tiny_spec(name, name, 112, EIGHT)
    fused = spec.feature_fusion and replace(spec.feature_fusion, channels=(8, 10, 12, 12))
    text, groups = replace(spec.text, name="brain"), replace(spec.clusters, count=5)
    return Published(name, arrays, replace(spec, text=text, clusters=groups, feature_fusion=fused, **changes))


def follow_adaclip(system, seen, mask):
    """An abnormal image, alone in its batch as published."""
    text = system.detector.text_features(seen)
    loss = focal_loss(system.detector.class_score(seen, text, everywhere(1, 112)), torch.ones(1))
    for patches in seen.segmentation.patches:
        maps = system.map_of(patches, text)
        loss = loss + focal_loss(maps, mask) + dice_of_rows(maps, mask) + dice_of_rows(1 - maps, 1 - mask)
    follow(loss, system.arrays["loss/total"])


def dice_of_rows(maps, mask):
    return dice_loss(maps[0][:, None], mask[0][:, None])


def test_gradients_of_adaclips_text_adapters_and_class_head_are_the_published_ones(monkeypatch):
    system = adaclip(arrays := with_gradients("adaclip"), "adaclip", visual_prompts=None)
    round_prompts(monkeypatch)
    use_clusters(monkeypatch, arrays["out/hsf_cluster_labels_img1"])
    stored = arrays["out/tap_tokens_img1"]
    tokens = TappedTokens(
        tuple(stored[:, None, 1:]), tuple(stored[:, None, 0]), arrays["out/pooled_img1"], GRID
    )
    seen = system.detector.align_tokens(tokens, system.detector.text(arrays["out/plain_pooled_img1"]))
    follow_adaclip(system, seen, arrays["in/mask[1:]"][:, 0])
    system.agree("text.", "adapters.", "class_head.")


@pytest.mark.parametrize("name", ["adaclip", "diffusionclip"])
def test_gradients_at_full_depth_with_prompts_and_features_in_the_stream_are_the_published_ones(
    name, monkeypatch
):
    system = adaclip(arrays := whole_golden(name), name)
    round_prompts(monkeypatch)
    use_clusters(monkeypatch, arrays["out/hsf_cluster_labels_img1"])
    features = [arrays[f"in/sd_feature_{i}"][1:] for i in range(4)] if name == "diffusionclip" else None
    seen = system.detector.align(arrays["in/image"][1:], features)
    follow_adaclip(system, seen, arrays["in/mask"][1:, 0].float())
    system.agree()


def test_gradients_of_anomalyclips_prompts_are_the_published_ones():
    """Its vision tower is not ours, but its features are stored."""
    arrays = whole_golden("anomalyclip")
    spec = tiny_spec("medvmad", "anomalyclip", 112, EIGHT)
    text = replace(spec.text, abnormal=("damaged object",), length=6, deep_depth=3, deep_length=3)
    tower = replace(spec.tower, activation="quick_gelu")
    spec = replace(spec, text=text, tower=tower, scale=1 / 0.07, enlarged="probabilities")
    prompts = learned_prompts("medvmad", arrays, spec, clip := golden_clip(arrays, spec))
    bank = prompts(clip)
    mask, pixels = arrays["in/mask"][:, 0].float(), 0
    for patches in arrays["out/patch_features"]:
        maps = anomaly_map(
            [two_class_cosines(patches[:, 1:], bank)],
            GRID,
            112,
            scale=spec.scale,
            fusion=spec.fusion,
            enlarged=spec.enlarged,
        )
        pixels = pixels + map_loss(maps, mask) + dice_loss(1 - maps, 1 - mask)
    logits = spec.scale * arrays["out/image_features"] @ bank.T
    images = F.cross_entropy(logits, arrays["in/label"].long())
    follow(4 * pixels + images, arrays["loss/pixel_loss"] + arrays["loss/image_loss"])
    agree("medvmad", arrays, {"prompts.": prompts})


TWO_HEADS = {"adapter": AdapterSpec("two_heads"), "image_score": "mean_patch"}
HYBRID = {
    "text": TextSpec("hybrid", deep_depth=2, deep_length=2, templates=1, name="brain"),
    "visual_prompts": VisualPromptSpec(length=2, depth=2),
}


@pytest.mark.parametrize("parts", [{}, TWO_HEADS, HYBRID], ids=["linear", "two heads", "hybrid"])
def test_gradients_of_a_batch_are_the_mean_of_those_of_its_images(tiny_tower: TowerSpec, parts):
    """The published code of three systems takes one image at a time."""
    torch.manual_seed(0)
    detector = AnomalyDetector(DetectorSpec(tiny_tower, **parts)).eval()
    detector.text_bank.copy_(F.normalize(torch.randn(2, 32), dim=-1))
    for name, parameter in detector.named_parameters():
        parameter.requires_grad_("tower." not in name)
    images, masks = torch.randn(2, 3, 64, 64), torch.rand(2, 64, 64) > 0.7

    def gradients(chosen):
        detector.zero_grad(set_to_none=True)
        seen = detector.align(images[chosen])
        text = detector.text_features(seen)
        loss = map_loss(detector.map_features(seen, text), masks[chosen])
        (loss + detector.patch_score(seen, text, everywhere(2, 64)[chosen]).mean()).backward()
        return {n: p.grad.clone() for n, p in detector.named_parameters() if p.grad is not None}

    together, first, second = gradients([0, 1]), gradients([0]), gradients([1])
    assert len(together) >= 4
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, (first[name] + second[name]) / 2, atol=1e-6, rtol=1e-3)
