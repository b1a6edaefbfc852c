"""`medanomalyclip web` where it cannot start, and what is kept of files that a browser sends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from MedAnomalyCLIPLib.cli import EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.errors import InvalidRequest, UnreadableImage


@pytest.fixture
def uploads():
    from MedAnomalyCLIPLib.web.study import Uploads

    uploads = Uploads()
    yield uploads
    uploads.close()


@pytest.mark.parametrize("options", [[], ["--readers", "2"]])
def test_without_trame_slicer_it_says_what_to_install(options, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trame_slicer", None)
    assert main(["web", *options]) == EXIT_USER_ERROR
    assert "pip install 'medanomalyclip[web]'" in capsys.readouterr().err


def test_a_study_that_is_not_there_is_told_before_anything_starts(tmp_path, capsys):
    assert main(["web", str(tmp_path / "nothing")]) == EXIT_USER_ERROR
    assert "nothing does not exist" in capsys.readouterr().err


def test_a_folder_of_detectors_that_is_not_there_is_told(tmp_path, capsys):
    assert main(["web", "--detectors", str(tmp_path / "nothing")]) == EXIT_USER_ERROR
    assert "nothing is no folder of detectors" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--readers", "0"], ["--port", "some"]])
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(SystemExit) as stopped:
        main(["web", *options])
    assert stopped.value.code == EXIT_USER_ERROR


def test_serving_others_unencrypted_is_warned_of(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trame_slicer", None)
    main(["web", "--host", "0.0.0.0"])
    assert "unencrypted" in capsys.readouterr().err


def test_one_file_is_a_file_and_several_are_a_folder(uploads):
    uploads.begin(1)
    uploads.add({"name": "head.nii.gz", "content": b"one"})
    assert uploads.path.read_bytes() == b"one" and uploads.path.name.endswith(".nii.gz")
    uploads.begin(2)
    for part in (b"a", [b"b", b"c"]):
        uploads.add({"name": "IM0001", "content": part})
    assert sorted(path.read_bytes() for path in uploads.path.iterdir()) == [b"a", b"bc"]


@pytest.mark.parametrize("name", ["../../outside.dcm", "/tmp/outside.dcm", "Zebrowski^Ada.dcm", ".."])
def test_names_from_a_browser_are_not_used(uploads, name):
    uploads.begin(1)
    uploads.add({"name": name, "content": b"x"})
    kept = uploads.path.relative_to(Path(uploads.path).parent)
    assert kept.name in ("image_0.dcm", "image_0")
    assert uploads.path.parent.name.startswith("medanomalyclip-")


def test_the_last_study_goes_when_the_next_comes(uploads):
    uploads.begin(1)
    uploads.add({"name": "a", "content": b"x"})
    before = uploads.path
    uploads.begin(1)
    assert not before.exists()
    with pytest.raises(InvalidRequest):
        _ = uploads.path


def test_what_the_browser_cannot_read_or_is_no_study_is_refused(uploads, monkeypatch):
    uploads.begin(1)
    with pytest.raises(UnreadableImage):
        uploads.add({"name": "a", "error": "gone"})
    monkeypatch.setenv("MEDANOMALYCLIP_LIMITS", "folder_files=3")
    with pytest.raises(InvalidRequest, match="4 files"):
        uploads.begin(4)


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("reading-room", "http://reading-room:80"),
    ],
)
def test_the_address_is_one_that_a_browser_here_can_open(host, shown):
    from MedAnomalyCLIPLib.web.entrance import address

    assert address(host, 80) == shown
