"""Results as files: a folder with pictures, map, segmentation, table and manifest.

`AnomalyResult`s of one volume in, one after the other; a folder out that is complete when it appears. Maps
and segmentations lie exactly where the image they were made from lies.
"""

from __future__ import annotations

import csv
import gzip
import json
import platform
import sys
from collections.abc import Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__
from .errors import Cancelled, InvalidRequest
from .geometry import AXES, place_in_volume, view_name
from .output_folder import OutputFolder, writing
from .overlay import render_overlay
from .result import RESEARCH_USE_ONLY, AnomalyResult
from .terminology import TERMINOLOGY_ENTRY, TERMS
from .volume import RAS_FROM_LPS, Volume

if TYPE_CHECKING:
    import SimpleITK
    from PIL.Image import Image

    from .dicom_output import DicomSink

MANIFEST = "result.json"
SCHEMA_VERSION = 1
_GEOMETRY_TOLERANCE_MM = 0.5e-3
_COLUMNS = (
    "index",
    "number",
    "view",
    "score",
    "percentile",
    "unlike",
    "area_mm2",
    "area_pixels",
    "peak_r_mm",
    "peak_a_mm",
    "peak_s_mm",
    "overlay",
    "notice",
)


class ResultWriter:
    """Writes the results of one volume into a folder of their own, one slice at a time.

    Everything is written beside the folder first and moved into place at the end, so that a folder that is
    there is whole. A run that the user stops keeps the slices that are done, and its manifest says
    `"complete": false`; any other error leaves nothing behind. Memory holds one map and one mask
    of the volume's size, however many slices come; for DICOM, those of each slice besides.

    ```python
    with ResultWriter(folder, volume, requested=40) as writer:
        for result in detect_slices(detector, volume):
            writer.add(result)
    print(writer.manifest["slices"][0]["score"])
    ```

    Attributes:
        folder: where the results appear.
        manifest: the content of `result.json`, once the folder is there.
    """

    def __init__(
        self,
        folder: Path | str,
        volume: Volume,
        *,
        requested: int | None = None,
        window: tuple[float, float] | None = None,
        overwrite: bool = False,
        dicom: Collection[str] = (),
    ) -> None:
        """Claims the folder; detection is too slow to learn at its end that nothing can be written.

        Args:
            folder: results go here; made when missing, refused when it holds results already.
            volume: the image that the results will come from.
            requested: number of slices that will come, None when not known.
            window: that was asked for, for the manifest; None for the detector's own rules.
            overwrite: replace the results of an earlier run.
            dicom: what to write as DICOM too: names of `dicom_output.DicomKind`s.

        Raises:
            OutputFailed: the folder is taken, or cannot be written.
            NotDicom: DICOM is asked for, and the volume did not come from it.
            DependencyMissing: DICOM is asked for, and highdicom is not installed.
        """
        self.folder = Path(folder).absolute()
        self.manifest: dict[str, Any] = {}
        self._volume = volume
        self._requested = requested
        self._window = window
        self._records: list[dict[str, Any]] = []
        self._files: list[str] = []
        self._notes: list[str] = []
        self._axis: int | None = None
        self._map: np.ndarray | None = None
        self._mask: np.ndarray | None = None
        self._run: dict[str, Any] = {}
        self._dicom_kinds, self._dicom = sorted(set(dicom)), _dicom_sink(volume, dicom)
        self._output = OutputFolder(folder, MANIFEST, overwrite=overwrite)
        self._staging = self._output.staging

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            stopped = kind is not None and issubclass(kind, Cancelled)
            if self._records and (kind is None or stopped):
                self._finish(stopped)
        finally:
            self._output.discard()

    def add(self, result: AnomalyResult) -> None:
        """Writes the slice's picture and takes its map, mask and numbers."""
        record = self._describe(result)
        if result.plane.aligned is not None:
            self._place(result, result.plane.aligned.axis)
        else:
            number = 1 + sum(r["axis"] is None for r in self._records)
            record["map"] = self._write_map(
                f"map_oblique_{number}", result.map[None], result.plane.ijk_to_ras
            )
            record["segmentation"] = self._write_segmentation(
                f"segmentation_oblique_{number}", result.mask[None], result.plane.ijk_to_ras
            )
        picture = self._write_picture(result, record["overlay"])
        if self._dicom is not None:
            self._dicom.add(result, self._staging, Path(record["overlay"]).stem, picture)
        self._records.append(record)
        self._run = self._run or _describe_run(result)

    def _describe(self, result: AnomalyResult) -> dict[str, Any]:
        """What the manifest says about one slice."""
        aligned = result.plane.aligned
        if aligned is None:
            number = 1 + sum(r["axis"] is None for r in self._records)
            overlay, view = f"overlay_oblique_{number}.png", "Oblique"
        else:
            overlay = f"overlay_{AXES[aligned.axis]}_{aligned.index:03d}.png"
            view = view_name(self._volume, aligned.axis)
        if any(r["overlay"] == overlay for r in self._records):
            raise InvalidRequest(f"{result.plane.description} was given twice; each slice is written once")
        return {
            "axis": None if aligned is None else AXES[aligned.axis],
            "index": None if aligned is None else aligned.index,
            "number": None if aligned is None else aligned.index + 1,
            "view": view,
            "description": result.plane.description,
            "score": round(float(result.score), 6),
            "percentile": None if result.percentile is None else round(float(result.percentile), 2),
            "image_threshold": None if result.image_threshold is None else float(result.image_threshold),
            "prompt": result.prompt,
            "unlikeness": None if result.unlikeness is None else round(float(result.unlikeness), 4),
            "unlike": result.is_unlike,
            "empty": result.is_empty,
            "threshold": float(result.threshold),
            "area_mm2": round(result.area_mm2, 4) if result.plane.spacing_known else None,
            "area_pixels": int(result.mask.sum()),
            "peak_ras_mm": [round(float(x), 3) for x in result.peak_ras] if result.map.any() else None,
            "window": result.window and [float(edge) for edge in result.window],
            "plane_ijk_to_ras": result.plane.ijk_to_ras.tolist(),
            "seconds": {step: round(float(s), 4) for step, s in result.timings.items()},
            "overlay": overlay,
        }

    def _place(self, result: AnomalyResult, axis: int) -> None:
        if self._axis not in (None, axis):
            raise InvalidRequest(
                f"Slices along {AXES[axis]} cannot join slices along {AXES[self._axis or 0]} in one map; "
                "write them to another folder"
            )
        self._axis = axis
        if self._map is None or self._mask is None:
            shape = self._volume.voxels.shape[:3]
            self._map = np.zeros(shape, dtype=np.float32)
            self._mask = np.zeros(shape, dtype=np.uint8)
        place_in_volume(result.plane, result.map, self._map)
        place_in_volume(result.plane, result.mask, self._mask)

    def _finish(self, stopped: bool) -> None:
        """Writes what belongs to the volume as a whole, then lets the folder appear."""
        if self._map is not None and self._mask is not None:
            self._write_map("map", self._map, self._volume.ijk_to_ras)
            self._write_segmentation("segmentation", self._mask, self._volume.ijk_to_ras)
        self._write_scores()
        complete = not stopped and self._requested in (None, len(self._records))
        if self._dicom is not None:
            self._dicom.finish(self._staging, complete=complete)
            self._files += self._dicom.files
        self.manifest = self._build_manifest(complete)
        with writing(self.folder / MANIFEST):
            text = json.dumps(self.manifest, indent=2, ensure_ascii=False, allow_nan=False)
            (self._staging / MANIFEST).write_text(text + "\n", encoding="utf-8")
        self._output.appear()

    def _build_manifest(self, complete: bool) -> dict[str, Any]:
        volume = self._volume
        return {
            "schema_version": SCHEMA_VERSION,
            "notice": RESEARCH_USE_ONLY,
            "complete": complete,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "software": _describe_software(),
            **self._run,
            "input": describe_input(volume),
            "window_requested": self._window and [float(edge) for edge in self._window],
            "slices_requested": self._requested,
            "dicom": self._dicom_kinds,
            "slices": self._records,
            "notes": self._notes,
            "files": [*self._files, MANIFEST],
        }

    def _write_picture(self, result: AnomalyResult, name: str) -> Image:
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text("Comment", RESEARCH_USE_ONLY)
        picture = render_overlay(result)
        with writing(self.folder / name):
            picture.save(self._staging / name, pnginfo=text)
        self._files.append(name)
        return picture

    def _write_map(self, stem: str, values: np.ndarray, ijk_to_ras: np.ndarray) -> str:
        """Anomaly values 0 to 1, (K, J, I); 0 also where nothing was analysed."""
        name = f"{stem}.nii.gz"
        if not _fits_nifti(ijk_to_ras, values.shape):
            name = f"{stem}.nrrd"
            self._notes.append(f"{name}: the voxel axes are not at right angles, which NIfTI cannot hold")
        image = _image(values.astype(np.float32, copy=False), ijk_to_ras)
        # NIfTI keeps 79 characters of it.
        image.SetMetaData("ITK_FileNotes", f"Anomaly map; 0: not analysed. {RESEARCH_USE_ONLY}")
        self._write_image(image, name)
        return name

    def _write_segmentation(self, stem: str, mask: np.ndarray, ijk_to_ras: np.ndarray) -> str:
        name = f"{stem}.seg.nrrd"
        image = _image(mask.astype(np.uint8, copy=False), ijk_to_ras)
        for key, value in _segment_fields(mask, ijk_to_ras).items():
            image.SetMetaData(key, value)
        self._write_image(image, name)
        return name

    def _write_image(self, image: SimpleITK.Image, name: str) -> None:
        import SimpleITK

        path = self._staging / name
        with writing(self.folder / name):
            try:
                SimpleITK.WriteImage(image, str(path), useCompression=True)
            except RuntimeError as error:
                raise OSError(str(error).strip().splitlines()[-1]) from error
            if name.endswith(".gz"):
                _check_gzip(path)
        self._files.append(name)

    def _write_scores(self) -> None:
        name = "scores.csv"
        with writing(self.folder / name), (self._staging / name).open("w", newline="") as stream:
            table = csv.DictWriter(stream, _COLUMNS, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            for record in self._records:
                r, a, s = record["peak_ras_mm"] or (None, None, None)
                peak = {"peak_r_mm": r, "peak_a_mm": a, "peak_s_mm": s}
                table.writerow({**record, **peak, "notice": RESEARCH_USE_ONLY})
        self._files.append(name)


def describe_input(volume: Volume) -> dict[str, Any]:
    """What `result.json` says of the image; nothing that identifies the patient."""
    return {
        "description": volume.source,
        "modality": volume.modality,
        "units": volume.units,
        "size_ijk": list(volume.size),
        "spacing_mm": [round(s, 6) for s in volume.spacing],
        "spacing_known": volume.spacing_known,
        "ijk_to_ras": volume.ijk_to_ras.tolist(),
    }


def _dicom_sink(volume: Volume, kinds: Collection[str]) -> DicomSink | None:
    """What takes the results as DICOM, tried on the volume's headers; None when DICOM is not asked for."""
    if not kinds:
        return None
    from .dicom_output import DicomSink, DicomSource

    sink = DicomSink(DicomSource.of_volume(volume), kinds)
    sink.rehearse(volume)
    return sink


def _segment_fields(mask: np.ndarray, ijk_to_ras: np.ndarray) -> dict[str, str]:
    """Slicer's custom NRRD fields for one binary labelmap segment; `mask` is (K, J, I)."""
    occupied = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in (2, 1, 0)]
    # The image's grid, for Slicer to edit and export on; it crops the segment itself to what is occupied.
    whole = [edge for count in mask.shape[::-1] for edge in (0, count - 1)]
    geometry = "".join(f"{number!r};" for number in [*ijk_to_ras.ravel().tolist(), *whole])
    return {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ConversionParameters": f"Reference image geometry|{geometry}|&",
        # Slicer before 5.2 reads "Master", later ones "Source".
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_SourceRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
        "Segment0_ID": "abnormality-candidate",
        "Segment0_Name": TERMS.name,
        "Segment0_NameAutoGenerated": "0",
        "Segment0_Color": " ".join(f"{c / 255:.6f}" for c in TERMS.colour),
        "Segment0_ColorAutoGenerated": "0",
        "Segment0_Extent": " ".join(f"{o[0]} {o[-1]}" if o.size else "0 -1" for o in occupied),
        "Segment0_LabelValue": "1",
        "Segment0_Layer": "0",
        "Segment0_Tags": f"TerminologyEntry:{TERMINOLOGY_ENTRY}|Notice:{RESEARCH_USE_ONLY}|",
    }


def _image(values: np.ndarray, ijk_to_ras: np.ndarray) -> SimpleITK.Image:
    """(K, J, I) array and its place in RAS mm as an image in LPS mm, as SimpleITK wants it."""
    import SimpleITK

    ijk_to_lps = RAS_FROM_LPS @ ijk_to_ras  # its own inverse
    spacing = np.linalg.norm(ijk_to_lps[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(values)
    image.SetOrigin(ijk_to_lps[:3, 3].tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((ijk_to_lps[:3, :3] / spacing).ravel().tolist())
    return image


def _fits_nifti(ijk_to_ras: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether the voxel axes are at right angles, to within what moves the far corner by half a micrometre.

    ITK writes any other matrix to NIfTI too, but as the nearest one with right angles.
    """
    axes = ijk_to_ras[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    u, _, vt = np.linalg.svd(axes / spacing)
    far_corner = np.array(shape[::-1]) - 1
    return bool(np.linalg.norm((axes - (u @ vt) * spacing) @ far_corner) <= _GEOMETRY_TOLERANCE_MM)


def _check_gzip(path: Path) -> None:
    """Raises OSError when the file is cut short; ITK does not notice a full disk when it writes NIfTI."""
    try:
        with gzip.open(path) as stream:
            while stream.read(1 << 20):
                pass
    except EOFError as error:
        raise OSError("the disk is full") from error


def _describe_run(result: AnomalyResult) -> dict[str, Any]:
    """What is the same for all slices."""
    provenance = result.provenance
    return {
        "detector": {
            "name": provenance.bundle,
            "version": provenance.bundle_version,
            "sha256": provenance.bundle_sha256,
        },
        "threshold": float(result.threshold),
        "device": provenance.device,
        "precision": provenance.precision,
        "runtime": provenance.runtime,
    }


def _describe_software() -> dict[str, str]:
    """Versions of this package, of Python, and of the libraries that took part."""
    libraries = ("numpy", "torch", "monai", "open_clip", "SimpleITK", "pydicom", "highdicom")
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in libraries}
    return {
        "name": "medanomalyclip",
        "version": __version__,
        "python": platform.python_version(),
        **{name: str(version) for name, version in loaded.items() if version},
    }
