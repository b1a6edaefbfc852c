"""Where the files that ship beside the code lie: the bundled detector, the terminology.

Name in, path out, the same from a checkout, inside Slicer and after `pip install`.
"""

from __future__ import annotations

from pathlib import Path

from .errors import MedAnomalyCLIPError

_PACKAGE = Path(__file__).resolve().parent
# Inside the package after `pip install`, beside it in a checkout and in Slicer. The inner one is asked
# first: beside an installed package lies site-packages, where `Resources` may be somebody else's.
_FOLDERS = (_PACKAGE / "Resources", _PACKAGE.parent / "Resources")


def resource_path(name: str) -> Path:
    """The file or folder `name` of the module's resources, for example "Models/default"."""
    for folder in _FOLDERS:
        if (folder / name).exists():
            return folder / name
    raise MedAnomalyCLIPError(
        f"{name} is missing from this installation of MedAnomalyCLIP; install it again, complete"
    )
