"""Nodes that hold results: made, found again, filed beside their volume, and told what made them.

Each says in its attributes which kind of result it holds, and refers to the volume it was made from.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import slicer

from .result import RESEARCH_USE_ONLY, AnomalyResult, Provenance
from .scene_views import Node

ROLE = "MedAnomalyCLIP.Role"
SOURCE = "MedAnomalyCLIP.Source"
"""Node reference from a result to the volume it was made from."""

MAP, VOLUME_MAP = "map", "volume map"
"""Roles of maps: of one slice, and of a volume."""

_NAMES = {
    MAP: "anomaly map",
    VOLUME_MAP: "anomaly map of volume",
    "segmentation": "anomaly candidates",
    "table": "anomaly scores",
    "scores": "anomaly score",
    "chart": "anomaly score along the volume",
}
_VIEW = "MedAnomalyCLIP.View"


def record_provenance(node: Node, result: AnomalyResult) -> None:
    """Write to a node what is needed to explain it later; nothing that identifies the patient."""
    plane = result.plane
    record_detector(node, result)
    _record(
        node,
        {
            "Score": f"{result.score:.9g}",
            "Prompt": result.prompt,
            "Unlike": "yes" if result.is_unlike else "no",
            "Unlikeness": "" if result.unlikeness is None else f"{result.unlikeness:.9g}",
            "UnlikeThreshold": "" if result.unlike_threshold is None else f"{result.unlike_threshold:.9g}",
            "Empty": "yes" if result.is_empty else "no",
            "Percentile": "" if result.percentile is None else f"{result.percentile:.6g}",
            "Window": "" if result.window is None else json.dumps([float(edge) for edge in result.window]),
            "Plane": as_json(plane.ijk_to_ras),
            "PlaneDescription": plane.description,
            "AlignedSlice": "" if plane.aligned is None else json.dumps(asdict(plane.aligned)),
        },
    )


def record_detector(node: Node, result: AnomalyResult) -> None:
    """Write to a node what is the same for all slices of a run."""
    provenance = result.provenance
    _record(
        node,
        {
            "Bundle": provenance.bundle,
            "BundleVersion": provenance.bundle_version,
            "BundleSHA256": provenance.bundle_sha256,
            "SoftwareVersion": provenance.software_version,
            "Device": provenance.device,
            "Precision": provenance.precision,
            "Runtime": provenance.runtime,
            "ImageThreshold": "" if result.image_threshold is None else f"{result.image_threshold:.9g}",
            "Threshold": f"{result.threshold:.9g}",
            "SmallestAreaMM2": f"{result.min_area_mm2:.9g}",
            "SpacingKnown": str(result.plane.spacing_known),
            "Notice": RESEARCH_USE_ONLY,
        },
    )


def recorded(node: Node, key: str) -> str:
    """What `record_provenance` or `record_detector` wrote; empty if they did not."""
    return node.GetAttribute(f"MedAnomalyCLIP.{key}") or ""


def _record(node: Node, facts: dict[str, str]) -> None:
    for key, value in facts.items():
        node.SetAttribute(f"MedAnomalyCLIP.{key}", value)


def provenance_of(node: Node) -> Provenance:
    """The detector that a node's attributes name."""
    keys = ("Bundle", "BundleVersion", "BundleSHA256", "SoftwareVersion", "Device", "Precision", "Runtime")
    return Provenance(*(recorded(node, key) for key in keys))


def number_or_none(text: str) -> float | None:
    return float(text) if text else None


def as_json(matrix: np.ndarray) -> str:
    return json.dumps(np.round(matrix, 9).tolist())


def result_node(class_name: str, role: str, source: Node, view_name: str = "") -> Node:
    """The node that holds this kind of result, made if the scene has none."""
    node = find_result_node(class_name, role, source, view_name)
    return node or new_result_node(class_name, role, source, view_name)


def new_result_node(class_name: str, role: str, source: Node, view_name: str = "") -> Node:
    """A node for this kind of result, beside those that there may be."""
    name = f"{source.GetName()} {_NAMES[role]}" + (f" {view_name}" if view_name else "")
    return adopt(slicer.mrmlScene.AddNewNodeByClass(class_name, name), role, source, view_name)


def adopt(node: Node, role: str, source: Node, view_name: str = "") -> Node:
    """Make a node the holder of a kind of result of a volume."""
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
