"""What is installed and what is missing, what installing would do, and how fast a detector is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import time
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name

from MedAnomalyCLIPLib import readiness
from MedAnomalyCLIPLib.bundle import default_bundle_path
from MedAnomalyCLIPLib.bundle_list import BundleSummary
from MedAnomalyCLIPLib.errors import BundleInvalid
from MedAnomalyCLIPLib.readiness import (
    Package,
    Speed,
    check_packages,
    check_readiness,
    frozen_versions,
    lacking_wheels,
    measure_speed,
    plan_installation,
)
from MedAnomalyCLIPLib.resources import resource_path

REQUIREMENTS = resource_path("requirements.txt")


@pytest.fixture
def only_installed(monkeypatch):
    """A Python with these packages (name: version) and no others."""

    def use(versions):
        names = {readiness._IMPORT_NAMES.get(name, name) for name in versions}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)
        return lambda name: versions.get(name, "")

    return use


SLICER = {"numpy": "2.4.6", "SimpleITK": "2.5.0", "pydicom": "3.0.1", "scipy": "1.17.1"}


def test_all_that_the_tests_run_with_is_ready():
    state = check_readiness(REQUIREMENTS, lambda: BundleSummary.read(default_bundle_path()))
    assert state
    assert state.reasons == ()
    assert {p.name: p.installed for p in state.packages}["monai"] == importlib.metadata.version("monai")


def test_what_is_missing_is_named_and_not_imported(tmp_path, only_installed):
    path = tmp_path / "requirements.txt"
    path.write_text("numpy>=1.26\n\nno-such-package[extra]>=2\nscikit-image>=0.22\n")
    packages = check_packages(path, only_installed({"numpy": "2.4.6"}))
    assert [p.requirement for p in packages if not p.satisfied] == [
        "no-such-package[extra]>=2",
        "scikit-image>=0.22",
    ]


@pytest.mark.parametrize(
    ("version", "satisfied"),
    [("1.3.2", False), ("1.4.0", True), ("1.10", True), ("1.5.0rc2", True), ("1.6.1+cpu", True)],
)
def test_versions_are_compared_as_pip_does(tmp_path, only_installed, version, satisfied):
    path = tmp_path / "requirements.txt"
    path.write_text("monai>=1.4\n")
    (package,) = check_packages(path, only_installed({"monai": version}))
    assert (package.satisfied, package.installed) == (satisfied, version)


def test_a_package_that_does_not_tell_its_version_is_taken_as_it_is(tmp_path, only_installed):
    path = tmp_path / "requirements.txt"
    path.write_text("SimpleITK>=2.3\n")
    only_installed({"SimpleITK": ""})
    (package,) = check_packages(path, lambda name: "")
    assert package.satisfied


def test_remains_of_an_uninstalled_package_do_not_count(tmp_path, only_installed):
    path = tmp_path / "requirements.txt"
    path.write_text("monai>=1.4\n")
    only_installed({})
    (package,) = check_packages(path, lambda name: "1.6.1")
    assert not package.satisfied


def test_reasons_say_what_is_missing_or_too_old(monkeypatch):
    states = (
        Package("monai>=1.4", "monai", "1.3.2", False),
        Package("torch>=2.8", "torch", "", False),
        Package("numpy>=1.26", "numpy", "2.4.6", True),
    )
    monkeypatch.setattr(readiness, "check_packages", lambda path: states)

    def damaged():
        raise BundleInvalid("default has no weights.safetensors")

    state = check_readiness(REQUIREMENTS, damaged)
    assert not state
    assert state.reasons == (
        "monai 1.3.2 is too old: monai>=1.4 is needed",
        "torch>=2.8 is not installed",
        "default has no weights.safetensors",
    )
    assert [p.name for p in state.missing] == ["monai", "torch"]


# Planning


def test_in_a_fresh_slicer_torch_goes_to_its_extension_and_the_rest_to_pip(only_installed):
    installed = only_installed(SLICER)
    plan = plan_installation(check_packages(REQUIREMENTS, installed), installed)
    assert plan.torch == "torch>=2.8"
    assert plan.packages[:3] == ("monai>=1.4", "open_clip_torch>=3.3", "onnxruntime>=1.20")
    assert plan.packages[3:] == ("scikit-image>=0.22", "safetensors>=0.4", "filelock>=3.12", "tqdm>=4.60")
    assert plan.blocked == ()
    assert plan.requirements == ("torch>=2.8", *plan.packages)


def test_the_light_installation_is_small_and_without_torch(only_installed):
    installed = only_installed(SLICER)
    packages = check_packages(resource_path("requirements-light.txt"), installed)
    plan = plan_installation(packages, installed)
    assert plan.torch == ""
    assert not {"torch", "monai", "open-clip-torch", "timm"} & {name for name, _ in plan.takes}
    assert 100 < plan.megabytes < 160


def test_the_plan_names_what_packages_bring_but_not_what_is_there(only_installed):
    installed = only_installed(SLICER)
    names = [name for name, _ in plan_installation(check_packages(REQUIREMENTS, installed), installed).takes]
    assert {"torch", "torchvision", "timm", "huggingface-hub", "hf-xet", "mpmath"} <= set(names)
    assert "numpy" not in names
    assert "scipy" not in names
    assert len(names) == len(set(names))


def test_nothing_missing_makes_an_empty_plan():
    plan = plan_installation(check_packages(REQUIREMENTS))
    assert not plan
    assert plan.takes == ()


def test_packages_of_slicer_that_are_too_old_block_and_are_not_replaced(only_installed):
    installed = only_installed({**SLICER, "numpy": "1.24.0", "torch": "2.2.2"})
    plan = plan_installation(check_packages(REQUIREMENTS, installed), installed)
    assert set(plan.blocked) == {"numpy>=1.26", "torch>=2.8"}
    assert plan.torch == ""
    assert "numpy>=1.26" not in plan.packages


def test_other_packages_that_are_too_old_are_upgraded(only_installed):
    installed = only_installed({**SLICER, "torch": "2.9.0", "monai": "1.2.0"})
    plan = plan_installation(check_packages(REQUIREMENTS, installed), installed)
    assert "monai>=1.4" in plan.packages
    assert dict(plan.takes)["monai"] > 0


def environment(name):
    """Size in MB and needs of an installed package, as its own metadata says."""
    distribution = importlib.metadata.distribution(name)
    needs = [Requirement(line) for line in distribution.requires or []]
    here = {
        str(canonicalize_name(n.name)) for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})
    }
    return sum(file.size or 0 for file in distribution.files or []) / 1e6, here


@pytest.mark.parametrize(
    "name", ["monai", "onnxruntime", "open-clip-torch", "scikit-image", "timm", "torchvision", "sympy"]
)
def test_what_packages_take_and_bring_is_what_they_do_here(name):
    size, needs = environment(name)
    told, brings = readiness._TAKES[name]
    assert told == pytest.approx(size, rel=0.5, abs=0.5)
    assert needs - set(brings.split()) == set(), "a newer version brings more than the consent names"


def test_everything_that_comes_has_its_size():
    brought = {name for _, brings in readiness._TAKES.values() for name in brings.split()}
    assert brought <= set(readiness._TAKES)


def test_installed_versions_are_frozen():
    versions = {"numpy": "2.4.6", "torch": "2.13.0+cpu", "SimpleITK": "2.5.0"}
    assert frozen_versions(lambda name: versions.get(name, "")) == (
        "numpy==2.4.6\nSimpleITK==2.5.0\ntorch==2.13.0+cpu\n"
    )


# Wheels


def wheel(folder, name, version, tag="py3-none-any"):
    (folder / f"{name}-{version}-{tag}.whl").touch()


def test_wheels_that_serve_are_found(tmp_path):
    wheel(tmp_path, "monai", "1.6.1")
    wheel(tmp_path, "open_clip_torch", "3.3.0")
    wheel(tmp_path, "scikit_image", "0.26.0", str(next(iter(sys_tags()))))
    (tmp_path / "notes.txt").touch()
    (tmp_path / "no-wheel.whl").touch()
    assert lacking_wheels(tmp_path, ["monai>=1.4", "open_clip_torch>=3.3", "scikit-image>=0.22"]) == ()


def test_wheels_that_are_too_old_or_for_another_computer_do_not_serve(tmp_path):
    wheel(tmp_path, "monai", "1.3.0")
    wheel(tmp_path, "torch", "2.9.0", "cp27-cp27m-win32")
    assert lacking_wheels(tmp_path, ["monai>=1.4", "torch>=2.8"]) == ("monai>=1.4", "torch>=2.8")


# Speed


class Timed:
    """Takes a known time, much longer at the first slice."""

    provenance = SimpleNamespace(device="cpu", runtime="a clock", precision="float32")

    def __init__(self):
        self.calls = 0

    def detect(self, plane):
        assert plane.shape == (256, 256)
        self.calls += 1
        time.sleep(0.3 if self.calls == 1 else 0.02)


def test_speed_is_that_of_a_loaded_detector():
    detector = Timed()
    speed = measure_speed(detector)
    assert detector.calls == 4
    assert 0.02 <= speed.seconds < 0.2
    assert speed.device == "cpu"
    assert speed.title.startswith("CPU, ")
    assert speed.title.endswith(", a clock")


def test_a_real_detector_can_be_measured(tiny_bundle):
    from MedAnomalyCLIPLib.detection import SliceDetector

    assert measure_speed(SliceDetector.load(tiny_bundle.folder, device="cpu"), runs=1).seconds > 0


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, "fast"])
def test_a_duration_that_cannot_be_is_refused(seconds):
    with pytest.raises(ValueError, match="duration"):
        Speed("cpu", "CPU", seconds)
