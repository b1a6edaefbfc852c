"""The DICOM files behind a volume node: what Slicer's DICOM database knows of it.

A node and its `Volume` in; the volume with the frames that its slices were read from out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import slicer
from slicer.i18n import tr as _

from .errors import NotDicom
from .scene_views import Node
from .volume import Volume

_INSTANCES = "DICOM.instanceUIDs"  # as Slicer's DICOM plugins leave it on what they load


def is_from_dicom(node: Node | None) -> bool:
    """Whether a volume node was loaded from DICOM."""
    return bool(node is not None and node.GetAttribute(_INSTANCES))


def with_dicom_frames(volume: Volume, node: Node) -> Volume:
    """A volume that knows the files it came from.

    Args:
        volume: as it was made of the node.
        node: the volume node.

    Raises:
        NotDicom: the node was not loaded from DICOM, or its files are gone.
        GeometryRefused: it was moved, cropped or resampled since.
    """
    from .dicom import frames_on_grid

    if not is_from_dicom(node):
        raise NotDicom(
            _(
                "{name} was not loaded from DICOM, so no patient and study are known that DICOM results "
                "could belong to. Load the study with Slicer's DICOM module, or export without DICOM."
            ).format(name=node.GetName())
        )
    database = getattr(slicer, "dicomDatabase", None)
    uids = node.GetAttribute(_INSTANCES).split() if database is not None and database.isOpen else []
    paths = [Path(database.fileForInstance(uid) or "") for uid in uids]  # type: ignore[union-attr]
    if not paths or not all(path.is_file() for path in paths):
        raise NotDicom(
            _(
                "The DICOM files of {name} are not in Slicer's DICOM database any more; import the study "
                "again, or export without DICOM."
            ).format(name=node.GetName())
        )
    return replace(volume, frames=frames_on_grid(list(dict.fromkeys(paths)), volume))
