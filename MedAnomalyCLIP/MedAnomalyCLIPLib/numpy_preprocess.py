"""The steps of `preprocess` with NumPy and Pillow alone, where there is neither MONAI nor PyTorch."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .preprocess import NARROWEST_WINDOW, PlanePreprocessor, SquareFit

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class NumpyPreprocessor(PlanePreprocessor):
    """What it makes are arrays, equal to those of `SlicePreprocessor` but for rounding."""

    def _square(self, image: np.ndarray, low: float, high: float, fit: SquareFit) -> np.ndarray:
        spec = self.spec
        fitted = np.stack(
            [_resized(channel, fit, spec.interpolation) for channel in _scaled(image, low, high)]
        )
        fitted.clip(0, 1, out=fitted)
        if spec.colour == "grey" and len(fitted) == 3:
            fitted = fitted.mean(0, keepdims=True)
        square = np.zeros((3, spec.size, spec.size), np.float32)
        rows, columns = fit.fitted_shape
        square[:, fit.top : fit.top + rows, fit.left : fit.left + columns] = fitted
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
        square -= mean
        square /= std
        return square

    def _square_mask(self, inside: np.ndarray, fit: SquareFit) -> np.ndarray:
        square = np.zeros((fit.size, fit.size), dtype=bool)
        rows, columns = (
            np.minimum(_places(count, size).astype(int), size - 1)
            for count, size in zip(fit.fitted_shape, fit.plane_shape, strict=True)
        )
        region = np.s_[fit.top : fit.top + len(rows), fit.left : fit.left + len(columns)]
        square[region] = inside[np.ix_(rows, columns)]
        return square

    def _enlarged(self, image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        down = _interpolated(image, shape[0])
        return np.ascontiguousarray(_interpolated(down.T, shape[1]).T)


def _scaled(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Window to [0, 1], in float32; all become 0 in a window without width."""
    if high - low < NARROWEST_WINDOW:
        return np.zeros(image.shape, np.float32)
    return ((image - low) / (high - low)).clip(0, 1).astype(np.float32)


def _resized(image: np.ndarray, fit: SquareFit, interpolation: str) -> np.ndarray:
    """(H, W) to (h, w) with Pillow's filter, after which PyTorch's antialiased interpolation is made."""
    rows, columns = fit.fitted_shape
    if image.shape == (rows, columns):
        return image
    return np.asarray(Image.fromarray(image).resize((columns, rows), _FILTERS[interpolation]))


def _interpolated(lines: np.ndarray, count: int) -> np.ndarray:
    """(n, ...) to (count, ...): linear between centres of rows, edges aligned, ends continued."""
    size = len(lines)
    if count == size:
        return lines
    places = np.maximum(_places(count, size) - np.float32(0.5), 0)
    below = np.minimum(places.astype(int), size - 1)
    above = np.minimum(below + 1, size - 1)
    share = (places - below.astype(np.float32)).reshape(-1, *(1,) * (lines.ndim - 1))
    return lines[below] * (1 - share) + lines[above] * share


def _places(count: int, size: int) -> np.ndarray:
    """(count,) where centres of new pixels lie among `size` old ones, in float32 as in PyTorch."""
    return (np.arange(count, dtype=np.float32) + np.float32(0.5)) * (np.float32(size) / np.float32(count))
