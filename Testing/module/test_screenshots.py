"""The pictures of the README are rendered by one command, and show what they are said to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PICTURES = ("screenshot.png", "running.png", "outputs.png", "teach.png", "setup.png")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory, slicer_application):
    """The folder of pictures, made in a process of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    command = [sys.executable, ROOT / "Testing" / "screenshots.py", folder, "--stand-in"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_every_picture_of_the_panel_is_rendered_and_in_the_readme(rendered):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(PICTURES) <= set(re.findall(r"\]\(Resources/(\w+\.png)\)", readme))
    for name in PICTURES:
        new, shipped = pixels(rendered / name), pixels(ROOT / "Resources" / name)
        assert len(np.unique(new.reshape(-1, 3), axis=0)) > 50
        assert abs(new.shape[1] - shipped.shape[1]) <= 40, (
            "the shipped one is of another panel; render it anew"
        )


def test_heat_lies_on_the_spot_and_nowhere_else_in_the_slice(rendered):
    picture = pixels(rendered / "slice.png")
    heat = (picture[..., 0] - picture[..., 2] > 60) & (np.arange(640) < 540)  # the legend is further right
    rows, columns = np.nonzero(heat)
    assert len(rows) > 1000
    assert np.ptp(rows) < 200 and np.ptp(columns) < 200


def test_a_run_on_its_way_is_seen_as_such(rendered):
    """Two panels side by side: a bar in the right one alone."""
    picture = pixels(rendered / "running.png")
    blue = (picture[..., 2] - picture[..., 0] > 100).sum(axis=0) > 5
    half = picture.shape[1] // 2
    assert not blue[:half].any()
    assert blue[half:].sum() > 50
