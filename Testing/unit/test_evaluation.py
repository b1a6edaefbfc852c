"""Figures of merit, their intervals, and the trivial baselines that stand beside them."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from MedAnomalyCLIPLib.datasets import ImageRecord, lesion_mask, planes_of
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.errors import Cancelled
from MedAnomalyCLIPLib.evaluation.baselines import image_baselines, pixel_baseline
from MedAnomalyCLIPLib.evaluation.bootstrap import intervals, resampling_weights
from MedAnomalyCLIPLib.evaluation.image_sets import (
    DETECTOR,
    POOLED,
    detect_records,
    mean_and_spread,
    measure_set,
    measure_sets,
    set_figures,
)
from MedAnomalyCLIPLib.evaluation.metrics import (
    best_f1_threshold,
    ranking_figures,
    ranking_figures_of_draws,
)
from MedAnomalyCLIPLib.evaluation.pixels import LesionPixels, Overlap, PixelCounts, area_up_to, pixel_figures


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    pairs = [(b > a) for a in scores[~labels] for b in scores[labels]]
    assert ranking_figures(scores, labels)["auroc"] == pytest.approx(np.mean(pairs))


def test_best_f1_and_sensitivity_are_found_by_trying_all_thresholds():
    rng = np.random.default_rng(1)
    labels = rng.random(80) < 0.4
    scores = np.round(rng.normal(labels, 1.0), 1)  # with ties
    f1, sensitive = [], [0.0]
    for threshold in np.unique(scores):
        called = scores >= threshold
        f1.append(2 * (called & labels).sum() / (called.sum() + labels.sum()))
        if (~called & ~labels).sum() / (~labels).sum() >= 0.95:
            sensitive.append((called & labels).sum() / labels.sum())
    figures = ranking_figures(scores, labels)
    assert figures["f1max"] == pytest.approx(max(f1))
    assert figures["sensitivity"] == pytest.approx(max(sensitive))


def test_one_class_alone_has_no_figures():
    assert ranking_figures(np.array([0.1, 0.2]), np.array([True, True])) == {}
    assert pixel_figures([np.zeros((3, 3))], [np.zeros((3, 3), bool)]) == {}


def test_draws_agree_with_scikit_learn_on_repeated_images():
    """A draw that takes images several times is the same as a longer list of images."""
    rng = np.random.default_rng(2)
    labels = np.arange(40) % 3 == 0
    scores = np.round(rng.normal(labels, 1.5), 1)
    weights = rng.integers(0, 4, (5, 40)).astype(float)
    order = np.argsort(-scores)
    ends = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(weights[:, order] * labels[order], axis=1)[:, ends]
    alarms = np.cumsum(weights[:, order] * ~labels[order], axis=1)[:, ends]
    found = ranking_figures_of_draws(hits, alarms, hits[:, -1], alarms[:, -1])
    for draw in range(5):
        repeated = np.repeat(np.arange(40), weights[draw].astype(int))
        expected = ranking_figures(scores[repeated], labels[repeated])
        assert {name: values[draw] for name, values in found.items()} == pytest.approx(expected)


class TestPixels:
    def images(self, seed=0, levels=None):
        """Five maps and masks of different sizes; two masks are empty, others have several regions."""
        rng = np.random.default_rng(seed)
        maps, masks = [], []
        for number, shape in enumerate([(9, 12), (14, 7), (10, 10), (6, 20), (8, 8)]):
            mask = rng.random(shape) < (0.25 if number < 3 else 0)
            values = np.clip(rng.normal(0.3 + 0.3 * mask, 0.2), 0, 1)
            maps.append((np.round(values * levels) / levels if levels else values).astype(np.float32))
            masks.append(mask)
        return maps, masks

    @staticmethod
    def slow_regions(mask):
        """Lists of (row, column) that touch at sides or corners, by walking from pixel to pixel."""
        left, regions = set(zip(*np.nonzero(mask), strict=True)), []
        while left:
            region, queue = [], deque([left.pop()])
            while queue:
                r, c = queue.popleft()
                region.append((r, c))
                for near in [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                    if near in left:
                        left.remove(near)
                        queue.append(near)
            regions.append(region)
        return regions

    def slow_pro(self, maps, masks, limit=0.3):
        """Mean overlap of regions against false positive rate, one threshold after the other."""
        regions = [(m, region) for m, t in zip(maps, masks, strict=True) for region in self.slow_regions(t)]
        normal = np.concatenate([m[~t] for m, t in zip(maps, masks, strict=True)])
        points = [(0.0, 0.0)]
        for threshold in sorted(np.unique(np.concatenate([m.ravel() for m in maps])), reverse=True):
            overlaps = [np.mean([m[place] >= threshold for place in region]) for m, region in regions]
            points.append((np.mean(normal >= threshold), np.mean(overlaps)))
        area = 0.0
        for (x0, y0), (x1, y1) in pairwise(points):
            if x0 < limit and x1 > x0:
                end = min(x1, limit)
                area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
        return area / limit

    @pytest.mark.parametrize("levels", [None, 10])
    @pytest.mark.parametrize("seed", range(5))
    def test_pro_agrees_with_a_slow_and_obvious_reference(self, seed, levels):
        maps, masks = self.images(seed, levels)
        assert pixel_figures(maps, masks)["pro"] == pytest.approx(self.slow_pro(maps, masks), abs=1e-6)

    def test_a_perfect_map_has_all_figures_at_one(self):
        _, masks = self.images()
        figures = pixel_figures([m.astype(np.float32) for m in masks], masks)
        assert set(figures.values()) == {1.0}

    def test_a_small_lesion_counts_as_much_as_a_large_one_in_pro(self):
        mask = np.zeros((20, 20), bool)
        mask[2:12, 2:12] = mask[16, 16] = True
        large = np.where(mask, 1.0, 0.0)
        large[16, 16] = 0
        assert pixel_figures([large], [mask])["pro"] == pytest.approx(0.5 + 0.5 * 0.15, abs=1e-6)

    def test_regions_that_touch_at_a_corner_are_one(self):
        assert LesionPixels.of([np.eye(4, dtype=bool)]).regions[0] == len(self.slow_regions(np.eye(4))) == 1

    def test_images_of_different_size_are_pooled(self):
        maps = [np.array([[0.9, 0.1]]), np.array([[0.2], [0.3], [0.8]])]
        masks = [np.array([[True, False]]), np.array([[False], [False], [True]])]
        assert pixel_figures(maps, masks)["auroc"] == 1.0

    def test_quantiles_stand_for_all_values_of_a_large_image(self):
        """Far more different values than thresholds, most of them near 0."""
        rng = np.random.default_rng(0)
        mask = np.zeros((400, 400), bool)
        mask[50:90, 60:100] = mask[200:210, 200:203] = True
        values = rng.random((400, 400)) ** np.where(mask, 3, 8)
        raw = ranking_figures(values.ravel(), mask.ravel())
        found = PixelCounts.of([values], LesionPixels.of([mask])).figures()
        assert {name: found[name] for name in raw} == pytest.approx(raw, abs=1e-3)
        assert found["auroc"] == pytest.approx(raw["auroc"], abs=1e-5)

    def test_draws_agree_with_images_that_are_really_repeated(self):
        maps, masks = self.images(3, levels=50)
        repeats = [2, 0, 3, 1, 1]
        found = PixelCounts.of(maps, LesionPixels.of(masks)).figures_of_draws(np.array([repeats, [1] * 5]))
        again = [i for i, n in enumerate(repeats) for _ in range(n)]
        expected = pixel_figures([maps[i] for i in again], [masks[i] for i in again])
        assert {name: values[0] for name, values in found.items()} == pytest.approx(expected)
        once = pixel_figures(maps, masks)
        assert {name: values[1] for name, values in found.items()} == pytest.approx(once)

    def test_dice_is_told_for_all_pixels_and_for_the_mean_image(self):
        called = [np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 0, 0]], bool), np.zeros((1, 4), bool)]
        masks = [np.array([[1, 0, 0, 0]], bool), np.array([[1, 0, 0, 0]], bool), np.zeros((1, 4), bool)]
        figures = Overlap.of(called, masks).figures()
        assert figures["dice"] == pytest.approx(2 * 2 / (3 + 2))
        assert figures["dice per image"] == pytest.approx((2 / 3 + 1) / 2)

    def test_area_ends_between_two_points_where_the_limit_says(self):
        x, y = np.array([[0.2, 0.6]]), np.array([[0.5, 0.7]])
        assert area_up_to(x, y, 0.3)[0] == pytest.approx(0.2 * 0.25 + 0.1 * 0.525)


class TestBootstrap:
    def test_the_same_seed_gives_the_same_draws(self):
        labels = np.arange(30) < 10
        one, two, other = (resampling_weights(labels, draws=20, seed=s) for s in (1, 1, 2))
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)

    def test_every_draw_has_as_many_images_of_each_class_and_set_as_there_are(self):
        labels, groups = np.arange(30) % 3 == 0, ["a"] * 12 + ["b"] * 18
        weights = resampling_weights(labels, None, groups, draws=50, seed=0)
        for label in (True, False):
            for group in "ab":
                members = (labels == label) & (np.array(groups) == group)
                assert (weights[:, members].sum(axis=1) == members.sum()).all()

    def test_images_of_one_patient_are_taken_together(self):
        labels = np.arange(40) % 2 == 0
        patients = [f"p{i // 4}" for i in range(40)]
        weights = resampling_weights(labels, patients, draws=50, seed=0).reshape(50, 10, 4)
        assert (weights == weights[:, :, :1]).all()
        assert weights.std() > 0

    def test_the_same_name_in_two_sets_is_two_patients(self):
        patients, sets = ["p"] * 24, [f"s{i // 2}" for i in range(24)]
        weights = resampling_weights(np.ones(24, bool), patients, sets, draws=5, seed=0)
        assert weights is None  # one unit in each set: nothing to draw from

    def test_a_single_patient_gives_no_interval(self):
        assert resampling_weights(np.arange(40) < 20, ["p"] * 40, draws=9, seed=0) is None

    def test_intervals_cover_the_truth_about_as_often_as_they_say(self):
        """Scores of two normal distributions, whose true AUROC is known."""
        truth, covered = 0.7602, 0  # Phi(1 / sqrt 2)
        labels = np.arange(100) < 50
        for seed in range(60):
            scores = np.random.default_rng(seed).normal(labels, 1.0)
            weights = resampling_weights(labels, draws=300, seed=seed)
            order = np.argsort(-scores)
            hits = np.cumsum(weights[:, order] * labels[order], axis=1)
            alarms = np.cumsum(weights[:, order] * ~labels[order], axis=1)
            draws = ranking_figures_of_draws(hits, alarms, hits[:, -1], alarms[:, -1])
            low, high = intervals(draws)["auroc"]
            covered += low <= truth <= high
        assert 50 <= covered <= 60


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
    assert np.argmax(pixel_baseline("brightness", pixels)) == 23
    assert np.argmin(pixel_baseline("darkness", pixels)) == 23
    centre = pixel_baseline("centre", pixels)
    assert centre[10, 5] > centre[0, 0]


def test_a_bright_region_rivals_more_than_bright_specks():
    """Noise hides a faint region from single pixels, and not from smoothed ones."""
    rng = np.random.default_rng(0)
    mask = np.zeros((224, 224), bool)
    mask[60:100, 80:130] = True
    noisy = (0.4 + 0.2 * mask + rng.normal(0, 0.2, mask.shape)).astype(np.float32)
    single, smoothed = (
        pixel_figures([values], [mask])["ap"] for values in (noisy, pixel_baseline("brightness", noisy))
    )
    assert single < 0.3 < 0.9 < smoothed


def test_mean_and_spread_over_draws_of_support_images():
    assert mean_and_spread([0.6, 0.8]) == pytest.approx((0.7, 0.2 / 2**0.5))
    assert mean_and_spread([0.6]) == (0.6, 0.0)


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
    assert figures["pixel auroc of brightness"] > 0.95
    assert {"image auroc", "image ap", "pixel auroc", "pixel ap"} <= figures.keys()


def test_an_abnormal_image_without_a_mask_is_no_evidence_at_pixel_level(records):
    masks = [lesion_mask(record, plane) for record, plane in zip(records, planes_of(records), strict=True)]
    assert masks[3] is None
    assert not masks[0].any()
    assert masks[2].sum() == 7 * 12


class TestMeasuring:
    @pytest.fixture
    def measured(self, records, tiny_bundle):
        """Two sets of 24 images, in which abnormal ones have a bright lesion."""
        records = [
            replace(r, set=name, modality="MR") for name in ("one", "two") for r in records for _ in range(6)
        ]
        detector = SliceDetector.load(tiny_bundle.folder, device="cpu")
        return records, detect_records(detector, records)

    def test_sets_are_measured_apart_and_together(self, measured):
        one, two, both = measure_sets(*measured, draws=50)
        assert (one.name, two.name, both.name) == ("one", "two", POOLED)
        assert (both.normal, both.abnormal, both.masks) == (24, 24, 12)
        assert one.rows == two.rows

    def test_one_set_is_not_told_twice(self, measured):
        records, results = measured
        assert [m.name for m in measure_sets(records[:24], results[:24], draws=0)] == ["one"]

    def test_detector_and_baselines_stand_in_one_table_with_intervals(self, measured):
        records, results = measured
        measured_set = measure_set("one", records[:24], results[:24], draws=50)
        assert [row.ranker for row in measured_set.rows if row.level == "pixel"] == [
            DETECTOR,
            "brightness",
            "darkness",
            "centre",
        ]
        for row in measured_set.rows:
            for name, value in row.figures.items():
                low, high = row.intervals[name]
                assert low - 1e-9 <= value <= high + 1e-9
        assert {"auroc", "ap", "pro", "dice"} <= measured_set.row("pixel").figures.keys()

    def test_images_without_a_label_are_left_out(self, measured):
        records, results = measured
        records = [replace(r, abnormal=None) if r.set == "two" else r for r in records]
        assert [m.name for m in measure_sets(records, results, draws=0)] == ["one"]

    def test_detection_can_be_stopped(self, records, tiny_bundle):
        detector, seen = SliceDetector.load(tiny_bundle.folder, device="cpu"), []
        with pytest.raises(Cancelled, match="2 of 4"):
            detect_records(detector, records, lambda *n: seen.append(n), lambda: len(seen) == 2)
