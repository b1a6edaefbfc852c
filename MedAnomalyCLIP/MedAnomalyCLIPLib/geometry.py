"""Planes of a volume: cut one out as the reader sees it, and put a map back where it came from.

`Volume` in, `SlicePlane` out. All positions are RAS in mm, all matrices map homogeneous column vectors.
Planes that no stack of voxels lies in are sampled by `resampling`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from .background import Background
from .errors import GeometryRefused, InvalidRequest
from .resampling import Frame, finite_pixels, missed, resample, to_index
from .volume import Volume

AXES = ("I", "J", "K")

_VIEWS = ("Sagittal", "Coronal", "Axial")  # the views whose normals are R, A and S
_READING_ORIENTATION = (  # of each view: to the right, and down, in RAS
    (np.array([0.0, -1.0, 0.0]), np.array([0.0, 0.0, -1.0])),
    (np.array([-1.0, 0.0, 0.0]), np.array([0.0, 0.0, -1.0])),
    (np.array([-1.0, 0.0, 0.0]), np.array([0.0, -1.0, 0.0])),
)
_TOLERANCE_DEGREES = 0.1  # Slicer's own for calling a view aligned
_TOLERANCE = math.sin(math.radians(_TOLERANCE_DEGREES))
_TIE = 1e-6  # far above rounding errors, far below a difference that means something


@dataclass(frozen=True)
class AlignedSlice:
    """Which voxels an aligned plane shows, and how they were turned to reading orientation.

    The slab of voxels at `index` along `axis` is transposed, then flipped; undoing it runs backwards.

    Attributes:
        axis: 0, 1 or 2 for I, J or K.
        index: position along that axis, from 0.
        transpose: whether rows and columns of the slab were exchanged.
        flip_rows: whether row 0 of the plane is the last row after transposing.
        flip_columns: likewise for columns.
    """

    axis: int
    index: int
    transpose: bool
    flip_rows: bool
    flip_columns: bool


@dataclass(frozen=True, eq=False)
class SlicePlane:
    """A flat image cut from a volume, as the reader sees it, and where it lies in the patient.

    Pixels keep the volume's own spacing, so they may be oblong; the network's square grid is made, and
    undone, by `preprocess`. So an aligned plane holds voxels untouched.

    Attributes:
        pixels: (H, W) or (H, W, 3); row 0 is the top of the view, column 0 its left.
        ijk_to_ras: 4x4, pixel centre (column, row, 0, 1) to RAS in mm; the third column is the normal
            times the distance between source slices.
        valid: (H, W) bool, False where the plane leaves the volume or a voxel is not a finite number.
        aligned: the voxels shown, None when the plane was resampled.
        modality: as `Volume.modality`.
        units: as `Volume.units`.
        description: the plane in words, for example "Axial 17 of 40, aligned".
        spacing_known: as `Volume.spacing_known`.
        background: as `Volume.background`; None when that is not known.
    """

    pixels: np.ndarray
    ijk_to_ras: np.ndarray
    valid: np.ndarray
    aligned: AlignedSlice | None = None
    modality: str = ""
    units: str = ""
    description: str = ""
    spacing_known: bool = True
    background: Background | None = None

    @cached_property
    def is_empty(self) -> bool:
        """Whether it shows nothing but noise, as slices above a head do; False when that is not known."""
        return self.background is not None and self.background.is_all_of(self)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def spacing(self) -> tuple[float, float]:
        """Distance in mm between (rows, columns), the same order as `shape`."""
        column, row = np.linalg.norm(self.ijk_to_ras[:3, :2], axis=0)
        return float(row), float(column)

    @property
    def pixel_area_mm2(self) -> float:
        return float(np.linalg.norm(np.cross(self.ijk_to_ras[:3, 0], self.ijk_to_ras[:3, 1])))

    def to_ras(self, column: float, row: float) -> np.ndarray:
        """(3,) position in mm of a point given in pixels; whole numbers are pixel centres."""
        return (self.ijk_to_ras @ np.array([column, row, 0.0, 1.0]))[:3]

    def to_pixel(self, ras: np.ndarray) -> tuple[float, float]:
        """(column, row) of the pixel nearest a position in RAS mm, in fractions; the inverse of `to_ras`."""
        offset = np.asarray(ras, dtype=np.float64) - self.ijk_to_ras[:3, 3]
        column, row, _ = np.linalg.solve(self.ijk_to_ras[:3, :3], offset)
        return float(column), float(row)


def cut_slice(volume: Volume, axis: int, index: int) -> SlicePlane:
    """Cut the slice at a position along a voxel axis, in canonical reading orientation.

    The slice is turned by quarter turns and flips to what is nearest the reading orientation of its
    anatomical view, so the same anatomy gives the same pixels in whatever order its voxels are stored. Voxels
    are untouched, unless the two voxel axes in the slice are not perpendicular: then the slice is resampled.

    Args:
        volume: the image.
        axis: 0, 1 or 2 for I, J or K.
        index: position along that axis, from 0; `SlicePlane.description` counts from 1, as people do.

    Raises:
        InvalidRequest: no such axis or slice, or the volume is under a non-linear transform, where its slices
            are curved surfaces: only planes of the patient can be cut there.
    """
    return next(cut_slices(volume, axis, [index]))


def cut_slices(volume: Volume, axis: int, indices: Iterable[int]) -> Iterator[SlicePlane]:
    """Cut slices one after the other as `cut_slice` does; what they have in common is worked out once."""
    count = slice_count(volume, axis)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < count:
            raise InvalidRequest(f"There is no slice {index} along {AXES[axis]}; choose 0 to {count - 1}")
        if volume.warp is not None:
            raise InvalidRequest(
                "The image is under a non-linear transform, so its slices are curved in the patient; "
                "take the plane of a slice view instead, or remove or harden the transform"
            )
        reading = _reading(volume, axis)
        if reading.slices is not None:
            yield reading.slices.take(volume, int(index))
        else:
            frame = _frame_of_slice(volume, axis, int(index), reading.right, reading.down)
            yield _resampled_plane(volume, frame)


def cut_plane(volume: Volume, slice_to_ras: np.ndarray) -> SlicePlane:
    """Cut the plane of a Slicer slice view.

    When the plane is parallel to a stack of voxels (within 0.1°, Slicer's own tolerance) the nearest slice of
    that stack is taken untouched, turned by quarter turns and flips to what is nearest the view's
    orientation. Otherwise, and always under a non-linear transform, it is resampled: rows and columns along
    the view's axes, at the volume's own spacing, clipped to the volume.

    Args:
        volume: the image.
        slice_to_ras: 4x4; first column the view's right, second the view's UP (pixels of the result go down),
            fourth a point of the plane in RAS mm, which may lie anywhere in it. Handedness does not matter,
            and neither do lengths.

    Raises:
        GeometryRefused: the matrix is not that of a plane, or the plane misses the volume.
    """
    frame = Frame.of_view(slice_to_ras)
    axis = None if volume.warp is not None else _parallel_axis(volume, frame.normal)
    if axis is None:
        return _resampled_plane(volume, frame)
    # Within the tolerance the index still drifts along the plane, so it is read where the plane passes the
    # volume's centre, not at the origin, which may be far away.
    centre = (volume.ijk_to_ras @ [*((np.array(volume.size) - 1) / 2), 1.0])[:3]
    nearest = centre + (frame.origin - centre) @ frame.normal * frame.normal
    position, last = float(to_index(volume, nearest)[axis]), volume.size[axis] - 1
    if not -0.5 - _TIE <= position <= last + 0.5 + _TIE:
        raise missed(volume)
    index = min(max(math.floor(position + 0.5), 0), last)
    return _AlignedSlices.of(volume, axis, frame.right, frame.down).take(volume, index)


def to_slab(aligned: AlignedSlice, image: np.ndarray) -> np.ndarray:
    """Turn (H, W) or (H, W, 3) pixels of an aligned plane back to the order of the voxels they came from.

    Shapes:
        returns: (J, I) for axis K, (K, I) for axis J, (K, J) for axis I, and 3 colours if there are; a view.
    """
    if aligned.flip_rows:
        image = image[::-1]
    if aligned.flip_columns:
        image = image[:, ::-1]
    return image.swapaxes(0, 1) if aligned.transpose else image


def place_in_volume(plane: SlicePlane, image: np.ndarray, out: np.ndarray) -> None:
    """Write an image on an aligned plane's grid to the voxels the plane shows.

    Args:
        plane: an aligned plane.
        image: (H, W) or (H, W, 3), for example a map or mask of that plane.
        out: (K, J, I) or (K, J, I, 3), changed in place and only in that slice.

    Raises:
        GeometryRefused: the plane was resampled, so its pixels are no voxels.
    """
    if plane.aligned is None:
        raise GeometryRefused(
            f"{plane.description or 'This plane'} has pixels of its own, which cannot be put back as voxels; "
            "keep the result on the plane's own grid"
        )
    if image.shape[:2] != plane.shape:
        raise ValueError(f"image {image.shape} does not fit its plane {plane.shape}")
    _slab(out, plane.aligned.axis, plane.aligned.index)[...] = to_slab(plane.aligned, image)


def slice_count(volume: Volume, axis: int) -> int:
    """Number of slices along a voxel axis (0, 1, 2 for I, J, K)."""
    if isinstance(axis, bool) or axis not in (0, 1, 2):
        raise InvalidRequest(f"There is no voxel axis {axis}; choose 0, 1 or 2 for I, J or K")
    return volume.size[axis]


def resolve_axis(volume: Volume, name: str) -> int:
    """Voxel axis (0, 1, 2) that a name means in a volume.

    Args:
        volume: the image.
        name: "I", "J", "K"; "axial", "coronal", "sagittal" for the axis whose slices are nearest that view, a
            different one for each view; "acquisition" for the slices as they were made. Case does not matter.
    """
    key = name.strip().lower()
    if key.upper() in AXES:
        return AXES.index(key.upper())
    if key == "acquisition":
        return acquisition_axis(volume)
    for view, word in enumerate(_VIEWS):
        if key == word.lower():
            return _view_of_axes(volume).index(view)
    raise InvalidRequest(
        f"There is no axis {name!r}; choose I, J, K, axial, coronal, sagittal or acquisition"
    )


def acquisition_axis(volume: Volume) -> int:
    """Voxel axis (0, 1, 2) along which the slices were most likely acquired.

    The only axis that is one voxel long; else the axis whose spacing differs from that of the other two; else
    K, the axis on which files stack their slices.
    """
    flat = [axis for axis in range(3) if volume.size[axis] == 1]
    if len(flat) == 1:
        return flat[0]
    spacing = volume.spacing
    for axis in (2, 1, 0):
        one, other = (spacing[a] for a in range(3) if a != axis)
        if math.isclose(one, other, rel_tol=0.01) and not math.isclose(spacing[axis], one, rel_tol=0.01):
            return axis
    return 2


def view_name(volume: Volume, axis: int) -> str:
    """ "Axial", "Coronal" or "Sagittal": the view that slices along a voxel axis are nearest to."""
    slice_count(volume, axis)
    return _VIEWS[_view_of_axes(volume)[axis]]


def _frame_of_slice(volume: Volume, axis: int, index: int, right: np.ndarray, down: np.ndarray) -> Frame:
    """The plane of a slice whose voxel axes are not perpendicular: columns along one of them."""
    turned = _nearest_turn(volume, axis, index, right, down)
    column, row = _grid_of(volume, turned)[:3, :2].T
    along = column / np.linalg.norm(column)
    across = row - (row @ along) * along
    centre = (np.array(volume.size) - 1) / 2
    centre[axis] = index
    return Frame((volume.ijk_to_ras @ [*centre, 1.0])[:3], along, across / np.linalg.norm(across))


def _slice_normals(volume: Volume) -> np.ndarray:
    """(3, 3) rows: unit normals of the slices along I, J, K; not voxel axes where the grid is sheared."""
    gradients = np.linalg.inv(volume.ijk_to_ras[:3, :3])
    return gradients / np.linalg.norm(gradients, axis=1, keepdims=True)


def _in_plane_axes_are_perpendicular(volume: Volume, axis: int) -> bool:
    one, other = (volume.ijk_to_ras[:3, a] / volume.spacing[a] for a in range(3) if a != axis)
    return bool(abs(one @ other) <= _TOLERANCE)


def _parallel_axis(volume: Volume, normal: np.ndarray) -> int | None:
    """The voxel axis whose slices a plane is parallel to and can show untouched, None if there is none."""
    for axis, slice_normal in enumerate(_slice_normals(volume)):
        parallel = np.linalg.norm(np.cross(slice_normal, normal)) <= _TOLERANCE
        if parallel and _in_plane_axes_are_perpendicular(volume, axis):
            return axis
    return None


def _view_of_axes(volume: Volume) -> tuple[int, ...]:
    """For each voxel axis the view its slices show: 0 sagittal, 1 coronal, 2 axial, each once.

    Where two choices are equally near (a volume turned by 45°) a small term in the directions of the normals,
    blind to their signs, decides, so that the order in which voxels are stored does not.
    """
    normals = _slice_normals(volume)
    x, y, z = normals.T
    tilt = x * y + 2 * y * z + 3 * z * x
    return max(
        itertools.permutations(range(3)),
        key=lambda views: sum(abs(normals[a, view]) + _TIE * tilt[a] * view for a, view in enumerate(views)),
    )


def _nearest_turn(volume: Volume, axis: int, index: int, right: np.ndarray, down: np.ndarray) -> AlignedSlice:
    """How to turn a slice so that its columns and rows go as nearly as possible to the right and down."""

    def nearness(turned: AlignedSlice) -> float:
        column, row = _grid_of(volume, turned)[:3, :2].T
        column, row = column / np.linalg.norm(column), row / np.linalg.norm(row)
        # The last term decides between the two equal choices of a slice turned by 45°, and the same for all
        # orders in which its voxels may be stored.
        return float(column @ right + row @ down + _TIE * (column @ down))

    turns = itertools.product((False, True), repeat=3)
    return max((AlignedSlice(axis, index, *turn) for turn in turns), key=nearness)


def _grid_of(volume: Volume, aligned: AlignedSlice) -> np.ndarray:
    """4x4 pixel-to-RAS matrix of a slice turned in a given way."""
    grid = np.eye(4)
    for pixel_axis, (voxel_axis, flip) in enumerate(_pixel_axes(aligned)):
        grid[:3, pixel_axis] = volume.ijk_to_ras[:3, voxel_axis] * (-1 if flip else 1)
    normal = np.cross(grid[:3, 0], grid[:3, 1])
    distance = 1 / np.linalg.norm(np.linalg.inv(volume.ijk_to_ras[:3, :3])[aligned.axis])
    grid[:3, 2] = normal / np.linalg.norm(normal) * distance
    grid[:3, 3] = _first_pixel(volume, aligned)
    return grid


def _first_pixel(volume: Volume, aligned: AlignedSlice) -> np.ndarray:
    """(3,) position in RAS mm of a turned slice's first pixel."""
    first = np.array([0.0, 0.0, 0.0, 1.0])
    first[aligned.axis] = aligned.index
    for voxel_axis, flip in _pixel_axes(aligned):
        first[voxel_axis] = volume.size[voxel_axis] - 1 if flip else 0
    return (volume.ijk_to_ras @ first)[:3]


def _pixel_axes(aligned: AlignedSlice) -> tuple[tuple[int, bool], tuple[int, bool]]:
    """Of a turned slice's columns, then rows: the voxel axis that they go along, and whether backwards."""
    low, high = (axis for axis in range(3) if axis != aligned.axis)  # a slab has its lower axis last
    columns, rows = (high, low) if aligned.transpose else (low, high)
    return (columns, aligned.flip_columns), (rows, aligned.flip_rows)


def _slab(voxels: np.ndarray, axis: int, index: int) -> np.ndarray:
    """View of the voxels at a position along I, J or K."""
    return voxels[(slice(None),) * (2 - axis) + (index,)]


@dataclass(frozen=True, eq=False)
class _AlignedSlices:
    """The slices along a voxel axis, all turned in the same way; what they share is found once for all.

    Attributes:
        turned: how, with the index of the first slice.
        grid: 4x4 pixel-to-RAS matrix of that.
        view: name of the view that they show.
    """

    turned: AlignedSlice
    grid: np.ndarray
    view: str

    @classmethod
    def of(cls, volume: Volume, axis: int, right: np.ndarray, down: np.ndarray) -> _AlignedSlices:
        turned = _nearest_turn(volume, axis, 0, right, down)
        view = view_name(volume, axis) if volume.spacing_known else "Image"
        return cls(turned, _grid_of(volume, turned), view)

    def take(self, volume: Volume, index: int) -> SlicePlane:
        aligned = replace(self.turned, index=index)
        pixels = _slab(volume.voxels, aligned.axis, index)
        if aligned.transpose:
            pixels = pixels.swapaxes(0, 1)
        pixels = pixels[:: -1 if aligned.flip_rows else 1, :: -1 if aligned.flip_columns else 1]
        # Copied, so that the plane stays what it was at the click, whatever becomes of the volume.
        pixels = pixels.copy(order="C")
        grid = self.grid.copy()
        grid[:3, 3] = _first_pixel(volume, aligned)
        return SlicePlane(
            pixels=pixels,
            ijk_to_ras=grid,
            valid=finite_pixels(pixels),
            aligned=aligned,
            modality=volume.modality,
            units=volume.units,
            description=f"{self.view} {index + 1} of {volume.size[aligned.axis]}, aligned",
            spacing_known=volume.spacing_known,
            background=volume.background,
        )


class _Reading(NamedTuple):
    """How slices along a voxel axis are read.

    Attributes:
        right, down: (3,) where columns and rows should go.
        slices: as near to that as quarter turns and flips come; None where axes are not perpendicular.
    """

    right: np.ndarray
    down: np.ndarray
    slices: _AlignedSlices | None


_readings: WeakKeyDictionary[Volume, dict[int, _Reading]] = WeakKeyDictionary()


def _reading(volume: Volume, axis: int) -> _Reading:
    """Worked out once for each volume and axis: slice after slice is cut while a reader waits."""
    known = _readings.setdefault(volume, {})
    if axis not in known:
        right, down = _READING_ORIENTATION[_view_of_axes(volume)[axis]]
        perpendicular = _in_plane_axes_are_perpendicular(volume, axis)
        slices = _AlignedSlices.of(volume, axis, right, down) if perpendicular else None
        known[axis] = _Reading(right, down, slices)
    return known[axis]


def _resampled_plane(volume: Volume, frame: Frame) -> SlicePlane:
    resampled = resample(volume, frame)
    plane = SlicePlane(
        pixels=resampled.pixels,
        ijk_to_ras=resampled.ijk_to_ras,
        valid=resampled.valid,
        modality=volume.modality,
        units=volume.units,
        spacing_known=volume.spacing_known,
        background=volume.background,
    )
    return replace(plane, description=_describe_resampled(volume, frame, plane.spacing))


def _describe_resampled(volume: Volume, frame: Frame, spacing: tuple[float, float]) -> str:
    """For example "Axial oblique 8°, resampled 0.8 mm"; the angle is that to the nearest stack of voxels."""
    # Rounded, so that at 45° between two views the same one is named whatever the last digits are.
    view = (
        _VIEWS[2 - int(np.argmax(np.round(np.abs(frame.normal[::-1]), 6)))]
        if volume.spacing_known
        else "Image"
    )
    if volume.warp is not None:
        how = "warped"
    else:
        sine = np.linalg.norm(np.cross(_slice_normals(volume), frame.normal), axis=1).min()
        angle = math.degrees(math.asin(min(1.0, float(sine))))
        how = "sheared" if angle <= _TOLERANCE_DEGREES else f"oblique {angle:.{0 if angle >= 1 else 1}f}°"
    rows, columns = (f"{step:.3g}" for step in spacing)
    return f"{view} {how}, resampled {rows if rows == columns else f'{rows} x {columns}'} mm"
