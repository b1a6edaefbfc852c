"""From a click to the overlay in the scene, on Slicer's own libraries: what each step of it takes.

Nothing is clicked: `MedAnomalyCLIPLogic` is called as the panel does it. Drawing the view is software
rendering of an offscreen window here, and the graphics card's work in Slicer.

    python -m benchmarks.scene int8 20     # milliseconds as JSON, medians over 20 slices
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .ways import load

MODULE = Path(__file__).parents[2] / "MedAnomalyCLIP" / "MedAnomalyCLIP.py"
VOLUMES = {"60 slices of 256 x 256": (60, 256, 256), "100 slices of 512 x 512": (100, 512, 512)}


def scene_run(way: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each step, medians over slices of each of the VOLUMES.

    Steps: plane (cut in the view), detect (preprocessing, network, map back), scene (map node, overlay and
    segment), click to overlay (all of these), drawn (the view with them).
    """
    from harness import application
    from harness.scripted_module import HostedModule
    from harness.slice_views import slice_views

    application.start()
    hosted = HostedModule(MODULE)
    return {
        name: _volume(hosted, slice_views()["Red"], shape, way, rounds) for name, shape in VOLUMES.items()
    }


def _volume(hosted: Any, view: Any, shape: tuple[int, int, int], way: str, rounds: int) -> dict[str, float]:
    import slicer

    from harness import phantom

    slicer.mrmlScene.Clear(False)
    view.reset()
    view.open_window()
    voxels, _ = phantom.head(shape)
    matrix = phantom.axial_matrix(shape, (0.9, 0.9, 3.0))
    node = phantom.add_volume(voxels, matrix, "Head")
    view.show(node)
    logic = hosted.code.MedAnomalyCLIPLogic()
    logic.detectorFactory = lambda folder: load(way)
    taken: list[dict[str, float]] = []
    indices = np.linspace(shape[0] // 4, 3 * shape[0] // 4, rounds + 2).round().astype(int)
    for index in indices:
        view.node.JumpSlice(*(matrix @ [shape[2] / 2, shape[1] / 2, index, 1])[:3])
        view.layers()
        taken.append(_detection(logic, node, view))
    logic.close()
    slicer.mrmlScene.Clear(False)
    counted = taken[2:]  # the first loads the detector and makes the nodes
    return {step: statistics.median(1000 * one[step] for one in counted) for step in counted[0]}


def _detection(logic: Any, node: Any, view: Any) -> dict[str, float]:
    """Seconds of each step of one detection, all marked, so that there is a segment to be written."""
    clicked = time.perf_counter()
    run = logic._start(node, view.name, None, 0.5, threshold=0.3)
    asked = time.perf_counter()
    run.future.result()
    found = time.perf_counter()
    logic._deliver(run)
    written = time.perf_counter()
    view.picture()
    return {
        "plane": asked - clicked,
        "detect": found - asked,
        "scene": written - found,
        "click to overlay": written - clicked,
        "drawn": time.perf_counter() - written,
    }


if __name__ == "__main__":
    print(json.dumps(scene_run(sys.argv[1], int(sys.argv[2]))))
