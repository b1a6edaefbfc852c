"""Detectors loaded inside Slicer, where Python packages may be missing that the extension does not bring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slicer.i18n import tr as _

from .bundle import default_bundle_path, read_manifest
from .errors import BundleInvalid, DependencyMissing
from .networks import runs_without_torch
from .readiness import check_packages
from .resources import resource_path
from .runtime import BFLOAT16

if TYPE_CHECKING:
    from .detection import SliceDetector


FULL, LIGHT = "requirements.txt", "requirements-light.txt"
"""What all detectors need; what those with a graph for ONNX Runtime need on the CPU."""


def missing_requirements() -> list[str]:
    """Requirements of the full installation, as pip names them, that are not installed or too old."""
    return _missing(FULL)


def missing_light_requirements() -> list[str]:
    """The same of the light installation."""
    return _missing(LIGHT)


def serves_light(folder: Path | str = "", device: str = "auto", precision: str = "auto") -> bool:
    """Whether the light installation has all that a detector needs on a device; the bundled one if empty."""
    if precision == BFLOAT16:
        return False
    try:
        manifest = read_manifest(Path(folder or default_bundle_path()))
    except BundleInvalid:
        return False
    return device in ("auto", "cpu") and runs_without_torch(manifest)


def load_detector(folder: str = "", device: str = "auto", precision: str = "auto") -> SliceDetector:
    """The detector in a folder, ready on a device; the bundled one if the folder is empty.

    Raises:
        DependencyMissing: see `require_packages`.
        BundleInvalid: the folder holds no detector, or a damaged one.
        InvalidRequest: the device does not exist here, or does not do with the precision.
    """
    require_packages(light=serves_light(folder, device, precision))
    from .detection import SliceDetector

    return SliceDetector.load(folder or None, device=device, precision=precision)


def require_packages(*, light: bool = False) -> None:
    """Raise unless all requirements of the full installation, or of the light one, can be imported.

    Raises:
        DependencyMissing: with the steps that install what is missing in Slicer.
    """
    missing = missing_light_requirements() if light else missing_requirements()
    if not missing:
        return
    words = _(
        "Python packages are missing: {names}.\nClick {button} in the section Setup, or type in the Python"
        ' console: slicer.util.getModuleLogic("MedAnomalyCLIP").setupPythonRequirements({argument})'
    )
    button, argument = (_("Install light"), "light=True") if light else (_("Install full"), "")
    raise DependencyMissing(words.format(names=", ".join(missing), button=button, argument=argument))


def _missing(file: str) -> list[str]:
    return [p.requirement for p in check_packages(resource_path(file)) if not p.satisfied]
