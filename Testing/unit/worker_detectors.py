"""Detectors for worker processes: what is bright is anomalous; some end the process that they run in."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from harness.fake_detector import BrightnessDetector
from MedAnomalyCLIPLib.errors import BundleInvalid

POISON = 30_000.0
"""A slice as bright as this ends the process that detects on it, as the kernel does when memory runs out."""


class MarkedDetector(BrightnessDetector):
    """Notes its process when it is loaded, and may be slow or deadly."""

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        super().__init__()
        self._seconds = seconds
        (folder / f"loaded-{os.getpid()}").touch()

    def threshold_with(self, prompt):
        return self.threshold

    def title_of(self, prompt):
        return ""

    def detect(self, plane, **options):
        if plane.pixels.max() == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self._seconds)
        return super().detect(plane, **options)


def load(bundle, device):
    """For `WorkerDetector.load`; the bundle's folder is where it notes its process."""
    return MarkedDetector(Path(bundle))


def load_slow(bundle, device):
    return MarkedDetector(Path(bundle), seconds=0.3)


def load_once(bundle, device):
    """In one process, and in no other after it."""
    if any(Path(bundle).iterdir()):
        raise BundleInvalid("this computer lacks what it needs")
    return MarkedDetector(Path(bundle), seconds=0.3)


def load_none(bundle, device):
    raise BundleInvalid("the detector is damaged")
