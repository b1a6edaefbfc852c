"""What a killed run leaves beside its place, and how the next one finds and clears it up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.errors import OutputFailed
from MedAnomalyCLIPLib.output_folder import OutputFolder, Staging

LIBRARY = Path(__file__).resolve().parents[2] / "MedAnomalyCLIP"
KILLED = """
import os, signal, sys
from pathlib import Path
from MedAnomalyCLIPLib import output_folder
folder = output_folder.OutputFolder(sys.argv[1], "m.json", overwrite=True)
(folder.staging / "m.json").write_text('{"files": ["m.json"]}')
if sys.argv[2] == "between":  # the earlier results are moved away, the new ones not yet in place
    folder.place.replace(folder.staging.with_name(folder.staging.name + ".old"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_one(place: Path, when: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(LIBRARY)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(place), when], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


def write(place: Path, content: str = "1", *, overwrite: bool = False) -> None:
    with OutputFolder(place, "m.json", overwrite=overwrite) as folder:
        (folder.staging / "a").write_text(content)
        (folder.staging / "m.json").write_text('{"files": ["a", "m.json"]}')


def test_what_a_killed_run_left_is_cleared_up_by_the_next(tmp_path):
    kill_one(tmp_path / "out", "writing")
    assert len(list(tmp_path.iterdir())) == 2
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_results_that_a_killed_run_had_moved_away_are_put_back(tmp_path):
    write(tmp_path / "out", "earlier")
    kill_one(tmp_path / "out", "between")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputFailed, match="exists already"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_run_is_writing_is_left_alone(tmp_path):
    living = OutputFolder(tmp_path / "out", "m.json", overwrite=False)
    (living.staging / "a").write_text("of the first")
    write(tmp_path / "out", "of the second")
    assert (living.staging / "a").read_text() == "of the first"
    with pytest.raises(OutputFailed, match="exists already"):
        living.appear()
    living.discard()
    assert (tmp_path / "out" / "a").read_text() == "of the second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_as_long_as_they_may_be_leave_room_for_what_is_written_first(tmp_path):
    write(tmp_path / ("x" * 255))
    write(tmp_path / ("ü" * 127))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["a[b]*?", "-rf", " ", "a\nb", "..."])
def test_odd_names_are_names_like_others(name, tmp_path):
    kill_one(tmp_path / name, "writing")
    write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed, match="out could not be written"):
        OutputFolder(tmp_path / "file" / "out", "m.json", overwrite=False)
    with pytest.raises(OSError):
        Staging(tmp_path / "file" / "out")


# Going on with a batch


@pytest.fixture
def volumes(tmp_path) -> list[Path]:
    paths = []
    for name in ("one", "two"):
        paths.append(tmp_path / f"{name}.nii.gz")
        voxels = np.random.default_rng(len(paths)).integers(0, 900, (3, 20, 24)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(paths[-1]))
    return paths


@pytest.fixture
def detect(volumes, tiny_bundle, tmp_path):
    def run(*words, inputs=volumes):
        common = ["--model", tiny_bundle.folder, "--output", tmp_path / "out", "--device", "cpu", "--all"]
        return main([str(word) for word in ("detect", *inputs, *common, *words)])

    return run


def test_a_batch_goes_on_where_it_was_and_says_what_was_done_before(detect, volumes, tmp_path, capsys):
    assert detect(inputs=volumes[:1]) == EXIT_DONE
    before = (tmp_path / "out/one/result.json").read_bytes()
    capsys.readouterr()
    assert detect("--resume") == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert ["done before" in line for line in lines] == [True, False]
    assert (tmp_path / "out/one/result.json").read_bytes() == before
    assert (tmp_path / "out/two/result.json").is_file()


def test_results_of_other_settings_are_no_results_to_go_on_with(detect, capsys):
    assert detect() == EXIT_DONE
    for words in (["--threshold", "0.9"], ["--window", "0", "500"], ["--axis", "I"]):
        assert detect("--resume", *words) == EXIT_USER_ERROR
        assert "another image, detector or settings" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["incomplete", "file gone", "manifest cut"])
def test_results_that_are_not_whole_are_made_again_or_refused(damage, detect, tmp_path):
    assert detect() == EXIT_DONE
    manifest = tmp_path / "out/one/result.json"
    told = json.loads(manifest.read_text())
    if damage == "incomplete":
        gone = told["slices"].pop()["overlay"]
        manifest.write_text(json.dumps(told | {"complete": False}))
        assert detect("--resume") == EXIT_DONE
        assert json.loads(manifest.read_text())["complete"] is True
        assert (manifest.parent / gone).is_file()
    elif damage == "file gone":
        (manifest.parent / "scores.csv").unlink()
        assert detect("--resume") == EXIT_USER_ERROR
    else:
        manifest.write_text(manifest.read_text()[:300])
        assert detect("--resume") == EXIT_USER_ERROR
