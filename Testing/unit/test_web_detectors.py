"""The detectors that the page in the browser offers, by numbers that tell no folder."""

from __future__ import annotations

import shutil

import pytest

from MedAnomalyCLIPLib.bundle import MANIFEST
from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest
from MedAnomalyCLIPLib.web.detectors import DetectorList


@pytest.fixture
def folder(make_bundle, tmp_path):
    folder = tmp_path / "detectors"
    make_bundle("first", folder)
    make_bundle("second", folder)
    return folder


def offered(detectors):
    return {item["title"]: item["value"] for item in detectors.items()}


def test_without_a_folder_there_is_the_bundled_detector_alone():
    detectors = DetectorList()
    assert offered(detectors) == {"Bundled detector": 0}
    assert detectors.folder(0) == ""


def test_the_detector_to_begin_with_comes_first_and_is_offered_once(folder):
    detectors = DetectorList(folder / "second", folder)
    found = offered(detectors)
    assert found["second 1"] == 0
    assert sorted(found) == ["Bundled detector", "first 1", "second 1"]
    assert detectors.read(found["first 1"]).folder == folder / "first"
    assert detectors.folder(found["Bundled detector"]) == ""


def test_numbers_stay_when_detectors_come_and_go(make_bundle, folder):
    detectors = DetectorList(None, folder)
    second = offered(detectors)["second 1"]
    shutil.rmtree(folder / "first")
    make_bundle("another", folder)
    found = offered(detectors)
    assert found["second 1"] == second and "first 1" not in found
    assert detectors.folder(found["another 1"]) == str(folder / "another")


def test_a_detector_that_cannot_be_used_is_listed_and_says_why_when_it_is_chosen(folder):
    (folder / "first" / MANIFEST).write_text("{}")
    detectors = DetectorList(None, folder)
    with pytest.raises(BundleInvalid, match="bundle"):
        detectors.read(offered(detectors)["first (cannot be used)"])


@pytest.mark.parametrize("number", [-1, 17, "0", "../first", None])
def test_what_was_not_offered_is_refused(folder, number):
    detectors = DetectorList(None, folder)
    detectors.items()
    with pytest.raises(InvalidRequest):
        detectors.folder(number)
