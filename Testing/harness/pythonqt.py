"""`import qt` as Slicer's modules know it: PySide6 with the manners of PythonQt.

Every QObject class is subclassed on first use. In the subclass

- Qt properties are attributes (`label.text = "x"`, `button.enabled`); calling one is a TypeError;
- `button.connect("clicked(bool)", f)` takes a signal's signature, and refuses one that the class has not;
- surplus arguments of a signal are dropped, as PythonQt does for functions with fewer parameters;
- an exception in a slot is printed and the program goes on; it is also kept in `slot_errors`.

PySide6's own switch `from __feature__ import true_property` is no substitute: it takes the setters away.
Changing PySide6's classes in place ends the interpreter with a crash, hence the subclasses.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import types
from collections.abc import Callable
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

slot_errors: list[BaseException] = []

_MODULES = (QtCore, QtGui, QtWidgets)
# Virtual in C++: an attribute of that name would be called as an override.
_VIRTUAL = {"sizeHint", "minimumSizeHint", "spacing"}
_SIGNATURE = re.compile(r"(\w+)\s*\((.*)\)")


class _Property:
    """A Qt property as an attribute of instances; on the class it is whatever PySide6 has there."""

    def __init__(self, native: type, name: str, writable: bool) -> None:
        capital = name[:1].upper() + name[1:]
        self._name = name
        self._native = getattr(native, name, None)
        getters = (getattr(native, n, None) for n in (name, f"is{capital}", f"has{capital}"))
        self._get = next((g for g in getters if callable(g)), None) or (
            lambda widget: QtCore.QObject.property(widget, name)
        )
        self._set = None
        if writable:
            self._set = getattr(native, f"set{capital}", None) or (
                lambda widget, value: QtCore.QObject.setProperty(widget, name, value)
            )

    def __get__(self, instance: Any, owner: type) -> Any:
        return self._native if instance is None else self._get(instance)

    def __set__(self, instance: Any, value: Any) -> None:
        if self._set is None:
            raise AttributeError(f"{type(instance).__name__}.{self._name} is read-only")
        self._set(instance, value)


class _MannersType(type(QtCore.QObject)):
    """`isinstance(x, qt.QWidget)` holds for every QWidget, also for one that Qt made itself."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return (
            isinstance(instance, cls.__dict__["native"])
            if "native" in cls.__dict__
            else super().__instancecheck__(instance)
        )


class _Manners:
    """What PythonQt gives to every QObject."""

    # Signatures of signals declared in Python, whose arguments Qt knows only as "PyObject".
    declared_signals: tuple[str, ...] = ()
    # Where a signal cannot have its own name, because Qt has a method of that name: the one it has.
    signal_names: dict[str, str] = {}  # noqa: RUF012

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # PySide6 looks for these in the instance's own class only.
        cls.connect, cls.disconnect = _Manners.connect, _Manners.disconnect

    def connect(self, signal: str, *target: Any) -> bool:
        name, types = _check_signal(self, signal)
        arguments = len(types.split(",")) if types else 0
        slot = target[0] if len(target) == 1 else getattr(target[0], target[1].split("(")[0])
        wanted = _positional_count(slot)

        def call(*values: Any) -> None:
            try:
                slot(*values[: arguments if wanted is None else min(arguments, wanted)])
            except BaseException as error:
                slot_errors.append(error)
                raise

        bound_signal = getattr(self, self.signal_names.get(name, name))
        if types and signal not in self.declared_signals:
            bound_signal = bound_signal[types]  # else Qt may choose an overload without arguments
        bound_signal.connect(call)
        self.__dict__.setdefault("_connections", []).append((signal, target, bound_signal, call))
        return True

    def disconnect(self, signal: str, *target: Any) -> bool:
        kept = []
        for connection in self.__dict__.get("_connections", []):
            if connection[0] == signal and (not target or connection[1] == target):
                connection[2].disconnect(connection[3])
            else:
                kept.append(connection)
        self.__dict__["_connections"] = kept
        return True

    def findChildren(self, cls: type = QtCore.QObject, *options: Any) -> list[Any]:
        native = cls.__dict__.get("native", cls)
        return [
            child for child in QtCore.QObject.findChildren(self, native, *options) if isinstance(child, cls)
        ]

    def className(self) -> str:
        return self.metaObject().className()

    def delete(self) -> None:
        self.deleteLater()

    @property
    def name(self) -> str:
        return QtCore.QObject.objectName(self)

    @name.setter
    def name(self, value: str) -> None:
        QtCore.QObject.setObjectName(self, value)


def _check_signal(widget: Any, signature: str) -> tuple[str, str]:
    """Name and argument types of a signal that the widget has."""
    match = _SIGNATURE.fullmatch(signature.strip())
    if match is None:
        raise ValueError(f"{signature!r} is no signal signature such as 'clicked(bool)'")
    normal = QtCore.QMetaObject.normalizedSignature(signature).data().decode()
    if normal not in widget.declared_signals and widget.metaObject().indexOfSignal(normal) < 0:
        raise ValueError(f"{type(widget).__name__} has no signal {signature}")
    return match[1], normal[len(match[1]) + 1 : -1]


def _positional_count(slot: Callable[..., Any]) -> int | None:
    """How many positional arguments a function takes; None for any number."""
    try:
        parameters = inspect.signature(slot).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


_subclasses: dict[type, type] = {}


def with_manners(native: type) -> type:
    """The subclass of a PySide6 class that behaves as PythonQt's."""
    if native not in _subclasses:
        meta = native.staticMetaObject
        attributes: dict[str, Any] = {"native": native, "__module__": "qt"}
        for index in range(meta.propertyCount()):
            prop = meta.property(index)
            if prop.name() not in _VIRTUAL:
                attributes[prop.name()] = _Property(native, prop.name(), prop.isWritable())
        if hasattr(native, "exec"):
            attributes["exec_"] = lambda self, *arguments: native.exec(self, *arguments)
        _subclasses[native] = _MannersType(native.__name__, (_Manners, native), attributes)
    return _subclasses[native]


custom_widgets: dict[str, type] = {}
"""Widget classes that .ui files may name, beside Qt's own."""


class _UiLoader(QtUiTools.QUiLoader):
    """Makes the widgets and layouts of a .ui file with PythonQt's manners."""

    def createWidget(self, class_name: str, parent: Any = None, name: str = "") -> Any:
        cls = custom_widgets.get(class_name) or getattr(qt, class_name, None)
        if cls is None:
            raise RuntimeError(f"The harness has no stand-in for the widget class {class_name}")
        widget = cls(parent)
        widget.setObjectName(name)
        return widget

    def createLayout(self, class_name: str, parent: Any = None, name: str = "") -> Any:
        if not isinstance(
            parent, QtWidgets.QWidget
        ):  # a layout within a layout; Qt gives it its parent later
            return super().createLayout(class_name, parent, name)
        layout = getattr(qt, class_name)(parent)
        layout.setObjectName(name)
        return layout


class _Qt(types.ModuleType):
    """The flat module `qt`."""

    QUiLoader = _UiLoader

    def __getattr__(self, name: str) -> Any:
        for module in _MODULES:
            found = getattr(module, name, None)
            if found is None:
                continue
            unsuited = (QtCore.QCoreApplication, QtCore.QThread)
            if (
                isinstance(found, type)
                and issubclass(found, QtCore.QObject)
                and not issubclass(found, unsuited)
            ):
                found = with_manners(found)
            setattr(self, name, found)
            return found
        raise AttributeError(f"qt has no {name}")


def _print_message(kind: Any, context: Any, message: str) -> None:
    """Qt's warnings, but not those about what Slicer's own widgets have and the stand-ins have not."""
    if (
        "mrmlSceneChanged" not in message
        and "ctkPathLineEdit::" not in message
        and not message.startswith("QObject::connect:  (")
    ):
        print(message, file=sys.stderr)


QtCore.qInstallMessageHandler(_print_message)

qt = _Qt("qt")
application = QtWidgets.QApplication.instance() or QtWidgets.QApplication(["Slicer"])
application.setStyle("Fusion")
sys.modules.setdefault("qt", qt)
