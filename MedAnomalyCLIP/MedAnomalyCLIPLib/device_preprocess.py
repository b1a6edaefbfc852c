"""The steps of `preprocess` on a GPU, for many slices at once, and there the way back of their maps.

The host copies stored pixels into page-locked memory, and no more: a volume's slices are windowed, resized
and normalised where the network runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .cuda import exhausted_is_told
from .geometry import SlicePlane
from .preprocess import (
    LARGEST,
    NARROWEST_WINDOW,
    PreparedBatch,
    PreprocessSpec,
    SlicePreprocessor,
    SquareFit,
    WindowRule,
    checked_window,
    resized,
)

PIXELS_AT_ONCE = 2**24
"""Some 20 bytes of the device's memory each: what this needs does not depend on the size of the slices."""

_HELD_AS = {  # uint16 by its bits: PyTorch hardly computes with it
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.uint16): torch.int16,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class _Kind(NamedTuple):
    """What slices that are prepared together have in common."""

    dtype: np.dtype
    shape: tuple[int, int]
    spacing: tuple[float, float]
    rule: WindowRule


class DevicePreprocessor(SlicePreprocessor):
    """What it makes of several slices are tensors on a device, equal to those of `SlicePreprocessor` but for
    rounding: to 0.00001 of the window, maps to 0.000001.

    Colour, slices with invalid pixels and those of unusual types or sizes are prepared one by one on the
    host.
    """

    def __init__(self, spec: PreprocessSpec, device: torch.device) -> None:
        super().__init__(spec)
        self.device = device
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] for values in (spec.mean, spec.std)
        )

    @torch.inference_mode()
    def prepare_many(
        self, planes: Sequence[SlicePlane], window: tuple[float, float] | None = None
    ) -> PreparedBatch:
        count, size = len(planes), self.spec.size
        window = None if window is None else checked_window(window)
        with exhausted_is_told():
            batch = PreparedBatch(
                images=(-self._mean / self._std).expand(count, 3, size, size).contiguous(),
                valid=torch.zeros(count, size, size, dtype=torch.bool, device=self.device),
                fits=tuple(SquareFit.of(plane.shape, plane.spacing, size) for plane in planes),
                windows=torch.empty(count, 2, dtype=torch.float64, device=self.device),
            )
            for kind, part in _alike(planes, self._kind, lambda kind: _together(kind.shape)):
                if kind is None:
                    self._prepare_one(batch, part.start, planes[part.start], window)
                else:
                    self._prepare_alike(batch, part, planes[part], kind, window)
        return batch

    @torch.inference_mode()
    def map_back_many(self, network_maps: Any, fits: Sequence[SquareFit]) -> Sequence[Any]:
        size = self.spec.size
        if tuple(network_maps.shape) != (len(fits), size, size):
            raise ValueError(
                f"maps {tuple(network_maps.shape)} do not fit {len(fits)} slices of {size} pixels"
            )
        back: list[Tensor] = []
        with exhausted_is_told():
            for fit, part in _alike(fits, lambda fit: fit, lambda fit: _together(fit.plane_shape)):
                shown = network_maps[(part, *_region(fit))].float()
                low, high = (limit[:, None, None] for limit in torch.aminmax(shown.flatten(1), dim=1))
                large = F.interpolate(shown[:, None], fit.plane_shape, mode="bilinear", align_corners=False)
                back.extend(large[:, 0].clamp(low, high))
        return back

    def _kind(self, plane: SlicePlane) -> _Kind | None:
        """None for what is prepared one by one."""
        pixels, dtype = plane.pixels, plane.pixels.dtype.newbyteorder("=")
        if pixels.ndim != 2 or dtype not in _HELD_AS or pixels.size > PIXELS_AT_ONCE or not plane.valid.all():
            return None
        if dtype.kind == "f" and not np.isfinite(pixels).all():
            return None
        return _Kind(dtype, plane.shape, plane.spacing, self.spec.window_rule(plane))

    def _prepare_one(
        self, batch: PreparedBatch, index: int, plane: SlicePlane, window: tuple[float, float] | None
    ) -> None:
        prepared = self.prepare(plane, window)
        batch.images[index].copy_(prepared.tensor)
        batch.valid[index].copy_(prepared.valid)
        for column, limit in enumerate(prepared.window):
            batch.windows[index, column].fill_(limit)

    def _prepare_alike(
        self,
        batch: PreparedBatch,
        part: slice,
        planes: Sequence[SlicePlane],
        kind: _Kind,
        window: tuple[float, float] | None,
    ) -> None:
        values = self._stored_values(planes, kind)
        windows = batch.windows[part]
        self._find_windows(values, kind, window, windows)
        low, width = windows[:, 0], windows[:, 1] - windows[:, 0]
        low, divisor, wide = (
            numbers[:, None, None]
            for numbers in (
                low.to(values),
                width.clamp(min=NARROWEST_WINDOW).to(values),
                width >= NARROWEST_WINDOW,
            )
        )
        scaled = ((values - low) / divisor).clamp_(0, 1).float().masked_fill_(~wide, 0.0)
        fit = batch.fits[part.start]
        fitted = resized(scaled[:, None], fit.fitted_shape, self.spec.interpolation).clamp(0, 1)
        rows, columns = _region(fit)
        batch.images[part, :, rows, columns] = (fitted - self._mean) / self._std
        batch.valid[part, rows, columns] = True

    def _stored_values(self, planes: Sequence[SlicePlane], kind: _Kind) -> Tensor:
        """(B, H, W) on the device: float32 if that is exact, else float64."""
        locked = self.device.type == "cuda"
        held = torch.empty(len(planes), *kind.shape, dtype=_HELD_AS[kind.dtype], pin_memory=locked)
        for plane, place in zip(planes, held.numpy().view(kind.dtype), strict=True):
            np.copyto(place, plane.pixels)
        stored = held.to(self.device, non_blocking=True)
        if kind.dtype == np.uint16:
            return (stored.int() & 0xFFFF).float()
        if kind.dtype.kind == "f":
            return stored.double().clamp_(-LARGEST, LARGEST)
        return stored.float() if kind.dtype.itemsize <= 2 else stored.double()

    def _find_windows(
        self, values: Tensor, kind: _Kind, window: tuple[float, float] | None, found: Tensor
    ) -> None:
        """Writes (B, 2) low and high, by the rules of `PlanePreprocessor`."""
        rule = kind.rule
        if window is None and rule.kind == "range":
            window = float(rule.lower), float(rule.upper)  # type: ignore[arg-type]
        elif window is None and rule.kind == "full" and kind.dtype == np.uint8:
            window = 0.0, 255.0
        flat = values.flatten(1)
        for column, percent in enumerate((rule.lower, rule.upper)):
            if window is not None:
                found[:, column].fill_(window[column])
            elif rule.kind == "full":
                found[:, column].copy_(flat.amax(1) if column else flat.amin(1))
            else:
                found[:, column].copy_(percentile(flat, float(percent)))  # type: ignore[arg-type]


def percentile(values: Tensor, percent: float) -> Tensor:
    """(B,) float64 of (B, N), as `numpy.percentile` has it: linear between the two values around it."""
    last = values.shape[1] - 1
    place = percent / 100 * last
    below = int(place)
    low = values.kthvalue(below + 1, dim=1).values.double()
    if below == last:
        return low
    high = values.kthvalue(below + 2, dim=1).values.double()
    return low + (high - low) * (place - below)


def _alike(
    items: Sequence[Any], kind_of: Callable[[Any], Any], together: Callable[[Any], int]
) -> Iterator[tuple[Any, slice]]:
    """Runs of neighbours of one kind, so many together at most; one by one where the kind is None."""
    start = 0
    for kind, run in itertools.groupby(items, kind_of):
        stop = start + sum(1 for _ in run)
        step = 1 if kind is None else together(kind)
        for first in range(start, stop, step):
            yield kind, slice(first, min(first + step, stop))
        start = stop


def _together(shape: tuple[int, int]) -> int:
    return max(1, PIXELS_AT_ONCE // (shape[0] * shape[1]))


def _region(fit: SquareFit) -> tuple[slice, slice]:
    """Rows and columns of the square that a plane lies in."""
    rows, columns = fit.fitted_shape
    return slice(fit.top, fit.top + rows), slice(fit.left, fit.left + columns)
