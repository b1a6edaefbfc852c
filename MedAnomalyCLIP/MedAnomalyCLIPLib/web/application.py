"""Slicer's libraries as one application: `start()` makes the scene and what scripts reach through `slicer`.

The wheel `slicer-core` brings MRML, the logics and `slicer.util`, but no application: `slicer.app`,
`slicer.modules` and `slicer.i18n` are made here, as far as the module's logic asks for them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import DependencyMissing

if TYPE_CHECKING:
    from trame_slicer.core import SlicerApp

_started: list[Any] = []


class WindowlessApplication:
    """What the module's logic asks of `slicer.app`. There is no layout manager: the page has the views."""

    def __init__(self, logic: Any) -> None:
        self._logic = logic

    def applicationLogic(self) -> Any:
        return self._logic

    def layoutManager(self) -> None:
        return None

    def pauseRender(self) -> None:
        self._logic.PauseRender()

    def resumeRender(self) -> None:
        self._logic.ResumeRender()


def require() -> None:
    """Raise unless Slicer's libraries can be imported.

    Raises:
        DependencyMissing: trame-slicer or Slicer's libraries are not installed, or do not fit each other.
    """
    try:
        import slicer.util  # noqa: F401
        from trame_slicer.core import SlicerApp  # noqa: F401
    except ImportError as error:
        raise DependencyMissing(
            f"The page in the browser needs trame-slicer and Slicer's libraries ({error}); in an environment "
            "of its own: pip install 'medanomalyclip[web]'"
        ) from error


def start() -> SlicerApp:
    """Start once in a process; later calls return the same application.

    Raises:
        DependencyMissing: as `require`.
    """
    if _started:
        return _started[0]
    require()
    import slicer
    from trame_slicer.core import SlicerApp
    from vtkmodules.vtkCommonCore import vtkLogger

    vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_OFF)  # VTK tells its errors twice otherwise
    with quiet_vtk():  # the wheel has no colour files and says so for each of them
        app = SlicerApp()
        colours = app.register_module_logic(slicer.vtkSlicerColorLogic(), logic_name="Colors")
    logics = {
        "colors": colours,
        "segmentations": app.segmentations_logic,
        "subjecthierarchy": app.subject_hierarchy_logic,
        "terminologies": app.terminologies_logic,
        "volumes": app.volumes_logic,
    }
    slicer.mrmlScene = app.scene
    slicer.app = WindowlessApplication(app.app_logic)
    slicer.modules = SimpleNamespace(**{name: _module(logic) for name, logic in logics.items()})
    _speak_english()
    _started.append(app)
    return app


@contextmanager
def quiet_vtk() -> Iterator[None]:
    """VTK's warnings off for a while: about what a wheel lacks, and what trame-slicer will have to change."""
    from vtkmodules.vtkCommonCore import vtkObject

    vtkObject.GlobalWarningDisplayOff()
    try:
        yield
    finally:
        vtkObject.GlobalWarningDisplayOn()


def _module(logic: Any) -> SimpleNamespace:
    return SimpleNamespace(logic=lambda: logic)


def _speak_english() -> None:
    """Slicer's translations come with its application; without it, words are shown as they are written."""
    import slicer

    if "slicer.i18n" in sys.modules:
        return
    words = ModuleType("slicer.i18n")
    words.tr = lambda text: text  # type: ignore[attr-defined]
    words.translate = lambda _context, text: text  # type: ignore[attr-defined]
    sys.modules[words.__name__] = words
    slicer.i18n = words
