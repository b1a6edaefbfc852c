"""What the README tells to type does what it says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from MedAnomalyCLIPLib.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def in_a_folder_with_an_image(tmp_path, monkeypatch):
    shutil.copy(get_testdata_file("MR_small.dcm"), tmp_path)
    monkeypatch.chdir(tmp_path)


def test_python_example_runs(in_a_folder_with_an_image, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out
    assert Path("results/mr/segmentation.seg.nrrd").is_file()


@pytest.mark.parametrize("line", re.findall(r"^medanomalyclip (.*?)(?:\s+#.*)?$", README, re.MULTILINE))
def test_command_runs(in_a_folder_with_an_image, line):
    words = line.replace("INPUT...", "INPUT").replace("INPUT", "MR_small.dcm").replace("DIR", "out").split()
    if "--slice" in words:
        words[words.index("--slice") + 1] = "0"  # the image has one slice
    assert main(words) == 0


def test_linked_files_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_modules_of_the_data_flow_are_there():
    library = ROOT / "MedAnomalyCLIP" / "MedAnomalyCLIPLib"
    (table,) = re.findall(r"\| step \| where \|\n(.*?)\n\n", README, re.DOTALL)
    names = [name for name in re.findall(r"`([\w/]+(?:\.py|/))`", table) if name != "MedAnomalyCLIP.py"]
    assert len(names) > 15
    assert [name for name in names if not (library / name).exists()] == []
