"""Preprocessing without MONAI and PyTorch is that with them, but for rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MedAnomalyCLIPLib.errors import InvalidRequest
from MedAnomalyCLIPLib.geometry import SlicePlane
from MedAnomalyCLIPLib.numpy_preprocess import NumpyPreprocessor
from MedAnomalyCLIPLib.preprocess import STANDARD_WINDOWS, PreprocessSpec, SlicePreprocessor, SquareFit

bounded = settings(max_examples=150, deadline=None, derandomize=True)

SPEC = PreprocessSpec(48, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), dict(STANDARD_WINDOWS))
PIXEL = 1e-5
"""Largest difference of windowed pixels, which lie in [0, 1], before they are divided by std."""

sides = st.integers(1, 150)


@st.composite
def planes(draw):
    """Planes of any size, spacing, type and modality, grey or in colour, with or without pixels outside."""
    shape = draw(sides), draw(sides)
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, np.bool_]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    colour = draw(st.booleans())
    pixels = generator.normal(500, 400, (*shape, 3) if colour else shape)
    if np.issubdtype(dtype, np.unsignedinteger):
        pixels = pixels.clip(0, np.iinfo(dtype).max)
    pixels = pixels.astype(dtype)
    if np.issubdtype(dtype, np.floating) and draw(st.booleans()):
        pixels.flat[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    valid = generator.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.95, 1.1]))
    down, across = draw(st.tuples(*[st.floats(0.2, 4.0)] * 2))
    modality, units = draw(st.sampled_from([("", ""), ("MR", ""), ("CT", "HU")]))
    ijk_to_ras = np.diag([across, down, 1.0, 1.0])
    return SlicePlane(pixels, ijk_to_ras, valid, modality=modality, units=units)


@bounded
@given(
    plane=planes(),
    window=st.none() | st.tuples(st.floats(-500, 500), st.floats(500, 2000)),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    colour=st.sampled_from(["keep", "grey"]),
)
def test_slices_become_the_same_input(plane, window, interpolation, colour):
    spec = replace(SPEC, interpolation=interpolation, colour=colour)
    found, expected = (kind(spec).prepare(plane, window) for kind in (NumpyPreprocessor, SlicePreprocessor))
    assert (found.fit, found.window) == (expected.fit, expected.window)
    assert found.tensor.dtype == np.float32
    assert found.tensor.shape == (3, 48, 48)
    np.testing.assert_allclose(found.tensor, expected.tensor.numpy(), rtol=0, atol=PIXEL / min(spec.std))
    assert found.valid.dtype == np.bool_
    assert np.array_equal(found.valid, expected.valid.numpy())


@bounded
@given(
    shape=st.tuples(sides, sides), spacing=st.tuples(*[st.floats(0.2, 4.0)] * 2), seed=st.integers(0, 1000)
)
def test_maps_come_back_the_same(shape, spacing, seed):
    fit = SquareFit.of(shape, spacing, SPEC.size)
    network_map = np.random.default_rng(seed).random((SPEC.size, SPEC.size), np.float32)
    found, expected = (
        kind(SPEC).map_back(network_map, fit) for kind in (NumpyPreprocessor, SlicePreprocessor)
    )
    assert found.dtype == np.float32
    assert found.shape == shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(2000, 1500), (512, 512), (300, 1024)])
def test_large_slices_too(shape):
    pixels = np.random.default_rng(0).integers(0, 4000, shape).astype(np.uint16)
    plane = SlicePlane(pixels, np.diag([0.3, 0.5, 1.0, 1.0]), np.ones(shape, bool), modality="CR")
    spec = replace(SPEC, size=256)
    found, expected = (kind(spec).prepare(plane) for kind in (NumpyPreprocessor, SlicePreprocessor))
    np.testing.assert_allclose(found.tensor, expected.tensor.numpy(), rtol=0, atol=PIXEL / min(spec.std))
    network_map = np.random.default_rng(1).random((256, 256), np.float32)
    one, two = (
        kind(spec).map_back(network_map, found.fit) for kind in (NumpyPreprocessor, SlicePreprocessor)
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=2e-4)  # places of 2,000 pixels, in float32


def test_a_map_of_another_size_is_refused():
    fit = SquareFit.of((10, 10), (1, 1), SPEC.size)
    with pytest.raises(ValueError, match="does not fit"):
        NumpyPreprocessor(SPEC).map_back(np.zeros((10, 10), np.float32), fit)


def test_a_window_that_is_none_is_refused():
    plane = SlicePlane(np.zeros((9, 9)), np.eye(4), np.ones((9, 9), bool))
    with pytest.raises(InvalidRequest, match="window"):
        NumpyPreprocessor(SPEC).prepare(plane, (2.0, 1.0))
