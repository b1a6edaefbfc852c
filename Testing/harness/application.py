"""slicer-core as an application without windows: `start()` fills slicer.mrmlScene, .modules and .app."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import slicer
import slicer.util
import vtk

from .system_libraries import require_system_libraries

_MODULE_LOGICS = {
    "Colors": "vtkSlicerColorLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "SubjectHierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "Terminologies": "vtkSlicerTerminologiesModuleLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "Volumes": "vtkSlicerVolumesLogic",
}


class HeadlessApplication:
    """What `slicer.app` offers to scripts, without windows.

    Attributes:
        applicationName: as in Slicer; message boxes are titled with it.
        temporaryPath: folder for files that nobody keeps.
        slicerUserSettingsFilePath: file in a folder for what belongs to the user; neither exists.
    """

    applicationName = "Slicer"

    def __init__(self, logic: vtk.vtkObject) -> None:
        self._logic = logic
        self._scratch = tempfile.TemporaryDirectory(prefix="slicer-harness-")
        self.temporaryPath = self._scratch.name
        self.slicerUserSettingsFilePath = str(Path(self._scratch.name) / "settings" / "Slicer.ini")
        self.process_events = lambda: None
        self._slots: dict[str, list[Callable[[], None]]] = {}

    def connect(self, signal: str, slot: Callable[[], None]) -> bool:
        self._slots.setdefault(signal, []).append(slot)
        return True

    def emit(self, signal: str) -> None:
        """Call what was connected to one of the application's signals, for example "startupCompleted()"."""
        for slot in self._slots.get(signal, []):
            slot()

    def applicationLogic(self) -> vtk.vtkObject:
        return self._logic

    def mrmlScene(self) -> vtk.vtkObject:
        return slicer.mrmlScene

    def layoutManager(self) -> None:
        return None

    def testingEnabled(self) -> bool:
        return True

    def processEvents(self, *_: object) -> None:
        self.process_events()

    def pauseRender(self) -> None:
        self._logic.PauseRender()

    def resumeRender(self) -> None:
        self._logic.ResumeRender()

    def setOverrideCursor(self, *_: object) -> None:
        pass

    def restoreOverrideCursor(self) -> None:
        pass

    def moduleManager(self) -> SimpleNamespace:
        return SimpleNamespace(connect=lambda *_: True, disconnect=lambda *_: True)


class VtkErrors:
    """Errors that VTK's and Slicer's C++ print and then carry on from.

    Attributes:
        messages: those since the last `clear`.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._window = vtk.vtkOutputWindow.GetInstance()
        self._window.AddObserver(vtk.vtkCommand.ErrorEvent, self._keep)

    def clear(self) -> None:
        self.messages.clear()

    @vtk.calldata_type(vtk.VTK_STRING)
    def _keep(self, _window: vtk.vtkObject, _event: str, message: str) -> None:
        self.messages.append(message)


class _Quiet:
    """VTK's warnings off for a while: the wheel has neither colour files nor terminologies and says so."""

    def __enter__(self) -> None:
        vtk.vtkObject.GlobalWarningDisplayOff()

    def __exit__(self, *_: object) -> None:
        vtk.vtkObject.GlobalWarningDisplayOn()


def start() -> HeadlessApplication:
    """Start once; later calls return the same application."""
    if isinstance(getattr(slicer, "app", None), HeadlessApplication):
        return slicer.app
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    require_system_libraries()

    scene = slicer.vtkMRMLScene()
    slicer.mrmlScene = scene
    _speak_english()
    logic = slicer.vtkSlicerApplicationLogic()
    app = HeadlessApplication(logic)
    with _Quiet():
        logic.SetMRMLScene(scene)
        logic.GetColorLogic().SetMRMLScene(scene)
        logic.GetColorLogic().AddDefaultColorNodes()
        logic.SetSliceLogics(vtk.vtkCollection())
        logic.SetViewLogics(vtk.vtkCollection())
        slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(scene, True)
        slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance().SetMRMLApplicationLogic(logic)
        app.data_io = _data_io(scene, logic, app.temporaryPath)
        slicer.modules = SimpleNamespace(
            **{name.lower(): _module(name, cls, scene, logic) for name, cls in _MODULE_LOGICS.items()}
        )
        if scene.GetFirstNodeByClass("vtkMRMLCrosshairNode") is None:
            crosshair = slicer.vtkMRMLCrosshairNode()
            crosshair.SetCrosshairName("default")
            scene.AddNode(crosshair)
    slicer.app = app
    return app


def _speak_english() -> None:
    """`slicer.i18n`, which no wheel carries."""
    words = ModuleType("slicer.i18n")
    words.tr = lambda text: text
    words.translate = lambda context, text: text
    sys.modules[words.__name__] = slicer.i18n = words


def _module(
    name: str, class_name: str, scene: vtk.vtkObject, application_logic: vtk.vtkObject
) -> SimpleNamespace:
    logic = getattr(slicer, class_name)()
    logic.SetMRMLApplicationLogic(application_logic)
    logic.SetMRMLScene(scene)
    application_logic.SetModuleLogic(name, logic)
    return SimpleNamespace(logic=lambda: logic)


def _data_io(scene: vtk.vtkObject, logic: vtk.vtkObject, cache: str) -> tuple[vtk.vtkObject, vtk.vtkObject]:
    """Reading an .mrb fails without these two."""
    remote = slicer.vtkMRMLRemoteIOLogic()
    remote.SetMRMLScene(scene)
    remote.SetMRMLApplicationLogic(logic)
    remote.GetCacheManager().SetRemoteCacheDirectory(cache)
    data_io = slicer.vtkDataIOManagerLogic()
    data_io.SetMRMLScene(scene)
    data_io.SetMRMLApplicationLogic(logic)
    data_io.SetAndObserveDataIOManager(remote.GetDataIOManager())
    remote.AddDataIOToScene()
    return remote, data_io


def save_bundle(path: Path) -> None:
    """Write the scene as an .mrb."""
    folder = str(Path(tempfile.mkdtemp(dir=slicer.app.temporaryPath)) / path.stem)
    Path(folder).mkdir()
    if not slicer.app.applicationLogic().SaveSceneToSlicerDataBundleDirectory(folder, None):
        raise RuntimeError(f"the scene was not saved to {folder}")
    if not slicer.app.applicationLogic().Zip(str(path), folder):
        raise RuntimeError(f"{path} was not written")


def load_bundle(path: Path) -> None:
    """Replace the scene by that of an .mrb."""
    if not slicer.mrmlScene.ReadFromMRB(str(path), True):
        raise RuntimeError(f"{path} was not read")
