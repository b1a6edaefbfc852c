"""Fetched model files: where they are, how much they take, and that deleting them takes nothing else."""

from __future__ import annotations

import pytest

from MedAnomalyCLIPLib.downloads import PLACE, delete_downloads, downloaded_bytes, downloads_folder
from MedAnomalyCLIPLib.errors import OutputFailed


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(PLACE, str(tmp_path))
    return tmp_path


def test_nothing_fetched_takes_no_room_and_makes_no_folder(place):
    assert downloaded_bytes() == 0
    assert delete_downloads() == 0
    assert list(place.iterdir()) == []


def test_deleting_takes_our_files_and_no_neighbours(place):
    blobs = downloads_folder() / "models--somebody" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"x" * 1000)
    (downloads_folder() / "ViT-L-14.pt").write_bytes(b"y" * 500)
    (place / "theirs.pt").write_bytes(b"z")
    assert downloaded_bytes() == 1500
    assert delete_downloads() == 1500
    assert [p.name for p in place.iterdir()] == ["theirs.pt"]
    assert downloaded_bytes() == 0


def test_links_into_the_cache_count_once_and_links_out_of_it_are_not_followed(place):
    """Hugging Face's cache has its files twice: as blobs, and as links from snapshots."""
    folder = downloads_folder()
    folder.mkdir()
    (folder / "blob").write_bytes(b"x" * 1000)
    (folder / "snapshot").symlink_to(folder / "blob")
    theirs = place / "theirs"
    theirs.mkdir()
    (theirs / "file").write_bytes(b"z" * 10)
    (folder / "out").symlink_to(theirs)
    assert downloaded_bytes() == 1000
    delete_downloads()
    assert (theirs / "file").exists()


def test_a_folder_that_is_a_link_is_left_alone(place):
    theirs = place / "theirs"
    theirs.mkdir()
    downloads_folder().symlink_to(theirs)
    with pytest.raises(OutputFailed, match="is a link"):
        delete_downloads()
    assert theirs.is_dir()


def test_the_folder_is_ours_alone_wherever_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(PLACE, raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    assert downloads_folder() == tmp_path / ".cache" / "medanomalyclip-models"
