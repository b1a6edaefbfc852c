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


def add_dicom_options(parser: argparse.ArgumentParser) -> None:
    """Results as DICOM, beside the other files."""
    group = parser.add_argument_group(
        "DICOM results",
        "for DICOM images; they hold the patient's identity, as those do (needs: pip install '.[dicom]')",
    )
    for option, kind, words in (
        ("--dicom-seg", "segmentation", "DICOM Segmentations of what reaches the threshold, and of the map"),
        ("--dicom-sr", "report", "a DICOM Structured Report, and the segmentation that it refers to"),
        ("--secondary-capture", "capture", "the overlay pictures as DICOM Secondary Captures"),
    ):
        group.add_argument(
            option, action="append_const", const=kind, dest="dicom", help=f"write {words}", default=[]
        )


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value
