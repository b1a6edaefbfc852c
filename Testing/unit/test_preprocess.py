"""A slice becomes the network's input by the bundle's numbers, and a map comes back to where it belongs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest
from MedAnomalyCLIPLib.geometry import SlicePlane
from MedAnomalyCLIPLib.preprocess import PreprocessSpec, SlicePreprocessor, SquareFit, WindowRule

bounded = settings(max_examples=60, deadline=None, derandomize=True)

SPEC = PreprocessSpec(
    size=32,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    windows={
        "CT": WindowRule("range", -160, 240),
        "MR": WindowRule("percentile", 1, 99),
        "default": WindowRule("full"),
    },
)
PLAIN = SlicePreprocessor(SPEC)


def plane_of(pixels, spacing: tuple[float, float] = (1.0, 1.0), valid=None, **about) -> SlicePlane:
    """A plane with a distance in mm between its rows, and between its columns."""
    pixels = np.asarray(pixels)
    valid = np.ones(pixels.shape[:2], bool) if valid is None else np.asarray(valid)
    return SlicePlane(pixels, np.diag([spacing[1], spacing[0], 1.0, 1.0]), valid, **about)


def grey(prepared) -> np.ndarray:
    """(S, S) of the first channel."""
    return prepared.tensor[0].numpy()


def square(pixels) -> np.ndarray:
    """Pixels repeated to SPEC.size, so that preparing them changes nothing but their values."""
    pixels = np.asarray(pixels)
    return np.kron(
        pixels, np.ones((SPEC.size // pixels.shape[0], SPEC.size // pixels.shape[1]), pixels.dtype)
    )


def blob(shape: tuple[int, int], row: float, column: float, sigma: tuple[float, float]) -> np.ndarray:
    rows, columns = np.indices(shape)
    return np.exp(-(((rows - row) / sigma[0]) ** 2 + ((columns - column) / sigma[1]) ** 2) / 2).astype(
        np.float32
    )


def centroid(image: np.ndarray) -> tuple[float, float]:
    rows, columns = np.indices(image.shape)
    return float(np.average(rows, weights=image)), float(np.average(columns, weights=image))


shapes = st.tuples(st.integers(20, 90), st.integers(20, 90))
spacings = st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0))
inner = st.tuples(st.floats(0.4, 0.6), st.floats(0.4, 0.6))


class TestFit:
    @bounded
    @given(st.tuples(st.integers(1, 600), st.integers(1, 600)), spacings, st.integers(16, 336))
    def test_the_longer_side_in_mm_fills_the_square_and_the_rest_is_centred(self, shape, spacing, size):
        fit = SquareFit.of(shape, spacing, size)
        longer = int(shape[1] * spacing[1] > shape[0] * spacing[0])
        assert fit.fitted_shape[longer] == size
        margins = np.array([fit.top, fit.left])
        assert np.all(margins >= 0)
        assert np.all(np.abs(size - np.array(fit.fitted_shape) - 2 * margins) <= 1)

    @bounded
    @given(st.tuples(st.integers(1, 600), st.integers(1, 600)), spacings)
    def test_a_millimetre_is_as_long_down_as_across(self, shape, spacing):
        fit = SquareFit.of(shape, spacing, 224)
        height, width = shape[0] * spacing[0], shape[1] * spacing[1]
        exact = 224 / max(height, width)
        for fitted, length in zip(fit.fitted_shape, (height, width), strict=True):
            assert abs(fitted - exact * length) <= 0.5 or fitted == 1

    @pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1)])
    def test_a_line_of_pixels_keeps_at_least_one_network_pixel(self, shape):
        prepared = PLAIN.prepare(plane_of(np.full(shape, 255, np.uint8)))
        assert prepared.tensor.shape == (3, 32, 32)
        assert prepared.tensor.sum() > 0
        assert PLAIN.map_back(grey(prepared), prepared.fit).shape == shape

    @bounded
    @given(shapes, spacings, st.floats(-5, 100), st.floats(-5, 100))
    def test_a_position_survives_the_way_to_the_network_and_back(self, shape, spacing, row, column):
        fit = SquareFit.of(shape, spacing, 224)
        assert fit.to_plane(*fit.to_network(row, column)) == pytest.approx((row, column), abs=1e-9)


class TestWindows:
    def test_hounsfield_units_use_the_range_of_the_modality(self):
        pixels = square(np.array([[-1000, -160], [40, 3000]], np.int16))
        prepared = PLAIN.prepare(plane_of(pixels, modality="CT", units="HU"))
        assert prepared.window == (-160, 240)
        np.testing.assert_allclose(grey(prepared), square(np.array([[0, 0], [0.5, 1]])), atol=1e-6)

    def test_ct_that_is_not_in_hounsfield_units_uses_the_default(self):
        pixels = square(np.array([[10, 20], [30, 50]], np.int16))
        prepared = PLAIN.prepare(plane_of(pixels, modality="CT"))
        assert prepared.window == (10, 50)

    def test_a_modality_without_a_rule_uses_the_default(self):
        assert PLAIN.prepare(plane_of(square(np.array([[3, 8]] * 2)), modality="PT")).window == (3, 8)

    def test_percentiles_are_those_of_monai(self):
        from monai.transforms import ScaleIntensityRangePercentiles

        pixels = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
        expected = ScaleIntensityRangePercentiles(1, 99, 0, 1, clip=True)(pixels[None])[0]
        prepared = PLAIN.prepare(plane_of(pixels, modality="MR"))
        np.testing.assert_allclose(grey(prepared), expected, atol=1e-6)

    def test_percentiles_leave_invalid_pixels_out(self):
        pixels = np.zeros((32, 32), np.float32)
        pixels[:, :16] = np.arange(16)
        valid = np.zeros((32, 32), bool)
        valid[:, :16] = True
        low, high = PLAIN.prepare(plane_of(pixels, valid=valid, modality="MR")).window
        assert (low, high) == pytest.approx(np.percentile(pixels[:, :16], (1, 99)))

    def test_bytes_keep_their_full_scale(self):
        prepared = PLAIN.prepare(plane_of(square(np.array([[51, 102]] * 2, np.uint8))))
        assert prepared.window == (0, 255)
        np.testing.assert_allclose(grey(prepared), square(np.array([[0.2, 0.4]] * 2)), atol=1e-6)

    def test_the_users_window_overrides_every_rule(self):
        pixels = square(np.array([[0, 100]] * 2, np.int16))
        prepared = PLAIN.prepare(plane_of(pixels, modality="CT", units="HU"), window=(-100, 300))
        assert prepared.window == (-100, 300)
        np.testing.assert_allclose(grey(prepared), square(np.array([[0.25, 0.5]] * 2)), atol=1e-6)

    @pytest.mark.parametrize("window", [(5, 1), (0, np.nan), (-np.inf, 0)])
    def test_a_window_that_is_no_interval_is_refused(self, window):
        with pytest.raises(InvalidRequest, match="window"):
            PLAIN.prepare(plane_of(np.zeros((4, 4))), window=window)

    @pytest.mark.parametrize("modality", ["", "MR"])
    @pytest.mark.parametrize("value", [0, -5, 1e300])
    def test_a_constant_image_is_black_and_never_nan(self, value, modality):
        prepared = PLAIN.prepare(plane_of(np.full((9, 9), value, np.float64), modality=modality))
        assert torch.count_nonzero(prepared.tensor) == 0

    @pytest.mark.parametrize("window", [(40, 40), (0, 1e-310)])
    def test_a_window_without_width_is_black(self, window):
        plane = plane_of(np.arange(81, dtype=np.uint8).reshape(9, 9))
        assert torch.count_nonzero(PLAIN.prepare(plane, window).tensor) == 0

    def test_a_modality_is_known_in_small_letters_too(self):
        pixels = np.arange(1024).reshape(32, 32)
        assert PLAIN.prepare(plane_of(pixels, modality="mr")).window == pytest.approx((10.23, 1012.77))

    def test_invalid_pixels_are_as_dark_as_the_window_goes(self):
        pixels, valid = np.full((32, 32), 300, np.int16), np.ones((32, 32), bool)
        pixels[:8], valid[:8] = 3000, False
        prepared = PLAIN.prepare(plane_of(pixels, valid=valid), window=(200, 400))
        assert np.all(grey(prepared)[:8] == 0)
        assert np.all(grey(prepared)[8:] == 0.5)

    def test_values_that_are_no_numbers_do_not_spread(self):
        pixels = np.full((64, 64), 300.0, np.float32)
        pixels[0, 0], pixels[9, 9] = np.nan, np.inf
        prepared = PLAIN.prepare(plane_of(pixels), window=(200, 400))
        assert np.all(grey(prepared)[8:] == 0.5)
        assert torch.isfinite(prepared.tensor).all()

    @pytest.mark.parametrize("modality", ["", "MR"])
    def test_a_plane_without_a_valid_pixel_is_black(self, modality):
        plane = plane_of(np.full((9, 9), np.nan), valid=np.zeros((9, 9), bool), modality=modality)
        assert torch.count_nonzero(PLAIN.prepare(plane).tensor) == 0

    @pytest.mark.parametrize(
        ("dtype", "low", "high"),
        [
            (np.int16, -32768, 32767),
            (np.uint16, 0, 65535),
            (np.int32, -(2**31), 2**31 - 1),
            (np.int32, 10**9, 10**9 + 1),
            (np.uint64, 0, 2**64 - 1),
            (np.float32, -3.4e38, 3.4e38),
            (np.float64, -1.7e308, 1.7e308),
            (np.float64, 1e9, 1e9 + 1),
            (">i2", -32768, 32767),
            (np.float16, -60000, 60000),
            (np.bool_, 0, 1),
        ],
    )
    @pytest.mark.parametrize("modality", ["", "MR"])
    def test_extreme_values_become_black_and_white(self, dtype, low, high, modality):
        pixels = square(np.array([[low, high]] * 2, dtype))
        prepared = PLAIN.prepare(plane_of(pixels, modality=modality))
        np.testing.assert_allclose(grey(prepared), square(np.array([[0.0, 1.0]] * 2)), atol=1e-6)


class TestColour:
    def test_colours_are_neither_stretched_nor_mixed(self):
        pixels = np.zeros((32, 32, 3), np.uint8) + np.array([51, 102, 204], np.uint8)
        prepared = PLAIN.prepare(plane_of(pixels, modality="MR"))
        np.testing.assert_allclose(prepared.tensor[:, 5, 5], [0.2, 0.4, 0.8], atol=1e-6)

    def test_deep_colours_share_one_window(self):
        pixels = np.zeros((32, 32, 3), np.uint16)
        pixels[..., 1], pixels[..., 2] = 500, 1000
        prepared = PLAIN.prepare(plane_of(pixels))
        np.testing.assert_allclose(prepared.tensor[:, 5, 5], [0, 0.5, 1], atol=1e-6)

    def test_a_detector_of_grey_images_sees_the_mean_of_the_colours(self):
        pixels = np.zeros((32, 32, 3), np.uint8) + np.array([51, 102, 153], np.uint8)
        prepared = SlicePreprocessor(replace(SPEC, colour="grey")).prepare(plane_of(pixels))
        np.testing.assert_allclose(prepared.tensor, 0.4, atol=1e-6)

    def test_a_grey_image_has_three_equal_channels(self):
        prepared = PLAIN.prepare(plane_of(np.arange(64, dtype=np.uint8).reshape(8, 8)))
        assert torch.equal(prepared.tensor[0], prepared.tensor[1])
        assert torch.equal(prepared.tensor[0], prepared.tensor[2])


class TestResizing:
    def test_a_constant_image_stays_constant_up_to_its_border(self):
        """MONAI's own antialiased resize does not: it filters across a border of zeros."""
        prepared = PLAIN.prepare(plane_of(np.full((100, 70), 51, np.uint8)))
        rows, columns = prepared.fit.fitted_shape
        image = grey(prepared)[:rows, prepared.fit.left : prepared.fit.left + columns]
        np.testing.assert_allclose(image, 0.2, atol=1e-6)

    def test_the_padding_is_black_before_normalisation(self):
        prepared = PLAIN.prepare(plane_of(np.full((10, 5), 255, np.uint8)))
        assert prepared.tensor.sum() == 3 * 32 * 16
        assert grey(prepared)[:, 8:24].min() == 1

    def test_enlarging_is_that_of_monai(self):
        from monai.transforms import Resize

        pixels = np.random.default_rng(0).random((20, 20), np.float32)
        expected = Resize((32, 32), mode="bilinear", align_corners=False)(pixels[None])[0]
        np.testing.assert_allclose(grey(PLAIN.prepare(plane_of(pixels), window=(0, 1))), expected, atol=1e-6)

    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    def test_shrinking_is_that_of_pillow(self, interpolation):
        from PIL import Image

        pixels = np.random.default_rng(0).random((150, 150), np.float32)
        method = Image.Resampling[interpolation.upper()]
        expected = np.asarray(Image.fromarray(pixels).resize((32, 32), method))
        prepared = SlicePreprocessor(replace(SPEC, interpolation=interpolation)).prepare(
            plane_of(pixels), window=(0, 1)
        )
        np.testing.assert_allclose(grey(prepared), expected, atol=1e-5)

    def test_bicubic_does_not_overshoot_the_window(self):
        bicubic = SlicePreprocessor(replace(SPEC, interpolation="bicubic"))
        checks = np.kron([[0, 1], [1, 0]], np.full((4, 4), 255)).astype(np.uint8)
        prepared = bicubic.prepare(plane_of(checks))
        assert (prepared.tensor.min(), prepared.tensor.max()) == (0, 1)

    def test_a_ball_seen_in_oblong_pixels_is_round_for_the_network(self):
        pixels = blob((40, 80), 19.5, 39.5, (4, 8))  # rows twice as far apart as columns
        image = grey(PLAIN.prepare(plane_of(pixels, spacing=(2.0, 1.0)), window=(0, 1)))
        rows, columns = np.indices(image.shape) - np.array(centroid(image))[:, None, None]
        assert np.average(rows**2, weights=image) == pytest.approx(
            np.average(columns**2, weights=image), rel=0.01
        )

    def test_normalisation_is_per_channel(self):
        spec = replace(SPEC, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
        prepared = SlicePreprocessor(spec).prepare(plane_of(np.full((32, 16), 255, np.uint8)))
        np.testing.assert_allclose(prepared.tensor[:, 5, 16], [1.8, 3.2, 0.35], atol=1e-6)
        np.testing.assert_allclose(prepared.tensor[:, 5, 0], [-0.2, -0.8, -0.15], atol=1e-6)


class TestPrepared:
    def test_the_tensor_is_a_plain_one(self):
        tensor = PLAIN.prepare(plane_of(np.arange(80).reshape(8, 10))).tensor
        assert type(tensor) is torch.Tensor
        assert tensor.dtype == torch.float32
        assert tensor.shape == (3, 32, 32)

    @bounded
    @given(shapes, spacings)
    def test_a_network_pixel_is_valid_where_its_centre_lies_on_a_valid_pixel(self, shape, spacing):
        valid = np.random.default_rng(0).random(shape) < 0.5
        prepared = PLAIN.prepare(plane_of(np.zeros(shape, np.uint8), spacing, valid))
        rows, columns = prepared.fit.to_plane(*np.indices((32, 32)))
        expected = np.zeros((32, 32), bool)
        for place in np.ndindex(32, 32):
            row, column = round(rows[place]), round(columns[place])
            if 0 <= row < shape[0] and 0 <= column < shape[1]:
                expected[place] = valid[row, column]
        on_an_edge = np.any([np.abs(p % 1 - 0.5) < 1e-3 for p in (rows, columns)], axis=0)
        np.testing.assert_array_equal(prepared.valid.numpy()[~on_an_edge], expected[~on_an_edge])

    def test_all_but_the_padding_is_valid_where_the_plane_is(self):
        prepared = PLAIN.prepare(plane_of(np.zeros((10, 5), np.uint8)))
        assert prepared.valid[:, 8:24].all()
        assert prepared.valid.sum() == 32 * 16

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
    def test_the_plane_itself_is_left_alone(self, dtype):
        pixels, valid = np.arange(1024).reshape(32, 32).astype(dtype), np.ones((32, 32), bool)
        valid[:5] = False
        before = pixels.copy()
        PLAIN.prepare(plane_of(pixels, valid=valid), window=(50, 60))
        np.testing.assert_array_equal(pixels, before)


class TestTheWayBack:
    @bounded
    @given(shapes, spacings, inner)
    def test_a_mark_on_the_network_comes_back_within_half_a_pixel(self, shape, spacing, place):
        fit = SquareFit.of(shape, spacing, 64)
        row, column = fit.top + place[0] * fit.fitted_shape[0], fit.left + place[1] * fit.fitted_shape[1]
        scale = np.divide(fit.fitted_shape, fit.plane_shape)
        mark = blob(
            (64, 64), row, column, tuple(np.minimum(np.maximum(0.7, scale), np.array(fit.fitted_shape) / 14))
        )
        back = SlicePreprocessor(replace(SPEC, size=64)).map_back(mark, fit)
        assert np.abs(np.subtract(centroid(back), fit.to_plane(row, column))).max() <= 0.5

    @bounded
    @given(shapes, spacings, inner)
    def test_a_mark_on_the_plane_goes_to_the_network_and_back_to_its_place(self, shape, spacing, place):
        preprocessor = SlicePreprocessor(replace(SPEC, size=64))
        row, column = place[0] * (shape[0] - 1), place[1] * (shape[1] - 1)
        mark = blob(shape, row, column, (shape[0] / 14, shape[1] / 14))
        prepared = preprocessor.prepare(plane_of(mark, spacing), window=(0, 1))
        there = np.subtract(centroid(grey(prepared)), prepared.fit.to_network(row, column))
        back = np.subtract(centroid(preprocessor.map_back(prepared.tensor[0], prepared.fit)), (row, column))
        assert np.abs(there).max() <= 0.25
        assert np.abs(back).max() <= 0.25

    @bounded
    @given(shapes, spacings, st.booleans())
    def test_every_pixel_gets_the_value_of_its_own_place_on_the_network(self, shape, spacing, across):
        fit = SquareFit.of(shape, spacing, 64)
        ramp = np.indices((64, 64))[int(across)].astype(np.float32)
        expected = np.stack(fit.to_network(*np.indices(shape)))[int(across)]
        first = (fit.top, fit.left)[across]
        last = first + fit.fitted_shape[across] - 1
        back = PLAIN.map_back(ramp, fit)
        np.testing.assert_allclose(back, np.clip(expected, first, last), atol=1e-4)

    @bounded
    @given(shapes, spacings)
    def test_padding_takes_no_part(self, shape, spacing):
        fit = SquareFit.of(shape, spacing, 64)
        network_map = np.ones((64, 64), np.float32)
        rows, columns = fit.fitted_shape
        network_map[fit.top : fit.top + rows, fit.left : fit.left + columns] = 0.25
        np.testing.assert_allclose(PLAIN.map_back(network_map, fit), 0.25)

    def test_a_map_may_be_a_half_precision_tensor_with_gradients(self):
        fit = SquareFit.of((8, 8), (1, 1), 4)
        back = PLAIN.map_back(torch.full((4, 4), 0.5, dtype=torch.bfloat16, requires_grad=True), fit)
        assert back.dtype == np.float32
        assert np.all(back == 0.5)

    def test_a_map_of_another_size_is_no_map_of_this_network(self):
        with pytest.raises(ValueError, match="64 x 64"):
            PLAIN.map_back(np.zeros((32, 32)), SquareFit.of((8, 8), (1, 1), 64))


class TestSpec:
    def test_it_is_the_same_after_a_stay_in_json(self):
        assert PreprocessSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"size": 0}, "size"),
            ({"size": True}, "size"),
            ({"size": 224.0}, "size"),
            ({"mean": [0, 0]}, "mean"),
            ({"mean": [0, 0, float("nan")]}, "mean"),
            ({"std": [1, 1, 0]}, "std"),
            ({"interpolation": "lanczos"}, "lanczos"),
            ({"windows": {}}, "default"),
            ({"windows": {"default": {"kind": "range", "lower": 0, "upper": 1}}}, "Hounsfield"),
            ({"windows": {"default": {"kind": "otsu"}}}, "otsu"),
            ({"windows": {"default": {"kind": "full", "lower": 1}}}, "full"),
            ({"windows": {"default": {"kind": "percentile"}}}, "lower"),
            ({"windows": {"default": {"kind": "percentile", "lower": 5, "upper": 5}}}, "less than"),
            ({"windows": {"default": {"kind": "percentile", "lower": 5, "upper": 101}}}, "within 0 and 100"),
            ({"windows": {"default": {"kind": "full"}, "ct": {"kind": "full"}}}, "capitals"),
            ({"windows": {"default": {"kind": "full", "gamma": 2}}}, "gamma"),
            ({"colour": "blue"}, "blue"),
            ({"contrast": 1}, "contrast"),
        ],
    )
    def test_nonsense_is_refused_by_name(self, change, reason):
        with pytest.raises(BundleInvalid, match=reason):
            PreprocessSpec.from_dict({**SPEC.to_dict(), **change})

    def test_a_missing_number_is_named(self):
        data = SPEC.to_dict()
        del data["std"]
        with pytest.raises(BundleInvalid, match="std"):
            PreprocessSpec.from_dict(data)


def test_importing_the_module_needs_neither_torch_nor_monai():
    code = (
        "import sys, MedAnomalyCLIPLib.preprocess; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    )
    library = next(path for path in sys.path if path.endswith("MedAnomalyCLIP"))
    assert subprocess.run([sys.executable, "-c", code], cwd=library, check=False).returncode == 0
