"""Results to segments: a mask goes to the voxels it was computed from, in world coordinates.

One segmentation node for each source volume, under no transform: Slicer's own import of labelmaps applies the
volume's transform twice when the two nodes have different ones.

One segment for each voxel grid. Aligned slices of a volume share the volume's grid, so detections on
different slices gather in one segment, each touching its own slice only. A resampled plane has a grid of its
own and gets a segment of its own; so does a slice of a volume that was moved in between.
"""

from __future__ import annotations

import json

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from .geometry import AXES, AlignedSlice, SlicePlane, to_slab
from .resources import resource_path
from .result import RESEARCH_USE_ONLY, AnomalyResult
from .scene import ijk_to_local, world_from_local
from .scene_nodes import SOURCE, adopt, as_json, find_result_node, record_provenance, result_node
from .scene_views import Node
from .terminology import TERMINOLOGY_ENTRY, TERMS

_GRID = "MedAnomalyCLIP.Grid"
_RESULTS = "MedAnomalyCLIP.Results"
_SAME_PLACE_MM = 1e-3


def write_segment(
    result: AnomalyResult,
    source: Node,
    *,
    node: Node | None = None,
    grid: np.ndarray | None = None,
    room: tuple[int, int] | None = None,
) -> tuple[Node, str] | None:
    """Write a result's mask to the segmentation of its source volume.

    Only the slice that was detected changes. Writing the same slice again, for example with another
    threshold, replaces it.

    Args:
        result: of a plane of `source`.
        source: the volume node.
        node: segmentation node to write to; None for the one of this volume, made when first needed.
        grid: (4, 4) IJK to world RAS of the volume when its slices were cut, for a run over a volume that may
            be moved meanwhile; None for where it is now.
        room: first and last slice of a run, where more slices will follow.

    Returns:
        vtkMRMLSegmentationNode and segment ID; None when nothing reaches the threshold and there is no
        earlier mask of this slice to clear.
    """
    if grid is None:
        grid, lower, slab, on_volume = _slab_on_grid(result, source)
    else:
        lower, slab = _slab(result)
        on_volume = True
    if node is None:
        node = find_result_node("vtkMRMLSegmentationNode", "segmentation", source)
    elif node.GetNodeReference(SOURCE) is None:
        _prepare_segmentation(adopt(node, "segmentation", source), source)
    segment_id = find_segment(node, grid, on_volume) if node else None
    if segment_id is None and not slab.any():
        return None
    if node is None:
        node = result_node("vtkMRMLSegmentationNode", "segmentation", source)
        _prepare_segmentation(node, source)
    if segment_id is None:
        name = TERMS.name if on_volume else f"{TERMS.name}, {result.plane.description}"
        segment_id = _add_segment(node, name, grid)
    with slicer.util.NodeModify(node):
        _paint(node.GetSegmentation(), segment_id, slab, lower, grid, _span(result, room))
        _record_in_segment(node.GetSegmentation().GetSegment(segment_id), result)
        record_provenance(node, result)
    return node, segment_id


def _span(result: AnomalyResult, room: tuple[int, int] | None) -> tuple[int, int, int] | None:
    aligned = result.plane.aligned
    return None if room is None or aligned is None else (aligned.axis, *room)


def _slab_on_grid(result: AnomalyResult, source: Node) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """The mask as voxels of the volume if the plane is still a slice of it, else of the plane's own grid.

    Shapes:
        returns: grid (4, 4) IJK to world RAS, index (3,) of the first voxel, voxels (K, J, I) uint8, and
            whether the grid is the volume's.
    """
    plane, mask = result.plane, result.mask.astype(np.uint8)
    own = plane.ijk_to_ras, np.zeros(3, dtype=int), mask[np.newaxis], False
    to_world, warp = world_from_local(source)
    if plane.aligned is None or warp is not None or source.GetImageData() is None:
        return own
    grid = to_world @ ijk_to_local(source)
    if not _lies_on(plane, plane.aligned, grid):
        return own
    return grid, *_slab(result), True


def _slab(result: AnomalyResult) -> tuple[np.ndarray, np.ndarray]:
    """Index (3,) of the first voxel and voxels (K, J, I) uint8 of an aligned result's mask."""
    aligned = result.plane.aligned
    assert aligned is not None
    lower = np.zeros(3, dtype=int)
    lower[aligned.axis] = aligned.index
    return lower, np.expand_dims(to_slab(aligned, result.mask.astype(np.uint8)), 2 - aligned.axis)


def _lies_on(plane: SlicePlane, aligned: AlignedSlice, grid: np.ndarray) -> bool:
    """Whether the corners of an aligned plane are where a volume's matrix puts those voxels now."""
    height, width = plane.shape
    rows = to_slab(aligned, np.broadcast_to(np.arange(height)[:, np.newaxis], plane.shape))
    columns = to_slab(aligned, np.broadcast_to(np.arange(width), plane.shape))
    outer, inner = (axis for axis in (2, 1, 0) if axis != aligned.axis)
    for corner in ((0, 0), (0, -1), (-1, 0)):
        ijk = np.array([0, 0, 0, 1], dtype=float)
        ijk[aligned.axis] = aligned.index
        ijk[outer], ijk[inner] = (at % size for at, size in zip(corner, rows.shape, strict=True))
        here = plane.to_ras(columns[corner], rows[corner])
        if np.linalg.norm((grid @ ijk)[:3] - here) > _SAME_PLACE_MM:
            return False
    return True


def _prepare_segmentation(node: Node, source: Node) -> None:
    node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(source)
    display = node.GetDisplayNode()
    display.SetOpacity2DFill(0.0)  # the heat map under it is what the reader looks at
    display.SetOpacity2DOutline(1.0)
    display.SetSliceIntersectionThickness(2)
    register_terminology()


def register_terminology() -> None:
    """Make our coded term known to Slicer, so that its selectors can show it."""
    path = resource_path("MedAnomalyCLIP.term.json")
    module = getattr(slicer.modules, "terminologies", None)
    if module is None:
        return
    context = json.loads(path.read_text(encoding="utf-8"))["SegmentationCategoryTypeContextName"]
    if not module.logic().IsTerminologyContextLoaded(context):
        module.logic().LoadTerminologyFromFile(str(path))


def find_segment(node: Node, grid: np.ndarray, on_volume: bool = True) -> str | None:
    """The segment made for a grid; None if there is none, or if somebody has given it another grid since."""
    segmentation = node.GetSegmentation()
    for segment_id in segmentation.GetSegmentIDs():
        segment = segmentation.GetSegment(segment_id)
        text = _tag(segment, _GRID)
        if not text or not np.allclose(json.loads(text), grid, atol=_SAME_PLACE_MM):
            continue
        image = segment.GetRepresentation(_labelmap_name())
        if not on_volume or image is None or image.IsEmpty() or _has_grid(image, grid):
            return segment_id
    return None


def _add_segment(node: Node, name: str, grid: np.ndarray) -> str:
    segment = slicer.vtkSegment()
    segment.SetName(name)
    segment.SetColor(*(channel / 255.0 for channel in TERMS.colour))
    segment.NameAutoGeneratedOff()
    segment.ColorAutoGeneratedOff()
    segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), TERMINOLOGY_ENTRY)
    segment.SetTag(_GRID, as_json(grid))
    segment.SetTag("MedAnomalyCLIP.Notice", RESEARCH_USE_ONLY)
    segmentation = node.GetSegmentation()
    segment_id = segmentation.GenerateUniqueSegmentID("anomaly")
    segmentation.AddSegment(segment, segment_id)
    return segment_id


def _paint(
    segmentation: Node,
    segment_id: str,
    slab: np.ndarray,
    lower: np.ndarray,
    grid: np.ndarray,
    room: tuple[int, int, int] | None,
) -> None:
    """Replace one slab of a segment's mask, and nothing else, in a labelmap of the segment's own.

    Slicer's functions for this replace whole segments, or resample other segments that share the labelmap.
    A labelmap that has to grow grows once, to all of `room`: axis, first and last slice.
    """
    segment = segmentation.GetSegment(segment_id)
    image = segment.GetRepresentation(_labelmap_name())
    upper = lower + slab.shape[::-1] - 1
    fits = (
        image is not None
        and not _is_shared(segmentation, segment_id, image)
        and segment.GetLabelValue() == 1
        and image.GetScalarType() == vtk.VTK_UNSIGNED_CHAR
        and _has_grid(image, grid)
        and _covers(image, lower, upper)
    )
    if not fits:
        first, last = lower.copy(), upper.copy()
        if room is not None:
            axis, start, end = room
            first[axis], last[axis] = min(start, lower[axis]), max(end, upper[axis])
        image = _grown_labelmap(image, segment.GetLabelValue(), first, last, grid)
        segment.AddRepresentation(_labelmap_name(), image)
        segment.SetLabelValue(1)
    _region(image, lower, upper)[...] = slab
    image.GetPointData().GetScalars().Modified()
    image.Modified()


def _is_shared(segmentation: Node, segment_id: str, image: Node) -> bool:
    """Whether a labelmap holds other segments too; vtkSegmentation's own answer to this is the opposite."""
    others = (other for other in segmentation.GetSegmentIDs() if other != segment_id)
    return any(segmentation.GetSegment(o).GetRepresentation(_labelmap_name()) is image for o in others)


def _grown_labelmap(
    image: Node | None, label: int, lower: np.ndarray, upper: np.ndarray, grid: np.ndarray
) -> Node:
    """A labelmap of 0 and 1 that covers a box and whatever an older labelmap on the same grid covers."""
    keep = image is not None and not image.IsEmpty() and _has_grid(image, grid)
    first, last = _box(image) if keep else (lower, upper)
    start, end = np.minimum(first, lower), np.maximum(last, upper)
    grown = slicer.vtkOrientedImageData()
    grown.SetExtent([int(bound) for pair in zip(start, end, strict=True) for bound in pair])
    grown.SetImageToWorldMatrix(slicer.util.vtkMatrixFromArray(grid))
    # Zeros of the system: memory is taken when a slice is written, not at once, which holds the main thread.
    voxels = np.zeros(int((end - start + 1).prod()), np.uint8)
    grown.GetPointData().SetScalars(numpy_to_vtk(voxels, array_type=vtk.VTK_UNSIGNED_CHAR))
    if keep:
        _region(grown, first, last)[...] = _region(image, first, last) == label
    return grown


def _region(image: Node, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """View of a labelmap's voxels in a box of indices, ends included: (K, J, I)."""
    first, _ = _box(image)
    voxels = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])
    return voxels[
        tuple(slice(a, b + 1) for a, b in zip((lower - first)[::-1], (upper - first)[::-1], strict=True))
    ]


def _box(image: Node) -> tuple[np.ndarray, np.ndarray]:
    extent = np.array(image.GetExtent())
    return extent[::2], extent[1::2]


def _covers(image: Node, lower: np.ndarray, upper: np.ndarray) -> bool:
    first, last = _box(image)
    return bool((first <= lower).all() and (last >= upper).all())


def _has_grid(image: Node, grid: np.ndarray) -> bool:
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    return np.allclose(slicer.util.arrayFromVTKMatrix(matrix), grid, atol=_SAME_PLACE_MM)


def _labelmap_name() -> str:
    return slicer.vtkSegmentationConverter.GetBinaryLabelmapRepresentationName()


def _record_in_segment(segment: Node, result: AnomalyResult) -> None:
    """One entry for each slice of the segment: it gathers results of different scores and thresholds."""
    aligned = result.plane.aligned
    results = json.loads(_tag(segment, _RESULTS) or "{}")
    results["plane" if aligned is None else f"{AXES[aligned.axis]} {aligned.index}"] = {
        "score": round(result.score, 6),
        "threshold": round(result.threshold, 6),
        "area_mm2": round(result.area_mm2, 3),
        "bundle": f"{result.provenance.bundle} {result.provenance.bundle_version}",
    }
    segment.SetTag(_RESULTS, json.dumps(results))


def _tag(segment: Node, name: str) -> str:
    value = vtk.reference("")
    return str(value) if segment.GetTag(name, value) else ""


def select_in_segment_editor(node: Node, source: Node, segment_id: str = "") -> None:
    """Make a segmentation, its volume and a segment the ones that Slicer's Segment Editor opens with."""
    scene = slicer.mrmlScene
    editor = scene.GetSingletonNode("SegmentEditor", "vtkMRMLSegmentEditorNode")
    if editor is None:
        editor = slicer.vtkMRMLSegmentEditorNode()
        editor.SetSingletonTag("SegmentEditor")
        editor = scene.AddNode(editor)
    with slicer.util.NodeModify(editor):
        editor.SetAndObserveSegmentationNode(node)
        editor.SetAndObserveSourceVolumeNode(source)
        editor.SetSelectedSegmentID(segment_id)
