"""What is chosen on the page: a folder, one of its series, a detector."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from MedAnomalyCLIPLib.bundle import MANIFEST, default_bundle_path
from unit.images import write_dicom_series
from web.browsing import COMMAND

POSITIONS = [(0.0, 0.0, 3.0 * number) for number in range(4)]


@pytest.fixture
def two_series(tmp_path):
    """A folder of DICOM files: an MR of 20 columns, and a CT of 24."""
    for modality, columns in (("MR", 20), ("CT", 24)):
        voxels = np.full((4, 22, columns), 40, np.int16)
        voxels[2, 6:12, 6:12] = 900
        names = {"Modality": modality, "SeriesInstanceUID": f"1.2.3.{columns}"}
        write_dicom_series(tmp_path / "study" / modality, voxels, POSITIONS, **names)
    return tmp_path / "study"


@pytest.fixture
def detectors(tmp_path):
    """A folder with a detector of the reader's, the bundled one under a name and threshold of its own."""
    shutil.copytree(default_bundle_path(), tmp_path / "detectors" / "ours")
    manifest = tmp_path / "detectors" / "ours" / MANIFEST
    changes = {"name": "Ours", "version": "7", "threshold": 0.97}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))
    damaged = tmp_path / "detectors" / "damaged"
    damaged.mkdir()
    (damaged / MANIFEST).write_text("{}")
    return tmp_path / "detectors"


def test_of_a_folder_of_dicom_files_a_series_is_chosen_and_detected_on(start_server, open_page, two_series):
    reader = open_page(start_server().address)
    reader.upload(two_series, "folder")
    reader.page.get_by_label("The folder holds several series").first.wait_for()
    reader.page.locator(".series").click()
    reader.page.get_by_role("option").filter(has_text="CT").click()
    reader.wait_for_study("CT, 24 × 22 × 4 voxels")
    reader.page.locator(".series").wait_for(state="detached")
    reader.click("range-button")
    reader.page.locator("[data-slice='4']").wait_for()
    scores = [float(text) for text in reader.page.locator("[data-slice] td:nth-child(2)").all_text_contents()]
    assert np.argmax(scores) == 2


def test_a_detector_of_the_readers_own_is_chosen(start_server, open_page, head_file, detectors):
    server = start_server(head_file, "--detectors", detectors, program=COMMAND)
    reader = open_page(server.address)
    reader.wait_for_study()
    reader.click("detect-button")
    reader.wait_for_text("result-line", "Detector: MedAnomalyCLIP default")
    reader.choose("detector", "damaged (cannot be used)")
    reader.wait_for_text("message", "bundle.json")
    assert "Bundled detector" in reader.text("detector")
    reader.choose("detector", "Ours 7")
    reader.page.get_by_role("button", name="Reset").wait_for()
    reader.click("detect-button")
    reader.wait_for_text("result-line", "Detector: Ours")
    assert float(reader.page.get_attribute(".threshold [role=slider]", "aria-valuenow")) == 0.97
    state = reader.page.evaluate("JSON.stringify(window.trame.state.state)")
    assert str(detectors) not in state
    reader.page.evaluate("window.trame.state.set('detector', 17)")
    reader.wait_for_text("message", "There is no such detector")
