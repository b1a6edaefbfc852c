"""A batch from a real archive and back into it: Orthanc, started here and stopped."""

from __future__ import annotations

import json
import pickle
import re
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import worker_detectors
from dicom_objects import identity
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file

pytest.importorskip("dicomweb_client", reason="dicomweb-client is missing: pip install dicomweb-client")

from images import PATIENT_ID, write_dicom, write_dicom_series

from harness import orthanc
from MedAnomalyCLIPLib import dicomweb
from MedAnomalyCLIPLib.batch_source import hashed
from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.dicomweb import Archive
from MedAnomalyCLIPLib.dicomweb_source import search_archive
from MedAnomalyCLIPLib.errors import (
    ArchiveFailed,
    Cancelled,
    InvalidRequest,
    OutputFailed,
    SeriesAmbiguous,
    UnsupportedImage,
)

pytestmark = pytest.mark.skipif(not orthanc.IS_INSTALLED, reason=orthanc.MISSING)

SECRET = "MEDANOMALYCLIP_DICOMWEB_PASSWORD"
KINDS = ["--dicom-seg", "--dicom-sr", "--secondary-capture"]
SLICES = 4


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with orthanc.running(tmp_path_factory.mktemp("orthanc")) as archive:
        yield archive


@pytest.fixture
def archive(running, monkeypatch, tmp_path):
    """Empty, with credentials in the environment, and temporary files in a folder of the test."""
    running.clear()
    monkeypatch.setenv("MEDANOMALYCLIP_DICOMWEB_USER", orthanc.USER)
    monkeypatch.setenv(SECRET, orthanc.PASSWORD)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return running


def upload(archive, folder, *, modality="CT", brightest=900, **elements):
    """A series of some slices, one of them with something bright; its UIDs are told."""
    voxels = np.zeros((SLICES, 24, 20), np.int16)
    voxels[1, 8:14, 5:11] = brightest
    elements = {**identity(), "Modality": modality, **elements}
    positions = [(0, 0, 3.0 * k) for k in range(SLICES)]
    archive.upload(*write_dicom_series(folder, voxels, positions, **elements))
    return elements


@pytest.fixture
def studies(archive, tmp_path):
    """A CT and an MR study, and a report that is no image, in the CT's."""
    ct = upload(archive, tmp_path / "ct", StudyDate="20260107")
    mr = upload(archive, tmp_path / "mr", modality="MR", StudyDate="20260203", PatientID="ID-4712")
    about = {key: ct[key] for key in ("StudyInstanceUID", "StudyDate")}
    archive.upload(write_dicom(tmp_path / "ko", np.zeros((4, 4), np.uint8), Modality="KO", **about))
    return ct, mr


@pytest.fixture
def batch(archive, tmp_path):
    """Runs the command on the archive."""
    (tmp_path / "notes").mkdir()

    def run(*words, output=tmp_path / "out", load=worker_detectors.load):
        line = ["batch", "--dicomweb", archive.url, "--output", output, "--model", tmp_path / "notes"]
        return main([*map(str, line), "--device", "cpu", *words], load=load)

    return run


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def loaded(tmp_path):
    return len(list((tmp_path / "notes").iterdir()))


def ours(archive):
    return [found for found in archive.objects() if found.get("Manufacturer") == "MedAnomalyCLIP"]


def test_studies_are_found_detected_on_and_given_their_results(studies, archive, batch, tmp_path):
    ct, _ = studies
    assert batch("--query", "ModalitiesInStudy=CT", "StudyDate=20260101-20260131", *KINDS) == EXIT_DONE
    (record,) = manifest(tmp_path / "out")["inputs"]
    assert (record["state"], record["slices"], record["highest"]["index"]) == ("done", SLICES, 1)
    stored = ours(archive)
    assert sorted(found.Modality for found in stored) == ["OT"] * SLICES + ["SEG", "SEG", "SR"]
    assert {found.StudyInstanceUID for found in stored} == {ct["StudyInstanceUID"]}
    assert {str(found.PatientID) for found in stored} == {PATIENT_ID}
    written = (tmp_path / "out" / record["folder"]).glob("*.dcm")
    assert {found.SOPInstanceUID for found in stored} == {dcmread(path).SOPInstanceUID for path in written}
    (segmentation,) = [f for f in stored if f.Modality == "SEG" and f.SegmentationType == "BINARY"]
    assert segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID == ct["SeriesInstanceUID"]
    assert segmentation.pixel_array.sum() == 36


def test_the_query_is_matched_by_study_and_by_series(studies, archive, tmp_path):
    ct, mr = studies
    upload(archive, tmp_path / "thin", StudyInstanceUID=ct["StudyInstanceUID"], SeriesDescription="THIN")

    def found(**query):
        return {item.series for item in search_archive(Archive(archive.url), query)}

    assert len(found()) == 3
    assert found(ModalitiesInStudy="MR") == {mr["SeriesInstanceUID"]}
    assert found(PatientID="ID-4712") == {mr["SeriesInstanceUID"]}
    assert len(found(StudyDate="20260107")) == 2
    assert found(Modality="CT", SeriesDescription="THIN").isdisjoint(
        {ct["SeriesInstanceUID"], mr["SeriesInstanceUID"]}
    )
    with pytest.raises(InvalidRequest, match="no series of images that matches"):
        found(StudyDate="19000101")


def test_a_search_goes_through_all_pages(studies, archive, monkeypatch):
    monkeypatch.setattr(dicomweb, "_PAGE", 1)
    assert len(list(search_archive(Archive(archive.url), {}))) == 2


def test_a_second_run_does_nothing(studies, archive, batch, tmp_path, capfd):
    assert batch(*KINDS) == EXIT_DONE
    before = len(archive.objects())
    assert loaded(tmp_path) == 1
    assert batch(*KINDS, "--json") == EXIT_DONE
    assert loaded(tmp_path) == 1
    assert manifest(tmp_path / "out")["counts"] == {"done": 2, "present": 0, "failed": 0, "stopped": 0}
    assert len(archive.objects()) == before  # and pictures of results were no input


def test_results_that_the_archive_has_from_elsewhere_are_not_made_again(studies, archive, batch, tmp_path):
    ct, _ = studies
    assert batch("--query", "Modality=CT", *KINDS) == EXIT_DONE
    before = len(archive.objects())
    assert batch(*KINDS, output=tmp_path / "elsewhere") == EXIT_DONE
    states = {record["key"]: record["state"] for record in manifest(tmp_path / "elsewhere")["inputs"]}
    assert states.pop(hashed(ct["SeriesInstanceUID"])) == "present"
    assert list(states.values()) == ["done"]
    assert len(archive.objects()) == before + SLICES + 3  # those of the MR
    detected = manifest(tmp_path / "elsewhere")
    assert batch(*KINDS, output=tmp_path / "elsewhere") == EXIT_DONE
    assert manifest(tmp_path / "elsewhere")["inputs"] == detected["inputs"]


def test_a_kind_of_result_that_is_not_there_yet_is_made(studies, archive, batch, tmp_path):
    assert batch("--query", "Modality=CT", "--dicom-seg") == EXIT_DONE
    assert batch("--query", "Modality=CT", *KINDS, output=tmp_path / "more") == EXIT_DONE
    assert manifest(tmp_path / "more")["counts"]["done"] == 1


def test_results_of_another_detector_or_series_do_not_count(studies, archive, batch, tmp_path, monkeypatch):
    ct, _ = studies
    assert batch("--query", "Modality=CT", *KINDS) == EXIT_DONE
    upload(archive, tmp_path / "thin", **{k: v for k, v in ct.items() if k.startswith("Study")})
    assert batch("--query", "Modality=CT", *KINDS, output=tmp_path / "two") == EXIT_DONE
    assert manifest(tmp_path / "two")["counts"] == {"done": 1, "present": 1, "failed": 0, "stopped": 0}
    kind = worker_detectors.MarkedDetector
    monkeypatch.setattr(kind, "provenance", replace(kind.provenance, bundle_sha256="1" * 64))
    assert batch("--query", "Modality=CT", *KINDS, output=tmp_path / "three") == EXIT_DONE
    assert manifest(tmp_path / "three")["counts"]["done"] == 2


def test_without_dicom_results_nothing_is_stored(studies, archive, batch, tmp_path):
    before = len(archive.objects())
    assert batch() == EXIT_DONE
    assert len(archive.objects()) == before
    assert not list((tmp_path / "out").rglob("*.dcm"))


def test_nothing_but_dicom_results_tells_password_or_patient(studies, archive, batch, tmp_path, capfd):
    ct, mr = studies
    upload(archive, tmp_path / "odd", brightest=100, SeriesDescription="odd")
    for path in (tmp_path / "odd").iterdir():  # the same places again: a series that fails
        changed = write_dicom(path, np.zeros((24, 20), np.int16), **mr)
        archive.upload(changed)
    assert batch(*KINDS) == EXIT_USER_ERROR
    printed = capfd.readouterr()
    assert manifest(tmp_path / "out")["counts"]["failed"] == 1
    words = ["Patience", PATIENT_ID, "ID-4712", *ct.values(), *mr.values()]
    words = [word.encode() for word in words if len(word) > 4]
    secrets = [orthanc.PASSWORD.encode(), b"geheim"]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert [word for word in secrets if word in content] == [], path
            if path.suffix != ".dcm":
                assert [word for word in words if word in content] == [], path
    for text in (printed.out, printed.err):
        assert "geheim" not in text
    assert not [word for word in words if word in printed.err.encode()]


def test_what_goes_to_workers_holds_no_credentials(studies, archive):
    (item, _) = search_archive(Archive(archive.url), {})
    assert b"geheim" not in pickle.dumps(item)
    assert b"Authorization" not in pickle.dumps(item)
    assert item.series not in repr(item)
    assert pickle.loads(pickle.dumps(item)) == item


def test_workers_fetch_and_store_with_their_own_credentials(studies, archive, batch, tmp_path):
    pytest.importorskip("distributed")
    assert batch(*KINDS, "--workers", "1") == EXIT_DONE
    assert manifest(tmp_path / "out")["counts"]["done"] == 2
    assert len(ours(archive)) == 2 * (SLICES + 3)


def test_files_are_fetched_into_a_private_folder_that_goes(studies, archive, tmp_path):
    item = next(search_archive(Archive(archive.url), {}))
    with item.opened(None) as volume:
        assert volume.size == (20, 24, SLICES)
        (folder,) = {frame.path.parent for frame in volume.frames}
        assert folder.is_relative_to(tmp_path / "temporary")
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert list((tmp_path / "temporary").iterdir()) == []
    with pytest.raises(ZeroDivisionError), item.opened(None):
        raise ZeroDivisionError
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_a_killed_run_had_fetched_goes_with_the_next(studies, archive, tmp_path):
    item = next(search_archive(Archive(archive.url), {}))
    program = (
        "import os, pickle, signal, sys\n"
        "item = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "with item.opened(None):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, pickle.dumps(item).hex()], check=False)
    assert len(list((tmp_path / "temporary").rglob("*.dcm"))) == SLICES
    with item.opened(None):
        assert len(list((tmp_path / "temporary").rglob("*.dcm"))) == SLICES
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_wrong_password_is_told_and_ends_the_batch(studies, batch, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv(SECRET, "not the right one")
    assert batch() == EXIT_USER_ERROR
    told = capfd.readouterr().err
    assert "401 Unauthorized" in told
    assert SECRET in told
    assert "not the right one" not in told
    assert not (tmp_path / "out").exists()


def test_series_whose_archive_refuses_meanwhile_are_done_by_the_next_run(
    studies, batch, monkeypatch, tmp_path
):
    def load(bundle, device):
        monkeypatch.setenv(SECRET, "changed")
        return worker_detectors.load(bundle, device)

    assert batch(load=load) == EXIT_USER_ERROR
    records = manifest(tmp_path / "out")["inputs"]
    assert [record["error"] for record in records] == ["ArchiveFailed"] * 2
    assert "401 Unauthorized" in records[0]["reason"]
    monkeypatch.setenv(SECRET, orthanc.PASSWORD)
    assert batch() == EXIT_DONE
    assert manifest(tmp_path / "out")["counts"]["done"] == 2


def test_results_that_could_not_be_stored_are_stored_by_the_next_run(studies, archive, batch, tmp_path):
    whole = dicomweb.Connection.store
    with pytest.MonkeyPatch.context() as patch:

        def part(self, study, files):
            whole(self, study, files[:2])
            raise ArchiveFailed("the archive is full")

        patch.setattr(dicomweb.Connection, "store", part)
        assert batch("--query", "Modality=CT", *KINDS) == EXIT_USER_ERROR
    (record,) = manifest(tmp_path / "out")["inputs"]
    assert (record["state"], record["reason"]) == ("failed", "the archive is full")
    assert len(ours(archive)) == 2
    assert batch("--query", "Modality=CT", *KINDS) == EXIT_DONE
    assert manifest(tmp_path / "out")["counts"] == {"done": 1, "present": 0, "failed": 0, "stopped": 0}
    assert len(ours(archive)) == SLICES + 3  # those that were there are the same as those that came


@pytest.mark.parametrize(
    ("limit", "words"), [("folder_files=2", "more than the 2 files"), ("fetched_bytes=2000", "2,000 bytes")]
)
def test_a_series_that_is_too_large_is_not_fetched(studies, archive, monkeypatch, limit, words, tmp_path):
    monkeypatch.setenv("MEDANOMALYCLIP_LIMITS", limit)
    item = next(search_archive(Archive(archive.url), {}))
    with pytest.raises(UnsupportedImage, match=words), item.opened(None):
        pass
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_full_disk_is_told(studies, archive, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    item = next(search_archive(Archive(archive.url), {}))
    monkeypatch.setattr(Dataset, "save_as", full)
    with pytest.raises(OutputFailed, match="No space left"), item.opened(None):
        pass


def test_a_fetch_can_be_stopped(studies, archive, tmp_path):
    item = next(search_archive(Archive(archive.url), {}))
    with pytest.raises(Cancelled), item.opened(None, lambda: True):
        pass
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_list_tells_which_number_is_which_series(studies, batch, capsys):
    ct, _ = studies
    assert batch("--query", "Modality=CT") == EXIT_DONE
    capsys.readouterr()
    assert batch("--list") == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines if ct["SeriesInstanceUID"] in line] == ["0001"]
    assert [line[:4] for line in lines if " MR " in line] == ["----"]


def test_studies_that_come_later_are_done_by_the_next_run(studies, archive, batch, tmp_path):
    assert batch("--query", "Modality=CT") == EXIT_DONE
    assert batch() == EXIT_DONE
    assert [record["number"] for record in manifest(tmp_path / "out")["inputs"]] == [1, 2]
    assert Path(tmp_path / "out" / "slices.csv").read_text().count("\n") == 1 + 2 * SLICES


def test_a_series_of_several_volumes_is_refused_with_what_to_do(archive, tmp_path):
    made = upload(archive, tmp_path / "first", EchoTime=10)
    upload(archive, tmp_path / "second", **{**made, "EchoTime": 20})
    (item,) = search_archive(Archive(archive.url), {})
    with pytest.raises(SeriesAmbiguous, match=r"makes 2 volumes.*fetch it"), item.opened(None):
        pass


def test_the_readme_leads_to_results_in_an_archive(archive, batch, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^medanomalyclip (.*--dicomweb.*)$", readme, re.MULTILINE)
    archive.upload(Path(get_testdata_file("CT_small.dcm")))
    monkeypatch.chdir(tmp_path)
    words = line.replace("http://localhost:8042", archive.address).split()
    assert main(words, load=lambda *_: worker_detectors.load(tmp_path / "notes", "cpu")) == EXIT_DONE
    assert {found.Modality for found in ours(archive)} == {"SEG", "SR"}
    archive.clear()
    upload(archive, tmp_path / "ct")
    (example,) = re.findall(r"```\n([^`]*search_archive[^`]*)```", readme)
    monkeypatch.setattr(SliceDetector, "load", lambda: worker_detectors.load(tmp_path / "notes", "cpu"))
    exec(compile(example.replace("http://localhost:8042", archive.address), "README.md", "exec"), {})
    assert {found.Modality for found in ours(archive)} == {"SEG", "SR"}
