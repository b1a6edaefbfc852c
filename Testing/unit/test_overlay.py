"""What the pictures show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from MedAnomalyCLIPLib.geometry import SlicePlane
from MedAnomalyCLIPLib.heat import heat_colours
from MedAnomalyCLIPLib.overlay import area_in_words, display_window, picture_size, render_overlay
from MedAnomalyCLIPLib.result import AnomalyResult, Provenance
from MedAnomalyCLIPLib.terminology import TERMS

PROVENANCE = Provenance("a detector", "1.2.3", "ab" * 32, "0.1.0", "cpu", "float32")


def a_result(pixels, anomaly=None, spacing=(1.0, 1.0), threshold=0.5, valid=None, **fields) -> AnomalyResult:
    shape = pixels.shape[:2]
    matrix = np.diag([-spacing[1], -spacing[0], 1.0, 1.0])
    plane = SlicePlane(
        pixels, matrix, np.ones(shape, bool) if valid is None else valid, description="Axial 1 of 1"
    )
    anomaly = np.zeros(shape, np.float32) if anomaly is None else anomaly
    return AnomalyResult(plane, 0.5, anomaly, threshold, PROVENANCE, **fields)


def slice_part(result: AnomalyResult) -> np.ndarray:
    """(height, width, 3) of the picture without its frame: pixel (0, 0) is the slice's top left corner."""
    picture = np.asarray(render_overlay(result)).astype(int)
    width, height = picture_size(result)
    background = picture[0, 0]
    rows = np.flatnonzero((picture[:, : width // 2] != background).any(axis=(1, 2)))
    # The slice is the longest run of rows that differ from the background.
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    top = max(runs, key=len)[0]
    left = np.flatnonzero((picture[top + height // 2] != background).any(axis=1))[0]
    return picture[top : top + height, left : left + width]


def is_coloured(picture: np.ndarray) -> np.ndarray:
    return np.ptp(picture, axis=-1) > 8


def test_row_zero_is_at_the_top():
    pixels = np.repeat(np.arange(64.0)[:, None], 64, axis=1)
    picture = slice_part(a_result(255 - pixels))
    assert picture[5].mean() > picture[-5].mean() + 200


def test_column_zero_is_at_the_left():
    pixels = np.repeat(np.arange(64.0)[None], 64, axis=0)
    picture = slice_part(a_result(255 - pixels))
    assert picture[:, 5].mean() > picture[:, -5].mean() + 200


def test_colour_covers_the_mask_and_nothing_else():
    anomaly = np.full((64, 64), 0.4, np.float32)
    anomaly[10:20, 30:50] = 0.9
    picture = slice_part(a_result(np.full((64, 64), 100.0), anomaly, window=(0.0, 200.0)))
    expected = np.kron(anomaly > 0.5, np.ones((8, 8), bool))
    np.testing.assert_array_equal(is_coloured(picture), expected)


def test_single_pixel_of_a_mask_survives_shrinking():
    anomaly = np.zeros((3000, 3000), np.float32)
    anomaly[1234, 2345] = 1
    picture = slice_part(a_result(np.full((3000, 3000), 100.0), anomaly, window=(0.0, 200.0)))
    assert is_coloured(picture).any()


def test_mask_is_outlined_in_the_colour_of_the_segment():
    anomaly = np.zeros((64, 64), np.float32)
    anomaly[10:20, 30:50] = 0.9
    picture = slice_part(a_result(np.full((64, 64), 100.0), anomaly))
    assert tuple(picture[10 * 8, 40 * 8]) == TERMS.colour
    assert tuple(picture[15 * 8, 40 * 8]) != TERMS.colour


@pytest.mark.parametrize(
    ("shape", "spacing", "size"),
    [
        ((64, 64), (1.0, 1.0), (512, 512)),
        ((40, 80), (5.0, 0.5), (102, 512)),
        ((1, 1), (0.3, 0.3), (512, 512)),
        ((600, 300), (0.2, 0.2), (300, 600)),
        ((4000, 3000), (0.1, 0.1), (1536, 2048)),
    ],
)
def test_pixels_become_square_and_the_picture_neither_tiny_nor_huge(shape, spacing, size):
    assert picture_size(a_result(np.zeros(shape), spacing=spacing)) == size


def test_detectors_window_is_shown():
    pixels = np.linspace(-1000, 1000, 64 * 64).reshape(64, 64)
    picture = slice_part(a_result(pixels, window=(-100.0, 100.0)))
    assert set(np.unique(picture[:200])) == {0}
    assert set(np.unique(picture[-200:])) == {255}


def test_without_a_window_outliers_do_not_darken_the_slice():
    pixels = np.random.default_rng(0).uniform(0, 100, (100, 100))
    pixels[0, 0] = 1e6
    assert display_window(a_result(pixels))[1] == pytest.approx(100, abs=1)


def test_pixels_without_an_image_are_black():
    pixels = np.full((64, 64), 50.0)
    pixels[:32] = np.nan
    picture = slice_part(a_result(pixels, valid=np.isfinite(pixels), window=(0.0, 100.0)))
    assert picture[:200].max() < 20
    assert picture[-200:].min() > 120


def test_colour_images_keep_their_colour():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 1] = 200
    assert tuple(slice_part(a_result(pixels))[100, 100]) == (0, 200, 0)


def test_constant_slice_has_a_picture():
    assert render_overlay(a_result(np.full((8, 8), 7))).size[0] > 512


def test_empty_slice_has_a_picture():
    result = a_result(np.full((8, 8), np.nan), valid=np.zeros((8, 8), bool))
    assert render_overlay(result).size[0] > 512


def test_patient_sized_pictures_have_legible_text():
    small, large = (render_overlay(a_result(np.zeros((n, n)))) for n in (64, 2048))
    assert large.height - 2048 > 3 * (small.height - 512)


def test_area_has_a_unit():
    assert area_in_words(123.4, 7) == "123 mm²"
    assert area_in_words(1.234, 7) == "1.2 mm²"
    assert area_in_words(0.0, 0) == "0 mm²"
    assert area_in_words(None, 7) == "7 px"


def test_unknown_pixel_size_gives_no_area_in_mm():
    known = a_result(np.zeros((64, 64)), np.ones((64, 64), np.float32))
    unknown = replace(known, plane=replace(known.plane, spacing_known=False))
    assert not np.array_equal(np.asarray(render_overlay(known)), np.asarray(render_overlay(unknown)))


def test_lightness_of_the_heat_colours_rises_all_the_way():
    srgb = heat_colours(64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(np.cbrt(luminance)) > 0).all()


def test_heat_colours_are_as_many_as_asked_for():
    assert heat_colours(7).shape == (7, 3)
    assert heat_colours(256)[[0, -1]].tolist() == [[0, 0, 4], [252, 255, 164]]
