"""Detectors loaded inside Slicer, where Python packages may be missing that the extension does not bring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slicer.i18n import tr as _

from .errors import DependencyMissing
from .readiness import check_packages
from .resources import resource_path

if TYPE_CHECKING:
    from .detection import SliceDetector


def missing_requirements() -> list[str]:
    """Requirements of this module, as pip names them, that are not installed or too old."""
    return [p.requirement for p in check_packages(resource_path("requirements.txt")) if not p.satisfied]


def load_detector(folder: str = "", device: str = "auto") -> SliceDetector:
    """The detector in a folder, ready on a device; the bundled one if the folder is empty.

    Raises:
        DependencyMissing: see `require_packages`.
        BundleInvalid: the folder holds no detector, or a damaged one.
        InvalidRequest: the device does not exist here.
    """
    require_packages()
    from .detection import SliceDetector

    return SliceDetector.load(folder or None, device=device)


def require_packages() -> None:
    """Raise unless all requirements of this module can be imported.

    Raises:
        DependencyMissing: with the steps that install what is missing in Slicer.
    """
    missing = missing_requirements()
    if missing:
        words = _(
            "Python packages are missing: {names}.\nClick Install in the section Setup, or type in the Python"
            ' console: slicer.util.getModuleLogic("MedAnomalyCLIP").setupPythonRequirements()'
        )
        raise DependencyMissing(words.format(names=", ".join(missing)))
