"""Slice views brought to a slice of a volume, and which slice they are at."""

from __future__ import annotations

import numpy as np
import slicer

from .scene import is_shown
from .scene_views import Node, slice_logic, slice_view_names
from .scene_volume_map import VolumeMap

_PARALLEL = 1e-3


def views_of(volume: Node) -> tuple[str, ...]:
    """Layout names of the slice views that show a volume."""
    return tuple(name for name in slice_view_names() if is_shown(volume, name))


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
        if _is_parallel(node, volume_map):
            node.JumpSliceByOffsetting(*middle)
        elif peak is not None:
            node.JumpSliceByOffsetting(*peak)


def slice_in_views(volume_map: VolumeMap) -> int | None:
    """Index of the slice that a view along the map's axis is at; None if there is no such view."""
    to_ijk = np.linalg.inv(volume_map.grid)
    for name in _views(volume_map):
        node = slice_logic(name).GetSliceNode()
        if _is_parallel(node, volume_map):
            origin = slicer.util.arrayFromVTKMatrix(node.GetSliceToRAS())[:, 3]
            return round(float((to_ijk @ origin)[volume_map.axis]))
    return None


def _views(volume_map: VolumeMap) -> list[str]:
    shown = (volume_map.node, volume_map.source)
    return [n for n in slice_view_names() if any(node is not None and is_shown(node, n) for node in shown)]


def _is_parallel(node: Node, volume_map: VolumeMap) -> bool:
    normal = slicer.util.arrayFromVTKMatrix(node.GetSliceToRAS())[:3, 2]
    gradient = np.linalg.inv(volume_map.grid[:3, :3])[volume_map.axis]
    gradient = gradient / np.linalg.norm(gradient)
    return bool(np.linalg.norm(np.cross(normal, gradient)) < _PARALLEL)
