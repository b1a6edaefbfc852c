"""A folder of studies: found, done, gone on with, and nobody's name in what comes out."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from full_disk import files_limited_to
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from MedAnomalyCLIPLib.batch import InProcess, run_batch
from MedAnomalyCLIPLib.batch_records import read_records
from MedAnomalyCLIPLib.batch_series import DONE, FAILED, STOPPED, BatchSettings
from MedAnomalyCLIPLib.batch_source import SearchAhead, search
from MedAnomalyCLIPLib.cli import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.errors import (
    ArchiveFailed,
    BundleInvalid,
    DependencyMissing,
    InvalidRequest,
    OutputFailed,
    UnreadableImage,
)
from MedAnomalyCLIPLib.result import AnomalyResult, Provenance

NAME = "DOE_JANE_1970"


class Detector:
    provenance = Provenance("a fake", "1.0", "0" * 64, "0", "cpu", "float32")

    def __init__(self):
        self.detected = 0
        self.crash = None

    def guess_preset(self, modality, words=""):
        return ""

    def threshold_with(self, prompt):
        return 0.5

    def title_of(self, prompt):
        return ""

    def detect_many(self, planes, **options):
        for plane in planes:
            yield self.detect(plane, **options)

    def detect(self, plane, *, threshold=None, window=None, prompt=None):
        if self.crash is not None and plane.pixels.max() == self.crash:
            raise ZeroDivisionError
        self.detected += 1
        values = np.clip(plane.pixels / 1000, 0, 1).astype(np.float32)
        return AnomalyResult(plane, float(values.max()), values, threshold or 0.5, self.provenance)


@pytest.fixture
def detector():
    return Detector()


def write_volume(path, brightest=900, depth=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.zeros((depth, 6, 7), np.int16)
    voxels[:, 2, 3] = brightest
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(path))


@pytest.fixture
def studies(tmp_path):
    """Two volumes, a picture, a DICOM folder of one series, a damaged file, and what is none of these."""
    folder = tmp_path / "studies"
    write_volume(folder / NAME / "head.nii.gz", 900)
    write_volume(folder / "other" / f"{NAME}.nrrd", 700, depth=2)
    Image.fromarray(np.full((8, 9), 200, np.uint8)).save(folder / "picture.png")
    (folder / "dicom").mkdir()
    shutil.copy(get_testdata_file("MR_small.dcm"), folder / "dicom")
    (folder / f"{NAME} damaged.nii").write_bytes((folder / "other" / f"{NAME}.nrrd").read_bytes()[:40])
    (folder / "notes.txt").write_text("no image")
    write_volume(folder / "mask.seg.nrrd")
    (folder / f"{NAME}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    return folder


def run(studies, detector, tmp_path, **options):
    return run_with(lambda: detector, studies, tmp_path / "out", **options)


def run_with(load, studies, out, **options):
    return run_batch(search([studies], leave_out=out), out, InProcess(load), **options)


def states(manifest):
    return [record["state"] for record in manifest["inputs"]]


def test_every_image_and_series_is_found_and_nothing_else(studies):
    places = [item.place for item in search([studies])]
    assert places == [
        f"studies/{NAME} damaged.nii",
        f"studies/{NAME}.png",
        "studies/picture.png",
        f"studies/{NAME}/head.nii.gz",
        "studies/dicom",
        f"studies/other/{NAME}.nrrd",
    ]


def test_series_of_one_folder_are_inputs_of_their_own(studies):
    slice_ = dcmread(get_testdata_file("CT_small.dcm"))
    slice_.save_as(studies / "dicom" / "another.dcm")
    series = [item for item in search([studies]) if item.place == "studies/dicom"]
    assert len({item.series for item in series}) == len({item.key for item in series}) == 2


def test_an_input_that_fails_does_not_stop_the_others(studies, detector, tmp_path):
    manifest = run(studies, detector, tmp_path)
    assert states(manifest) == [FAILED, FAILED, DONE, DONE, DONE, DONE]
    assert manifest["counts"] == {"done": 4, "present": 0, "failed": 2, "stopped": 0}
    assert manifest["complete"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    head = manifest["inputs"][3]
    assert head["highest"]["score"] == 0.9
    assert head["slices"] == 3
    written = json.loads((tmp_path / "out" / head["folder"] / "result.json").read_text())
    assert written["complete"]


def test_no_name_gets_into_the_results(studies, detector, tmp_path):
    manifest = run(studies, detector, tmp_path)
    assert all(record["reason"] for record in manifest["inputs"][:2])
    for path in (tmp_path / "out").rglob("*"):
        assert NAME not in path.name
        if path.suffix in (".json", ".csv"):
            text = path.read_text()
            assert NAME not in text
            assert "DOE" not in text


def stop_after(detector, count):
    return lambda: detector.detected >= count


def test_a_stopped_batch_goes_on_where_it_stopped(studies, detector, tmp_path):
    stopped = run(studies, detector, tmp_path, is_stopped=stop_after(detector, 3))
    assert states(stopped) == [FAILED, FAILED, DONE, STOPPED]
    assert not stopped["complete"]
    done = detector.detected
    seen = []
    manifest = run(studies, detector, tmp_path, on_series=lambda *about: seen.append(about[0]))
    assert states(manifest) == [FAILED, FAILED, DONE, DONE, DONE, DONE]
    assert seen == [4, 5, 6]
    assert detector.detected - done == 3 + 1 + 2
    assert [record["number"] for record in manifest["inputs"]] == [1, 2, 3, 4, 5, 6]


def test_what_is_done_is_not_done_again_nor_the_detector_loaded(studies, detector, tmp_path):
    run(studies, detector, tmp_path)

    def load():
        raise AssertionError

    assert run_with(load, studies, tmp_path / "out")["complete"]


def test_failed_inputs_are_done_again_when_asked_for(studies, detector, tmp_path):
    run(studies, detector, tmp_path)
    write_volume(studies / f"{NAME} damaged.nii")
    assert states(run(studies, detector, tmp_path))[0] == FAILED
    manifest = run(studies, detector, tmp_path, retry=True)
    assert states(manifest)[:2] == [DONE, FAILED]
    assert "reason" not in manifest["inputs"][0]


def test_images_that_came_later_are_done_and_numbers_stay(studies, detector, tmp_path):
    before = run(studies, detector, tmp_path)["inputs"]
    write_volume(studies / "added.nii.gz", 800)
    manifest = run(studies, detector, tmp_path)
    assert manifest["inputs"][: len(before)] == before
    assert manifest["inputs"][-1]["number"] == len(before) + 1


def test_a_bug_meets_one_input_and_is_told(studies, detector, tmp_path):
    detector.crash = 900
    manifest = run(studies, detector, tmp_path)
    assert states(manifest).count(FAILED) == 3
    reason = manifest["inputs"][3]["reason"]
    assert "ZeroDivisionError in test_batch.py" in reason
    assert str(tmp_path) not in reason


def test_other_settings_or_another_detector_are_not_mixed(studies, detector, tmp_path):
    run(studies, detector, tmp_path)
    with pytest.raises(InvalidRequest, match="other settings"):
        run(studies, detector, tmp_path, settings=BatchSettings(threshold=0.2))
    detector.provenance = replace(detector.provenance, bundle_sha256="1" * 64)
    with pytest.raises(InvalidRequest, match="another detector"):
        run(studies, detector, tmp_path, retry=True)


def test_a_detector_that_cannot_be_loaded_ends_the_batch(studies, tmp_path):
    def load():
        raise BundleInvalid("damaged")

    with pytest.raises(BundleInvalid):
        run_with(load, studies, tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(studies, detector, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(OutputFailed, match="other files"):
        run(studies, detector, tmp_path)


def test_a_file_in_place_of_the_output_is_told(studies, detector, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputFailed, match="out"):
        run(studies, detector, tmp_path)


def test_a_damaged_manifest_is_told(studies, detector, tmp_path):
    run(studies, detector, tmp_path)
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(OutputFailed, match=r"manifest\.json"):
        run(studies, detector, tmp_path)


def test_results_within_the_folder_are_no_inputs(studies, detector):
    for _ in range(2):
        manifest = run_with(lambda: detector, studies, studies / "out")
        assert len(manifest["inputs"]) == 6


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "empty"])
def test_a_folder_without_images_is_told(tmp_path, make):
    make(tmp_path / "nothing")
    with pytest.raises(UnreadableImage, match="nothing"):
        list(search([tmp_path / "nothing"]))


def test_only_the_middle_slice_when_asked_for(studies, detector, tmp_path):
    manifest = run(studies, detector, tmp_path, settings=BatchSettings(middle=True))
    assert manifest["inputs"][3]["highest"]["index"] == 1
    assert manifest["inputs"][3]["slices"] == 1


# The command


def command(detector, *words):
    return main(["batch", *map(str, words)], load=lambda bundle, device: detector)


def test_the_command_tells_each_input_and_its_exit_code_that_some_failed(studies, detector, tmp_path, capsys):
    assert command(detector, studies, "--output", tmp_path / "out") == EXIT_USER_ERROR
    printed = capsys.readouterr()
    assert f"4/6  0004  studies/{NAME}/head.nii.gz  done  highest score 0.900" in printed.out
    assert printed.out.splitlines()[-1] == "4 done, 2 failed, 0 stopped"
    assert "2 of 6 inputs failed" in printed.err


def test_the_command_lists_which_number_is_which(studies, detector, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(detector, studies, "--output", out, "--list") == EXIT_DONE
    assert f"----  to do  studies/{NAME}/head.nii.gz" in capsys.readouterr().out
    command(detector, studies, "--output", out, "--quiet")
    capsys.readouterr()
    assert command(detector, studies, "--output", out, "--list") == EXIT_DONE
    assert f"0004  done  studies/{NAME}/head.nii.gz" in capsys.readouterr().out


def test_the_command_prints_the_manifest_for_programs(studies, detector, tmp_path, capsys):
    command(detector, studies, "--output", tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out)["counts"]["done"] == 4


def test_a_terminal_shows_a_bar_of_all_that_were_found(studies, detector, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    command(detector, studies, "--output", tmp_path / "out")
    assert re.search(r"\| 5/[56] \[", sys.stderr.getvalue())  # the last one may be found late


def test_the_command_says_that_a_fault_is_none_of_the_users(studies, detector, tmp_path):
    detector.crash = 900
    assert command(detector, studies, "--output", tmp_path / "out", "--quiet") == EXIT_BUG


def test_ctrl_c_ends_the_command_after_the_slice(studies, detector, tmp_path):
    good = detector.detect

    def detect(plane, **options):
        if detector.detected == 2:
            signal.raise_signal(signal.SIGINT)
        return good(plane, **options)

    detector.detect = detect
    assert command(detector, studies, "--output", tmp_path / "out") == EXIT_INTERRUPTED
    assert states(json.loads((tmp_path / "out" / "manifest.json").read_text()))[-1] == STOPPED


# Records, studies and the table


def read_table(out):
    with (out / "slices.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_table_has_a_row_for_each_slice_as_the_series_tell_it(studies, detector, tmp_path):
    manifest = run(studies, detector, tmp_path)
    rows = read_table(tmp_path / "out")
    done = [record for record in manifest["inputs"] if record["state"] == DONE]
    assert len(rows) == sum(record["slices"] for record in done) == 1 + 3 + 1 + 2
    for record in done:
        told = json.loads((tmp_path / "out" / record["folder"] / "result.json").read_text())["slices"]
        mine = [row for row in rows if row["key"] == record["key"]]
        assert [float(row["score"]) for row in mine] == [each["score"] for each in told]
        assert {row["folder"] for row in mine} == {record["folder"]}


def test_the_table_can_be_parquet(studies, detector, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run(studies, detector, tmp_path)
    run(studies, detector, tmp_path, table="parquet")
    rows = parquet.read_table(tmp_path / "out" / "slices.parquet").to_pylist()
    assert [row["score"] for row in rows] == [float(row["score"]) for row in read_table(tmp_path / "out")]
    assert [row["unlike"] for row in rows] == [False] * len(rows)


def test_parquet_without_its_package_is_refused_before_anything_is_done(
    studies, detector, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DependencyMissing, match="pip install pyarrow"):
        run(studies, detector, tmp_path, table="parquet")
    assert not (tmp_path / "out").exists()


def test_series_of_one_dicom_study_share_a_folder_and_a_manifest(studies, detector, tmp_path):
    for number in (1, 2):
        slice_ = dcmread(get_testdata_file("CT_small.dcm"))
        slice_.SeriesInstanceUID += f".{number}"
        slice_.save_as(studies / "dicom" / f"{number}.dcm")
    manifest = run(studies, detector, tmp_path)
    together = [record for record in manifest["inputs"] if record.get("modality") == "CT"]
    assert len(together) == 2
    (study,) = {record["study"] for record in together}
    told = json.loads((tmp_path / "out" / f"{study:04d}" / "manifest.json").read_text())
    assert told["series"] == together
    assert told["counts"] == {"done": 2, "present": 0, "failed": 0, "stopped": 0}
    assert {record["study"] for record in manifest["inputs"]} == set(range(1, 6))


def test_two_batches_do_not_write_to_one_folder(studies, detector, tmp_path):
    refused = []

    def another(*_told):
        with pytest.raises(OutputFailed, match="Another batch is writing to out") as error:
            run(studies, detector, tmp_path)
        refused.append(error)

    assert run(studies, detector, tmp_path, on_series=another)["complete"]
    assert len(refused) == 6
    assert run(studies, detector, tmp_path)["complete"]


def test_what_the_journal_tells_is_known_after_a_kill(studies, detector, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(settled, *_told):
        if settled == 4:
            raise Killed

    with pytest.raises(Killed):
        run(studies, detector, tmp_path, on_series=kill)
    out = tmp_path / "out"
    assert [record["state"] for record in read_records(out).values()] == [FAILED, FAILED, DONE, DONE]
    with (out / "journal.jsonl").open("a") as journal:
        journal.write('{"number": 5, "ke')  # cut off
    before = detector.detected
    manifest = run(studies, detector, tmp_path)
    assert manifest["complete"]
    assert detector.detected - before == 1 + 2
    assert [record["number"] for record in manifest["inputs"]] == [1, 2, 3, 4, 5, 6]
    assert not (out / "journal.jsonl").exists()


def test_results_that_no_record_tells_of_are_taken_not_made_again(studies, detector, tmp_path):
    first = run(studies, detector, tmp_path)
    path = tmp_path / "out" / "manifest.json"
    untold = {**first, "inputs": [{**record, "state": ""} for record in first["inputs"]]}
    path.write_text(json.dumps(untold))
    before = detector.detected
    second = run(studies, detector, tmp_path)
    assert detector.detected == before
    assert second["inputs"] == first["inputs"]


def test_a_series_whose_results_were_removed_is_done_again(studies, detector, tmp_path):
    done = run(studies, detector, tmp_path)["inputs"][3]
    shutil.rmtree(tmp_path / "out" / done["folder"])
    before = detector.detected
    assert run(studies, detector, tmp_path)["complete"]
    assert detector.detected - before == done["slices"]


def test_a_full_disk_fails_what_does_not_fit_and_the_next_run_does_it(studies, detector, tmp_path):
    noise = np.random.default_rng(0).integers(0, 700, (2, 400, 400)).astype(np.int16)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise), str(studies / "large.nii.gz"))
    with files_limited_to(200_000):
        manifest = run(studies, detector, tmp_path)
    failed = [record for record in manifest["inputs"] if record.get("error") == "OutputFailed"]
    assert len(failed) == 1
    assert "could not be written" in failed[0]["reason"]
    assert manifest["counts"] == {"done": 4, "present": 0, "failed": 3, "stopped": 0}
    assert not manifest["complete"]
    before = detector.detected
    assert run(studies, detector, tmp_path)["counts"] == {"done": 5, "present": 0, "failed": 2, "stopped": 0}
    assert detector.detected - before == 2


def test_several_inputs_are_one_batch(studies, detector, tmp_path):
    out = tmp_path / "out"
    places = [studies / "picture.png", studies / "other"]
    manifest = run_batch(search(places), out, InProcess(lambda: detector))
    assert states(manifest) == [DONE, DONE]
    assert states(run_batch(search(places[::-1]), out, InProcess(lambda: detector))) == [DONE, DONE]
    with pytest.raises(InvalidRequest, match="Two inputs are called other"):
        search([studies / "other", tmp_path / "other"])


class FakeSink:
    """Has results of the series whose keys it is given, and takes those of others."""

    def __init__(self, has=(), error=None):
        self.had, self.error, self.taken = has, error, {}

    def has(self, item, bundle_sha256):
        assert bundle_sha256 == "0" * 64
        return item.key in self.had

    def take(self, item, folder, files):
        assert all((folder / name).is_file() for name in files)
        if self.error:
            raise self.error
        self.taken[item.key] = files


def test_sinks_get_the_results_of_every_series(studies, detector, tmp_path):
    sink = FakeSink()
    manifest = run(studies, detector, tmp_path, sinks=(sink,))
    assert list(sink.taken) == [record["key"] for record in manifest["inputs"] if record["state"] == DONE]
    assert all("scores.csv" in files for files in sink.taken.values())


def test_what_a_sink_could_not_take_is_offered_again_and_not_detected_again(studies, detector, tmp_path):
    manifest = run(studies, detector, tmp_path, sinks=(FakeSink(error=ArchiveFailed("it is away")),))
    assert states(manifest) == [FAILED] * 6
    assert manifest["inputs"][3]["reason"] == "it is away"
    detected = detector.detected
    sink = FakeSink()
    assert states(run(studies, detector, tmp_path, sinks=(sink,)))[2:] == [DONE] * 4
    assert len(sink.taken) == 4
    assert detector.detected == detected


def test_what_all_sinks_have_is_not_done(studies, detector, tmp_path):
    keys = [item.key for item in search([studies]) if not item.problem]
    sinks = FakeSink(keys), FakeSink(keys[:3])
    manifest = run(studies, detector, tmp_path, sinks=sinks)
    assert manifest["counts"]["present"] == 3
    assert len(sinks[0].taken) == manifest["counts"]["done"]
    assert manifest["complete"]
    before = detector.detected
    assert run(studies, detector, tmp_path)["inputs"] == manifest["inputs"]
    assert detector.detected == before


def test_work_begins_before_the_search_has_come_to_its_end(tmp_path):
    gate = threading.Event()

    def source():
        yield "first"
        assert gate.wait(20)
        yield "second"

    ahead = SearchAhead(source())
    waiting = iter(ahead)
    assert next(waiting) == "first"
    assert not ahead.complete
    gate.set()
    assert list(waiting) == ["second"]
    assert (ahead.found, ahead.complete) == (2, True)


def test_what_waits_has_a_bound():
    given = []
    ahead = SearchAhead((given.append(number) or number for number in range(1000)), most_waiting=10)
    ahead.wait(20)
    assert len(given) <= 12
    ahead.close()
