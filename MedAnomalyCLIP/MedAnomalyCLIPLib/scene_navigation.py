"""Slice views brought to a slice of a volume, and which slice they are at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import slicer

from .geometry import SlicePlane
from .scene import is_shown
from .scene_views import Node, slice_logic, slice_view_names

if TYPE_CHECKING:
    from .scene_volume_map import VolumeMap

_PARALLEL = 1e-3


def views_of(volume: Node) -> tuple[str, ...]:
    """Layout names of the slice views that show a volume."""
    return tuple(name for name in slice_view_names() if is_shown(volume, name))


def show_plane(node: Node, plane: SlicePlane, view_name: str) -> None:
    """Bring a view to a plane of a volume, and the volume into it if it shows another.

    The view is turned where it looks in another direction; else only its offset changes.
    """
    view = slice_logic(view_name)
    slice_node = view.GetSliceNode()
    if not is_shown(node, view_name):
        view.GetSliceCompositeNode().SetBackgroundVolumeID(node.GetID())
    rows, columns = plane.shape
    centre = plane.to_ras((columns - 1) / 2, (rows - 1) / 2)
    right, down = (plane.ijk_to_ras[:3, axis] / np.linalg.norm(plane.ijk_to_ras[:3, axis]) for axis in (0, 1))
    if _looks_along(slice_node, np.cross(right, down)):
        slice_node.JumpSliceByOffsetting(*centre)
        return
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, -down, np.cross(right, -down), centre], axis=1)
    slice_node.GetSliceToRAS().DeepCopy(slicer.util.vtkMatrixFromArray(matrix))
    slice_node.UpdateMatrices()


def jump_to_slice(volume_map: VolumeMap, index: int) -> None:
    """Bring the views of a map's volume to one of its slices; views across it go to the highest map value.

    Only the offset of a view changes. Where nothing was found on the slice, views across it stay.
    """
    row = volume_map.rows.get(index)
    centre = (np.array(volume_map.node.GetImageData().GetDimensions()) - 1) / 2
    centre[volume_map.axis] = index
    middle = (volume_map.grid @ [*centre, 1.0])[:3]
    peak = None if row is None or row.peak_ras is None else np.array(row.peak_ras)
    for name in _views(volume_map):
        node = slice_logic(name).GetSliceNode()
        if _looks_along(node, _normal(volume_map)):
            node.JumpSliceByOffsetting(*middle)
        elif peak is not None:
            node.JumpSliceByOffsetting(*peak)


def slice_in_views(volume_map: VolumeMap) -> int | None:
    """Index of the slice that a view along the map's axis is at; None if there is no such view."""
    to_ijk = np.linalg.inv(volume_map.grid)
    for name in _views(volume_map):
        node = slice_logic(name).GetSliceNode()
        if _looks_along(node, _normal(volume_map)):
            origin = slicer.util.arrayFromVTKMatrix(node.GetSliceToRAS())[:, 3]
            return round(float((to_ijk @ origin)[volume_map.axis]))
    return None


def _views(volume_map: VolumeMap) -> list[str]:
    shown = (volume_map.node, volume_map.source)
    return [n for n in slice_view_names() if any(node is not None and is_shown(node, n) for node in shown)]


def _normal(volume_map: VolumeMap) -> np.ndarray:
    """(3,) direction across the slices of a map's axis, RAS."""
    return np.linalg.inv(volume_map.grid[:3, :3])[volume_map.axis]


def _looks_along(node: Node, normal: np.ndarray) -> bool:
    """Whether a view shows planes with this normal, from either side."""
    seen = slicer.util.arrayFromVTKMatrix(node.GetSliceToRAS())[:3, 2]
    return bool(np.linalg.norm(np.cross(seen, normal / np.linalg.norm(normal))) < _PARALLEL)
