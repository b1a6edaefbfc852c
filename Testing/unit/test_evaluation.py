"""Figures of merit and the trivial baselines that stand beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from MedAnomalyCLIPLib.datasets import ImageRecord, lesion_mask, planes_of
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.evaluation.baselines import image_baselines, pixel_baselines
from MedAnomalyCLIPLib.evaluation.image_sets import detect_records, set_figures
from MedAnomalyCLIPLib.evaluation.metrics import best_f1_threshold, pixel_figures, ranking_figures


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    pairs = [(b > a) for a in scores[~labels] for b in scores[labels]]
    assert ranking_figures(scores, labels)["auroc"] == pytest.approx(np.mean(pairs))


def test_one_class_alone_has_no_figures():
    assert ranking_figures(np.array([0.1, 0.2]), np.array([True, True])) == {}


def test_pixel_figures_pool_images_of_different_size():
    maps = [np.array([[0.9, 0.1]]), np.array([[0.2], [0.3], [0.8]])]
    masks = [np.array([[True, False]]), np.array([[False], [False], [True]])]
    assert pixel_figures(maps, masks) == {"auroc": 1.0, "ap": 1.0}


def test_best_threshold_is_found_by_trying_all():
    rng = np.random.default_rng(0)
    truth = rng.random((20, 20)) < 0.2
    scores = np.clip(rng.normal(0.3, 0.1, truth.shape) + 0.3 * truth, 0, 1)

    def f1(threshold):
        called = scores >= threshold
        return 2 * (called & truth).sum() / (called.sum() + truth.sum())

    tried = np.linspace(0, 1, 101)
    best = best_f1_threshold([scores], [truth])
    assert f1(best) == pytest.approx(max(f1(t) for t in tried))


def test_baselines_know_brightness_shape_and_centre():
    pixels = np.zeros((20, 10), np.float32)
    pixels[2, 3] = 1
    assert image_baselines(pixels)["shape"] == 2
    assert image_baselines(pixels)["dark share"] == pytest.approx(199 / 200)
    maps = pixel_baselines(pixels)
    assert np.argmax(maps["brightness"]) == 23
    assert maps["centre"][10, 5] > maps["centre"][0, 0]


@pytest.fixture
def records(tmp_path):
    """Two normal and two abnormal pictures; one abnormal one without a mask."""
    rng = np.random.default_rng(0)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:12, 8:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    made = []
    for number in range(4):
        pixels = rng.integers(0, 120, (30, 40)).astype(np.uint8)
        if number >= 2:
            pixels[mask > 0] = 250
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        made.append(
            ImageRecord(
                tmp_path / f"{number}.png", None, "made-up", "test", number >= 2, "MR", "brain", "", ""
            )
        )
    return [*made[:2], replace(made[2], mask=tmp_path / "mask.png"), made[3]]


def test_figures_of_a_set_count_what_they_rest_on(records, tiny_bundle):
    detector = SliceDetector.load(tiny_bundle.folder, device="cpu")
    figures = set_figures(records, detect_records(detector, records))
    assert figures["images"] == 4
    assert figures["abnormal"] == 2
    assert figures["image auroc of mean intensity"] == 1.0
    assert figures["pixel auroc of brightness"] == 1.0
    assert {"image auroc", "image ap", "pixel auroc", "pixel ap"} <= figures.keys()


def test_an_abnormal_image_without_a_mask_is_no_evidence_at_pixel_level(records):
    masks = [lesion_mask(record, plane) for record, plane in zip(records, planes_of(records), strict=True)]
    assert masks[3] is None
    assert not masks[0].any()
    assert masks[2].sum() == 7 * 12
