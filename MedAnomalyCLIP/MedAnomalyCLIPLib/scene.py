"""MRML in and out: volume nodes and slice views become planes, results become an overlay.

Call everything here on the main thread. A plane holds a copy of its pixels, so the worker that runs the
detector never reads memory that the scene may change.

A result's map goes to one volume node for each source volume and view. It lies in world coordinates under no
transform, and is the foreground of that view only. Maps of whole volumes are made by `scene_volume_map`, and
masks go where `scene_segments` puts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from .errors import UnsupportedImage
from .geometry import AlignedSlice, SlicePlane, cut_plane
from .heat import heat_colours
from .result import AnomalyResult
from .scene_nodes import (
    MAP,
    ROLE,
    VOLUME_MAP,
    number_or_none,
    provenance_of,
    record_detector,
    record_provenance,
    recorded,
    result_node,
)
from .scene_views import Node, slice_logic
from .stored_map import from_stored, to_stored
from .volume import Volume, Warp, assemble, header_modality

_PREVIOUS = "MedAnomalyCLIP.PreviousForeground"
_PREVIOUS_OPACITY = "MedAnomalyCLIP.PreviousForegroundOpacity"
_HEAT = "MedAnomalyCLIPHeat"

_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_HOUNSFIELD_CODES = ("[hnsf'U]", "HU")
_HOUNSFIELD_MINIMUM = -200
_ABOVE_EVERY_MAP = 2.0  # upper display threshold; a map ends at 1, interpolation may overshoot


# Volume nodes and views to planes


def volume_from_node(node: Node, *, modality: str | None = None) -> Volume:
    """The image of a scalar or colour volume node, where it lies in the world.

    Voxels are not copied: the result shares the node's memory and is meant to be cut at once. Linear parent
    transforms go into `ijk_to_ras`, any others into `warp`.

    Args:
        node: a vtkMRMLScalarVolumeNode or vtkMRMLVectorVolumeNode.
        modality: DICOM code that overrides what the scene says; None for what DICOM import left there.

    Raises:
        UnsupportedImage: the node is no image, or one with an unknown pixel layout.
    """
    if node is None or not node.IsA("vtkMRMLVolumeNode"):
        raise UnsupportedImage(_("There is no volume to look at; choose one"))
    name = Path(node.GetName() or _("The volume"))
    if node.IsA("vtkMRMLLabelMapVolumeNode") or node.GetAttribute(ROLE):
        words = _("{name} is a result, not an image; choose the volume it was made from")
        raise UnsupportedImage(words.format(name=name))
    image = node.GetImageData()
    if image is None or image.GetNumberOfPoints() == 0 or image.GetPointData().GetScalars() is None:
        raise UnsupportedImage(_("{name} has no voxels").format(name=name))
    modality, hounsfield = _modality_of(node, modality)
    to_world, warp = world_from_local(node)
    volume = assemble(
        name,
        _voxels(image, str(name)),
        to_world @ ijk_to_local(node),
        modality=modality,
        source="Volume node of a Slicer scene",
        spacing_known=not _is_picture(node),
        # Slicer keeps the range of the voxels at hand; reading all of them at every click takes too long.
        hounsfield=hounsfield or image.GetScalarRange()[0] <= _HOUNSFIELD_MINIMUM,
    )
    return volume if warp is None else replace(volume, warp=warp)


def plane_in_view(node: Node, view_name: str, *, modality: str | None = None) -> SlicePlane:
    """The plane that a slice view shows at this moment, cut from a volume node.

    Args:
        node: as for `volume_from_node`.
        view_name: layout name of the view, for example "Red".
        modality: as for `volume_from_node`.

    Raises:
        InvalidRequest: there is no such view.
        GeometryRefused: the plane misses the volume.
    """
    slice_to_ras = slice_logic(view_name).GetSliceNode().GetSliceToRAS()
    return cut_plane(volume_from_node(node, modality=modality), slicer.util.arrayFromVTKMatrix(slice_to_ras))


def _voxels(image: vtk.vtkImageData, name: str) -> np.ndarray:
    """(K, J, I) or (K, J, I, 3), sharing the image's memory; a fourth component is alpha and is dropped."""
    components = image.GetNumberOfScalarComponents()
    shape = image.GetDimensions()[::-1]
    values = vtk_to_numpy(image.GetPointData().GetScalars())
    if components == 1:
        return values.reshape(shape)
    if components not in (3, 4):
        words = _("{name} has {count} values in each voxel; only grey and colour are known")
        raise UnsupportedImage(words.format(name=name, count=components))
    return values.reshape(*shape, components)[..., :3]


def ijk_to_local(node: Node) -> np.ndarray:
    """4x4 from the first voxel in memory to the node's own RAS; an extent need not start at 0."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    result = slicer.util.arrayFromVTKMatrix(matrix)
    result[:3, 3] += result[:3, :3] @ np.array(node.GetImageData().GetExtent()[::2])
    return result


def world_from_local(node: Node) -> tuple[np.ndarray, Warp | None]:
    """4x4 from a node's own RAS to world RAS, or the identity and a warp from world to the node's own RAS."""
    transform = node.GetParentTransformNode()
    if transform is None:
        return np.eye(4), None
    if transform.IsTransformToWorldLinear():
        matrix = vtk.vtkMatrix4x4()
        transform.GetMatrixTransformToWorld(matrix)
        return slicer.util.arrayFromVTKMatrix(matrix), None
    from_world = vtk.vtkGeneralTransform()
    transform.GetTransformFromWorld(from_world)

    def warp(world: np.ndarray) -> np.ndarray:
        points, moved = vtk.vtkPoints(), vtk.vtkPoints()
        points.SetData(numpy_to_vtk(np.ascontiguousarray(world, dtype=np.float64), deep=True))
        moved.SetDataTypeToDouble()
        from_world.TransformPoints(points, moved)
        return vtk_to_numpy(moved.GetData()).copy()

    return np.eye(4), warp


def _modality_of(node: Node, requested: str | None) -> tuple[str, bool]:
    """DICOM modality code or empty, and whether the node says that its voxels are Hounsfield units."""
    units = node.GetVoxelValueUnits() if hasattr(node, "GetVoxelValueUnits") else None
    hounsfield = units is not None and units.GetCodeValue() in _HOUNSFIELD_CODES
    if requested is not None:
        return header_modality(requested), hounsfield
    attribute = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMSeriesModalityAttributeName()
    hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
    item = hierarchy.GetItemByDataNode(node) if hierarchy else 0
    text = (hierarchy.GetItemAttribute(item, attribute) if item else "") or node.GetAttribute(attribute) or ""
    return header_modality(text) or ("CT" if hounsfield else ""), hounsfield


def words_of(node: Node | None) -> tuple[str, str]:
    """What a volume node says of itself: its modality, and words that may tell what it shows."""
    if node is None:
        return "", ""
    return _modality_of(node, None)[0], node.GetName() or ""


def _is_picture(node: Node) -> bool:
    storage = node.GetStorageNode()
    name = (storage.GetFileName() if storage else None) or ""
    return name.lower().endswith(_PICTURES)


# Results to the overlay


def write_map(result: AnomalyResult, source: Node, view_name: str = "", colours: Node | None = None) -> Node:
    """Write a result's map to the volume node of this source and view, made at the first time.

    Args:
        colours: colour node to show it in; None for our own heat colours.

    Returns:
        vtkMRMLScalarVolumeNode of one slice, on the plane's own grid, with values as `stored_map` tells;
        shown nowhere yet.
    """
    node = result_node("vtkMRMLScalarVolumeNode", MAP, source, view_name)
    with slicer.util.NodeModify(node):
        node.SetAndObserveTransformNodeID(None)
        node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(result.plane.ijk_to_ras))
        slicer.util.updateVolumeFromArray(node, to_stored(result)[np.newaxis])
        record_provenance(node, result)
    prepare_display(node, colours).InterpolateOn()
    set_map_threshold(node, result.threshold)
    return node


def prepare_display(map_node: Node, colours: Node | None = None) -> Node:
    """The display node of a map, set to show values from 0 to 1 in these colours, or our own."""
    display = _volume_display_node(map_node)
    with slicer.util.NodeModify(display):
        display.SetAndObserveColorNodeID((colours or heat_colour_node()).GetID())
        display.AutoWindowLevelOff()
        display.SetWindowLevelMinMax(0.0, 1.0)
        display.ApplyThresholdOn()
    return display


def set_map_colours(map_node: Node, colours: Node | None) -> None:
    """Show a map in the colours of a colour node; None for our own heat colours."""
    _volume_display_node(map_node).SetAndObserveColorNodeID((colours or heat_colour_node()).GetID())


def set_legend(map_node: Node, visible: bool) -> None:
    """Show or hide the colour legend of a map."""
    _add_legend(map_node)
    slicer.modules.colors.logic().GetColorLegendDisplayNode(map_node).SetVisibility(visible)


def result_of_map(node: Node) -> AnomalyResult:
    """The result that `write_map` wrote, read back, also from a saved scene; its plane has no pixels left.

    Shapes:
        map: (H, W) float32, the same values as were written.
    """
    values, valid = from_stored(slicer.util.arrayFromVolume(node)[0])
    aligned = recorded(node, "AlignedSlice")
    plane = SlicePlane(
        pixels=np.zeros(values.shape, np.uint8),
        ijk_to_ras=np.array(json.loads(recorded(node, "Plane"))),
        valid=valid,
        aligned=AlignedSlice(**json.loads(aligned)) if aligned else None,
        description=recorded(node, "PlaneDescription"),
        spacing_known=recorded(node, "SpacingKnown") != "False",
    )
    window = recorded(node, "Window")
    return AnomalyResult(
        plane=plane,
        score=float(recorded(node, "Score")),
        map=values,
        threshold=float(recorded(node, "Threshold")),
        provenance=provenance_of(node),
        percentile=number_or_none(recorded(node, "Percentile")),
        image_threshold=number_or_none(recorded(node, "ImageThreshold")),
        window=tuple(json.loads(window)) if window else None,
        unlikeness=number_or_none(recorded(node, "Unlikeness")),
        unlike_threshold=number_or_none(recorded(node, "UnlikeThreshold")),
        is_empty=recorded(node, "Empty") == "yes",
        min_area_mm2=float(recorded(node, "SmallestAreaMM2") or 0),
    )


def rewrite_map(node: Node, result: AnomalyResult) -> None:
    """Bring a map of one slice up to date with another threshold or smallest area of its own result."""
    stored = to_stored(result)
    voxels = slicer.util.arrayFromVolume(node)[0]
    if not np.array_equal(voxels, stored):
        voxels[...] = stored
        slicer.util.arrayFromVolumeModified(node)
    record_detector(node, result)
    set_map_threshold(node, result.threshold)


def set_map_threshold(map_node: Node, threshold: float) -> None:
    """Show the map from this value on. A matter of display only: nothing is computed again."""
    _volume_display_node(map_node).SetThreshold(threshold, _ABOVE_EVERY_MAP)
    map_node.SetAttribute("MedAnomalyCLIP.Threshold", f"{threshold:.9g}")


def _volume_display_node(map_node: Node) -> Node:
    """The map's own display node, made again if somebody deleted it: the legend, one too, then moves up."""
    display = map_node.GetDisplayNode()
    if display is None or not display.IsA("vtkMRMLScalarVolumeDisplayNode"):
        if display is not None:
            slicer.mrmlScene.RemoveNode(display)
        map_node.CreateDefaultDisplayNodes()
    return map_node.GetDisplayNode()


def show_map(map_node: Node, view_name: str, opacity: float = 0.5) -> None:
    """Make a map the foreground of one view, with its legend, and remember what was there before."""
    composite = slice_logic(view_name).GetSliceCompositeNode()
    if not is_map(slicer.mrmlScene.GetNodeByID(composite.GetForegroundVolumeID() or "")):
        composite.SetNodeReferenceID(_PREVIOUS, composite.GetForegroundVolumeID())
        composite.SetAttribute(_PREVIOUS_OPACITY, repr(composite.GetForegroundOpacity()))
    _set_foreground(composite, map_node.GetID(), opacity)
    _add_legend(map_node)


def shown_map(view_name: str) -> Node | None:
    """The anomaly map in a view's foreground, None when there is another volume or none."""
    composite = slice_logic(view_name).GetSliceCompositeNode()
    node = slicer.mrmlScene.GetNodeByID(composite.GetForegroundVolumeID() or "")
    return node if is_map(node) else None


def is_shown(node: Node, view_name: str) -> bool:
    """Whether a volume is in a view's background or foreground, or under the map made from it."""
    composite = slice_logic(view_name).GetSliceCompositeNode()
    return node.GetID() in (composite.GetBackgroundVolumeID(), composite.GetForegroundVolumeID())


def set_overlay_opacity(view_name: str, opacity: float) -> None:
    """Opacity of the map in a view; a foreground that is not ours is left alone."""
    node = shown_map(view_name)
    if node is not None:
        _set_foreground(slice_logic(view_name).GetSliceCompositeNode(), node.GetID(), opacity)


def restore_foreground(view_name: str) -> bool:
    """Put back the foreground that a view had before its map; False when no map is shown there."""
    if shown_map(view_name) is None:
        return False
    composite = slice_logic(view_name).GetSliceCompositeNode()
    previous = composite.GetNodeReference(_PREVIOUS)
    opacity = float(composite.GetAttribute(_PREVIOUS_OPACITY) or 0.0)
    _set_foreground(composite, previous.GetID() if previous else None, opacity)
    composite.SetNodeReferenceID(_PREVIOUS, None)
    composite.RemoveAttribute(_PREVIOUS_OPACITY)
    return True


def is_map(node: Node | None) -> bool:
    return node is not None and node.GetAttribute(ROLE) in (MAP, VOLUME_MAP)


def heat_colour_node() -> Node:
    """The one colour table of our overlays, made or, after a scene was closed, filled again."""
    node = slicer.mrmlScene.GetSingletonNode(_HEAT, "vtkMRMLColorTableNode")
    if node is None:
        node = slicer.vtkMRMLColorTableNode()
        node.SetSingletonTag(_HEAT)
        node.SetName("MedAnomalyCLIP heat")
        node = slicer.mrmlScene.AddNode(node)
    colours = heat_colours() / 255.0
    if node.GetNumberOfColors() != len(colours):
        with slicer.util.NodeModify(node):
            node.SetTypeToUser()
            node.SetAttribute("Category", "MedAnomalyCLIP")
            node.SetNumberOfColors(len(colours))
            for index, (red, green, blue) in enumerate(colours):
                node.SetColor(index, f"{index / (len(colours) - 1):.2f}", red, green, blue, 1.0)
    return node


def _add_legend(map_node: Node) -> None:
    """Give a map its colour legend, drawn wherever the map is; what the reader changed about it stays."""
    colours = slicer.modules.colors.logic()
    if colours.GetColorLegendDisplayNode(map_node) is not None:
        return
    legend = colours.AddDefaultColorLegendDisplayNode(map_node)
    legend.SetTitleText("Anomaly")
    legend.SetLabelFormat("%.1f")
    legend.SetNumberOfLabels(6)
    legend.SetSize(0.07, 0.4)  # the text is scaled to this
    for text in (legend.GetTitleTextProperty(), legend.GetLabelTextProperty()):
        text.SetFontFamilyToArial()
        text.BoldOff()
    legend.SetVisibility(True)


@contextmanager
def _unlinked(composite: Node) -> Iterator[None]:
    """Keep a view's layers from reaching linked views.

    Code that changes a composite node is not broadcast, but desktop Slicer's view controller answers it: its
    opacity slider moves, and moving it is an interaction, which linked views follow.
    """
    linked = composite.GetLinkedControl()
    composite.SetLinkedControl(False)
    try:
        yield
    finally:
        composite.SetLinkedControl(linked)


def _set_foreground(composite: Node, volume_id: str | None, opacity: float) -> None:
    with _unlinked(composite), slicer.util.NodeModify(composite):
        composite.SetForegroundVolumeID(volume_id)
        composite.SetForegroundOpacity(opacity)
