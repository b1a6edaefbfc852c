"""A study marked with an invented patient: nothing written or said tells who it is, nor its folder.

With one exception: DICOM results, where they are asked for, belong to the patient and study of their source,
and hold what the standard asks for that, but no more.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom import Dataset, dcmread

from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_USER_ERROR, main
from unit.images import write_dicom

MARKS = {
    "PatientName": "Zyxwv^Markedname",
    "PatientID": "MARKED-ID-90817",
    "PatientBirthDate": "19310217",
    "PatientAddress": "Markedstreet 7",
    "OtherPatientIDs": "MARKED-OTHER-5",
    "InstitutionName": "Markedhospital",
    "InstitutionAddress": "Markedtown",
    "ReferringPhysicianName": "Markeddoctor^R",
    "OperatorsName": "Markedoperator^O",
    "StudyDate": "20010911",
    "SeriesDate": "20010912",
    "AcquisitionDateTime": "20010913101112",
    "StudyTime": "034157.77",
    "StudyDescription": "Markedstudy",
    "SeriesDescription": "Markedseries",
    "ProtocolName": "Markedprotocol",
    "AccessionNumber": "MARKEDACC77",
    "StudyID": "MARKEDSTUDY8",
    "StationName": "MARKEDSTATION",
    "DeviceSerialNumber": "MARKEDSERIAL3",
    "ImageComments": "Markedcomment",
    "StudyInstanceUID": "1.2.826.0.1.3680043.9.9999.111",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.9.9999.222",
    "SOPInstanceUID": "1.2.826.0.1.3680043.9.9999.333",
    "FrameOfReferenceUID": "1.2.826.0.1.3680043.9.9999.444",
}
FOLDER = "Markedfolder^Zyxwv_19310217"
WORDS = (
    *(re.split(r"[\^ ]", value)[0] for value in MARKS.values()),
    "Markedprivate",
    "Markednested",
    FOLDER,
    "marked",
)


def private_elements() -> dict[str, object]:
    """A sequence and a private block that tell it too."""
    request = Dataset()
    request.RequestedProcedureDescription = "Markednested"
    return {**MARKS, "RequestAttributesSequence": [request]}


@pytest.fixture
def study(tmp_path) -> Path:
    folder = tmp_path / FOLDER / "study"
    folder.mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 900, (40, 36)).astype(np.int16)
        elements = private_elements() | {"SOPInstanceUID": f"{MARKS['SOPInstanceUID']}.{number}"}
        path = write_dicom(
            folder / f"{number}.dcm",
            pixels,
            ImagePositionPatient=[0.0, 0.0, 6.0 * number],
            InstanceNumber=number + 1,
            **elements,
        )
        assert all(value.encode() in path.read_bytes() for value in MARKS.values())
    return folder


def unpacked(content: bytes) -> bytes:
    """A file's bytes, and all that is compressed in it: gzip, and every zlib stream that begins anywhere."""
    parts = [content]
    for match in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]", content):
        with suppress(zlib.error):
            parts.append(zlib.decompressobj(wbits=47).decompress(content[match.start() :], 1 << 24))
    return b"".join(parts)


def told(content: bytes) -> list[str]:
    """Which of the marks can be read in it, in any of the usual encodings."""
    text = unpacked(content).lower()
    return [
        word
        for word in WORDS
        if any(word.lower().encode(code) in text for code in ("utf-8", "utf-16-le", "utf-16-be"))
    ]


def files_that_tell(root: Path) -> dict[str, list[str]]:
    files = [path for path in root.rglob("*") if path.is_file()]
    assert files
    return {path.name: words for path in files if (words := told(path.read_bytes()))}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zlib.compress])
def test_marks_are_found_where_they_are(pack):
    assert told(b"front" + pack(b"of Markedhospital") + b"end") == ["Markedhospital", "marked"]


def test_a_mark_in_a_picture_or_a_volume_is_found(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("Comment", "Markedcomment", zip=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png", pnginfo=text)
    image = sitk.GetImageFromArray(np.zeros((2, 3, 4), np.uint8))
    image.SetMetaData("ITK_FileNotes", "Markedcomment")
    sitk.WriteImage(image, str(tmp_path / "b.nii.gz"), True)
    assert set(files_that_tell(tmp_path)) == {"a.png", "b.nii.gz"}


@pytest.mark.parametrize("whole", [True, False], ids=["series", "file"])
def test_detecting_tells_nothing_of_the_patient(whole, study, tiny_bundle, tmp_path, capfd):
    words = ["detect", study if whole else study / "1.dcm", "--all", "--output", tmp_path / "out"]
    assert (
        main([*map(str, words), "--model", str(tiny_bundle.folder), "--device", "cpu", "--json"]) == EXIT_DONE
    )
    assert files_that_tell(tmp_path / "out") == {}
    printed = capfd.readouterr()
    assert told(printed.out.replace(str(tmp_path), "").encode()) == []
    assert told(printed.err.encode()) == []


BELONGING = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "OtherPatientIDs"),  # the patient
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "StudyDescription"),
    *(
        "ReferringPhysicianName",
        "SeriesInstanceUID",
        "SOPInstanceUID",
        "FrameOfReferenceUID",
    ),  # what it refers to
)


def test_dicom_results_alone_tell_the_patient_and_study_and_nothing_else(study, tiny_bundle, tmp_path, capfd):
    words = ["detect", study, "--all", "--output", tmp_path / "out", "--model", tiny_bundle.folder]
    words = [*map(str, words), "--device", "cpu", "--json"]
    assert main([*words, "--dicom-seg", "--dicom-sr", "--secondary-capture"]) == EXIT_DONE
    telling = files_that_tell(tmp_path / "out")
    assert set(telling) == {path.name for path in (tmp_path / "out").rglob("*.dcm")}
    assert len(telling) == 6  # segmentation, map, report, three captures
    allowed = {re.split(r"[\^ ]", MARKS[keyword])[0] for keyword in BELONGING} | {"marked"}
    assert {word for found in telling.values() for word in found} <= allowed
    for name, found in telling.items():
        assert {"Zyxwv", MARKS["PatientID"], MARKS["StudyInstanceUID"]} <= set(found), name
        assert told(name.encode()) == []
    printed = capfd.readouterr()
    assert told((printed.out + printed.err).replace(str(tmp_path), "").encode()) == []


@pytest.mark.parametrize("mark", ["PatientName", "StudyInstanceUID"])
def test_a_refusal_of_dicom_results_tells_nothing_of_the_patient(mark, study, tiny_bundle, tmp_path, capfd):
    for path in study.iterdir():
        dataset = dcmread(path)
        dataset.SOPClassUID = "1.2.3.4"  # of a kind that nobody knows
        if mark == "StudyInstanceUID":
            del dataset.StudyInstanceUID
        dataset.save_as(path)
    words = ["detect", study, "--output", tmp_path / "out", "--model", tiny_bundle.folder, "--dicom-sr"]
    assert main([*map(str, words), "--device", "cpu"]) == EXIT_USER_ERROR
    printed = capfd.readouterr()
    assert told((printed.out + printed.err).encode()) == []
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("words", [["--table", "parquet"], ["--workers", "1"]], ids=["one", "workers"])
def test_a_batch_tells_nothing_of_the_patients(words, study, tmp_path, capfd):
    pytest.importorskip("pyarrow")
    pytest.importorskip("distributed")
    import worker_detectors

    (study / "Markedname.nii.gz").write_bytes(gzip.compress(b"\x5c\x01" + bytes(400)))
    (study / "3.dcm").write_bytes((study / "2.dcm").read_bytes()[:-700])
    (study / "Zyxwv").mkdir()
    write_dicom(study / "Zyxwv" / "4.dcm", np.ones((40, 36), np.int16), SeriesNumber=5, **private_elements())
    (tmp_path / "notes").mkdir()
    where = [study, "--output", tmp_path / "out", "--model", tmp_path / "notes", "--device", "cpu"]
    assert main(["batch", *map(str, where), *words], load=worker_detectors.load) == EXIT_USER_ERROR
    told_of = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told_of["counts"]["done"] >= 1
    assert told_of["counts"]["failed"] >= 1
    assert list((tmp_path / "out").glob("slices.*"))
    assert files_that_tell(tmp_path / "out") == {}
    assert told(capfd.readouterr().err.replace(str(tmp_path), "").encode()) == []


def test_looking_tells_nothing_of_the_patient(study, capfd):
    for words in (["info", str(study)], ["info", str(study), "--json"], ["info", str(study / "0.dcm")]):
        assert main(words) == EXIT_DONE
    printed = capfd.readouterr()
    assert told((printed.out + printed.err).encode()) == []


def test_a_report_tells_nothing_of_the_patients(study, tiny_bundle, tmp_path, capfd):
    lines = [f"{n}.dcm,CT,head,{n % 2},test,set" for n in range(3)]
    (study / "manifest.csv").write_text("\n".join(["image,modality,body_part,label,split,set", *lines]))
    words = [
        "evaluate",
        study,
        "--model",
        tiny_bundle.folder,
        "--output",
        tmp_path / "report",
        "--draws",
        "5",
    ]
    assert main([*map(str, words), "--device", "cpu"]) == EXIT_DONE
    assert files_that_tell(tmp_path / "report") == {}
    printed = capfd.readouterr()
    assert told((printed.out + printed.err).replace(str(tmp_path), "").encode()) == []


def test_a_trained_detector_and_its_run_tell_nothing_of_the_patients(study, clip_folder, tmp_path, capfd):
    words = ["train", "--support", study, "--output", tmp_path / "run", "--device", "cpu"]
    assert main([*map(str, words), "--set", f"start={json.dumps(str(clip_folder))}"]) == EXIT_DONE
    assert files_that_tell(tmp_path / "run") == {}
    printed = capfd.readouterr()
    assert told((printed.out + printed.err).encode()) == []


def test_errors_tell_nothing_of_the_patient(study, tiny_bundle, tmp_path, capfd):
    generator = np.random.default_rng(0)
    content = (study / "1.dcm").read_bytes()
    for number in range(40):
        damaged = bytearray(content[: generator.integers(200, len(content))])
        for place in generator.integers(132, len(damaged), 30):
            damaged[place] = generator.integers(256)
        (study / "1.dcm").write_bytes(damaged)
        out = tmp_path / "out" / str(number)
        words = [
            "detect",
            study,
            "--output",
            out,
            "--model",
            tiny_bundle.folder,
            "--device",
            "cpu",
            "--quiet",
        ]
        assert main([*map(str, words)]) in (EXIT_DONE, EXIT_USER_ERROR)
    printed = capfd.readouterr()
    assert told((printed.out + printed.err).encode()) == []
