"""What the commands' options share: how a detector is loaded, and how values are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..detection import SliceDetector

DetectorLoader = Callable[["Path | str | None", str], "SliceDetector"]


def load_detector(bundle: Path | str | None, device: str) -> SliceDetector:
    """The detector in a bundle's folder, or the bundled one, ready on its device."""
    from ..detection import SliceDetector

    return SliceDetector.load(bundle, device=device)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value
