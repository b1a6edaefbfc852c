"""How all maps are shown: colours, legend, opacity, hidden or not; and the threshold and area they follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import slicer

from . import scene
from .scene_nodes import ROLE, SOURCE
from .scene_segments import write_segment
from .scene_views import Node, slice_view_names


class MapDisplay:
    """The reader's choices for maps, which hold for those that will come, too."""

    def __init__(self) -> None:
        self._colours: Node | None = None
        self._legend = True
        self._visible = True

    @property
    def colours(self) -> Node | None:
        """Colour node of the maps; None for our own colours, also where that node was deleted."""
        present = self._colours is not None and slicer.mrmlScene.IsNodePresent(self._colours)
        return self._colours if present else None

    def set_colours(self, node: Node | None) -> None:
        self._colours = node
        for map_node in shown_maps():
            scene.set_map_colours(map_node, self.colours)

    def set_legend(self, visible: bool) -> None:
        self._legend = visible
        self.apply()

    def set_visible(self, visible: bool, opacity: float) -> None:
        self._visible = visible
        self.set_opacity(opacity)
        self.apply()

    def set_opacity(self, opacity: float) -> None:
        for name in slice_view_names():
            scene.set_overlay_opacity(name, opacity if self._visible else 0.0)

    def apply(self) -> None:
        """Let legends and outlines of the maps shown follow the choices."""
        sources = set()
        for map_node in shown_maps():
            scene.set_legend(map_node, self._legend and self._visible)
            sources.add(map_node.GetNodeReference(SOURCE))
        for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode"):
            ours = node.GetAttribute(ROLE) and node.GetNodeReference(SOURCE) in sources
            if ours and node.GetDisplayNode() is not None:
                node.GetDisplayNode().SetVisibility(self._visible)


def shown_maps() -> list[Node]:
    """The maps in the foreground of any slice view, each once."""
    maps = [scene.shown_map(name) for name in slice_view_names()]
    return list({node.GetID(): node for node in maps if node is not None}.values())


def update_slice_map(map_node: Node, **changes: Any) -> None:
    """Apply another threshold or smallest area to the map of one slice and its segment.

    Args:
        changes: threshold, min_area_mm2, or both.
    """
    result = replace(scene.result_of_map(map_node), **changes)
    scene.rewrite_map(map_node, result)
    source = map_node.GetNodeReference(SOURCE)
    if source is not None:
        write_segment(result, source)
