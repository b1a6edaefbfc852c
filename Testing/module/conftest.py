"""The module's panel over an empty or a filled scene."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MODULE = Path(__file__).parents[2] / "MedAnomalyCLIP" / "MedAnomalyCLIP.py"


@pytest.fixture(scope="session")
def hosted_module(slicer_application: Any) -> Any:
    """The module file, loaded once."""
    from harness.scripted_module import HostedModule

    return HostedModule(MODULE)


@pytest.fixture
def slot_errors() -> Iterator[list[BaseException]]:
    """Exceptions in slots; those that a test leaves in the list fail it."""
    from harness import pythonqt

    pythonqt.slot_errors.clear()
    yield pythonqt.slot_errors
    assert not pythonqt.slot_errors


@pytest.fixture
def head(views: dict[str, Any]) -> Any:
    """The phantom's volume node, shown in all views through its bright spot; Red is touched last."""
    import numpy as np

    from harness import phantom

    voxels, spot = phantom.head()
    matrix = phantom.axial_matrix(voxels.shape)
    node = phantom.add_volume(voxels, matrix, "Head")
    k, j, i = np.argwhere(spot).mean(axis=0)
    for name in ("Yellow", "Green", "Red"):
        view = views[name]
        view.show(node)
        view.node.JumpSlice(*(matrix @ [i, j, k, 1])[:3])
    return node


@pytest.fixture(autouse=True)
def fresh_settings(slicer_application: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without settings; the folder where they would be."""
    from harness.pythonqt import qt

    monkeypatch.setattr(
        slicer_application, "slicerUserSettingsFilePath", str(tmp_path / "settings" / "Slicer.ini")
    )
    qt.QSettings().clear()
    return tmp_path / "settings"


@pytest.fixture(autouse=True)
def no_warm_up(slicer_application: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded ahead, so that a test sees each loading where it asks for it."""
    monkeypatch.setattr("MedAnomalyCLIPLib.panel_setup.WARM_UP_AFTER_MS", 10**8)


@pytest.fixture
def detector() -> Any:
    from harness.fake_detector import BrightnessDetector

    return BrightnessDetector()


@pytest.fixture
def panel(hosted_module: Any, views: Any, slot_errors: Any, detector: Any) -> Iterator[Any]:
    """The panel with a detector that needs no network, over an empty scene."""
    panel = hosted_module.make_panel()
    panel.logic.detectorFactory = lambda folder: detector
    yield panel
    detector.gate.set()
    panel.cleanup()
    panel.parent.delete()
    process_events()


def process_events() -> None:
    from harness.pythonqt import application

    application.processEvents()


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Let Qt work until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        process_events()
        time.sleep(0.005)


@pytest.fixture
def wait() -> Callable[..., None]:
    return wait_until


@pytest.fixture
def detect(panel: Any) -> Callable[[], None]:
    """Click Detect and wait for the end of the run."""

    def click() -> None:
        panel.ui.detectButton.click()
        wait_until(lambda: not panel.logic.isRunning(), seconds=60)  # MONAI takes a while to import

    return click
