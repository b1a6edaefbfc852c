"""Loads a scripted module file as Slicer does, and makes its panel."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import slicer

from . import application, base_python
from .pythonqt import QtCore, qt
from .pythonqt import application as qt_application
from .qmrml_standins import qMRMLWidget


class HostedModule:
    """A loaded module.

    Attributes:
        code: the imported module file.
        metadata: what the module said about itself: title, categories, help text and so on.
    """

    def __init__(self, path: Path) -> None:
        app = application.start()
        app.process_events = qt_application.processEvents
        base_python.install()
        _keep_settings_out_of_home()
        self.name = path.stem
        self.code = self._load(path)
        self.metadata = SimpleNamespace(
            path=str(path),
            title="",
            categories=[],
            dependencies=[],
            contributors=[],
            helpText="",
            acknowledgementText="",
            icon=None,
        )
        setattr(slicer.modules, self.name.lower(), SimpleNamespace(path=str(path), name=self.name))
        getattr(self.code, self.name)(self.metadata)

    def _load(self, path: Path) -> ModuleType:
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(self.name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.name] = module
        spec.loader.exec_module(module)
        return module

    def make_panel(self) -> Any:
        """The module's widget, set up and entered, as after choosing the module in Slicer."""
        parent = qMRMLWidget()
        parent.setLayout(qt.QVBoxLayout())
        parent.setMRMLScene(slicer.mrmlScene)
        panel = getattr(self.code, f"{self.name}Widget")(parent)
        panel.setup()
        parent.isEntered = True
        panel.enter()
        return panel


def _keep_settings_out_of_home() -> None:
    settings = QtCore.QSettings
    settings.setDefaultFormat(settings.Format.IniFormat)
    settings.setPath(settings.Format.IniFormat, settings.Scope.UserScope, slicer.app.temporaryPath)
