"""From a slice to the network's input with MONAI transforms, and from the network's map back to the slice.

`SlicePlane` in, a square `Prepared` tensor out; (S, S) map in, (H, W) map on the plane's own pixels out.
Every number comes from a `PreprocessSpec`, which a bundle stores as JSON.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .configuration import from_mapping, to_mapping
from .errors import BundleInvalid, InvalidRequest
from .geometry import SlicePlane
from .resampling import finite_pixels

if TYPE_CHECKING:
    import torch

WINDOW_KINDS = ("range", "percentile", "full")
INTERPOLATIONS = ("bilinear", "bicubic")
COLOURS = ("keep", "grey")
DEFAULT_WINDOW = "default"

LARGEST = 8e307  # twice this is still a float64
NARROWEST_WINDOW = 1e-30  # a window narrower than this cannot be divided by in float32


@dataclass(frozen=True)
class WindowRule:
    """Which stored values become black and white.

    Attributes:
        kind: "range", `lower` to `upper` in Hounsfield units, for planes that hold those and no others;
            "percentile", between two percentiles of the plane's valid pixels, background included;
            "full", 0 to 255 for 8-bit pixels, else the plane's lowest to its highest valid value.
        lower: in HU or percent; None for "full".
        upper: likewise, greater than `lower`.
    """

    kind: str
    lower: float | None = None
    upper: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in WINDOW_KINDS:
            raise BundleInvalid(
                f"Window kind {self.kind!r} is not known; choose from {', '.join(WINDOW_KINDS)}"
            )
        if self.kind == "full":
            if self.lower is not None or self.upper is not None:
                raise BundleInvalid("A window of kind 'full' has no lower and upper value")
            return
        lower, upper = _number(self.lower, "window lower"), _number(self.upper, "window upper")
        if not lower < upper:
            raise BundleInvalid(
                f"A window's lower value {lower:g} must be less than its upper value {upper:g}"
            )
        if self.kind == "percentile" and not (lower >= 0 and upper <= 100):
            raise BundleInvalid(f"Percentiles {lower:g} and {upper:g} do not lie within 0 and 100")


@dataclass(frozen=True)
class PreprocessSpec:
    """The numbers that turn a slice into a detector's input.

    Attributes:
        size: S, side of the network's square input in pixels.
        mean: what is subtracted from red, green and blue after windowing to [0, 1].
        std: what they are divided by then.
        windows: rule for each modality code, and for all others under "default".
        interpolation: "bilinear" or "bicubic"; both average over the pixels that shrinking merges.
        colour: "keep", or "grey" to show the network the mean of the three channels.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    windows: dict[str, WindowRule]
    interpolation: str = "bilinear"
    colour: str = "keep"

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise BundleInvalid(f"The input size must be a whole number of pixels above 0, not {self.size!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or len(values) != 3:
                raise BundleInvalid(f"{name} needs three numbers, for red, green and blue, not {values!r}")
            object.__setattr__(self, name, tuple(_number(value, name) for value in values))
        if min(self.std) <= 0:
            raise BundleInvalid(f"std must be above 0, not {self.std}")
        if self.colour not in COLOURS:
            raise BundleInvalid(f"Colour {self.colour!r} is not known; choose from {', '.join(COLOURS)}")
        if self.interpolation not in INTERPOLATIONS:
            raise BundleInvalid(
                f"Interpolation {self.interpolation!r} is not known; choose from {', '.join(INTERPOLATIONS)}"
            )
        if not isinstance(self.windows, Mapping) or DEFAULT_WINDOW not in self.windows:
            raise BundleInvalid(f"windows needs a rule for {DEFAULT_WINDOW!r}")
        for modality, rule in self.windows.items():
            if not isinstance(rule, WindowRule):
                raise BundleInvalid(f"The window of {modality!r} is not a window rule: {rule!r}")
            if modality not in (DEFAULT_WINDOW, str(modality).upper()):
                raise BundleInvalid(f"{modality!r} is not a modality code in capitals, such as 'CT' or 'MR'")
        if self.windows[DEFAULT_WINDOW].kind == "range":
            raise BundleInvalid(f"The window of {DEFAULT_WINDOW!r} must not need Hounsfield units")
        object.__setattr__(self, "windows", dict(self.windows))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PreprocessSpec:
        """Read what `to_dict` wrote; unknown, missing and senseless entries raise BundleInvalid."""
        return from_mapping(cls, data, "preprocessing", BundleInvalid)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return to_mapping(self)

    def window_rule(self, plane: SlicePlane) -> WindowRule:
        """The rule for a plane: that of its modality, or the default if there is none or it lacks HU."""
        if plane.pixels.ndim == 3:
            return WindowRule("full")  # colours carry meaning: never stretched by their statistics
        rule = self.windows.get(plane.modality.upper(), self.windows[DEFAULT_WINDOW])
        if rule.kind == "range" and plane.units != "HU":
            return self.windows[DEFAULT_WINDOW]
        return rule


@dataclass(frozen=True)
class SquareFit:
    """Where a plane lies in the network's square.

    The plane is resized once, so that a millimetre has as many network pixels down as across and the longer
    side fills the square, and centred between padding. Positions are in pixels, whole numbers are pixel
    centres.

    Attributes:
        plane_shape: (H, W) of the plane.
        fitted_shape: (h, w) of the plane in the square, at least 1.
        top: rows of padding above.
        left: columns of padding on the left.
        size: S, side of the square.
    """

    plane_shape: tuple[int, int]
    fitted_shape: tuple[int, int]
    top: int
    left: int
    size: int

    @classmethod
    def of(cls, plane_shape: tuple[int, int], spacing: tuple[float, float], size: int) -> SquareFit:
        """Fit a plane with (rows, columns) and their distances in mm into a square."""
        height, width = (count * step for count, step in zip(plane_shape, spacing, strict=True))
        scale = size / max(height, width)
        fitted = (max(1, round(height * scale)), max(1, round(width * scale)))
        return cls(plane_shape, fitted, (size - fitted[0]) // 2, (size - fitted[1]) // 2, size)

    def to_network(self, row: float, column: float) -> tuple[float, float]:
        """(row, column) in the square of a position in the plane."""
        (rows, columns), (fitted_rows, fitted_columns) = self.plane_shape, self.fitted_shape
        return (
            self.top + (row + 0.5) * fitted_rows / rows - 0.5,
            self.left + (column + 0.5) * fitted_columns / columns - 0.5,
        )

    def to_plane(self, row: float, column: float) -> tuple[float, float]:
        """(row, column) in the plane of a position in the square; outside the plane on the padding."""
        (rows, columns), (fitted_rows, fitted_columns) = self.plane_shape, self.fitted_shape
        return (
            (row - self.top + 0.5) * rows / fitted_rows - 0.5,
            (column - self.left + 0.5) * columns / fitted_columns - 0.5,
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """A slice as the network takes it.

    Attributes:
        tensor: (3, S, S) float32, windowed, squared and normalised; an array if made without PyTorch.
        valid: (S, S) bool, likewise; False on the padding and where the slice has no image.
        fit: where the slice lies in it.
        window: (low, high) stored values that became 0 and 1 before normalisation.
    """

    tensor: Any
    valid: Any
    fit: SquareFit
    window: tuple[float, float]


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """Slices as the network takes them, together.

    Attributes:
        images: (B, 3, S, S) float32, an array or a tensor.
        valid: (B, S, S) bool, likewise.
        fits: where each slice lies in them.
        windows: (B, 2) float64, (low, high) of each, likewise.
    """

    images: Any
    valid: Any
    fits: tuple[SquareFit, ...]
    windows: Any


class PlanePreprocessor(ABC):
    """Turns slices into network input as one `PreprocessSpec` says, and maps back onto slices.

    Window (stored values to [0, 1]; pixels without an image become 0), resize, pad with 0 to a square, three
    equal channels if there is one, normalise. `SlicePreprocessor` does so with MONAI and PyTorch,
    `numpy_preprocess.NumpyPreprocessor` without them, `device_preprocess.DevicePreprocessor` on a GPU; tests
    hold them against each other.
    """

    def __init__(self, spec: PreprocessSpec) -> None:
        self.spec = spec

    def prepare(self, plane: SlicePlane, window: tuple[float, float] | None = None) -> Prepared:
        """Make the network's input of a plane.

        Args:
            plane: any slice; oblong pixels become square.
            window: (low, high) stored values to show as black and white, instead of the spec's rule.

        Raises:
            InvalidRequest: a window that is not two finite numbers in order.
        """
        values, valid = _numbers_of(plane)
        low, high = self._window(plane, values, valid) if window is None else checked_window(window)
        if valid is not None:
            values[~valid] = low
        image = values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))
        fit = SquareFit.of(plane.shape, plane.spacing, self.spec.size)
        inside = np.ones(plane.shape, dtype=bool) if valid is None else valid
        return Prepared(self._square(image, low, high, fit), self._square_mask(inside, fit), fit, (low, high))

    def prepare_many(
        self, planes: Sequence[SlicePlane], window: tuple[float, float] | None = None
    ) -> PreparedBatch:
        """Make the network's input of several planes; arguments and errors as for `prepare`."""
        prepared = [self.prepare(plane, window) for plane in planes]
        return PreparedBatch(
            np.stack([np.asarray(item.tensor) for item in prepared]),
            np.stack([np.asarray(item.valid) for item in prepared]),
            tuple(item.fit for item in prepared),
            np.array([item.window for item in prepared], dtype=np.float64),
        )

    def map_back_many(self, network_maps: Any, fits: Sequence[SquareFit]) -> Sequence[Any]:
        """Bring (B, S, S) maps back to their planes' own pixels, as `map_back` does.

        Returns:
            For each an (H, W) float32 array; or a tensor, where a device does it.
        """
        return [self.map_back(network_map, fit) for network_map, fit in zip(network_maps, fits, strict=True)]

    def picture(self, prepared: Prepared) -> np.ndarray:
        """What the network is shown, as a picture: normalisation undone, padding and invalid pixels black.

        Shapes:
            returns: (S, S, 3) uint8.
        """
        mean, std = (
            np.array(values, np.float32)[:, None, None] for values in (self.spec.mean, self.spec.std)
        )
        grey = (np.asarray(prepared.tensor) * std + mean).clip(0, 1)
        return np.ascontiguousarray((grey * 255).round().astype(np.uint8).transpose(1, 2, 0))

    def map_back(self, network_map: torch.Tensor | np.ndarray, fit: SquareFit) -> np.ndarray:
        """Bring a map on the network's square back to a plane's own pixels.

        Values are interpolated linearly between the network's pixels (align_corners=False, the convention
        with which `prepare` resizes) and never exceed them; the padding takes no part.

        Args:
            network_map: (S, S).
            fit: that of the `Prepared` slice.

        Returns:
            (H, W) float32.
        """
        if not isinstance(network_map, np.ndarray):
            network_map = network_map.detach().float().cpu().numpy()
        square = network_map.astype(np.float32, copy=False)
        if square.shape != (fit.size, fit.size):
            raise ValueError(f"map {square.shape} does not fit the network's {fit.size} x {fit.size}")
        rows, columns = fit.fitted_shape
        shown = square[fit.top : fit.top + rows, fit.left : fit.left + columns]
        # Rounding may leave the range by a bit.
        return self._enlarged(shown, fit.plane_shape).clip(shown.min(), shown.max())

    @abstractmethod
    def _square(self, image: np.ndarray, low: float, high: float, fit: SquareFit) -> Any:
        """(1 or 3, H, W) float32 or float64 stored values to the network's (3, S, S) float32 input.

        A window without width makes all pixels black.
        """

    @abstractmethod
    def _square_mask(self, inside: np.ndarray, fit: SquareFit) -> Any:
        """See `mask_in_square`."""

    @abstractmethod
    def _enlarged(self, image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """(h, w) float32 brought to (H, W), bilinear, edges aligned, whichever is larger."""

    def _window(self, plane: SlicePlane, values: np.ndarray, valid: np.ndarray | None) -> tuple[float, float]:
        rule = self.spec.window_rule(plane)
        if rule.kind == "range":
            return float(rule.lower), float(rule.upper)  # type: ignore[arg-type]
        if rule.kind == "full" and plane.pixels.dtype == np.uint8:
            return 0.0, 255.0
        inside = values if valid is None else values[valid]
        if inside.size == 0:
            return 0.0, 0.0
        if rule.kind == "full":
            return float(inside.min()), float(inside.max())
        low, high = np.percentile(inside, np.array([rule.lower, rule.upper], dtype=np.float64))
        return float(low), float(high)


class SlicePreprocessor(PlanePreprocessor):
    """With MONAI and PyTorch; what it makes are tensors.

    MONAI does each step but the resize: its `Resize(anti_aliasing=True)` filters across a border of zeros, so
    that a white picture of 512 x 300 pixels has grey corners (0.84), and it takes half a second for an X-ray.
    PyTorch's own antialiased interpolation, the filter of Pillow with which CLIP was trained, does neither.
    """

    def __init__(self, spec: PreprocessSpec) -> None:
        from monai.transforms import Compose, NormalizeIntensity, RepeatChannel, SpatialPad

        super().__init__(spec)
        normalise = NormalizeIntensity(subtrahend=spec.mean, divisor=spec.std, channel_wise=True)
        pad = SpatialPad((spec.size, spec.size), mode="constant", value=0.0)
        self._finish = {1: Compose([pad, RepeatChannel(3), normalise]), 3: Compose([pad, normalise])}

    def _square(self, image: np.ndarray, low: float, high: float, fit: SquareFit) -> torch.Tensor:
        scaled = _scaled(image, low, high)
        fitted = resized(scaled[None], fit.fitted_shape, self.spec.interpolation)[0].clamp_(0, 1)
        if self.spec.colour == "grey" and len(fitted) == 3:
            fitted = fitted.mean(0, keepdim=True)
        return self._finish[len(fitted)](fitted).as_tensor()

    def _square_mask(self, inside: np.ndarray, fit: SquareFit) -> torch.Tensor:
        return mask_in_square(inside, fit)

    def _enlarged(self, image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        import torch

        square = torch.from_numpy(np.ascontiguousarray(image))[None, None]
        return torch.nn.functional.interpolate(square, shape, mode="bilinear", align_corners=False)[
            0, 0
        ].numpy()


def _numbers_of(plane: SlicePlane) -> tuple[np.ndarray, np.ndarray | None]:
    """A plane's pixels, copied to float32 if that is exact, else float64; which are valid, None if all.

    Shapes:
        returns: (H, W) or (H, W, 3); (H, W) or None.
    """
    pixels, valid = plane.pixels, plane.valid
    if pixels.dtype.kind != "f":
        values = pixels.astype(np.float32 if pixels.dtype.itemsize <= 2 else np.float64)
    else:
        valid = valid & finite_pixels(pixels)
        # Differences of float64's own extremes would overflow; nothing else comes near the limit.
        values = np.clip(pixels, -LARGEST, LARGEST, dtype=np.float64)
    return values, None if valid.all() else valid


def _scaled(image: np.ndarray, low: float, high: float) -> torch.Tensor:
    """Window to [0, 1]; all become 0 in a window without width.

    Shapes:
        image: (C, H, W).
        returns: (C, H, W) float32.
    """
    import torch
    from monai.transforms import ScaleIntensityRange
    from monai.utils import convert_to_tensor

    if high - low < NARROWEST_WINDOW:
        return torch.zeros(image.shape)
    scale = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)
    return convert_to_tensor(scale(torch.from_numpy(image)), track_meta=False)


def resized(images: torch.Tensor, shape: tuple[int, int], interpolation: str) -> torch.Tensor:
    """(B, C, H, W) to (B, C, h, w); sides that shrink are averaged first, others are interpolated."""
    import torch

    if tuple(images.shape[2:]) == shape:
        return images
    if shape[1] == 1 < shape[0]:  # PyTorch 2.13 gives all rows of a single column the value of the first
        return resized(images.mT, (1, shape[0]), interpolation).mT
    return torch.nn.functional.interpolate(
        images, size=shape, mode=interpolation, align_corners=False, antialias=True
    )


def mask_in_square(mask: np.ndarray, fit: SquareFit) -> torch.Tensor:
    """A mask on a plane's pixels, in the network's square: what lies under each pixel's centre.

    Shapes:
        mask: (H, W) bool.
        returns: (S, S) bool, False on the padding.
    """
    import torch

    square = torch.zeros(fit.size, fit.size, dtype=torch.bool)
    inside = square[fit.top : fit.top + fit.fitted_shape[0], fit.left : fit.left + fit.fitted_shape[1]]
    image = torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32))[None, None]
    inside[...] = torch.nn.functional.interpolate(image, fit.fitted_shape, mode="nearest-exact")[0, 0] > 0.5
    return square


def checked_window(window: tuple[float, float]) -> tuple[float, float]:
    """A window as it is used, or InvalidRequest."""
    low, high = (float(value) for value in window)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InvalidRequest(
            f"A window needs two finite values, the lower one first, not {low:g} and {high:g}"
        )
    return max(low, -LARGEST), min(high, LARGEST)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BundleInvalid(f"{name} must be a finite number, not {value!r}")
    return float(value)


# Soft tissue in CT; MR has no units, and a few pixels far brighter than all others; pictures as they are.
STANDARD_WINDOWS: Mapping[str, WindowRule] = {
    DEFAULT_WINDOW: WindowRule("full"),
    "CT": WindowRule("range", -160.0, 240.0),
    "MR": WindowRule("percentile", 0.5, 99.5),
}
