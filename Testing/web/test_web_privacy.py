"""Who gets in, and what is told of a patient."""

from __future__ import annotations

import re
import socket
import sys
import urllib.error
import urllib.request
import zipfile

import pydicom
import pytest
from pydicom.data import get_testdata_file

from web.browsing import WAIT_MS

PATIENT = "Zebrowski"


@pytest.fixture
def dicom_file(tmp_path):
    """A slice of a made-up patient, whose name is in the header and in the file's name."""
    dataset = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    dataset.PatientName, dataset.PatientID = f"{PATIENT}^Ada", f"{PATIENT}-1"
    dataset.SeriesDescription = f"Follow-up {PATIENT}"
    dataset.save_as(tmp_path / f"{PATIENT}.dcm")
    return tmp_path / f"{PATIENT}.dcm"


def status(address: str) -> int:
    try:
        with urllib.request.urlopen(address) as answer:  # follows redirections
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_without_the_token_there_is_no_page(server):
    assert status(server.place) == 403
    assert status(f"{server.place}index.html?secret=wslink-secret") == 403
    assert status(server.address) == 200


def test_the_page_may_only_talk_to_its_own_server(server):
    token = server.address.split("?")[1]
    with urllib.request.urlopen(f"{server.place}index.html?{token}") as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    assert set(re.findall(r"wss?://(\S+)", policy)) == {server.place.split("/")[2]}
    assert answer.headers["Set-Cookie"].count("HttpOnly") == answer.headers["Set-Cookie"].count("Strict") == 1


def test_without_the_token_the_socket_tells_nothing(server, browser):
    """The page itself is no secret. With trame's own secret, which everybody knows, it stays empty."""
    known = f"{server.place}index.html?{server.address.split('?')[1]}"
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    page.route("**/index.html*", lambda route: route.continue_(url=known))
    frames: list[bytes] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(frame)))
    page.goto(known)
    page.locator(".detect-button").wait_for()
    assert b"volume_words" in b"".join(frames)
    page.goto("about:blank")
    frames.clear()
    page.goto(f"{server.place}index.html?secret=wslink-secret")
    page.wait_for_timeout(4000)
    assert frames  # it was told no
    assert b"volume_words" not in b"".join(frames)
    assert page.locator(".detect-button").count() == 0
    page.close()


# Linux takes the whole of 127.0.0.0/8 for its own: a second address even where there is no network.
@pytest.mark.skipif(sys.platform != "linux", reason="this system has no second address of its own")
def test_other_addresses_are_answered_only_when_the_user_says_so_and_with_the_token(server, start_server):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=3).close()
    known = start_server("--host", "0.0.0.0")
    place = f"http://127.0.0.2:{known.port}/"
    assert status(place) == 403
    assert status(place + known.address.removeprefix(known.place)) == 200


def test_no_patient_on_the_page_in_the_log_or_in_the_results(start_server, open_page, dicom_file, tmp_path):
    server = start_server()
    reader = open_page(server.address)
    reader.upload(dicom_file)
    reader.wait_for_study("MR, 64 × 64 × 1 voxels")
    reader.click("range-button")
    reader.page.locator("[data-slice]").first.wait_for()
    with reader.page.expect_download() as download:
        reader.click("export-button")
    download.value.save_as(tmp_path / "results.zip")
    shown = [reader.page.title(), reader.page.url, reader.page.content(), download.value.suggested_filename]
    state = reader.page.evaluate("JSON.stringify(window.trame.state.state)")
    server.stop()
    archive = zipfile.ZipFile(tmp_path / "results.zip")
    names = [archive.filename, *archive.namelist()]
    texts = [archive.read(name).decode("latin-1") for name in archive.namelist()]
    for text in (*shown, *reader.requests, state, server.told(), *names[1:], *texts):
        assert PATIENT.lower() not in text.lower()
