"""Trilinear sampling of a volume on a plane that no stack of voxels lies in.

`Volume` and `Frame` (a plane without extent) in, a grid of pixels clipped to the volume out. Positions are
RAS in mm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .errors import GeometryRefused
from .volume import Volume

MAX_PIXELS = 2**23
"""Most pixels of a resampled plane (some 600 MB while it is made); more are a mistake in the spacing."""

_EDGE = 1e-6  # in voxels: rounding error that must not decide whether a pixel lies in the volume
_SKEW = 1e-3  # cosine between the directions of a view that passes for rounding
_LATTICE = 48  # cells along each side when a warped volume is searched for in the plane
_REACH = 4.0  # how many of its own diagonals a warp may move the volume


@dataclass(frozen=True, eq=False)
class Frame:
    """A plane in the patient and which way up it is looked at.

    Attributes:
        origin: (3,) a point of the plane, RAS mm; it may lie far outside the volume.
        right: (3,) unit vector along a row of pixels.
        down: (3,) unit vector from one row to the next, perpendicular to `right`.
    """

    origin: np.ndarray
    right: np.ndarray
    down: np.ndarray

    @classmethod
    def of_view(cls, slice_to_ras: np.ndarray) -> Frame:
        """The plane of a slice view, from its 4x4 matrix: right, UP, ignored, a point of it."""
        matrix = np.array(slice_to_ras, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            raise GeometryRefused("The slice view's position is not a finite 4x4 matrix")
        lengths = np.linalg.norm(matrix[:3, :2], axis=0)
        if lengths.min() < 1e-9:
            raise GeometryRefused(
                "The slice view's position is singular: it has no right or no upward direction"
            )
        right, up = (matrix[:3, :2] / lengths).T
        if abs(right @ up) > _SKEW:
            raise GeometryRefused("The slice view's right and upward directions are not perpendicular")
        down = (up @ right) * right - up
        return cls(matrix[:3, 3], right, down / np.linalg.norm(down))

    @property
    def normal(self) -> np.ndarray:
        """(3,) unit vector that makes (right, down, normal) right-handed: away from the reader."""
        return np.cross(self.right, self.down)

    def to_ras(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Points x mm to the right of the origin and y mm below it: (...) and (...) to (..., 3)."""
        return self.origin + x[..., None] * self.right + y[..., None] * self.down


@dataclass(frozen=True, eq=False)
class Resampled:
    """What the plane shows of a volume.

    Attributes:
        pixels: (H, W) or (H, W, 3) floating point; invalid pixels hold the lowest valid value.
        valid: (H, W) bool, True where all voxels that a pixel is made of exist and are finite.
        ijk_to_ras: 4x4, as in `SlicePlane`.
    """

    pixels: np.ndarray
    valid: np.ndarray
    ijk_to_ras: np.ndarray


def resample(volume: Volume, frame: Frame) -> Resampled:
    """Sample a volume on a plane at the volume's own spacing, clipped to the volume.

    The volume is its voxel-centre box and half a voxel around it, in which the outermost voxel is continued.

    Raises:
        GeometryRefused: the plane misses the volume, or would need an unreasonable number of pixels.
    """
    extent = _linear_extent(volume, frame) if volume.warp is None else _warped_extent(volume, frame)
    if extent is None:
        raise missed(volume)
    left, top, right, bottom = extent
    middle = frame.to_ras(np.array((left + right) / 2), np.array((top + bottom) / 2))
    column_step, row_step = (_native_spacing(volume, middle, way) for way in (frame.right, frame.down))
    x, y = _grid_lines(extent, column_step, row_step)
    indices = _indices_of(volume, frame, x, y)
    ends = np.array(volume.size)[:, None, None] - 0.5
    inside = np.all((indices >= -0.5 - _EDGE) & (indices <= ends + _EDGE), axis=0)
    if not inside.any():
        raise missed(volume)
    if volume.warp is not None:  # its extent was an estimate, on the large side
        rows, columns = (_used(inside.any(axis=axis)) for axis in (1, 0))
        x, y, inside, indices = x[columns], y[rows], inside[rows, columns], indices[:, rows, columns]
    pixels = _interpolate(volume.voxels, indices)
    # A voxel that is not a number makes every pixel it has a part in one too, so the mask is complete.
    valid = inside & finite_pixels(pixels)
    pixels[~valid] = pixels[valid].min() if valid.any() else 0

    grid = np.eye(4)
    grid[:3, 0] = frame.right * column_step
    grid[:3, 1] = frame.down * row_step
    grid[:3, 2] = frame.normal * _slice_distance(volume, middle, frame.normal)
    grid[:3, 3] = frame.to_ras(x[0], y[0])
    return Resampled(pixels, valid, grid)


def finite_pixels(pixels: np.ndarray) -> np.ndarray:
    """(H, W) bool, where an (H, W) or (H, W, 3) image holds numbers, in all its colours."""
    if pixels.dtype.kind != "f":
        return np.ones(pixels.shape[:2], dtype=bool)
    finite = np.asarray(np.isfinite(pixels))
    return np.asarray(finite.all(axis=2)) if finite.ndim == 3 else finite


def missed(volume: Volume) -> GeometryRefused:
    """The error for a plane that does not meet the volume."""
    i, j, k = volume.size
    return GeometryRefused(
        f"The slice plane does not cut the image ({i} x {j} x {k} voxels); move the view onto the image"
    )


def to_index(volume: Volume, ras: np.ndarray) -> np.ndarray:
    """(..., 3) positions in RAS mm to (..., 3) continuous voxel indices along I, J, K, through the warp."""
    points = ras.reshape(-1, 3)
    if volume.warp is not None:
        points = np.asarray(volume.warp(points), dtype=np.float64).reshape(-1, 3)
    inverse = np.linalg.inv(volume.ijk_to_ras)
    return (points @ inverse[:3, :3].T + inverse[:3, 3]).reshape(ras.shape)


def _indices_of(volume: Volume, frame: Frame, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(3, H, W) continuous voxel indices I, J, K of a grid of points, W to the right and H down, in mm."""
    if volume.warp is not None:
        return np.moveaxis(to_index(volume, frame.to_ras(*np.meshgrid(x, y))), -1, 0)
    origin = to_index(volume, frame.origin)
    right, down = (_index_rate(volume, frame.origin, way) for way in (frame.right, frame.down))
    return origin[:, None, None] + right[:, None, None] * x + down[:, None, None] * y[:, None]


def _index_rate(volume: Volume, at: np.ndarray, way: np.ndarray) -> np.ndarray:
    """(3,) voxels passed along I, J, K per mm in a direction; across one voxel where the volume is warped."""
    if volume.warp is None:
        return np.linalg.solve(volume.ijk_to_ras[:3, :3], way)
    step = min(volume.spacing)
    ahead, behind = to_index(volume, np.stack([at + step / 2 * way, at - step / 2 * way]))
    return (ahead - behind) / step


def _native_spacing(volume: Volume, at: np.ndarray, way: np.ndarray) -> float:
    """Distance in mm along a direction that passes one voxel, counted as a length in voxel space.

    Along a voxel axis this is the voxel spacing, whatever the direction that of an isotropic volume, in
    between for slanted directions through oblong voxels.
    """
    return 1 / max(float(np.linalg.norm(_index_rate(volume, at, way))), 1e-12)


def _slice_distance(volume: Volume, at: np.ndarray, normal: np.ndarray) -> float:
    """Distance in mm along the normal between the volume's slices: of the voxel axis it is nearest."""
    rate = np.abs(_index_rate(volume, at, normal))
    gradients = np.linalg.norm(np.linalg.inv(volume.ijk_to_ras[:3, :3]), axis=1)
    return 1 / max(float(rate[np.argmax(rate / gradients)]), 1e-12)


def _grid_lines(
    extent: tuple[float, float, float, float], column_step: float, row_step: float
) -> tuple[np.ndarray, np.ndarray]:
    """(W,) and (H,) pixel centres in mm of the smallest grid that covers (left, top, right, bottom)."""
    left, top, right, bottom = extent
    # A grid that fits but for rounding gets no pixel more.
    columns = max(1, math.ceil((right - left) / column_step - _EDGE))
    rows = max(1, math.ceil((bottom - top) / row_step - _EDGE))
    if columns * rows > MAX_PIXELS:
        raise GeometryRefused(
            f"The plane would have {rows} x {columns} pixels at the image's own spacing of {row_step:.3g} x "
            f"{column_step:.3g} mm, more than {MAX_PIXELS} in all; check the image's spacing"
        )
    x = (left + right) / 2 + (np.arange(columns) - (columns - 1) / 2) * column_step
    y = (top + bottom) / 2 + (np.arange(rows) - (rows - 1) / 2) * row_step
    return x, y


def _used(flags: np.ndarray | np.bool_) -> slice:
    """From the first to the last that is set."""
    places = np.flatnonzero(flags)
    return slice(places[0], places[-1] + 1)


def _linear_extent(volume: Volume, frame: Frame) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) in mm of the polygon that a plane cuts out of a box of voxels."""
    corners = np.array([(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    ras = (corners * volume.size - 0.5) @ volume.ijk_to_ras[:3, :3].T + volume.ijk_to_ras[:3, 3]
    height = (ras - frame.origin) @ frame.normal
    height[np.abs(height) < _EDGE * min(volume.spacing)] = 0
    points = list(ras[height == 0])
    for a in range(8):
        for b in range(a):
            if np.abs(corners[a] - corners[b]).sum() == 1 and height[a] * height[b] < 0:
                part = height[a] / (height[a] - height[b])
                points.append(ras[a] + part * (ras[b] - ras[a]))
    if not points:
        return None
    offsets = np.array(points) - frame.origin
    x, y = offsets @ frame.right, offsets @ frame.down
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())


def _warped_extent(volume: Volume, frame: Frame) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) in mm of a rectangle that holds what the plane cuts of a warped volume.

    A warp is known from the patient to the volume only, so the volume has to be searched for. The plane is
    covered with a coarse lattice, `_REACH` diagonals around where the volume would be without its warp; a
    cell is kept when the voxel indices at its corners reach the volume, give or take what they change by in
    the cells around; the rectangle around the kept cells is searched again until it hardly shrinks. It is
    somewhat too large. A volume moved further than that reach is not found.
    """
    size = np.array(volume.size)
    offset = (volume.ijk_to_ras @ [*((size - 1) / 2), 1.0])[:3] - frame.origin
    reach = _REACH * float(np.linalg.norm(size * volume.spacing))
    x, y = float(offset @ frame.right), float(offset @ frame.down)
    left, top, right, bottom = x - reach, y - reach, x + reach, y + reach
    for _ in range(8):
        x_lines, y_lines = np.linspace(left, right, _LATTICE + 1), np.linspace(top, bottom, _LATTICE + 1)
        kept = _cells_that_may_meet(volume, _indices_of(volume, frame, x_lines, y_lines))
        if not kept.any():
            return None
        rows, columns = (_used(kept.any(axis=axis)) for axis in (1, 0))
        area = (right - left) * (bottom - top)
        left, right = float(x_lines[columns.start]), float(x_lines[columns.stop])
        top, bottom = float(y_lines[rows.start]), float(y_lines[rows.stop])
        if (right - left) * (bottom - top) > 0.9 * area:
            break
    return left, top, right, bottom


def _cells_that_may_meet(volume: Volume, indices: np.ndarray) -> np.ndarray:
    """(H, W) bool, which cells of a lattice, of (3, H + 1, W + 1) voxel indices, may meet the volume."""
    corners = np.stack([indices[:, :-1, :-1], indices[:, 1:, :-1], indices[:, :-1, 1:], indices[:, 1:, 1:]])
    low, high = corners.min(axis=0), corners.max(axis=0)
    slack = ndimage.maximum_filter(high - low, size=(1, 3, 3))
    ends = np.array(volume.size)[:, None, None] - 0.5
    return np.asarray(np.all((high + slack >= -0.5) & (low - slack <= ends), axis=0))


def _interpolate(voxels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Trilinear values of (K, J, I) or (K, J, I, 3) voxels at (3, H, W) indices I, J, K.

    Beyond the outermost voxels their values go on.

    The result is float32 where that holds the voxels' values exactly (up to 16 bits, and float32), else
    float64.
    """
    dtype = np.float32 if np.result_type(voxels.dtype, np.float32) == np.float32 else np.float64
    if voxels.dtype.kind == "f" and voxels.dtype.itemsize not in (4, 8):
        voxels = voxels.astype(dtype)  # half and extended precision are unknown to scipy
    channels = [voxels] if voxels.ndim == 3 else [voxels[..., channel] for channel in range(3)]
    sampled = [
        ndimage.map_coordinates(channel, indices[::-1], output=dtype, order=1, mode="nearest")
        for channel in channels
    ]
    return sampled[0] if voxels.ndim == 3 else np.stack(sampled, axis=-1)
