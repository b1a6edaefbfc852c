"""Detectors to choose from: listed by what they say of themselves, damaged ones with the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from MedAnomalyCLIPLib.bundle import CARD, MANIFEST, WEIGHTS, read_card
from MedAnomalyCLIPLib.bundle_list import BundleSummary, list_bundles
from MedAnomalyCLIPLib.errors import BundleInvalid


@pytest.fixture
def folder(make_bundle, tmp_path):
    """Two detectors, and things that are none."""
    folder = tmp_path / "detectors"
    make_bundle("second", folder, description="The other one", version="0.2")
    make_bundle("first", folder)
    (folder / "notes").mkdir()
    (folder / "notes.txt").write_text("no detector")
    (folder / ".first-half-written").mkdir()
    (folder / ".first-half-written" / MANIFEST).write_text("{")
    return folder


def test_detectors_are_listed_by_name_with_version_description_and_folder(folder):
    found, damaged = list_bundles(folder)
    assert [(b.name, b.version, b.description, b.folder.name) for b in found] == [
        ("first", "1", "Random weights, for tests", "first"),
        ("second", "0.2", "The other one", "second"),
    ]
    assert not damaged


def test_a_folder_that_does_not_exist_holds_none(tmp_path):
    assert list_bundles(tmp_path / "nowhere") == ([], {})


def test_a_file_in_place_of_the_folder_holds_none(tmp_path):
    (tmp_path / "file").write_text("")
    assert list_bundles(tmp_path / "file") == ([], {})


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    found, damaged = list_bundles(tmp_path)
    assert not found
    assert "Permission denied" in str(damaged[tmp_path])


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (MANIFEST, b"{", "not valid JSON"),
        (MANIFEST, b'{"name": "first"}', "missing"),
        (WEIGHTS, b"half a copy", "incomplete"),
        (WEIGHTS, None, "copy the whole folder"),
    ],
)
def test_a_damaged_detector_is_told_apart_with_the_reason(folder, file, content, reason):
    path = folder / "first" / file
    path.unlink() if content is None else path.write_bytes(content)
    found, damaged = list_bundles(folder)
    assert [bundle.name for bundle in found] == ["second"]
    assert reason in str(damaged[folder / "first"])


def test_weights_are_not_read(folder):
    """Same length, other content: only loading the detector notices."""
    path = folder / "first" / WEIGHTS
    path.write_bytes(bytes(path.stat().st_size))
    assert BundleSummary.read(folder / "first").name == "first"


def test_listing_loads_no_torch(folder):
    program = (
        "import sys; from pathlib import Path; from MedAnomalyCLIPLib.bundle_list import list_bundles\n"
        f"print(len(list_bundles(Path({str(folder)!r}))[0]), 'torch' in sys.modules)"
    )
    library = Path(__file__).parents[2] / "MedAnomalyCLIP"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=library, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["2", "False"]


def test_a_folder_without_manifest_is_refused_in_words(tmp_path):
    with pytest.raises(BundleInvalid, match="choose the folder of a detector"):
        BundleSummary.read(tmp_path)


def test_a_card_that_is_missing_or_no_text_is_read_all_the_same(tiny_bundle):
    card = tiny_bundle.folder / CARD
    card.write_bytes(b"# a \xff card")
    assert read_card(tiny_bundle.folder) == "# a \ufffd card"
    card.unlink()
    assert read_card(tiny_bundle.folder) == ""
