"""Images for the page: a file or folder to a volume node of the scene.

They are read by `volume.read_volume`, as for the command line: no patient's name comes into the scene.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, UnreadableImage
from ..limits import limits
from ..volume import Volume

if TYPE_CHECKING:
    from ..scene_views import Node

_HOUNSFIELD = ("[hnsf'U]", "UCUM", "Hounsfield unit")


def add_volume(volume: Volume) -> Node:
    """A volume node with the voxels and the place of a volume, displayed with an automatic window.

    It is called after modality and body part, which is what presets are guessed from.
    """
    import slicer

    name = " ".join(word for word in (volume.modality, volume.body_part, "image") if word)
    kind = "vtkMRMLVectorVolumeNode" if volume.is_colour else None
    node = slicer.util.addVolumeFromArray(volume.voxels, volume.ijk_to_ras, name, kind)
    attribute = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMSeriesModalityAttributeName()
    if volume.modality:
        node.SetAttribute(attribute, volume.modality)
    if volume.units == "HU":
        units = slicer.vtkCodedEntry()
        units.SetValueSchemeMeaning(*_HOUNSFIELD)
        node.SetVoxelValueUnits(units)
    return node


def volume_words(volume: Volume) -> str:
    """A line about an image, without anything that identifies the patient."""
    size = " × ".join(str(count) for count in volume.size)
    spacing = " × ".join(f"{step:.3g}" for step in volume.spacing)
    known = f"{spacing} mm" if volume.spacing_known else "pixel size unknown"
    return ", ".join(word for word in (volume.modality, f"{size} voxels", known) if word)


class Uploads:
    """What a browser sends, one file after the other, kept on this computer until the next study or the end.

    Files get names of our own: those from a browser are somebody's, and may point out of the folder.
    """

    def __init__(self) -> None:
        self._folder: TemporaryDirectory[str] | None = None
        self._paths: list[Path] = []

    def begin(self, count: int) -> None:
        """Forget the last study, and await the files of another.

        Raises:
            InvalidRequest: they are too many for a study.
        """
        self.close()
        if count > limits().folder_files:
            raise InvalidRequest(f"{count} files are no study; choose the folder of one series")
        self._folder = TemporaryDirectory(prefix="medanomalyclip-")

    def add(self, file: dict[str, Any]) -> None:
        """Keep a file as trame hands it over: a "name", and its "content" as bytes or a list of such.

        Raises:
            UnreadableImage: the browser could not read it.
        """
        name, content = str(file.get("name") or ""), file.get("content")
        if self._folder is None or content is None:
            raise UnreadableImage("The browser could not read the file")
        # Some formats are told by their suffix.
        suffix = "".join(Path(name).suffixes[-2 if name.endswith(".gz") else -1 :])
        path = Path(self._folder.name) / f"image_{len(self._paths)}{suffix}"
        path.write_bytes(b"".join(content) if isinstance(content, list) else content)
        self._paths.append(path)

    @property
    def path(self) -> Path:
        """The only file, or the folder of all.

        Raises:
            InvalidRequest: nothing was sent.
        """
        if self._folder is None or not self._paths:
            raise InvalidRequest("Nothing was chosen")
        return self._paths[0] if len(self._paths) == 1 else Path(self._folder.name)

    def close(self) -> None:
        """Nothing stays on this computer."""
        self._paths = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
