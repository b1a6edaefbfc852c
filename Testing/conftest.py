"""Fixtures on Slicer's real libraries, and a tiny detector; tests that ask for neither load neither.

The detector is a tiny CLIP with random weights in a bundle: no test needs downloaded weights.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

# Test processes beside each other share the cores, and so do the commands that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ARCHITECTURES = Path(__file__).parent / "data" / "architectures"


@pytest.fixture(scope="session")
def slicer_application() -> Any:
    """slicer-core, started once; a missing system library is named with its package."""
    from harness import application

    return application.start()


@pytest.fixture(scope="session")
def vtk_errors(slicer_application: Any) -> Any:
    """What C++ printed as errors and then carried on from."""
    from harness.application import VtkErrors

    return VtkErrors()


@pytest.fixture
def slicer_scene(slicer_application: Any, vtk_errors: Any) -> Iterator[Any]:
    """An empty scene with three slice views; errors that Slicer prints fail the test."""
    import slicer

    from harness.slice_views import slice_views

    slicer.mrmlScene.Clear(False)
    for view in slice_views().values():
        view.reset()
    vtk_errors.clear()
    yield slicer.mrmlScene
    printed = list(vtk_errors.messages)
    slicer.mrmlScene.Clear(False)
    assert not printed, "".join(printed)


@pytest.fixture
def views(slicer_scene: Any) -> dict[str, Any]:
    """The slice views by name."""
    from harness.slice_views import slice_views

    return slice_views()


@pytest.fixture(scope="session")
def tiny_tower():
    """Specification of a 64 px tower: 4 x 4 patches, four layers of width 64, embedding 32."""
    from MedAnomalyCLIPLib.clip.importing import import_open_clip
    from MedAnomalyCLIPLib.clip.specification import TowerSpec

    open_clip = import_open_clip()
    if "tiny-test-clip" not in open_clip.list_models():
        open_clip.add_model_config(ARCHITECTURES)
    return TowerSpec("tiny-test-clip", 64, (2, 4))


@pytest.fixture(scope="session")
def tiny_manifest(tiny_tower):
    from MedAnomalyCLIPLib.bundle import FORMAT, BundleManifest, NormalReference
    from MedAnomalyCLIPLib.detectors.specification import DetectorSpec
    from MedAnomalyCLIPLib.preprocess import PreprocessSpec, WindowRule

    windows = {"default": WindowRule("percentile", 1.0, 99.0)}
    return BundleManifest(
        format=FORMAT,
        name="tiny",
        version="1",
        description="Random weights, for tests",
        licence="none",
        detector=DetectorSpec(tiny_tower),
        preprocess=PreprocessSpec(64, (0.5,) * 3, (0.25,) * 3, windows),
        threshold=0.5,
        reference=NormalReference("five made-up images", (0.1, 0.2, 0.3, 0.4, 0.5)),
    )


@pytest.fixture
def make_bundle(tmp_path, tiny_manifest):
    """Writes a bundle with random weights, always the same, to a folder that is named after it."""
    import torch

    from MedAnomalyCLIPLib.bundle import save_bundle
    from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector

    def make(name="tiny", folder=None, *, seed=0, card="", **changes):
        torch.manual_seed(seed)
        manifest = replace(tiny_manifest, name=name, **changes)
        detector = AnomalyDetector(manifest.detector)
        detector.text_bank.copy_(torch.nn.functional.normalize(torch.randn(2, 32), dim=-1))
        return save_bundle((folder or tmp_path) / name, manifest, detector, card or f"# {name}\n")

    return make


@pytest.fixture
def tiny_bundle(make_bundle):
    """A bundle on disk whose weights are random but always the same."""
    return make_bundle()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every way to reach another computer raises; what was tried is told at the end too."""
    tried: list[Any] = []

    def forbidden(*arguments: Any, **_options: Any) -> None:
        tried.append(arguments)
        raise AssertionError(f"the network was asked for: {arguments}")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbidden)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, forbidden)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield tried
    assert not tried
