"""Detectors loaded inside Slicer, where Python packages may be missing that the extension does not bring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slicer.i18n import tr as _

from .errors import DependencyMissing
from .resources import resource_path
from .runtime import missing_packages

if TYPE_CHECKING:
    from .detection import SliceDetector


def missing_requirements() -> list[str]:
    """Requirements of this module, as pip names them, that cannot be imported."""
    return missing_packages(resource_path("requirements.txt"))


def load_detector(folder: str = "") -> SliceDetector:
    """The detector in a folder, ready on its device; the bundled one if the folder is empty.

    Raises:
        DependencyMissing: with the steps that install what is missing in Slicer.
        BundleInvalid: the folder holds no detector, or a damaged one.
    """
    require_packages()
    from .detection import SliceDetector

    return SliceDetector.load(folder or None)


def require_packages() -> None:
    """Raise unless all requirements of this module can be imported.

    Raises:
        DependencyMissing: with the steps that install what is missing in Slicer.
    """
    missing = missing_requirements()
    if missing:
        raise DependencyMissing(
            _("Python packages are missing: {names}.\n{steps}").format(
                names=", ".join(missing), steps="\n".join(_steps(missing))
            )
        )


def _steps(missing: list[str]) -> list[str]:
    others = [requirement for requirement in missing if not requirement.startswith("torch")]
    steps = []
    if len(others) < len(missing):
        steps.append(_("Install the extension PyTorch, restart Slicer, and install torch in its module."))
    if others:
        steps.append(_("In the Python console: slicer.util.pip_install({packages})").format(packages=others))
    return steps
