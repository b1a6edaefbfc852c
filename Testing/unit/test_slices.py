"""Many slices: small parts of masks, maps as nodes keep them, rows and candidates, the stream of results."""

from __future__ import annotations

import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from MedAnomalyCLIPLib.components import drop_small
from MedAnomalyCLIPLib.errors import DependencyMissing, GeometryRefused, UnsupportedImage
from MedAnomalyCLIPLib.geometry import SlicePlane, cut_slice
from MedAnomalyCLIPLib.result import AnomalyResult, Provenance
from MedAnomalyCLIPLib.runtime import MOST_AT_ONCE
from MedAnomalyCLIPLib.slice_stream import SliceStream
from MedAnomalyCLIPLib.slice_table import SliceRow, candidates, to_pandas
from MedAnomalyCLIPLib.stored_map import NOT_ANALYSED, from_stored, to_stored
from MedAnomalyCLIPLib.volume import Volume

PROVENANCE = Provenance("made up", "1", "0" * 64, "0", "cpu", "float32")
VOLUME = Volume(
    np.random.default_rng(0).integers(0, 1000, (5, 8, 6)).astype(np.int16), np.diag([2.0, 3.0, 5.0, 1.0])
)


def result_of(values, *, threshold=0.5, min_area_mm2=0.0, index=2, score=None, valid=None, **changes):
    plane = cut_slice(VOLUME, 2, index)
    values = np.asarray(values, np.float32)
    if values.shape != plane.shape:
        plane = SlicePlane(np.zeros(values.shape), np.diag([2.0, 3.0, 5.0, 1.0]), np.ones(values.shape, bool))
    if valid is not None:
        plane = replace(plane, valid=valid)
    score = float(values.max()) if score is None else score
    return AnomalyResult(plane, score, values, threshold, PROVENANCE, min_area_mm2=min_area_mm2, **changes)


# Small parts


def parts_by_flooding(mask) -> list[set[tuple[int, int]]]:
    """Slow and obvious: neighbours of neighbours, corners too."""
    left, parts = set(map(tuple, np.argwhere(mask))), []
    while left:
        part, edge = set(), {left.pop()}
        while edge:
            part |= edge
            around = {(r + i, c + j) for r, c in edge for i in (-1, 0, 1) for j in (-1, 0, 1)}
            edge = around & left
            left -= edge
        parts.append(part)
    return parts


@settings(deadline=None)  # scipy is imported by the first example
@given(arrays(bool, (7, 9)), st.floats(0, 12))
def test_exactly_the_parts_with_too_few_pixels_are_dropped(mask, pixels):
    kept = {at for part in parts_by_flooding(mask) if len(part) >= pixels for at in part}
    assert set(map(tuple, np.argwhere(drop_small(mask, pixels)))) == kept


def test_the_smallest_area_is_in_square_millimetres_of_the_plane():
    values = np.zeros((9, 9))
    values[1, 1] = values[5:7, 5:7] = 0.9  # 6 mm² and 24 mm²
    assert result_of(values).area_mm2 == pytest.approx(30)
    larger = result_of(values, min_area_mm2=7)
    assert larger.area_mm2 == pytest.approx(24)
    assert np.argwhere(larger.dropped).tolist() == [[1, 1]]
    assert result_of(values, min_area_mm2=25).area_mm2 == 0


# As nodes keep them

maps = arrays(np.float32, (6, 7), elements=st.floats(0, 1, width=32))


@settings(deadline=None)
@given(maps, arrays(bool, (6, 7)), st.floats(0.01, 1), st.floats(0, 60))
def test_a_stored_map_gives_back_every_value_and_hides_what_does_not_count(values, valid, threshold, area):
    values[~valid] = 0
    result = result_of(values, threshold=threshold, min_area_mm2=area, valid=valid)
    stored = to_stored(result)
    back, known = from_stored(stored)
    np.testing.assert_array_equal(back, values)
    np.testing.assert_array_equal(known, valid)
    np.testing.assert_array_equal(stored >= threshold, result.mask)


def test_what_was_not_analysed_is_below_every_threshold():
    assert NOT_ANALYSED < 0
    assert not from_stored(np.full((2, 2), NOT_ANALYSED))[1].any()


# Rows


def row(index, score):
    return SliceRow(index, score, None, 0.0, score, None)


@pytest.mark.parametrize(
    "scores, threshold, expected",
    [
        ((0.1, 0.9, 0.8, 0.2), 0.8, [1, 2]),
        ((0.1, 0.3, 0.2, 0.6, 0.5), None, [1, 3]),
        ((0.1, 0.3, 0.2, 0.6, 0.5), 0.9, [1, 3]),
        ((0.5, 0.5, 0.4), None, [0]),
        ((0.1, 0.4, 0.4, 0.6), None, [3]),
        ((0.3,), None, [0]),
        ((), 0.5, []),
    ],
)
def test_candidates_reach_the_image_threshold_or_are_local_maxima(scores, threshold, expected):
    rows = [row(index, score) for index, score in enumerate(scores)]
    assert candidates(rows[::-1], threshold) == expected


def test_a_row_tells_what_the_result_says():
    values = np.zeros((8, 6))
    values[3, 4] = 0.75
    result = result_of(values, percentile=91.0, window=(1.0, 2.0))
    made = SliceRow.of(result)
    assert (made.index, made.score, made.percentile, made.area_mm2, made.peak) == (2, 0.75, 91.0, 6.0, 0.75)
    np.testing.assert_allclose(made.peak_ras, result.plane.to_ras(4, 3))
    assert SliceRow.from_record(made.as_record()) == made


def test_a_resampled_plane_is_no_row():
    with pytest.raises(GeometryRefused, match="no slice"):
        SliceRow.of(result_of(np.zeros((9, 9))))


def test_a_data_frame_has_a_row_for_each_slice():
    values = np.full((8, 6), 0.25)
    frame = to_pandas([result_of(values, index=3, percentile=50.0), result_of(np.zeros((8, 6)), index=4)])
    assert frame[["axis", "index", "number"]].values.tolist() == [["K", 3, 4], ["K", 4, 5]]
    assert frame["percentile"].tolist()[0] == 50.0
    assert np.isnan(frame["peak_r_mm"][1])
    assert frame.dtypes["peak_r_mm"].kind == "f"
    assert frame["unlike"].tolist() == [None, None]
    assert frame["empty"].tolist() == [False, False]
    known = replace(result_of(values, index=3), unlikeness=0.9, unlike_threshold=0.8)
    assert to_pandas([known])["unlike"].tolist() == [True]
    assert to_pandas([row(1, 0.5)], axis=0)["axis"].tolist() == ["I"]
    assert list(to_pandas([]).columns) == list(frame.columns)


def test_without_pandas_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DependencyMissing, match="pip_install"):
        to_pandas([])


# The stream


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def detect(plane):
    index = plane.aligned.index
    if index == 3:
        raise UnsupportedImage("no")
    return AnomalyResult(plane, index / 10, np.zeros(plane.shape, np.float32), 0.5, PROVENANCE)


def test_results_come_in_order_and_a_slice_that_fails_does_not_end_it(pool):
    stream = SliceStream(
        [4, 3, 0], lambda k: cut_slice(VOLUME, 2, k), lambda plane: pool.submit(detect, plane)
    )
    outcomes = []
    while not stream.ended:
        outcomes.append(stream.take())
    assert [outcome.index for outcome in outcomes] == [4, 3, 0]
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert outcomes[2].result.plane.aligned.index == 0
    assert (stream.taken, stream.total) == (3, 3)


def test_planes_are_cut_on_the_callers_thread_and_few_ahead(pool):
    cut, gate = [], threading.Event()

    def cut_one(index):
        cut.append((index, threading.current_thread()))
        return cut_slice(VOLUME, 2, index)

    def wait_and_detect(plane):
        gate.wait(10)
        return detect(plane)

    stream = SliceStream(range(3), cut_one, lambda plane: pool.submit(wait_and_detect, plane))
    assert [index for index, _ in cut] == [0, 1]
    assert not stream.ready
    gate.set()
    stream.take()
    assert cut == [(index, threading.main_thread()) for index in range(3)]


def test_no_more_wait_at_the_worker_than_two_batches_and_each_step_cuts_two(pool):
    counts, ahead, results = [], [], []

    def submit(plane):
        future = pool.submit(detect, plane)
        future.result()
        results.append(weakref.ref(future.result()))
        return future

    stream = SliceStream([4] * 60, lambda k: counts.append(k) or cut_slice(VOLUME, 2, k), submit)
    while not stream.ended:
        before = len(counts)
        stream.take()
        assert len(counts) - before <= 2
        ahead.append(len(counts) - stream.taken)
    assert max(ahead) == 2 * MOST_AT_ONCE
    assert not [one for one in results if one() is not None]  # nothing that was taken is held


def test_nothing_is_cut_or_taken_after_a_cancel(pool):
    cut = []
    stream = SliceStream(
        range(5), lambda k: cut.append(k) or cut_slice(VOLUME, 2, k), lambda plane: pool.submit(detect, plane)
    )
    stream.take()
    stream.cancel()
    assert stream.ended
    assert cut == [0, 1, 2, 3]


def test_a_bug_is_raised_and_ends_the_stream(pool):
    def crash(plane):
        raise ZeroDivisionError

    stream = SliceStream(range(5), lambda k: cut_slice(VOLUME, 2, k), lambda plane: pool.submit(crash, plane))
    with pytest.raises(ZeroDivisionError):
        stream.take()
    assert stream.ended
