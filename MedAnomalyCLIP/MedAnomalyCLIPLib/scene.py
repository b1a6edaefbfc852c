"""MRML in and out: volume nodes and slice views become planes, results become an overlay.

Call everything here on the main thread. A plane holds a copy of its pixels, so the worker that runs the
detector never reads memory that the scene may change.

A result's map goes to one volume node for each source volume and view. It lies in world coordinates under no
transform, and is the foreground of that view only. Masks go where `scene_segments` puts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from .errors import UnsupportedImage
from .geometry import SlicePlane, cut_plane
from .heat import heat_colours
from .result import RESEARCH_USE_ONLY, AnomalyResult
from .scene_views import Node, slice_logic
from .volume import Volume, Warp, assemble, header_modality

ROLE = "MedAnomalyCLIP.Role"
SOURCE = "MedAnomalyCLIP.Source"
"""Node reference from a result to the volume it was made from."""

_VIEW = "MedAnomalyCLIP.View"
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
        raise UnsupportedImage("There is no volume to look at; choose one")
    name = Path(node.GetName() or "The volume")
    if node.IsA("vtkMRMLLabelMapVolumeNode") or node.GetAttribute(ROLE):
        raise UnsupportedImage(f"{name} is a result, not an image; choose the volume it was made from")
    image = node.GetImageData()
    if image is None or image.GetNumberOfPoints() == 0 or image.GetPointData().GetScalars() is None:
        raise UnsupportedImage(f"{name} has no voxels")
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
        raise UnsupportedImage(
            f"{name} has {components} values in each voxel; only grey and colour are known"
        )
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


def _is_picture(node: Node) -> bool:
    storage = node.GetStorageNode()
    name = (storage.GetFileName() if storage else None) or ""
    return name.lower().endswith(_PICTURES)


# Results to the overlay


def write_map(result: AnomalyResult, source: Node, view_name: str = "") -> Node:
    """Write a result's map to the volume node of this source and view, made at the first time.

    Returns:
        vtkMRMLScalarVolumeNode of one slice, on the plane's own grid; shown nowhere yet.
    """
    node = result_node("vtkMRMLScalarVolumeNode", "map", source, view_name)
    with slicer.util.NodeModify(node):
        node.SetAndObserveTransformNodeID(None)
        node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(result.plane.ijk_to_ras))
        slicer.util.updateVolumeFromArray(node, result.map[np.newaxis].astype(np.float32, copy=False))
        record_provenance(node, result)
    display = _volume_display_node(node)
    with slicer.util.NodeModify(display):
        display.SetAndObserveColorNodeID(heat_colour_node().GetID())
        display.AutoWindowLevelOff()
        display.SetWindowLevelMinMax(0.0, 1.0)
        display.InterpolateOn()
        display.ApplyThresholdOn()
    set_map_threshold(node, result.threshold)
    return node


def set_map_threshold(map_node: Node, threshold: float) -> None:
    """Show the map from this value on. A matter of display only: nothing is computed again."""
    _volume_display_node(map_node).SetThreshold(threshold, _ABOVE_EVERY_MAP)
    map_node.SetAttribute("MedAnomalyCLIP.Threshold", f"{threshold:g}")


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
    return node is not None and node.GetAttribute(ROLE) == "map"


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


# What results say about themselves


def record_provenance(node: Node, result: AnomalyResult) -> None:
    """Write to a node what is needed to explain it later; nothing that identifies the patient."""
    plane = result.plane
    facts = {
        "Bundle": result.provenance.bundle,
        "BundleVersion": result.provenance.bundle_version,
        "BundleSHA256": result.provenance.bundle_sha256,
        "SoftwareVersion": result.provenance.software_version,
        "Device": result.provenance.device,
        "Precision": result.provenance.precision,
        "Score": f"{result.score:.6g}",
        "Prompt": result.prompt,
        "Unlike": "yes" if result.is_unlike else "no",
        "Percentile": "" if result.percentile is None else f"{result.percentile:.6g}",
        "ImageThreshold": "" if result.image_threshold is None else f"{result.image_threshold:.6g}",
        "Threshold": f"{result.threshold:g}",
        "Window": "" if result.window is None else json.dumps([float(edge) for edge in result.window]),
        "Plane": as_json(plane.ijk_to_ras),
        "PlaneDescription": plane.description,
        "AlignedSlice": "" if plane.aligned is None else json.dumps(asdict(plane.aligned)),
        "Notice": RESEARCH_USE_ONLY,
    }
    for key, value in facts.items():
        node.SetAttribute(f"MedAnomalyCLIP.{key}", value)


def as_json(matrix: np.ndarray) -> str:
    return json.dumps(np.round(matrix, 9).tolist())


def result_node(class_name: str, role: str, source: Node, view_name: str = "") -> Node:
    """The node that holds this kind of result, made if the scene has none."""
    node = find_result_node(class_name, role, source, view_name)
    if node is not None:
        return node
    words = "anomaly map" if role == "map" else "anomaly candidates"
    name = f"{source.GetName()} {words}" + (f" {view_name}" if view_name else "")
    node = slicer.mrmlScene.AddNewNodeByClass(class_name, name)
    node.SetAttribute(ROLE, role)
    node.SetAttribute(_VIEW, view_name)
    node.SetNodeReferenceID(SOURCE, source.GetID())
    _file_beside(node, source)
    return node


def find_result_node(class_name: str, role: str, source: Node, view_name: str = "") -> Node | None:
    for node in slicer.util.getNodesByClass(class_name):
        if (
            node.GetAttribute(ROLE) == role
            and (node.GetAttribute(_VIEW) or "") == view_name
            and node.GetNodeReference(SOURCE) is source
        ):
            return node
    return None


def _file_beside(node: Node, source: Node) -> None:
    """Put a new node into the study of its source; without Slicer's plugins nodes have no place there."""
    hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
    if hierarchy is None:
        return
    item, source_item = hierarchy.GetItemByDataNode(node), hierarchy.GetItemByDataNode(source)
    if item and source_item:
        hierarchy.SetItemParent(item, hierarchy.GetItemParent(source_item))
