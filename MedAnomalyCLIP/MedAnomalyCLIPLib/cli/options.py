"""What the commands' options share: how a detector is loaded, and how values are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime import AUTO, PRECISIONS, RUNTIMES

if TYPE_CHECKING:
    from ..detection import SliceDetector

DetectorLoader = Callable[..., "SliceDetector"]  # of a bundle and a device, as `load_detector`


def load_detector(
    bundle: Path | str | None, device: str, runtime: str = AUTO, precision: str = AUTO
) -> SliceDetector:
    """The detector in a bundle's folder, or the bundled one, ready on its device."""
    from ..detection import SliceDetector

    return SliceDetector.load(bundle, device=device, runtime=runtime, precision=precision)


@dataclass(frozen=True)
class LoadingIn:
    """Loads detectors in one runtime and precision; unlike a partial function equal to its copies in other
    processes.
    """

    load: DetectorLoader
    runtime: str = AUTO
    precision: str = AUTO

    def __call__(self, bundle: Path | str | None, device: str) -> SliceDetector:
        return self.load(bundle, device, runtime=self.runtime, precision=self.precision)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where a detector runs, by what and in what; `main` hands the latter two to what loads detectors."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default=AUTO,
        help="PyTorch, ONNX Runtime, or whichever serves: ONNX Runtime on the CPU for detectors that have a "
        "graph for it (default: auto)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=AUTO,
        help="int8 is the fastest on the CPU and moves scores and maps little; bfloat16 and float16 need "
        "PyTorch; auto takes bfloat16 on NVIDIA GPUs that have it, else float16 there; int8 in ONNX Runtime "
        "for detectors that were found to allow it; float32 elsewhere (default: auto)",
    )


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
