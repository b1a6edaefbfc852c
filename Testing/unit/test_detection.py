"""SliceDetector: planes in, results on the planes' own grids out, through real bundles."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest

from MedAnomalyCLIPLib.bundle import Bundle, default_bundle_path
from MedAnomalyCLIPLib.detection import SliceDetector, detect_slices
from MedAnomalyCLIPLib.errors import BundleInvalid, Cancelled, InvalidRequest
from MedAnomalyCLIPLib.geometry import SlicePlane, cut_plane, cut_slice, cut_slices
from MedAnomalyCLIPLib.volume import Volume


@pytest.fixture
def detector(tiny_bundle):
    return SliceDetector.load(tiny_bundle.folder, device="cpu")


@pytest.fixture
def volume():
    voxels = np.random.default_rng(0).normal(100, 30, (6, 40, 30)).astype(np.int16)
    return Volume(voxels, np.diag([-1.0, -1.5, 4.0, 1.0]), modality="MR")


def test_map_lies_on_the_planes_own_pixels(detector, volume):
    result = detector.detect(cut_slice(volume, 2, 3))
    assert result.map.shape == result.mask.shape == (40, 30)
    assert result.map.dtype == np.float32
    assert 0 <= result.map.min() <= result.map.max() <= result.score <= 1


def test_score_is_the_highest_of_the_network_map(detector, volume):
    result = detector.detect(cut_slice(volume, 2, 3))
    assert result.score == pytest.approx(float(result.map.max()), abs=0.02)


def test_nothing_is_found_where_there_is_no_image(detector, volume):
    tilted = np.eye(4)  # cuts the corners off the volume, so that the slice is a hexagon
    tilted[:3, 0], tilted[:3, 1] = np.array([1, -1, 0]) / 2**0.5, np.array([1, 1, -2]) / 6**0.5
    tilted[:3, 2] = np.cross(tilted[:3, 0], tilted[:3, 1])
    tilted[:3, 3] = volume.ijk_to_ras[:3] @ [15, 20, 3, 1]
    result = detector.detect(cut_plane(volume, tilted))
    assert not result.plane.valid.all()
    assert result.map[~result.plane.valid].max() == 0
    assert not result.mask[~result.plane.valid].any()


def test_threshold_moves_the_mask_and_not_the_map(detector, volume):
    plane = cut_slice(volume, 2, 3)
    low, high = detector.detect(plane, threshold=0.0), detector.detect(plane, threshold=1.0)
    assert low.mask.all()
    assert not high.mask.any()
    assert np.array_equal(low.map, high.map)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_0_and_1_is_refused(detector, volume, threshold):
    with pytest.raises(InvalidRequest, match="threshold"):
        detector.detect(cut_slice(volume, 2, 0), threshold=threshold)


def test_batches_and_single_planes_agree(detector, volume):
    planes = [cut_slice(volume, 2, k) for k in range(5)]
    together = list(detector.detect_many(planes, batch_size=3))
    for plane, result in zip(planes, together, strict=True):
        assert result.plane is plane
        np.testing.assert_allclose(result.map, detector.detect(plane).map, atol=1e-5)


def test_while_one_batch_is_detected_no_more_than_the_next_is_cut(detector, volume):
    taken = []

    def planes():
        for k in range(6):
            taken.append(k)
            yield cut_slice(volume, 2, k)

    results = detector.detect_many(planes(), batch_size=2)
    next(results)
    assert taken == [0, 1, 2, 3]
    next(results)
    assert taken == [0, 1, 2, 3]


def test_slices_are_prepared_while_the_network_runs(detector, volume, monkeypatch):
    """Each waits for the other: the second batch's preparation ends before the first batch's network does."""
    prepared = threading.Event()
    prepare, run = detector._preprocessor.prepare, type(detector.network).__call__

    def notice(plane, window):
        if plane.aligned.index == 1:
            prepared.set()
        return prepare(plane, window)

    def slow(*inputs):
        assert prepared.wait(20), "nothing was prepared meanwhile"
        return run(*inputs)

    monkeypatch.setattr(detector._preprocessor, "prepare", notice)
    monkeypatch.setattr(type(detector.network), "__call__", slow)
    planes = [cut_slice(volume, 2, k) for k in range(2)]
    assert len(list(detector.detect_many(planes, batch_size=1))) == 2


def test_a_slice_that_cannot_be_prepared_is_told_in_its_turn(detector, volume):
    planes = [cut_slice(volume, 2, k) for k in range(2)]
    with pytest.raises(InvalidRequest, match="window"):
        list(detector.detect_many(planes, window=(2.0, 1.0)))


def test_memory_does_not_grow_with_the_number_of_slices(detector):
    """At most as much is held for 60 large slices as for 20; one of them has 2 MB."""

    def planes(count):
        for k in range(count):
            yield SlicePlane(np.full((512, 512), float(k)), np.eye(4), np.ones((512, 512), bool))

    def held(count):
        tracemalloc.start()
        for _ in detector.detect_many(planes(count), batch_size=2):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    held(4)
    assert held(60) < held(20) + 2e6


def test_result_tells_where_it_comes_from(detector, tiny_bundle, volume):
    result = detector.detect(cut_slice(volume, 2, 3))
    assert result.provenance.bundle_sha256 == tiny_bundle.manifest.weights_sha256
    assert result.provenance.device == "cpu"
    assert result.percentile == tiny_bundle.manifest.reference.percentile(result.score)
    assert {"preprocess", "network", "map_back"} <= result.timings.keys()


def test_the_bundles_thresholds_come_with_the_result(make_bundle, volume):
    detector = SliceDetector.load(make_bundle(threshold=0.3, image_threshold=0.8).folder, device="cpu")
    result = detector.detect(cut_slice(volume, 2, 3))
    assert (result.threshold, result.image_threshold) == (0.3, 0.8)


def test_slices_come_in_order_with_progress(detector, volume):
    seen = []
    results = list(
        detect_slices(
            detector, volume, indices=[4, 1], on_progress=lambda done, total: seen.append((done, total))
        )
    )
    assert [r.plane.aligned.index for r in results] == [4, 1]
    assert seen == [(1, 2), (2, 2)]


def test_all_slices_along_the_acquisition_axis_by_default(detector, volume):
    assert [r.plane.aligned.index for r in detect_slices(detector, volume)] == list(range(6))


def test_a_missing_slice_is_refused_before_the_first_is_detected(detector, volume):
    with pytest.raises(InvalidRequest, match="0 to 5"):
        next(detect_slices(detector, volume, indices=[0, 6]))


def test_cancelling_keeps_what_was_done(detector, volume):
    results = []
    with pytest.raises(Cancelled, match="2 of 6"):
        results.extend(
            result
            for result in detect_slices(detector, volume, is_cancelled=lambda: len(results) == 2)
            if results.append(result)
        )
    assert len(results) == 2


def test_a_device_that_does_not_exist_is_refused(tiny_bundle):
    with pytest.raises(InvalidRequest, match="nowhere"):
        SliceDetector.load(tiny_bundle.folder, device="nowhere")


def test_a_folder_without_a_detector_is_refused(tmp_path):
    with pytest.raises(BundleInvalid, match=r"bundle\.json"):
        SliceDetector.load(tmp_path)


class TestBundledDetector:
    """The detector that ships, on images that pydicom ships."""

    def test_is_whole_and_says_what_it_is(self):
        bundle = Bundle.load(default_bundle_path())
        assert bundle.manifest.weights_bytes < 25 * 10**6
        assert "Research use only" in bundle.card
        assert bundle.manifest.training_data
        assert bundle.manifest.quality

    def test_prefers_a_painted_lesion_to_the_same_slice_without(self):
        """A bright disc in a made-up brain raises the score, and the map peaks on it."""
        rows, columns = np.mgrid[-1:1:200j, -1:1:200j]
        rng = np.random.default_rng(0)
        head = np.where(columns**2 / 0.55 + rows**2 / 0.8 < 1, 400.0, 0) + rng.normal(0, 8, (200, 200))
        lesion = head + 350 * ((columns - 0.3) ** 2 + (rows + 0.2) ** 2 < 0.15**2)
        detector = SliceDetector.load(device="cpu")
        plain, with_lesion = (
            detector.detect(cut_slice(Volume(image[None], np.diag([-1.0, -1, 1, 1]), modality="MR"), 2, 0))
            for image in (head, lesion)
        )
        assert with_lesion.score > plain.score
        row, column = with_lesion.peak
        assert (columns[0, column] - 0.3) ** 2 + (rows[row, 0] + 0.2) ** 2 < 0.25**2


def test_slices_with_nothing_but_noise_are_not_analysed(detector):
    """The window of an empty slice stretches its noise, which looked like something to any detector."""
    rng = np.random.default_rng(0)
    voxels = rng.normal(40, 10, (5, 48, 48)).astype(np.float32)
    voxels[1:3, 12:36, 12:36] += 900
    volume = Volume(voxels, np.eye(4), modality="MR")
    results = list(detect_slices(detector, volume, axis=2))
    assert [r.is_empty for r in results] == [True, False, False, True, True]
    voxels = np.abs(rng.normal(0, 22, (4, 160, 144)))  # of which some pixels reach a tenth of the range
    voxels[1:3, 30:120, 30:120] += 700
    volume = Volume(voxels, np.eye(4), modality="MR")
    assert [p.is_empty for p in cut_slices(volume, 2, range(4))] == [True, False, False, True]
    assert (
        [r.score > 0 for r in results] == [r.map.any() for r in results] == [False, True, True, False, False]
    )


def test_an_image_all_of_one_value_shows_nothing(detector):
    plane = cut_slice(Volume(np.full((1, 32, 32), 7.0, np.float32), np.eye(4)), 2, 0)
    assert detector.detect(plane).score == 0
