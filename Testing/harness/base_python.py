"""Slicer's Base/Python files that no wheel carries, as far as our module uses them.

`slicer.ScriptedLoadableModule` and `slicer.parameterNodeWrapper`. The last is strict where Slicer's is:
widgets are matched by exact class, values are checked when written, sliders need a range.
"""

from __future__ import annotations

import sys
import types
import typing
import unittest
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slicer
import slicer.util
import vtk

from .ctk_standins import ctkSliderWidget
from .pythonqt import qt
from .qmrml_standins import qMRMLNodeComboBox


class ScriptedLoadableModule:
    def __init__(self, parent: Any) -> None:
        self.parent = parent
        self.moduleName = type(self).__name__
        icon = Path(parent.path).parent / "Resources" / "Icons" / f"{self.moduleName}.png"
        if icon.is_file():
            parent.icon = qt.QIcon(str(icon))

    def resourcePath(self, name: str) -> str:
        return str(Path(self.parent.path).parent / "Resources" / name)


class ScriptedLoadableModuleWidget:
    def __init__(self, parent: Any = None) -> None:
        self.parent = parent
        self.layout = parent.layout()
        self.moduleName = type(self).__name__.removesuffix("Widget")
        self.developerMode = False

    def resourcePath(self, name: str) -> str:
        return str(Path(slicer.util.modulePath(self.moduleName)).parent / "Resources" / name)

    def setup(self) -> None:
        pass

    def cleanup(self) -> None:
        pass


class ScriptedLoadableModuleLogic:
    def __init__(self, parent: Any = None) -> None:
        self.moduleName = type(self).__name__.removesuffix("Logic")
        self.isSingletonParameterNode = True

    def getParameterNode(self) -> Any:
        node = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
        if node is None:
            node = slicer.vtkMRMLScriptedModuleNode()
            node.SetSingletonTag(self.moduleName)
            node.SetName(self.moduleName)
            node = slicer.mrmlScene.AddNode(node)
        node.SetAttribute("ModuleName", self.moduleName)  # gone after a scene was closed
        return node


class ScriptedLoadableModuleTest(unittest.TestCase):
    def delayDisplay(self, message: str, msec: int | None = None) -> None:
        pass


@dataclass(frozen=True)
class WithinRange:
    minimum: float
    maximum: float

    def validate(self, value: float) -> None:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"{value} is not within [{self.minimum}, {self.maximum}]")


class _Parameter:
    """One typed field, kept in the parameter node as text or as a node reference."""

    def __init__(self, name: str, hint: Any, default: Any) -> None:
        self.name = name
        plain, notes = hint, ()
        if typing.get_origin(hint) is typing.Annotated:
            plain, notes = typing.get_args(hint)[0], hint.__metadata__
        self.range = next((note for note in notes if isinstance(note, WithinRange)), None)
        if isinstance(plain, types.UnionType) or type(None) not in (typing.get_args(plain) or (type(None),)):
            raise TypeError(f"Slicer's wrapper takes typing.Union with None, not {plain}")
        self.types = tuple(t for t in typing.get_args(plain) or (plain,) if t is not type(None))
        self.is_node = all(issubclass(t, slicer.vtkMRMLNode) for t in self.types)
        if not self.is_node and self.types not in ((str,), (int,), (float,), (bool,)):
            raise TypeError(f"The harness has no parameter type {hint}")
        self.default = None if self.is_node else self.types[0]() if default is None else default

    def read(self, node: Any) -> Any:
        if self.is_node:
            return node.GetNodeReference(self.name)
        text = node.GetParameter(self.name)
        return text == "True" if self.types[0] is bool else self.types[0](text)

    def write(self, node: Any, value: Any) -> None:
        accepted = (int, float) if self.types == (float,) else self.types
        if not (self.is_node and value is None) and not isinstance(value, accepted):
            raise TypeError(f"{self.name} is a {self.types}, not {value!r}")
        if self.range is not None:
            self.range.validate(value)
        if self.is_node:
            node.SetParameter(self.name, "")
            node.SetNodeReferenceID(self.name, value.GetID() if value is not None else None)
        else:
            node.SetParameter(self.name, str(value))


class _Connector:
    """A widget that shows one parameter: how to read it, how to write it, and its signal of change."""

    def __init__(self, widget: Any, parameter: _Parameter) -> None:
        self.widget = widget
        self.parameter = parameter
        kind = type(widget)
        if kind is qMRMLNodeComboBox and parameter.is_node:
            widget.nodeTypes = [t.__name__ for t in parameter.types]
            self.read, self.write = widget.currentNode, widget.setCurrentNode
            self.signal = widget.currentNodeChanged
        elif kind is ctkSliderWidget and parameter.types == (float,):
            if parameter.range is None:
                raise RuntimeError(f"{parameter.name} needs a range to be shown on a slider")
            widget.minimum, widget.maximum = parameter.range.minimum, parameter.range.maximum
            self._follow_attribute("value", widget.valueChanged)
        elif kind is qt.QCheckBox and parameter.types == (bool,):
            self._follow_attribute("checked", widget.toggled)
        elif kind is qt.QLineEdit and parameter.types == (str,):
            self._follow_attribute("text", widget.textChanged)
        else:
            raise RuntimeError(f"{kind.__name__} cannot show {parameter.name}")

    def _follow_attribute(self, name: str, signal: Any) -> None:
        self.read = lambda: getattr(self.widget, name)
        self.write = lambda value: setattr(self.widget, name, value)
        self.signal = signal


class _WrappedNode:
    """What the decorator `parameterNodeWrapper` makes of a class, beside the properties."""

    parameters: dict[str, _Parameter]

    def __init__(self, parameterNode: Any) -> None:
        self.parameterNode = parameterNode
        self._guis: dict[int, list[tuple[Any, Any]]] = {}
        self._updating = False
        for name, parameter in self.parameters.items():
            if not parameterNode.HasParameter(name):
                parameter.write(parameterNode, parameter.default)

    def connectGui(self, gui: Any) -> int:
        """Tie every widget with the dynamic property SlicerParameterName to its parameter."""
        names = {widget: widget.property("SlicerParameterName") for widget in vars(gui).values()}
        connectors = [_Connector(widget, self.parameters[name]) for widget, name in names.items() if name]
        slots = []
        for connector in connectors:
            connector.write(getattr(self, connector.parameter.name))

            def changed(*_: Any, connector: _Connector = connector) -> None:
                if not self._updating:
                    setattr(self, connector.parameter.name, connector.read())

            connector.signal.connect(changed)
            slots.append((connector.signal, changed))
        tag = self.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._update(connectors))
        self._guis[tag] = slots
        return tag

    def disconnectGui(self, tag: int) -> None:
        for signal, slot in self._guis.pop(tag, []):
            signal.disconnect(slot)
        self.RemoveObserver(tag)

    def _update(self, connectors: list[_Connector]) -> None:
        if self._updating:
            return
        self._updating = True
        try:
            for connector in connectors:
                connector.write(getattr(self, connector.parameter.name))
        finally:
            self._updating = False

    def AddObserver(self, event: int, callback: Any, priority: float = 0.0) -> int:
        return self.parameterNode.AddObserver(event, callback, priority)

    def RemoveObserver(self, tag: int) -> None:
        self.parameterNode.RemoveObserver(tag)

    def StartModify(self) -> int:
        return self.parameterNode.StartModify()

    def EndModify(self, was_modifying: int) -> None:
        self.parameterNode.EndModify(was_modifying)

    def Modified(self) -> None:
        self.parameterNode.Modified()


def parameterNodeWrapper(cls: type) -> type:
    """Class decorator: typed fields become properties over a vtkMRMLScriptedModuleNode."""
    hints = typing.get_type_hints(cls, include_extras=True)
    parameters = {name: _Parameter(name, hint, cls.__dict__.get(name)) for name, hint in hints.items()}
    properties = {name: _property_of(parameter) for name, parameter in parameters.items()}
    return type(
        cls.__name__, (_WrappedNode,), {**properties, "parameters": parameters, "__doc__": cls.__doc__}
    )


def _property_of(parameter: _Parameter) -> property:
    return property(
        lambda wrapper: parameter.read(wrapper.parameterNode),
        lambda wrapper, value: parameter.write(wrapper.parameterNode, value),
    )


def install() -> None:
    """Make the stand-ins importable under Slicer's names."""
    bases = (
        ScriptedLoadableModule,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
        ScriptedLoadableModuleWidget,
    )
    _register("ScriptedLoadableModule", __all__=[b.__name__ for b in bases], **{b.__name__: b for b in bases})
    _register("parameterNodeWrapper", parameterNodeWrapper=parameterNodeWrapper, WithinRange=WithinRange)


def _register(name: str, **content: Any) -> None:
    module = types.ModuleType(f"slicer.{name}")
    module.__dict__.update(content)
    sys.modules[module.__name__] = module
    setattr(slicer, name, module)
