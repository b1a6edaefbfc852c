"""Several readers behind one address: each has a process, and a study, of their own."""

from __future__ import annotations

import numpy as np
import pytest

from web.browsing import write_volume


@pytest.fixture
def other_file(tmp_path):
    return write_volume(tmp_path / "other.nii.gz", np.full((5, 30, 40), 70, np.int16))


def test_two_browsers_do_not_see_each_others_study(start_server, open_page, head_file, other_file):
    server = start_server("--readers", 2)
    one, two = open_page(server.address), open_page(server.address)
    one.upload(head_file)
    one.wait_for_study("72 × 80 × 12")
    one.click("detect-button")
    one.wait_for_text("score-words", "Score")
    assert "Open a file" in two.text("volume-words")
    two.upload(other_file)
    two.wait_for_study("40 × 30 × 5")
    assert two.text("score-words") == ""
    for reader, words in ((one, "72 × 80 × 12"), (two, "40 × 30 × 5")):
        reader.page.reload()
        reader.wait_for_study(words)
