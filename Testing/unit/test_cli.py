"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.data import get_testdata_file

from MedAnomalyCLIPLib import __version__
from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.errors import BundleInvalid
from MedAnomalyCLIPLib.result import RESEARCH_USE_ONLY, AnomalyResult, Provenance

LIBRARY = Path(__file__).resolve().parents[2] / "MedAnomalyCLIP"
PROVENANCE = Provenance("a fake", "1.0", "0" * 64, __version__, "cpu", "float32")


class FakeDetector:
    """Calls the brightest pixel of a slice anomalous; the brighter the slice, the higher the score."""

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def guess_preset(self, modality, words="") -> str:
        return ""

    def detect_many(self, planes, **options):
        for plane in planes:
            yield self.detect(plane, **options)

    def detect(self, plane, *, threshold=None, window=None, prompt=None) -> AnomalyResult:
        self.asked.append({"threshold": threshold, "window": window, "modality": plane.modality})
        pixels = np.where(plane.valid, plane.pixels, -np.inf)
        score = float(np.clip(pixels.max() / 1000, 0, 1))
        anomaly = np.where(pixels == pixels.max(), 0.9, 0.1).astype(np.float32)
        threshold = 0.5 if threshold is None else threshold
        return AnomalyResult(plane, score, anomaly, threshold, PROVENANCE, percentile=97.0)


@pytest.fixture
def detector() -> FakeDetector:
    return FakeDetector()


@pytest.fixture
def run(detector):
    return lambda *arguments: main([str(a) for a in arguments], load=lambda bundle, device: detector)


@pytest.fixture
def volume(tmp_path) -> Path:
    """Five slices of 6 x 7 voxels; the fourth is the brightest."""
    voxels = np.zeros((5, 6, 7), np.int16)
    voxels[:, 2, 3] = [100, 200, 300, 900, 400]
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 0.5, 3.0))
    sitk.WriteImage(image, str(tmp_path / "head.nii.gz"))
    return tmp_path / "head.nii.gz"


def written_slices(folder: Path) -> list[int]:
    return [record["index"] for record in json.loads((folder / "result.json").read_text())["slices"]]


def test_dicom_slice_gives_every_file(run, tmp_path):
    assert run("detect", get_testdata_file("CT_small.dcm"), "--output", tmp_path) == 0
    assert sorted(p.name for p in (tmp_path / "CT_small").iterdir()) == [
        "map.nii.gz",
        "overlay_K_000.png",
        "result.json",
        "scores.csv",
        "segmentation.seg.nrrd",
    ]


def test_one_line_for_each_image(run, tmp_path, capsys):
    images = [get_testdata_file("CT_small.dcm"), get_testdata_file("MR_small.dcm")]
    run("detect", *images, "--output", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["CT_small.dcm", "MR_small.dcm"]
    assert all(Path(line.split("  ")[-1]).is_file() for line in lines)


def test_middle_slice_is_taken_and_named_when_none_is_chosen(run, volume, tmp_path, capsys):
    run("detect", volume, "--output", tmp_path / "out")
    assert written_slices(tmp_path / "out/head") == [2]
    assert "slice 2 of 0 to 4, the middle one" in capsys.readouterr().err


def test_slices_are_counted_from_zero(run, volume, tmp_path):
    run("detect", volume, "--slice", 0, "--output", tmp_path / "out")
    assert written_slices(tmp_path / "out/head") == [0]


def test_all_slices_are_written_and_the_highest_is_told(run, volume, tmp_path, capsys):
    run("detect", volume, "--all", "--output", tmp_path / "out")
    assert written_slices(tmp_path / "out/head") == [0, 1, 2, 3, 4]
    assert "slice 3 (highest of 5)  score 0.900" in capsys.readouterr().out


def test_axis_chooses_the_slices(run, volume, tmp_path):
    run("detect", volume, "--all", "--axis", "J", "--output", tmp_path / "out")
    assert written_slices(tmp_path / "out/head") == [0, 1, 2, 3, 4, 5]


def test_options_reach_the_detector(run, volume, detector, tmp_path):
    options = ["--threshold", "0.3", "--window", "-100", "250", "--modality", "MR"]
    run("detect", volume, *options, "--output", tmp_path / "out")
    assert detector.asked == [{"threshold": 0.3, "window": (-100.0, 250.0), "modality": "MR"}]


def test_json_is_all_that_is_printed(run, volume, tmp_path, capsys):
    run("detect", volume, "--json", "--output", tmp_path / "out")
    printed = json.loads(capsys.readouterr().out)
    (result,) = printed["results"]
    assert result["slices"][0]["score"] == 0.3
    assert (printed["failures"], printed["interrupted"], printed["notice"]) == ([], False, RESEARCH_USE_ONLY)


def test_json_tells_failures(run, tmp_path, capsys):
    assert run("detect", tmp_path / "missing.nrrd", "--json", "--output", tmp_path) == 2
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    assert (failure["name"], failure["error"]) == ("missing.nrrd", "UnreadableImage")


def test_quiet_prints_nothing(run, volume, tmp_path, capsys):
    run("detect", volume, "--all", "--quiet", "--output", tmp_path / "out")
    assert capsys.readouterr() == ("", "")


def test_a_bad_image_does_not_keep_the_others_from_being_done(run, volume, tmp_path, capsys):
    (tmp_path / "bad.nrrd").write_text("no image")
    assert run("detect", tmp_path / "bad.nrrd", volume, "--output", tmp_path / "out") == 2
    assert written_slices(tmp_path / "out/head") == [2]
    assert "1 of 2 inputs failed: bad.nrrd" in capsys.readouterr().err


def test_bad_image_is_told_before_a_detector_is_loaded(tmp_path):
    def never(bundle, device):
        raise AssertionError("loaded")

    assert main(["detect", str(tmp_path / "missing"), "--output", str(tmp_path)], load=never) == 2


def test_bad_bundle_is_told(volume, tmp_path, capsys):
    def broken(bundle, device):
        raise BundleInvalid("bundle.json is missing")

    assert main(["detect", str(volume), "--output", str(tmp_path / "out")], load=broken) == 2
    assert "bundle.json is missing" in capsys.readouterr().err


def test_slice_out_of_range_is_told_and_nothing_written(run, volume, tmp_path, capsys):
    assert run("detect", volume, "--slice", 5, "--output", tmp_path / "out") == 2
    assert "0 to 4" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_results_are_overwritten_only_when_asked(run, volume, tmp_path):
    run("detect", volume, "--output", tmp_path / "out")
    assert run("detect", volume, "--slice", 1, "--output", tmp_path / "out") == 2
    assert written_slices(tmp_path / "out/head") == [2]
    assert run("detect", volume, "--slice", 1, "--overwrite", "--output", tmp_path / "out") == 0
    assert written_slices(tmp_path / "out/head") == [1]


def test_inputs_of_one_name_are_told_apart_by_their_folders(run, volume, tmp_path):
    for patient in ("a", "b"):
        (tmp_path / patient).mkdir()
        shutil.copy(volume, tmp_path / patient / "head.nii.gz")
    run("detect", tmp_path / "a/head.nii.gz", tmp_path / "b/head.nii.gz", "--output", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_head", "b_head"]


@pytest.mark.parametrize(
    "bad", [["--threshold", "1.5"], ["--threshold", "high"], ["--slice", "0", "--all"], []]
)
def test_bad_usage_is_a_user_error(run, volume, bad):
    output = [] if not bad else ["--output", "out"]
    with pytest.raises(SystemExit) as leaving:
        run("detect", volume, *bad, *output)
    assert leaving.value.code == 2


def test_reversed_window_is_a_user_error(run, volume, tmp_path):
    assert run("detect", volume, "--window", 10, 5, "--output", tmp_path / "out") == 2


def test_ctrl_c_finishes_the_slice_and_keeps_what_is_done(run, volume, detector, tmp_path, capsys):
    detect = detector.detect

    def interrupted_at_the_second(plane, **options):
        if len(detector.asked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return detect(plane, **options)

    detector.detect = interrupted_at_the_second
    assert run("detect", volume, "--all", "--output", tmp_path / "out") == 130
    assert written_slices(tmp_path / "out/head") == [0, 1]
    assert json.loads((tmp_path / "out/head/result.json").read_text())["complete"] is False
    assert "stopped: 2 of 5 done" in capsys.readouterr().out


def test_second_ctrl_c_stops_at_once_and_leaves_nothing(run, volume, detector, tmp_path):
    def interrupted_twice(plane, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    detector.detect = interrupted_twice
    assert run("detect", volume, "--all", "--output", tmp_path / "out") == 130
    assert not list((tmp_path / "out").iterdir())


def test_bugs_are_not_caught(run, volume, detector, tmp_path):
    detector.detect = lambda plane, **options: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run("detect", volume, "--output", tmp_path / "out")


def test_info_tells_size_and_spacing(run, volume, capsys):
    assert run("info", volume) == 0
    printed = capsys.readouterr().out
    assert "7 x 6 x 5" in printed
    assert "0.5 x 0.5 x 3" in printed


def test_info_speaks_json(run, volume, capsys):
    run("info", volume, "--json")
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert (image["size"], image["slices"]) == ([7, 6, 5], 5)


def test_info_does_not_tell_the_patients_name(run, capsys):
    run("info", get_testdata_file("CT_small.dcm"))
    assert "CompressedSamples" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["info", get_testdata_file("CT_small.dcm")]]
)
def test_small_commands_do_not_load_torch(arguments):
    code = f"""
import sys
from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_USER_ERROR, main
try:
    code = main({arguments!r})
except SystemExit as leaving:
    code = leaving.code
heavy = {{"torch", "monai", "open_clip", "skimage"}} & set(sys.modules)
sys.exit(code or bool(heavy) and str(heavy))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(LIBRARY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_version_is_the_packages(run, capsys):
    with pytest.raises(SystemExit):
        run("--version")
    assert capsys.readouterr().out == f"medanomalyclip {__version__}\n"


def test_help_tells_the_exit_codes(run, capsys):
    with pytest.raises(SystemExit):
        run("detect", "--help")
    printed = capsys.readouterr().out
    assert all(f"\n  {code} " in printed for code in (0, 1, 2, 130))


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Four pictures in MVTec's layout; a bright square is the lesion."""
    folder = tmp_path / "made-up"
    for number, kind in enumerate(("good", "good", "lesion", "lesion")):
        pixels = np.random.default_rng(number).integers(40, 90, (48, 40), dtype=np.uint8)
        mask = np.zeros_like(pixels)
        if kind == "lesion":
            pixels[10:20, 5:15], mask[10:20, 5:15] = 250, 255
            (folder / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / "ground_truth" / kind / f"{number}_mask.png")
        (folder / "test" / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "test" / kind / f"{number}.png")
    (folder / "train" / "good").mkdir(parents=True)
    Image.fromarray(np.full((48, 40), 60, np.uint8)).save(folder / "train" / "good" / "9.png")
    return folder


def test_evaluation_writes_a_report_and_a_line_for_each_set(tiny_bundle, dataset, tmp_path, capsys):
    words = ["evaluate", dataset, "--model", tiny_bundle.folder, "--output", tmp_path / "report"]
    assert main([*map(str, words), "--draws", "0", "--device", "cpu", "--modality", "MR"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "2 normal, 2 abnormal" in printed
    assert "pixel AUROC" in printed
    assert (tmp_path / "report" / "report.html").is_file()


def test_evaluation_on_a_part_that_is_not_there_names_those_that_are(dataset, tmp_path, capsys):
    words = ["evaluate", str(dataset), "--split", "valid", "--output", str(tmp_path / "report")]
    assert main(words) == EXIT_USER_ERROR
    assert "it has: test, train" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_own_phrases_are_needed_for_both(run, tmp_path, capsys):
    code = run(
        "detect", get_testdata_file("MR_small.dcm"), "--normal", "a normal brain", "--output", tmp_path
    )
    assert code == 2
    assert "--abnormal" in capsys.readouterr().err


def test_info_tells_a_detectors_presets(run, tiny_bundle, capsys):
    assert run("info", "--model", tiny_bundle.folder) == 0
    told = capsys.readouterr().out
    assert "tiny, version 1" in told
    assert "Research use only" in told
