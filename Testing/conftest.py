"""Fixtures on Slicer's real libraries; tests that ask for none of them never load Slicer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def slicer_application() -> Any:
    """slicer-core, started once; a missing system library is named with its package."""
    from harness import application

    return application.start()


@pytest.fixture(scope="session")
def vtk_errors(slicer_application: Any) -> Any:
    """What C++ printed as errors and then carried on from."""
    from harness.application import VtkErrors

    return VtkErrors()


@pytest.fixture
def slicer_scene(slicer_application: Any, vtk_errors: Any) -> Iterator[Any]:
    """An empty scene with three slice views; errors that Slicer prints fail the test."""
    import slicer

    from harness.slice_views import slice_views

    slicer.mrmlScene.Clear(False)
    for view in slice_views().values():
        view.reset()
    vtk_errors.clear()
    yield slicer.mrmlScene
    printed = list(vtk_errors.messages)
    slicer.mrmlScene.Clear(False)
    assert not printed, "".join(printed)


@pytest.fixture
def views(slicer_scene: Any) -> dict[str, Any]:
    """The slice views by name."""
    from harness.slice_views import slice_views

    return slice_views()
