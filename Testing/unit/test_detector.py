"""The detectors' core: cosines, fusion, smoothing, scores."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from MedAnomalyCLIPLib.detectors.adapters import LinearAdapter
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.detectors.scoring import anomaly_map, image_score, smooth, two_class_cosines
from MedAnomalyCLIPLib.detectors.specification import DetectorSpec
from MedAnomalyCLIPLib.errors import BundleInvalid
from MedAnomalyCLIPLib.training.losses import dice_loss, focal_loss


def test_linear_adapter_is_a_1x1_convolution_over_the_grid():
    adapter = LinearAdapter(8, 5)
    tokens = torch.randn(2, 12, 8)
    weight, bias = adapter.linear.weight, adapter.linear.bias
    grid = F.conv2d(tokens.mT.reshape(2, 8, 3, 4), weight[:, :, None, None], bias)
    torch.testing.assert_close(adapter(tokens), grid.flatten(2).mT)


def test_cosines_ignore_the_length_of_features():
    text = F.normalize(torch.randn(2, 6), dim=-1)
    features = torch.randn(3, 10, 6)
    torch.testing.assert_close(two_class_cosines(features, text), two_class_cosines(7 * features, text))


def test_each_image_may_have_a_text_bank_of_its_own():
    text = F.normalize(torch.randn(3, 2, 6), dim=-1)
    features = torch.randn(3, 10, 6)
    together = two_class_cosines(features, text)
    torch.testing.assert_close(together[1], two_class_cosines(features[1:2], text[1])[0])


def test_without_temperature_a_map_stays_between_0_119_and_0_881():
    """The narrow range of MediCLIP's published code: softmax of two cosines with nothing to scale them."""
    cosines = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])
    ends = anomaly_map([cosines], (1, 2), 2, scale=1.0, fusion="mean_then_softmax")
    assert float(ends.min()) == pytest.approx(1 / (1 + math.exp(2)), abs=1e-6)
    assert float(ends.max()) == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)


def test_order_of_fusion_matters_as_its_formula_says():
    cosines = [torch.tensor([[[0.0], [0.3]]]), torch.tensor([[[0.2], [0.0]]])]
    difference = torch.tensor([0.3, -0.2]) / 0.07
    mean_first = anomaly_map(cosines, (1, 1), 1, scale=1 / 0.07, fusion="mean_then_softmax")
    softmax_first = anomaly_map(cosines, (1, 1), 1, scale=1 / 0.07, fusion="softmax_then_mean")
    assert float(mean_first) == pytest.approx(float(difference.mean().sigmoid()))
    assert float(softmax_first) == pytest.approx(float(difference.sigmoid().mean()))


def test_smoothing_keeps_a_constant_and_the_sum_of_a_spot():
    spot = torch.zeros(1, 41, 41)
    spot[0, 20, 20] = 1.0
    assert float(smooth(spot, 2.0).sum()) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(smooth(torch.full((1, 9, 9), 0.3), 4.0), torch.full((1, 9, 9), 0.3))


def test_smoothing_equals_scipys_gaussian_as_the_published_systems_call_it():
    from scipy.ndimage import gaussian_filter

    picture = torch.rand(1, 30, 30)
    expected = gaussian_filter(picture[0].numpy(), 2.0)
    torch.testing.assert_close(smooth(picture, 2.0)[0], torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_score_comes_from_the_image_not_from_the_padding():
    maps = torch.full((1, 4, 4), 0.2)
    maps[0, 0, 0] = 0.9
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 0] = False
    assert float(image_score(maps, valid, "max_map")) == pytest.approx(0.2)
    assert float(image_score(maps, valid, "mean_map")) == pytest.approx(0.2)


@pytest.fixture
def detector(tiny_tower):
    torch.manual_seed(3)
    detector = AnomalyDetector(DetectorSpec(tiny_tower)).eval()
    detector.text_bank.copy_(F.normalize(torch.randn(2, 32), dim=-1))
    return detector


def test_detector_equals_its_parts_put_together_by_hand(detector):
    images = torch.randn(2, 3, 64, 64)
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        tokens = detector.tower(images)
        maps = 0
        for adapter, patches in zip(detector.adapters, tokens.patches, strict=True):
            features = F.normalize(patches @ adapter.linear.weight.T + adapter.linear.bias, dim=-1)
            logits = (features @ detector.text_bank.T / 0.07).mT.reshape(2, 2, 4, 4)
            logits = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=True)
            maps = maps + torch.softmax(logits, dim=1)[:, 1] / 2
        detection = detector(images, valid)
    torch.testing.assert_close(detection.map, maps)
    torch.testing.assert_close(detection.score, maps.amax((1, 2)))


def test_map_is_zero_on_padding(detector):
    valid = torch.ones(1, 64, 64, dtype=torch.bool)
    valid[0, :10] = False
    with torch.no_grad():
        detection = detector(torch.randn(1, 3, 64, 64), valid)
    assert float(detection.map[0, :10].max()) == 0
    assert float(detection.map[0, 10:].min()) > 0


def test_a_batch_gives_the_same_as_its_images_one_by_one(detector):
    images = torch.randn(3, 3, 64, 64)
    valid = torch.ones(3, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        together = detector(images, valid).score
        alone = torch.cat([detector(images[i : i + 1], valid[:1]).score for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change", [{"fusion": "max"}, {"image_score": "min"}, {"scale": 0.0}, {"smoothing": -1.0}]
)
def test_values_that_mean_nothing_are_refused(tiny_tower, change):
    with pytest.raises(BundleInvalid):
        replace(DetectorSpec(tiny_tower), **change)


def test_focal_loss_equals_its_formula():
    p, y = 0.8, 1.0
    right = (1 - 1e-5) * p + 1e-5 * (1 - p) + 1e-5
    expected = -((1 - right) ** 2) * math.log(right)
    assert float(focal_loss(torch.full((1, 2, 2), p), torch.full((1, 2, 2), y))) == pytest.approx(
        expected, rel=1e-5
    )


def test_dice_is_taken_over_whole_images_not_over_rows():
    """Missing a 52-pixel lesion altogether costs nearly 1; averaged over rows, next to nothing."""
    mask = torch.zeros(1, 224, 224)
    mask[0, 100:104, 100:113] = 1
    missed = torch.zeros_like(mask)
    rows = dice_loss(missed[0][:, None], mask[0][:, None])
    assert float(dice_loss(missed, mask)) == pytest.approx(1 - 1 / 53, rel=1e-5)
    assert float(rows) < 0.02
