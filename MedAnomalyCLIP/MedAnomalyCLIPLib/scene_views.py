"""Slice views of a scene: which there are, what they show, and which one the reader last touched.

Everything here works without a window or a layout manager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import slicer
import vtk
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

from .errors import InvalidRequest

Node = Any  # a vtkMRMLNode or a logic; VTK's classes carry no type information


def slice_view_names() -> tuple[str, ...]:
    """Layout names of the slice views, those of the current layout if there is one."""
    nodes = slicer.util.getNodesByClass("vtkMRMLSliceNode")
    in_layout = [node for node in nodes if node.IsMappedInLayout()]
    return tuple(node.GetLayoutName() for node in in_layout or nodes)


def slice_logic(view_name: str) -> Node:
    """The vtkMRMLSliceLogic of a view."""
    logic = slicer.app.applicationLogic().GetSliceLogicByLayoutName(view_name)
    if logic is None:
        words = _("There is no slice view {name!r}; choose from {names}")
        names = ", ".join(slice_view_names()) or _("none")
        raise InvalidRequest(words.format(name=view_name, names=names))
    return logic


def view_under_cursor() -> str:
    """Layout name of the slice view that the mouse is over, empty if it is over none."""
    crosshair = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLCrosshairNode")
    view = crosshair.GetCursorPositionXYZ([0.0, 0.0, 0.0]) if crosshair else None
    return view.GetLayoutName() if view is not None and view.IsA("vtkMRMLSliceNode") else ""


def displayed_window(node: Node) -> tuple[float, float]:
    """(low, high) voxel values that a volume's display shows as black and white, in every view.

    Raises:
        InvalidRequest: there is no volume, or it is not displayed.
    """
    display = node.GetDisplayNode() if node is not None else None
    if display is None or not display.IsA("vtkMRMLScalarVolumeDisplayNode"):
        raise InvalidRequest(_("The volume is not displayed, so it has no window; show it in a slice view"))
    return display.GetWindowLevelMin(), display.GetWindowLevelMax()


class ViewWatcher(VTKObservationMixin):
    """Follows the slice views' planes while it is started.

    A view is touched when it is scrolled, moved or tilted. One movement of the mouse may move the planes of
    several views (linked views, crosshair jumps); the view under the mouse is then the one that was touched.
    Passing over a view on the way to the panel is no touch.

    Attributes:
        touched: layout name of the view last touched, at first the first one; empty if there is none.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        """`on_change` is called when a plane moved, or when views came or went."""
        super().__init__()
        self.touched = ""
        self._on_change = on_change
        self._names: tuple[str, ...] = ()
        self._moved: dict[Node, int] = {}  # slice node: when its plane last changed

    def start(self) -> None:
        self.stop()
        scene = slicer.mrmlScene
        for event in (scene.NodeAddedEvent, scene.NodeRemovedEvent, scene.EndImportEvent):
            self.addObserver(scene, event, self._scene_changed)
        self._watch_all()

    def stop(self) -> None:
        self.removeObservers()
        self._moved.clear()

    def _watch_all(self) -> None:
        for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
            if node not in self._moved:
                self._moved[node] = node.GetSliceToRAS().GetMTime()
                self.addObserver(node, vtk.vtkCommand.ModifiedEvent, self._node_modified)
        self._names = slice_view_names()
        if self.touched not in self._names:
            self.touched = self._names[0] if self._names else ""

    def _scene_changed(self, _scene: Node, _event: str) -> None:
        before = self._names
        self._watch_all()
        if self._names != before:
            self._on_change()

    def _node_modified(self, node: Node, _event: str) -> None:
        moved = node.GetSliceToRAS().GetMTime()
        if self._moved.get(node) == moved:
            return
        self._moved[node] = moved
        self.touched = view_under_cursor() or node.GetLayoutName()
        self._on_change()
