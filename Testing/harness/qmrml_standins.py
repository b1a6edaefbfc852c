"""`slicer.qMRML...`: the MRML widgets of our panel, over the real scene."""

from __future__ import annotations

from functools import partial
from typing import Any

import slicer
from PySide6.QtCore import Property, Signal
from PySide6.QtGui import QStandardItem

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
    shows_hidden = False

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._box = qt.QComboBox(self)
        self._box.setObjectName("")
        layout.addWidget(self._box)
        self._flags = {"noneEnabled": False, "showChildNodeTypes": True}
        self._types: tuple[str, ...] = ()
        self._attributes: dict[str, tuple[str, str]] = {}  # class name: attribute and value it has to have
        self._none = "None"
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

    def addAttribute(self, class_name: str, name: str, value: str) -> None:
        """Offer only nodes of a class that have an attribute; nodes made here get it."""
        self._attributes[class_name] = (name, value)
        self._fill()

    def addNode(self) -> Any:
        """As by the reader, through the list."""
        node = self._scene.AddNewNodeByClass(self._types[0])
        if self._types[0] in self._attributes:
            node.SetAttribute(*self._attributes[self._types[0]])
        self.setCurrentNode(node)
        return node

    def setCurrentNode(self, node: Any) -> None:
        if node is not None and self._box.findData(node.GetID()) < 0:
            self._fill()  # Slicer's follows changes of attributes by itself
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
            if (self.shows_hidden or not node.GetHideFromEditors())
            and not (exact and node.GetClassName() not in self._types)
            and node not in found[:index]
            and self._has_attribute(node)
        ]

    def _has_attribute(self, node: Any) -> bool:
        name, value = self._attributes.get(node.GetClassName(), ("", ""))
        return not name or node.GetAttribute(name) == value

    def _fill(self, *_: Any) -> None:
        if self._scene is None:
            return
        self._box.blockSignals(True)
        self._box.clear()
        if self._flags["noneEnabled"]:
            self._box.addItem(self._none, "")
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

    def _set_none(self, text: str) -> None:
        self._none = text
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
    noneDisplay = Property(str, lambda self: self._none, _set_none)
    # Slicer's has these too; what they allow is not offered here, but for `addNode`.
    renameEnabled = Property(bool, lambda self: False, lambda self, v: None)
    addEnabled = Property(bool, lambda self: False, lambda self, v: None)
    removeEnabled = Property(bool, lambda self: False, lambda self, v: None)
    selectNodeUponCreation = Property(bool, lambda self: False, lambda self, v: None)


class qMRMLColorTableComboBox(qMRMLNodeComboBox):
    """Chooses a colour table; those are hidden from other lists."""

    shows_hidden = True
    currentNodeChanged = Signal(object)
    declared_signals = ("currentNodeChanged(vtkMRMLNode*)",)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self.nodeTypes = ("vtkMRMLColorTableNode", "vtkMRMLProceduralColorNode")


class qMRMLTableView(qt.QTableView):
    """Shows a table node, and follows it."""

    rowsSelected = Signal()
    declared_signals = ("selectionChanged()",)
    signal_names = {"selectionChanged": "rowsSelected"}  # noqa: RUF012

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node = None
        self._observed: list[tuple[Any, int]] = []
        self._model = qt.QStandardItemModel(self)
        self.setModel(self._model)
        self.destroyed.connect(partial(_stop_observing, self._observed))

    def selectionChanged(self, selected: Any, deselected: Any) -> None:
        super().selectionChanged(selected, deselected)
        self.rowsSelected.emit()

    def mrmlTableNode(self) -> Any:
        return self._node

    def setMRMLTableNode(self, node: Any) -> None:
        _stop_observing(self._observed)
        self._node = node
        if node is not None:
            self._observed.append((node, node.AddObserver("ModifiedEvent", self._fill)))
        self._fill()

    def _fill(self, *_: Any) -> None:
        table = self._node.GetTable() if self._node is not None else None
        columns = table.GetNumberOfColumns() if table is not None else 0
        rows = table.GetNumberOfRows() if table is not None else 0
        self._model.setRowCount(rows)
        self._model.setColumnCount(columns)
        self._model.setHorizontalHeaderLabels([table.GetColumnName(c) for c in range(columns)])
        for row in range(rows):
            for column in range(columns):
                text = table.GetValue(row, column).ToString()
                item = self._model.item(row, column)
                if item is None:
                    self._model.setItem(row, column, QStandardItem(text))
                elif item.text() != text:
                    item.setText(text)
        self.resizeColumnsToContents()


def _stop_observing(observed: list[tuple[Any, int]], *_: Any) -> None:
    while observed:
        scene, tag = observed.pop()
        scene.RemoveObserver(tag)


for _class in (qMRMLWidget, qMRMLNodeComboBox, qMRMLColorTableComboBox, qMRMLTableView):
    setattr(slicer, _class.__name__, _class)
    custom_widgets[_class.__name__] = _class
