"""`slicer.qMRML...`: the MRML widgets of our panel, over the real scene."""

from __future__ import annotations

from functools import partial
from typing import Any

import slicer
from PySide6.QtCore import Property, Signal

from .pythonqt import custom_widgets, qt


class qMRMLWidget(qt.QWidget):
    """The panel's outermost widget; hands the scene to its children, as .ui connections do in Slicer.

    Attributes:
        isEntered: whether the module is the one selected.
    """

    mrmlSceneChanged = Signal(object)
    declared_signals = ("mrmlSceneChanged(vtkMRMLScene*)",)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene = None
        self.isEntered = False

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        self._scene = scene
        self.mrmlSceneChanged.emit(scene)
        for child in self.findChildren(qt.QWidget):
            if hasattr(child, "setMRMLScene"):
                child.setMRMLScene(scene)


class qMRMLNodeComboBox(qt.QWidget):
    """Chooses a node of the scene; follows it as nodes come, go and are renamed."""

    currentNodeChanged = Signal(object)
    declared_signals = ("currentNodeChanged(vtkMRMLNode*)",)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._box = qt.QComboBox(self)
        self._box.setObjectName("")
        layout.addWidget(self._box)
        self._flags = {"noneEnabled": False, "showChildNodeTypes": True}
        self._types: tuple[str, ...] = ()
        self._scene = None
        self._observed: list[tuple[Any, int]] = []  # scene, observer
        self._current: str | None = None
        self._box.currentIndexChanged.connect(self._chosen)
        # The scene outlives the widget, and calling a deleted widget ends the process.
        self.destroyed.connect(partial(_stop_observing, self._observed))

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        _stop_observing(self._observed)
        self._scene = scene
        if scene is not None:
            events = (scene.NodeAddedEvent, scene.NodeRemovedEvent, scene.EndCloseEvent, scene.EndImportEvent)
            self._observed += [(scene, scene.AddObserver(event, self._fill)) for event in events]
        self._fill()

    def currentNode(self) -> Any:
        return self._scene.GetNodeByID(self._current) if self._scene and self._current else None

    def setCurrentNode(self, node: Any) -> None:
        self._box.setCurrentIndex(self._box.findData(node.GetID()) if node else self._empty_index())
        self._chosen()

    def _empty_index(self) -> int:
        return 0 if self._flags["noneEnabled"] else -1

    def _nodes(self) -> list[Any]:
        found = [node for name in self._types for node in slicer.util.getNodesByClass(name)]
        exact = not self._flags["showChildNodeTypes"]
        return [
            node
            for index, node in enumerate(found)
            if not node.GetHideFromEditors()
            and not (exact and node.GetClassName() not in self._types)
            and node not in found[:index]
        ]

    def _fill(self, *_: Any) -> None:
        if self._scene is None:
            return
        self._box.blockSignals(True)
        self._box.clear()
        if self._flags["noneEnabled"]:
            self._box.addItem("None", "")
        for node in self._nodes():
            self._box.addItem(node.GetName(), node.GetID())
        index = self._box.findData(self._current) if self._current else -1
        # As in Slicer: where nothing is not a choice, the first node that appears is chosen.
        self._box.setCurrentIndex(index if index >= 0 else 0 if self._box.count else -1)
        self._box.blockSignals(False)
        self._chosen()

    def _chosen(self, *_: Any) -> None:
        chosen = self._box.currentData or None
        if chosen != self._current:
            self._current = chosen
            self.currentNodeChanged.emit(self.currentNode())

    def _set_types(self, types: Any) -> None:
        self._types = tuple(t for t in types if t)
        self._fill()

    def _set_flag(self, name: str, value: bool) -> None:
        self._flags[name] = bool(value)
        self._fill()

    nodeTypes = Property("QStringList", lambda self: self._types, _set_types)
    noneEnabled = Property(
        bool, lambda self: self._flags["noneEnabled"], lambda self, v: self._set_flag("noneEnabled", v)
    )
    showChildNodeTypes = Property(
        bool,
        lambda self: self._flags["showChildNodeTypes"],
        lambda self, v: self._set_flag("showChildNodeTypes", v),
    )
    # Slicer's has these too; adding, removing and renaming are not for our panel.
    addEnabled = Property(bool, lambda self: False, lambda self, v: None)
    removeEnabled = Property(bool, lambda self: False, lambda self, v: None)
    selectNodeUponCreation = Property(bool, lambda self: False, lambda self, v: None)


def _stop_observing(observed: list[tuple[Any, int]], *_: Any) -> None:
    while observed:
        scene, tag = observed.pop()
        scene.RemoveObserver(tag)


for _class in (qMRMLWidget, qMRMLNodeComboBox):
    setattr(slicer, _class.__name__, _class)
    custom_widgets[_class.__name__] = _class
