"""What `benchmarks/speed.py` makes of its figures: tables, goals and a picture."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import speed
from benchmarks.speed_plot import main as draw

ONE, OTHER, WINCLIP = "bundled detector, int8", "ours on ViT-B/16+, int8", "WinCLIP"


@pytest.fixture
def figures():
    """As of a machine on which everything takes as many milliseconds as is easy to reckon with."""
    times = {ONE: 20.0, OTHER: 50.0, WINCLIP: 4000.0}
    peers = {
        name: {
            "ms": taken,
            "ratios": {
                other: {
                    "median": taken / than,
                    "low": taken / than - 1,
                    "high": taken / than + 1,
                    "rounds": 3,
                }
                for other, than in times.items()
                if other != name
            },
        }
        for name, taken in times.items()
    }
    slices = {n: {"seconds": 0.01 * n, "peak MiB": 300.0, "growth MiB": 40.0} for n in speed.SLICES}
    steps = {"plane": 5.0, "detect": 20.0, "scene": 15.0, "click to overlay": 40.0, "drawn": 9.0}
    return {
        "machine": {"processor": "a processor", "threads": 2},
        "peers": peers,
        "slices": {"int8": slices},
        "sides": {"int8": {side: side / 10 for side in speed.SIDES}},
        "stages": {"int8": {"read": 0.1, "detect": 20.0}},
        "loading": {"int8": {"imports": 0.4, "ready": 0.25, "first": 0.03, "second": 0.02}},
        "scene": {"int8": {"60 slices": steps}},
        "module import": 0.0725,
    }


def test_goals_are_held_against_what_was_found(figures):
    found = dict(speed.goals(figures))
    assert found["500 slices in 8 s"] == "5.0 s"
    assert found["100 times as fast as WinCLIP: bundled detector, int8"] == "200 (199 to 201)"
    assert found["60 times as fast as WinCLIP: ours on ViT-B/16+, int8"] == "80 (79 to 81)"
    assert found["click to overlay in 100 ms, 60 slices"] == "40 ms"
    assert found["ready 1 s after the imports"] == "0.25 s"
    assert not [goal for goal in found if goal.startswith("15 times")], "that was not measured"


def test_tables_tell_all_figures(figures):
    told = speed.words(figures)
    assert re.search(r"^\| WinCLIP \| 4000\.0 \| 200\.00 \(199\.00 to 201\.00\) \|$", told, re.MULTILINE)
    assert "module import: 0.072 s" in told or "module import: 0.073 s" in told
    assert "click to overlay 40.00" in told


def test_the_picture_shows_every_contender_and_is_the_same_each_time(figures, tmp_path):
    source = tmp_path / "speed.json"
    source.write_text(json.dumps(figures))
    for name in ("one.svg", "two.svg"):
        draw(str(source), str(tmp_path / name))
    text = (tmp_path / "one.svg").read_text()
    ElementTree.fromstring(text)
    assert all(name in text for name in (ONE, OTHER, WINCLIP))
    assert text == (tmp_path / "two.svg").read_text()
    assert len(text) < 200_000
