"""The light installation: the bundled detector works where PyTorch, MONAI and open_clip cannot be imported.

Each test is a process of its own in which importing them raises, as it does where they are not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from pydicom.data import get_testdata_file

from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.geometry import cut_slice
from MedAnomalyCLIPLib.onnx_int8 import ALLOWED
from MedAnomalyCLIPLib.volume import read_volume

MR = str(get_testdata_file("MR_small.dcm"))

WITHOUT = """
import importlib.metadata, importlib.util, sys

LEFT_OUT = ("torch", "torchvision", "monai", "open_clip", "open_clip_torch", "timm")

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LEFT_OUT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
find_spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *more: None if name in LEFT_OUT else find_spec(name, *more)

def version_without(name):
    if name in LEFT_OUT:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = version_without
"""


def light(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run code in a light installation."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )


def command(*arguments: object) -> subprocess.CompletedProcess:
    return light("from MedAnomalyCLIPLib.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)


def test_the_library_detects_and_says_what_the_full_installation_says(tmp_path):
    code = """
import numpy as np
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.geometry import cut_slice
from MedAnomalyCLIPLib.onnx_int8 import ALLOWED
from MedAnomalyCLIPLib.prompt import Prompt
from MedAnomalyCLIPLib.volume import read_volume

plane = cut_slice(read_volume(sys.argv[1]), 2, 0)
result = SliceDetector.load(precision="float32").detect(plane, prompt=Prompt("brain-mr"))
found = {"map": result.map, "score": result.score, "unlike": result.unlikeness}
result = SliceDetector.load().detect(plane, prompt=Prompt("brain-mr"))
assert result.provenance.precision == "int8"
np.savez(sys.argv[2], **found, rounded=result.map, loaded=sorted(sys.modules))
"""
    done = light(code, MR, tmp_path / "found.npz")
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    from MedAnomalyCLIPLib.prompt import Prompt

    full = SliceDetector.load(device="cpu", runtime="torch")
    expected = full.detect(cut_slice(read_volume(MR), 2, 0), prompt=Prompt("brain-mr"))
    np.testing.assert_allclose(found["map"], expected.map, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["rounded"], expected.map, rtol=0, atol=ALLOWED.map)
    assert float(found["score"]) == pytest.approx(expected.score, abs=1e-4)
    assert float(found["unlike"]) == pytest.approx(expected.unlikeness, abs=1e-3)
    assert not {"torch", "monai", "open_clip", "onnx"} & set(found["loaded"])
    extras = {"highdicom", "dicomweb_client", "distributed", "pyarrow", "trame", "trame_slicer", "aiohttp"}
    assert not extras & set(found["loaded"])


def test_the_command_detects(tmp_path):
    done = command("detect", MR, get_testdata_file("CT_small.dcm"), "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["results"]
    assert [result["runtime"].partition(" 1")[0] for result in told] == ["ONNX Runtime"] * 2
    assert {path.name for path in (tmp_path / "out" / "MR_small").iterdir()} >= {"map.nii.gz", "scores.csv"}


def test_info_tells_what_runs_the_detector():
    done = command("info", "--model")
    assert done.returncode == 0, done.stderr
    assert "runs on the CPU in: ONNX Runtime 1." in done.stdout


def test_info_tells_what_is_missing_for_another_detector(tiny_bundle):
    done = command("info", "--model", tiny_bundle.folder)
    assert "nothing that is installed; pip install 'medanomalyclip[full]'" in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["detect", MR, "--normal", "a normal knee", "--abnormal", "a torn meniscus", "--output", "OUT"],
        ["detect", MR, "--device", "cuda", "--output", "OUT"],
        ["detect", MR, "--runtime", "torch", "--output", "OUT"],
        ["detect", MR, "--model", "BUNDLE", "--output", "OUT"],
        ["train", "memory", "--support", "OUT", "--output", "OUT"],
        ["export-onnx", "BUNDLE"],
    ],
    ids=["own phrases", "gpu", "torch", "another detector", "teaching", "export"],
)
def test_what_it_cannot_do_is_refused_with_what_to_install(options, tmp_path, tiny_bundle):
    words = {"OUT": tmp_path / "out", "BUNDLE": tiny_bundle.folder}
    done = command(*(words.get(word, word) for word in options))
    assert done.returncode == 2, done.stderr
    assert "medanomalyclip[full]" in done.stderr
    assert "Install full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_speed_preview_and_devices_need_nothing_more():
    code = """
import numpy as np
from MedAnomalyCLIPLib.bundle import default_bundle_path, read_manifest
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.geometry import SlicePlane
from MedAnomalyCLIPLib.preview import network_picture
from MedAnomalyCLIPLib.readiness import measure_speed
from MedAnomalyCLIPLib.runtime import available_devices

speed = measure_speed(SliceDetector.load(), runs=1)
assert speed.title.startswith("CPU, ") and "ONNX Runtime" in speed.title and speed.seconds > 0, speed
plane = SlicePlane(np.eye(40), np.eye(4), np.ones((40, 40), bool))
assert network_picture(plane, read_manifest(default_bundle_path()).preprocess).side == 256
assert available_devices() == ("cpu",)
"""
    done = light(code)
    assert done.returncode == 0, done.stderr
