"""Sample images in Slicer's module Sample Data."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sample_data(monkeypatch):
    """Slicer's module of that name, as far as registering goes; what was registered."""
    registered = []

    class SampleDataLogic:
        @staticmethod
        def registerCustomSampleDataSource(
            category, sampleName, uris, fileNames, nodeNames, thumbnailFileName, checksums
        ):
            source = (category, sampleName, uris, fileNames, nodeNames, thumbnailFileName, checksums)
            if source not in registered:  # as Slicer does
                registered.append(source)

    module = ModuleType("SampleData")
    module.SampleDataLogic = SampleDataLogic
    monkeypatch.setitem(sys.modules, "SampleData", module)
    return registered


def test_samples_are_registered_when_slicer_has_started(hosted_module, sample_data, slicer_application):
    slicer_application.emit("startupCompleted()")
    names = [source[1] for source in sample_data]
    assert names == ["MRHead", "MRBrainTumor1", "MRBrainTumor2", "CTChest"]
    assert {source[0] for source in sample_data} == {"MedAnomalyCLIP"}


def test_registering_twice_offers_them_once(hosted_module, sample_data, slicer_application):
    slicer_application.emit("startupCompleted()")
    slicer_application.emit("startupCompleted()")
    assert len(sample_data) == 4


def test_addresses_end_in_the_checksum_of_the_file(hosted_module, sample_data, slicer_application):
    """So Slicer's release assets are named, and what is fetched is verified against the same number."""
    slicer_application.emit("startupCompleted()")
    for _, _, url, _, _, _, checksum in sample_data:
        digest = checksum.removeprefix("SHA256:")
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
        assert url == f"https://github.com/Slicer/SlicerTestingData/releases/download/SHA256/{digest}"


def test_every_sample_has_a_picture_of_the_size_that_slicer_wants(
    hosted_module, sample_data, slicer_application
):
    from PIL import Image

    slicer_application.emit("startupCompleted()")
    assert {Image.open(source[5]).size for source in sample_data} == {(260, 280)}


def test_a_slicer_without_sample_data_starts_all_the_same(hosted_module, slicer_application, monkeypatch):
    from MedAnomalyCLIPLib.panel_samples import register_samples

    monkeypatch.setitem(sys.modules, "SampleData", None)
    slicer_application.emit("startupCompleted()")
    assert register_samples() is False


def test_the_tutorial_names_samples_that_are_offered(hosted_module, sample_data, slicer_application):
    slicer_application.emit("startupCompleted()")
    tutorial = (ROOT / "Resources" / "tutorial.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\*\*(\w+)\*\*", tutorial)) & {source[1] for source in sample_data}
    assert {"MRBrainTumor1", "MRHead", "CTChest"} <= named
