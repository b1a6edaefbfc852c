"""Slices of volume nodes, cut one at a time, so that Slicer stays alive.

Call everything here on the main thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import slicer
from slicer.i18n import tr as _

from .errors import Cancelled
from .geometry import SlicePlane, acquisition_axis, cut_plane, cut_slice
from .geometry import view_name as nearest_view
from .scene import volume_from_node
from .scene_views import Node, slice_logic


@dataclass(frozen=True)
class SliceStack:
    """The slices of a volume that a range is counted in.

    Attributes:
        axis: 0, 1 or 2 for I, J or K.
        count: how many slices there are along it.
        view: "Axial", "Coronal" or "Sagittal", what they are nearest to.
    """

    axis: int
    count: int
    view: str

    @classmethod
    def of(cls, node: Node, view_name: str = "") -> SliceStack:
        """Along the axis that a view shows slices of, where it shows any untouched; else as acquired."""
        volume = volume_from_node(node)
        axis = acquisition_axis(volume)
        if view_name:
            slice_to_ras = slicer.util.arrayFromVTKMatrix(
                slice_logic(view_name).GetSliceNode().GetSliceToRAS()
            )
            # The view may be anywhere; its direction is what counts.
            slice_to_ras[:3, 3] = (volume.ijk_to_ras @ [*((np.array(volume.size) - 1) / 2), 1.0])[:3]
            aligned = cut_plane(volume, slice_to_ras).aligned
            axis = axis if aligned is None else aligned.axis
        return cls(axis, volume.size[axis], nearest_view(volume, axis))


@dataclass(frozen=True, eq=False)
class CutSlice:
    """A slice and the volume it was cut from.

    Attributes:
        node: the volume.
        plane: the slice; holds a copy of its pixels.
        anatomy: share of its pixels that show something, from 0 to 1.
    """

    node: Node
    plane: SlicePlane
    anatomy: float


class SliceCutter:
    """Slices that wait to be cut. One is cut at each call, which takes a few milliseconds."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Node, int, int | SlicePlane]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, node: Node, slices: Iterable[int | SlicePlane], axis: int | None = None) -> None:
        """Put slices at the end.

        Args:
            node: the volume.
            slices: positions along the axis, from 0, or planes that were cut from it before.
            axis: 0, 1 or 2 for I, J or K; None for the axis along which the slices were acquired.

        Raises:
            UnsupportedImage: the node is no image.
        """
        if axis is None:
            axis = acquisition_axis(volume_from_node(node))
        self._waiting.extend((node, axis, one) for one in slices)

    def clear(self) -> None:
        self._waiting.clear()

    def cut(self) -> CutSlice:
        """Cut the next slice. Where that fails, the others of its volume are dropped.

        Raises:
            Cancelled: the volume was deleted meanwhile.
            InvalidRequest, UnsupportedImage: there is no such slice, or the volume cannot be cut.
        """
        node, axis, wanted = self._waiting.popleft()
        try:
            if not slicer.mrmlScene.IsNodePresent(node):
                raise Cancelled(_("The volume was deleted before all its slices were taken"))
            volume = volume_from_node(node)
            plane = wanted if isinstance(wanted, SlicePlane) else cut_slice(volume, axis, wanted)
            return CutSlice(node, plane, volume.background.anatomy_share(plane))
        except Exception:
            self._waiting = deque(other for other in self._waiting if other[0] is not node)
            raise
