"""Mutants of DICOM: single files, compressed ones, multi-frame images, and folders of series."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from unit.dicom_objects import identity
from unit.images import deeply_nested_dicom, dicom_dataset, ramp, write_enhanced

from .image_files import look_at
from .mutations import BOMB_BYTES, EDGES, HUGE_TEXT, TRICKY_NAMES, Rng, damaged, pick, zlib_bomb
from .targets import Target

_SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"
_COMPRESSED = (
    *("MR_small_RLE.dcm", "JPEG2000.dcm", "JPGExtended.dcm", "MR_small_jpeg_ls_lossless.dcm"),
    *(
        "SC_rgb_small_odd_jpeg.dcm",
        "SC_rgb_rle_2frame.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "rtplan_truncated.dcm",
    ),
)
_LONGEST_SEED = 200_000
_VRS = [
    "AE",
    "AS",
    "AT",
    "CS",
    "DA",
    "DS",
    "DT",
    "FL",
    "FD",
    "IS",
    "LO",
    "LT",
    "OB",
    "OD",
    "OF",
    "OL",
    "OV",
    "OW",
    "PN",
    "SH",
    "SL",
    "SQ",
    "SS",
    "ST",
    "SV",
    "TM",
    "UC",
    "UI",
    "UL",
    "UN",
    "UR",
    "US",
    "UT",
    "UV",
]
_GEOMETRY = (
    *("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"),
    *("SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "PixelAspectRatio", "EchoTime"),
)
_LAYOUT = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PlanarConfiguration", "InstanceNumber", "SeriesNumber"),
)
_WORDS = (
    "PhotometricInterpretation",
    "Modality",
    "ImageType",
    "SeriesInstanceUID",
    "SOPClassUID",
    "RescaleType",
)


_IDENTITY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight"),
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "StudyDescription"),
    *("SpecificCharacterSet", "PatientOrientation", "Laterality", "BodyPartExamined", "BurnedInAnnotation"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "PixelSpacing", "SliceThickness"),
)
_COMPUTED_RADIOGRAPHY = "1.2.840.10008.5.1.4.1.1.1"


class DicomFiles(Target):
    """One file: damaged as bytes, its elements given other values, kinds and places."""

    name = "dicom"

    def prepare(self, folder: Path) -> None:
        from MedAnomalyCLIPLib import dicom  # noqa: F401 - imported outside of the limits

        self._small = [_bytes(dicom_dataset(ramp(1, 9, 8)[0])), _bytes(dicom_dataset(ramp(4, 6, 7)))]
        rgb = np.dstack([ramp(1, 6, 7, np.uint8)[0]] * 3)
        self._small.append(_bytes(dicom_dataset(rgb)))
        enhanced = write_enhanced(folder / "e.dcm", ramp(3, 6, 5), [(0, 0, z) for z in range(3)])
        self._small.append(enhanced.read_bytes())
        files = [_SHIPPED / name for name in _COMPRESSED]
        self._shipped = [f.read_bytes() for f in files if f.is_file() and f.stat().st_size < _LONGEST_SEED]
        for number, content in enumerate(self._small):
            (folder / str(number)).write_bytes(content)
            look_at(folder / str(number))
        self._bomb = zlib_bomb(wbits=-15)

    def mutant(self, folder: Path, rng: Rng) -> Path:
        path = folder / "m.dcm"
        kind = rng.random()
        if kind < 0.3:
            content = damaged(pick(rng, self._small), rng)
        elif kind < 0.5:
            content = self._compressed(rng)
        elif kind < 0.9:
            content = _with_other_elements(pick(rng, self._small), rng)
        else:
            content = self._special(rng)
        path.write_bytes(content)
        return path

    def _compressed(self, rng: Rng) -> bytes:
        """A codec's own stream is damaged as often as what stands before it."""
        content = pick(rng, self._shipped)
        if rng.random() < 0.5:
            return damaged(content, rng)
        at = content.find(b"\xe0\x7f\x10\x00")
        return content[:at] + damaged(content[at:], rng)

    def _special(self, rng: Rng) -> bytes:
        kind = int(rng.integers(4))
        if kind == 0:
            return deeply_nested_dicom(int(rng.integers(10, 4000)))
        if kind == 1:
            return _deflated(self._bomb if rng.random() < 0.5 else zlib.compress(bytes(99))[2:-4])
        if kind == 2:
            return _many_frames(rng)
        return _long_element(rng)

    def look(self, path: Path, output: Path) -> None:
        look_at(path)


class DicomSeries(Target):
    """A folder of slices, some damaged, doubled, missing, linked, or moved in space."""

    name = "series"

    def prepare(self, folder: Path) -> None:
        from MedAnomalyCLIPLib import dicom  # noqa: F401

    def mutant(self, folder: Path, rng: Rng) -> Path:
        study = folder / "study"
        study.mkdir()
        count = int(rng.integers(2, 6))
        gap = float(pick(rng, (1.0, 2.5, 0.0, -1.0, 1e-6, 1e30)))
        for number in range(count):
            elements = {
                "SeriesInstanceUID": f"1.2.{1 + int(rng.random() < 0.1)}",
                "InstanceNumber": number + 1,
                "ImagePositionPatient": [0.0, 0.0, number * gap],
            }
            content = _bytes(dicom_dataset(ramp(1, 6, 7)[0] + number, **elements))
            if rng.random() < 0.4:
                content = _with_other_elements(content, rng)
            if rng.random() < 0.15:
                content = damaged(content, rng)
            (study / f"{number:03d}").write_bytes(content)
        for _ in range(int(rng.integers(0, 3))):
            _stray(study, rng)
        return study

    def look(self, path: Path, output: Path) -> None:
        look_at(path)


class DicomResults(Target):
    """Sound pixels under a header whose patient, study and references are damaged; results become DICOM."""

    name = "dicom-results"

    def prepare(self, folder: Path) -> None:
        pixels = ramp(1, 9, 8)[0]
        nowhere = {"ImagePositionPatient": None, "FrameOfReferenceUID": None, "Modality": "CR"}
        radiograph = {**identity(), **nowhere, "SOPClassUID": _COMPUTED_RADIOGRAPHY}
        places = [(0, 0, z) for z in range(3)]
        enhanced = write_enhanced(folder / "e.dcm", ramp(3, 6, 5), places, **identity())
        self._seeds = [
            _bytes(dicom_dataset(pixels, **identity())),
            _bytes(dicom_dataset(pixels, **radiograph)),
            enhanced.read_bytes(),
        ]
        for number, content in enumerate(self._seeds):
            (folder / str(number)).write_bytes(content)
            self.look(folder / str(number), folder / f"results {number}")

    def mutant(self, folder: Path, rng: Rng) -> Path:
        content = pick(rng, self._seeds)
        for _ in range(int(rng.integers(1, 4))):
            words = [str(pick(rng, (*TRICKY_NAMES, *HUGE_TEXT))) for _ in range(int(rng.integers(0, 3)))]
            value = "\\".join(words).encode("utf-8", "replace")[:200]
            content = _element_replaced(content, pick(rng, _IDENTITY), value)
        if rng.random() < 0.4:
            content = _vr_replaced(content, rng)
        path = folder / "m.dcm"
        path.write_bytes(content)
        return path

    def look(self, path: Path, output: Path) -> None:
        from PIL import Image

        from harness.fake_detector import BrightnessDetector
        from MedAnomalyCLIPLib.dicom_output import DicomKind, DicomSink, DicomSource
        from MedAnomalyCLIPLib.geometry import cut_slice
        from MedAnomalyCLIPLib.volume import read_volume

        volume = read_volume(path)
        output.mkdir(parents=True, exist_ok=True)
        sink = DicomSink(DicomSource.of_volume(volume), list(DicomKind))
        sink.rehearse(volume)
        result = BrightnessDetector().detect(cut_slice(volume, 2, 0), threshold=0.01)
        sink.add(result, output, picture=Image.new("RGB", (2, 2)))
        sink.finish(output)


def _stray(study: Path, rng: Rng) -> None:
    """Something else in the folder: links in rings and outward, pipes, names that are hard to print."""
    kind = int(rng.integers(5))
    try:
        if kind == 0:
            (study / "ring").symlink_to(study, target_is_directory=True)
        elif kind == 1:
            (study / "out").symlink_to(str(pick(rng, ("/etc/passwd", "/dev/zero", "/nowhere", "../.."))))
        elif kind == 2:
            os.mkfifo(study / "pipe")
        elif kind == 3:
            (study / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + rng.bytes(200))
        else:
            name = str(pick(rng, TRICKY_NAMES)).replace("/", "_")
            (study / name).write_bytes((study / "000").read_bytes())
    except (OSError, ValueError):
        pass  # the file system will not have such a name


def _bytes(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _with_other_elements(content: bytes, rng: Rng) -> bytes:
    """One to three elements of other values, or missing, nested, or of another VR."""
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.random()
        if kind < 0.3:
            content = _element_replaced(content, pick(rng, _LAYOUT), _layout_value(rng))
        elif kind < 0.65:
            words = [str(pick(rng, HUGE_TEXT)) for _ in range(int(rng.integers(0, 8)))]
            content = _element_replaced(content, pick(rng, _GEOMETRY), "\\".join(words).encode())
        elif kind < 0.8:
            value = str(pick(rng, (*TRICKY_NAMES, "RGB", "YBR_FULL", "PALETTE COLOR", "SEG", "MONOCHROME1")))
            content = _element_replaced(content, pick(rng, _WORDS), value.encode("utf-8", "replace")[:60])
        else:
            content = _vr_replaced(content, rng)
    return content


def _layout_value(rng: Rng) -> bytes:
    if rng.random() < 0.3:
        return str(pick(rng, HUGE_TEXT)).encode()
    value = int(pick(rng, (*EDGES, 3, 4, 8, 12, 16, 24, 32, 64)))
    return (value & 0xFFFF).to_bytes(2, "little")


def _element_replaced(content: bytes, keyword: str, value: bytes) -> bytes:
    """Put raw bytes in the place of an element's value, in explicit little endian; add it where it is not."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tag = tag_for_keyword(keyword)
    assert tag is not None
    mark = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    value += b" " * (len(value) % 2)
    at = content.find(mark, 132)
    if at < 0:
        place = content.find(struct.pack("<HH", 0x7FE0, 0x0010))
        vr = dictionary_VR(tag).encode()[:2]
        return content[:place] + mark + vr + struct.pack("<H", len(value)) + value + content[place:]
    (length,) = struct.unpack_from("<H", content, at + 6)
    head = content[: at + 6] + struct.pack("<H", len(value))
    return head + value + content[at + 8 + length :]


def _vr_replaced(content: bytes, rng: Rng) -> bytes:
    places = [at for at in range(132, min(len(content), 1500) - 8, 2) if content[at + 4 : at + 6].isalpha()]
    if not places:
        return content
    at = pick(rng, places)
    return content[: at + 4] + pick(rng, _VRS).encode() + content[at + 6 :]


def _deflated(packed: bytes) -> bytes:
    """A file whose data set is a deflate stream."""
    dataset = dicom_dataset(ramp()[0])
    content = _bytes(dataset)
    meta = Dataset()
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    uid = DeflatedExplicitVRLittleEndian.encode() + b"\0" * (len(DeflatedExplicitVRLittleEndian) % 2)
    element = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(uid)) + uid
    return content[:132] + b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", len(element)) + element + packed


def _many_frames(rng: Rng) -> bytes:
    """A small image that claims frames without number."""
    frames = str(pick(rng, (2**31 - 1, 10**9, 10**7, 999999999999, 65536, -5)))
    content = _bytes(dicom_dataset(ramp(2, 1, 1), NumberOfFrames=2))
    content = _element_replaced(content, "NumberOfFrames", frames.encode())
    if rng.random() < 0.4:
        content = _element_replaced(content, "ImagePositionPatient", b"0\\0\\0")
    return content


def _long_element(rng: Rng) -> bytes:
    """An element whose length is far more than there is, or pixels that go on for longer than the image."""
    content = _bytes(dicom_dataset(ramp()[0]))
    at = content.find(b"\xe0\x7f\x10\x00")
    length = int(pick(rng, (2**32 - 2, 2**32 - 1, 2**31, BOMB_BYTES, 0)))
    return (
        content[: at + 8] + struct.pack("<I", length) + content[at + 12 :] + bytes(int(rng.integers(0, 5000)))
    )


TARGETS = (DicomFiles(), DicomSeries(), DicomResults())
