"""The map of a whole volume: one node on the volume's own grid, filled slice by slice.

Results of aligned slices in; voxels, a segment, and numbers of each slice out. Only the slice's own voxels
are written. The node remembers what it says of every slice, so a saved scene can be looked through, exported,
and gone on with. Call everything here on the main thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _
from vtk.util.numpy_support import vtk_to_numpy

from .errors import InvalidRequest
from .geometry import AXES, SlicePlane, cut_slice, place_in_volume
from .result import AnomalyResult
from .scene import ijk_to_local, prepare_display, set_map_threshold, show_map
from .scene_nodes import (
    ROLE,
    SOURCE,
    VOLUME_MAP,
    adopt,
    new_result_node,
    number_or_none,
    provenance_of,
    record_detector,
    recorded,
    result_node,
)
from .scene_segments import find_segment, write_segment
from .scene_table import write_table
from .scene_views import Node
from .slice_table import SliceRow
from .stored_map import NOT_ANALYSED, from_stored, to_stored
from .volume import Volume

_SEGMENTATION = "MedAnomalyCLIP.Segmentation"
_TABLE = "MedAnomalyCLIP.Table"
_AXIS = "MedAnomalyCLIP.Axis"
_SLICES = "MedAnomalyCLIP.Slices"
_SAME_PLACE_MM = 1e-3


class VolumeMap:
    """What is known of a volume's slices along one axis, in the nodes of a scene.

    Attributes:
        node: vtkMRMLScalarVolumeNode, float32, on the volume's grid in the world, under no transform; values
            as `stored_map` tells.
        axis: 0, 1 or 2 for I, J or K.
        grid: (4, 4) IJK to world RAS of the volume at the time of the run.
        rows: what is told of each slice, by index.
    """

    def __init__(self, node: Node) -> None:
        """Read a node that `create` made, perhaps long ago."""
        self.node = node
        self.axis = AXES.index(node.GetAttribute(_AXIS))
        self.grid = ijk_to_local(node)
        self._told = node.GetAttribute(_SLICES) or "[]"
        self.rows = {record["index"]: SliceRow.from_record(record) for record in json.loads(self._told)}
        self._held: Volume | None = None  # of its voxels; what slices have in common is worked out once
        self._unfinished: tuple[float, bool] | None = None  # what slices that await a refresh may still show

    @classmethod
    def create(
        cls,
        source: Node,
        volume: Volume,
        axis: int,
        node: Node | None = None,
        segmentation: Node | None = None,
        colours: Node | None = None,
        image: vtk.vtkImageData | None = None,
    ) -> VolumeMap:
        """A map in which nothing is analysed yet.

        Args:
            source: the volume node.
            volume: the same, as read at the click.
            axis: along which slices will come.
            node: volume node to use; None for the one of this volume, made when there is none.
            segmentation: segmentation node to use; None for the one of this volume.
            colours: colour node to show the map in; None for our own.
            image: voxels from `new_image`, emptied; None to make them here.

        Raises:
            InvalidRequest: `node` holds something else, which would be lost.
        """
        check_usable(node, source)
        if image is None:
            image = new_image(volume)
            empty(image)
        if node is None:
            node = result_node("vtkMRMLScalarVolumeNode", VOLUME_MAP, source)
        with slicer.util.NodeModify(node):
            adopt(node, VOLUME_MAP, source)
            # Before there are voxels: Slicer looks through all of them for a window when it makes a display.
            node.SetAndObserveImageData(None)
            # Between slices there is nothing to interpolate: the next one may not be analysed.
            prepare_display(node, colours).InterpolateOff()
            node.SetAndObserveTransformNodeID(None)
            node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(volume.ijk_to_ras))
            node.SetAndObserveImageData(image)
            node.SetAttribute(_AXIS, AXES[axis])
            node.SetAttribute(_SLICES, "[]")
            node.SetNodeReferenceID(_SEGMENTATION, segmentation and segmentation.GetID())
        made = cls(node)
        made._tell()
        return made

    # Nodes that belong to it

    @property
    def source(self) -> Node | None:
        """The volume that it was made from; None when that was deleted."""
        return self.node.GetNodeReference(SOURCE)

    @property
    def segmentation(self) -> Node | None:
        return self.node.GetNodeReference(_SEGMENTATION)

    @property
    def segment_id(self) -> str | None:
        """The segment of its masks; None when nothing reached the threshold yet."""
        return find_segment(self.segmentation, self.grid) if self.segmentation else None

    @property
    def table(self) -> Node | None:
        return self.node.GetNodeReference(_TABLE)

    @property
    def is_alive(self) -> bool:
        """Whether its node is still in the scene."""
        return bool(slicer.mrmlScene.IsNodePresent(self.node))

    @property
    def is_current(self) -> bool:
        """Whether nobody else changed what its node says: another object, a loaded scene, undo."""
        return self.is_alive and self._told == self.node.GetAttribute(_SLICES)

    @property
    def image_threshold(self) -> float | None:
        return number_or_none(recorded(self.node, "ImageThreshold"))

    @property
    def threshold(self) -> float | None:
        """Map value from which a pixel counts; None before the first result."""
        return number_or_none(recorded(self.node, "Threshold"))

    @property
    def min_area_mm2(self) -> float:
        return float(recorded(self.node, "SmallestAreaMM2") or 0)

    @property
    def slices(self) -> int:
        """Number of slices along the axis, analysed or not."""
        return int(self.node.GetImageData().GetDimensions()[self.axis])

    # Filling it

    def check_grid(self, volume: Volume, axis: int) -> None:
        """Raise unless slices of this volume can join those that are there.

        Raises:
            InvalidRequest: why they cannot.
        """
        if axis != self.axis:
            words = _("The earlier run went along {before}, this one goes along {now}; start anew")
            raise InvalidRequest(words.format(before=AXES[self.axis], now=AXES[axis]))
        same_size = tuple(self.node.GetImageData().GetDimensions()) == volume.size
        if not same_size or not np.allclose(self.grid, volume.ijk_to_ras, atol=_SAME_PLACE_MM):
            raise InvalidRequest(_("The volume was moved or replaced since the earlier run; start anew"))

    def check_detector(self, result: AnomalyResult) -> None:
        """Raise InvalidRequest unless this result's detector made those that are there."""
        if self.rows and result.provenance.bundle_sha256 != recorded(self.node, "BundleSHA256"):
            words = _("The earlier run used another detector, {name}; choose it, or start anew")
            raise InvalidRequest(words.format(name=recorded(self.node, "Bundle")))

    def write(self, result: AnomalyResult, room: tuple[int, int] | None = None) -> None:
        """Write the result of one slice to map, segment and table, and touch no other slice.

        Args:
            result: of an aligned slice along `axis`.
            room: first and last slice of the run.
        """
        row = SliceRow.of(result)
        with slicer.util.NodeModify(self.node):
            self._write_voxels(result)
            if not self.rows:
                set_map_threshold(self.node, result.threshold)
            record_detector(self.node, result)
            self.rows[row.index] = row
            self._write_segment(result, room)
            self._tell()

    def _write_voxels(self, result: AnomalyResult) -> None:
        place_in_volume(result.plane, to_stored(result), slicer.util.arrayFromVolume(self.node))
        slicer.util.arrayFromVolumeModified(self.node)

    def _write_segment(self, result: AnomalyResult, room: tuple[int, int] | None = None) -> None:
        if self.source is None:
            return
        written = write_segment(
            result, self.source, node=self.segmentation, grid=self.grid, room=room or self._extent()
        )
        if written is not None and self.segmentation is not written[0]:
            self.node.SetNodeReferenceID(_SEGMENTATION, written[0].GetID())

    def _extent(self) -> tuple[int, int]:
        return min(self.rows), max(self.rows)

    def _tell(self) -> None:
        """Bring attribute, table and plot up to date with the rows."""
        rows = [self.rows[index] for index in sorted(self.rows)]
        self._told = json.dumps([row.as_record() for row in rows])
        self.node.SetAttribute(_SLICES, self._told)
        if self.source is None:
            return
        if self.table is None:
            table = new_result_node("vtkMRMLTableNode", "table", self.source)
            self.node.SetNodeReferenceID(_TABLE, table.GetID())
        write_table(self.table, rows, self.image_threshold)

    def show(self, view_names: Sequence[str], opacity: float) -> None:
        """Make it the foreground of slice views."""
        for name in view_names:
            show_map(self.node, name, opacity)

    # Reading it

    def result(self, index: int, volume: Volume | None = None) -> AnomalyResult:
        """The result of a slice, read back.

        Args:
            index: of a slice in `rows`.
            volume: where the plane's pixels come from; None for a plane without an image.
        """
        plane = cut_slice(self._stored(), self.axis, index)
        values, valid = from_stored(plane.pixels)
        row = self.rows[index]
        if volume is None:
            plane = replace(plane, pixels=np.zeros(values.shape, np.uint8), valid=valid)
        else:
            plane = self._cut_image(volume, index)
        return AnomalyResult(
            plane=plane,
            score=row.score,
            map=values,
            threshold=self.threshold or 0.0,
            provenance=provenance_of(self.node),
            percentile=row.percentile,
            image_threshold=self.image_threshold,
            window=row.window,
            unlikeness=row.unlikeness,
            unlike_threshold=row.unlike_threshold,
            is_empty=row.empty,
            min_area_mm2=self.min_area_mm2,
        )

    def _stored(self) -> Volume:
        """The map's own voxels."""
        voxels = slicer.util.arrayFromVolume(self.node)
        held = self._held
        if held is None or held.voxels.shape != voxels.shape or not np.shares_memory(held.voxels, voxels):
            known = recorded(self.node, "SpacingKnown") != "False"
            held = self._held = Volume(voxels, self.grid, spacing_known=known)
        return held

    def _cut_image(self, volume: Volume, index: int) -> SlicePlane:
        if tuple(self.node.GetImageData().GetDimensions()) != volume.size:
            raise InvalidRequest(_("The volume was replaced since its slices were analysed; detect anew"))
        # Where the slices were analysed, wherever the volume was moved since.
        return cut_slice(replace(volume, ijk_to_ras=self.grid, warp=None), self.axis, index)

    def refresh(self, threshold: float, min_area_mm2: float) -> Iterator[int]:
        """Apply another threshold or smallest area, a slice at each step; the overlay's limit acts at once.

        Yields:
            index of a slice that is up to date; nothing for slices on which nothing changes.
        """
        before, signs_change = self._unfinished or (threshold, False)
        before = min(before, threshold if self.threshold is None else self.threshold)
        signs_change = signs_change or bool(self.min_area_mm2 or min_area_mm2)
        self._unfinished = before, signs_change
        set_map_threshold(self.node, threshold)
        self.node.SetAttribute("MedAnomalyCLIP.SmallestAreaMM2", f"{min_area_mm2:.9g}")
        return self._refresh_slices(min(before, threshold), signs_change)

    def _refresh_slices(self, lowest: float, signs_change: bool) -> Iterator[int]:
        """Bring slices up to date on which anything may have reached, or now reaches, the threshold."""
        for index in sorted(self.rows):
            if not self.is_alive:
                return
            if self.rows[index].peak < lowest:
                continue
            result = self.result(index)
            self.rows[index] = replace(self.rows[index], area_mm2=round(result.area_mm2, 4))
            with slicer.util.NodeModify(self.node):
                if signs_change:
                    self._write_voxels(result)
                self._write_segment(result)
            yield index
        self._unfinished = None
        with slicer.util.NodeModify(self.node):
            self._tell()


def new_image(volume: Volume) -> vtk.vtkImageData:
    """Voxels for a map of a volume, not set to anything yet."""
    image = vtk.vtkImageData()
    image.SetDimensions(*volume.size)
    image.AllocateScalars(vtk.VTK_FLOAT, 1)
    return image


def empty(image: vtk.vtkImageData) -> None:
    """Mark all voxels of a map as not analysed.

    The first touch of so much memory takes 0.1 s for 60 slices of 512 x 512: for the worker, while no node
    has the image yet.
    """
    vtk_to_numpy(image.GetPointData().GetScalars())[...] = NOT_ANALYSED


def check_usable(node: Node | None, source: Node) -> None:
    """Raise InvalidRequest if a node cannot become the map of a volume because it holds something else."""
    if node is None or node.GetImageData() is None:
        return
    if not is_volume_map(node):
        words = _("{name} holds an image already; choose or make another node")
        raise InvalidRequest(words.format(name=node.GetName()))
    if node.GetNodeReference(SOURCE) not in (None, source):
        words = _("{name} holds results of another volume; choose or make another node")
        raise InvalidRequest(words.format(name=node.GetName()))


def is_volume_map(node: Node | None) -> bool:
    """Whether a node holds the map of a volume, with what belongs to it."""
    return (
        node is not None
        and node.GetAttribute(ROLE) == VOLUME_MAP
        and bool(node.GetAttribute(_AXIS))
        and node.GetImageData() is not None
    )
