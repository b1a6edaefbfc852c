"""What the README tells to type does what it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from MedAnomalyCLIPLib.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def in_a_folder_with_an_image(tmp_path, monkeypatch):
    shutil.copy(get_testdata_file("MR_small.dcm"), tmp_path)
    (tmp_path / "FOLDER").mkdir()
    shutil.copy(get_testdata_file("MR_small.dcm"), tmp_path / "FOLDER")
    monkeypatch.chdir(tmp_path)


def test_python_example_runs(in_a_folder_with_an_image, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out
    assert Path("results/mr/segmentation.seg.nrrd").is_file()


def test_batch_example_runs_and_goes_on(in_a_folder_with_an_image):
    (example,) = re.findall(r"```\n(from [^`]*?run_batch\(search[^`]*?)```", README, re.DOTALL)
    Path("FOLDER").rename("studies")
    written = []
    for _run in range(2):
        told = {}
        exec(compile(example, "README.md", "exec"), told)
        assert [one["state"] for one in told["manifest"]["inputs"]] == ["done"]
        written.append(next(Path("results").glob("*/*/result.json")).stat().st_mtime_ns)
    assert written[0] == written[1]  # it was not done again
    assert json.loads(Path("results/manifest.json").read_text())["inputs"] == told["manifest"]["inputs"]


COMMAND = re.compile(r"^medanomalyclip (.*?)(?:\s+#.*)?$", re.MULTILINE)
(TRAINING,) = re.findall(r"^## Train a detector\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
# Seconds instead of the hours that the recipes' own numbers take.
SHORT = {
    "mediclip": ["--set", "optimisation.epochs=1", "--set", "data.normal=2"],
    "mvfa_few_shot": ["--set", "optimisation.epochs=1", "--set", "data.normal=2", "--set", "data.abnormal=1"],
}


# test_dicomweb.py runs those that need an archive.
HERE = [line for line in COMMAND.findall(README.replace(TRAINING, "")) if "--dicomweb" not in line]


@pytest.mark.parametrize("line", HERE)
def test_command_runs(in_a_folder_with_an_image, line):
    words = line.replace("INPUT...", "INPUT").replace("INPUT", "MR_small.dcm").replace("DIR", "out").split()
    if "--slice" in words:
        words[words.index("--slice") + 1] = "0"  # the image has one slice
    assert main(words) == 0


def test_commands_that_train_run_one_after_the_other(in_a_folder_with_an_image):
    rng = np.random.default_rng(0)
    for number in range(3):
        write_picture(Path("NORMAL") / f"{number}.png", rng)
        for split in ("train", "valid", "test"):
            folder = Path("DATASET/heads_AD") / split
            write_picture(folder / "good" / "img" / f"{number}.png", rng)
            write_picture(folder / "Ungood" / "img" / f"{number}.png", rng)
            write_picture(folder / "Ungood" / "anomaly_mask" / f"{number}.png", rng, mask=True)
    for line in COMMAND.findall(TRAINING):
        words = line.replace("INPUT", "MR_small.dcm").replace("DIR", "out").split()
        assert main([*words, *SHORT.get(words[1], [])]) == 0, line
    assert Path("report/report.html").is_file()
    assert Path("results/MR_small/result.json").is_file()


def write_picture(path, rng, *, mask=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((64, 64), np.uint8)
    if mask:
        pixels[20:40, 20:40] = 255
    else:
        pixels[8:56, 8:56] = rng.integers(60, 120, (48, 48))
    Image.fromarray(pixels).save(path)


def test_linked_files_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_modules_of_the_data_flow_are_there():
    library = ROOT / "MedAnomalyCLIP" / "MedAnomalyCLIPLib"
    (table,) = re.findall(r"\| step \| where \|\n(.*?)\n\n", README, re.DOTALL)
    names = [name for name in re.findall(r"`([\w/]+(?:\.py|/))`", table) if name != "MedAnomalyCLIP.py"]
    assert len(names) > 15
    assert [name for name in names if not (library / name).exists()] == []
