"""Measure how long Slicer's main thread is held while the panel works on a volume.

    python Testing/benchmarks/main_thread.py
    python Testing/benchmarks/main_thread.py --slices 200 --side 512 --json figures.json

The real panel on Slicer's own libraries, with the bundled detector on its worker, which loads it as soon as
the panel is shown, goes through a made-up head: one slice, all slices until Cancel after a third of them, the
rest, another threshold, saving as .mrb, closing, reading, another threshold. A turn is what the main thread
does between two looks at its events: a click, a timer's step, an observer's work. It counts with all that it
waits for: other programs on a busy machine, a worker that holds Python's lock, Python's collector of garbage,
whose full runs are told apart. Beside it stand its own processor time, and the time that Slicer's slice views
then need to follow. Saving and reading are Slicer's own and told apart. Ends with 1 unless the scene holds
what the library says of the same slices.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import slicer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "Testing"), str(ROOT / "MedAnomalyCLIP")]

from harness import phantom  # noqa: E402
from harness.application import load_bundle, save_bundle, start  # noqa: E402
from harness.pythonqt import application  # noqa: E402
from harness.scripted_module import HostedModule  # noqa: E402
from harness.slice_views import slice_views  # noqa: E402

PAUSE = 0.001  # seconds between two looks at the events
NOTHING = 0.0005  # a shorter turn had nothing to do
LIMIT = 0.05
ACROSS_BATCHES = 2e-5  # as unit/test_reproducible.py


@dataclass
class Turns:
    """What the main thread did in one part of the scenario: seconds of each turn."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    drawing: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Milliseconds, and how many turns there were and were too long."""

        def at(values: list[float], share: float) -> float:
            return round(1000 * float(np.quantile(values, share)), 1) if values else 0.0

        return {
            "turns": len(self.wall),
            "median": at(self.wall, 0.5),
            "p99": at(self.wall, 0.99),
            "max": at(self.wall, 1),
            "over_limit": sum(seconds > LIMIT for seconds in self.wall),
            "processor_max": at(self.processor, 1),
            "drawing_max": at(self.drawing, 1),
        }


class Collections:
    """Times Python's full collections of garbage, which stop all threads, whoever left it behind."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        gc.collect()  # of what starting left behind
        gc.callbacks.append(self._told)

    def _told(self, phase: str, about: dict[str, int]) -> None:
        if phase == "start":
            self._begun = time.perf_counter()
        elif about["generation"] == 2:
            self.milliseconds.append(round(1000 * (time.perf_counter() - self._begun), 1))


class Clock:
    """Drives the panel's event loop, and keeps the time of each turn by part of the scenario."""

    def __init__(self) -> None:
        self.parts: dict[str, Turns] = {}
        self._part = Turns()

    def begin(self, part: str) -> None:
        self._part = self.parts[part] = Turns()

    def do(self, work: Callable[[], object], *, pause: float = 0.0) -> None:
        """One turn: some work, and the wait for Python's lock after a pause."""
        begun, processor = time.perf_counter(), time.thread_time()
        work()
        if pause:
            time.sleep(pause)
        seconds = time.perf_counter() - begun - pause
        if seconds > NOTHING:
            self._part.wall.append(seconds)
            self._part.processor.append(time.thread_time() - processor)
            self._draw()

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.do(application.processEvents, pause=PAUSE)

    def _draw(self) -> None:
        """Slicer's own pipelines of the slice views, as the next frame would need them."""
        begun = time.perf_counter()
        for view in slice_views().values():
            view.layers()
        self._part.drawing.append(time.perf_counter() - begun)


def main() -> int:
    arguments = parse_arguments()
    start()
    voxels, _spot = phantom.head((arguments.slices, arguments.side, arguments.side))
    spacing = (230 / arguments.side, 230 / arguments.side, 150 / arguments.slices)
    node = phantom.add_volume(voxels, phantom.axial_matrix(voxels.shape, spacing), "Head")
    for view in slice_views().values():
        view.show(node)
    panel = HostedModule(ROOT / "MedAnomalyCLIP" / "MedAnomalyCLIP.py").make_panel()
    panel.ui.inputSelector.setCurrentNode(node)
    clock, told = Clock(), {}
    collections = Collections()
    problems = scenario(panel, clock, arguments, told)
    panel.cleanup()
    report = {
        "slices": arguments.slices,
        "side": arguments.side,
        "milliseconds": {part: turns.figures() for part, turns in clock.parts.items()},
        "full collections of garbage": collections.milliseconds,
        "seconds": told,
        "problems": problems,
    }
    tell(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=60, help="of the volume")
    parser.add_argument("--side", type=int, default=512, help="of each slice, in pixels")
    parser.add_argument("--threshold", type=float, default=0.3, help="low, so that segments are written too")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def scenario(panel: Any, clock: Clock, arguments: argparse.Namespace, told: dict[str, float]) -> list[str]:
    """Go through it; what is in the scene that should not be, or is not."""
    ui, problems = panel.ui, []
    stop_at = arguments.slices // 3

    def check(holds: bool, words: str) -> None:
        if not holds:
            problems.append(words)

    clock.begin("panel shown: packages, loading")
    clock.until(lambda: panel.logic._worker is not None)
    loaded = panel.logic._worker.call(lambda: None)
    clock.until(loaded.done)
    clock.begin("first slice")
    clock.do(ui.detectButton.click)
    clock.until(lambda: not panel.logic.isRunning())
    expected = library_map(ui.inputSelector.currentNode())
    from MedAnomalyCLIPLib.stored_map import NOT_ANALYSED

    clock.begin("detect, cancel")
    ui.thresholdSlider.value = arguments.threshold
    begun = time.perf_counter()
    clock.do(ui.rangeButton.click)
    clock.until(lambda: ui.rangeProgress.value >= stop_at)
    clock.do(ui.rangeButton.click)
    stored = slicer.util.arrayFromVolume(results(panel).mapNode)
    check(len(results(panel).rows) == stop_at, f"Cancel left {len(results(panel).rows)} slices")
    check(bool((stored[stop_at:] == NOT_ANALYSED).all()), "slices after Cancel are not marked")

    clock.begin("resume")
    ui.rangeResumeCheckBox.checked = True
    clock.do(ui.rangeButton.click)
    clock.until(lambda: not panel.logic.isRunning())
    told["detection"] = time.perf_counter() - begun
    problems += difference(panel, expected, arguments.threshold)
    clock.begin("threshold, reset")
    clock.do(ui.ownThresholdButton.click)
    clock.until(lambda: not panel._pollTimer.active)
    follow_threshold(panel, clock, arguments.threshold + 0.05)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.mrb"
        told["saving"] = seconds_of(lambda: save_bundle(path))
        clock.begin("close, read again")
        clock.do(lambda: slicer.mrmlScene.Clear(False))
        told["reading"] = seconds_of(lambda: load_bundle(path))
    clock.do(panel.enter)
    for view in slice_views().values():
        view.show(slicer.util.getNode("Head"))
    clock.do(lambda: panel.logic.showVolumeMap(results(panel).mapNode))
    clock.until(lambda: not panel.logic.poll())
    check(ui.resultsTable.model().rowCount() == arguments.slices, "the table was not read again")
    problems += difference(panel, expected, arguments.threshold + 0.05)
    clock.begin("threshold, read again")
    follow_threshold(panel, clock, arguments.threshold)
    problems += difference(panel, expected, arguments.threshold)
    return problems


def follow_threshold(panel: Any, clock: Clock, threshold: float) -> None:
    def move() -> None:
        panel.ui.thresholdSlider.value = threshold

    clock.do(move)
    clock.until(lambda: not panel._pollTimer.active)


def results(panel: Any) -> Any:
    """scene_run.VolumeDetection of the chosen volume."""
    return panel.logic.volumeDetection(panel.ui.inputSelector.currentNode())


def library_map(node: Any) -> np.ndarray:
    """(K, H, W) float32 maps of all slices, without scene and worker; voxel axes of the made-up head."""
    # Not at the top: what the panel imports with its first slice is measured.
    from MedAnomalyCLIPLib.bundle import default_bundle_path, read_manifest
    from MedAnomalyCLIPLib.detection import SliceDetector, detect_slices
    from MedAnomalyCLIPLib.panel_prompt import chosen_prompt
    from MedAnomalyCLIPLib.scene import volume_from_node, words_of

    volume = volume_from_node(node)
    manifest = read_manifest(default_bundle_path())
    prompt = chosen_prompt(manifest, "auto", *words_of(node))
    found = detect_slices(SliceDetector.load(), volume, axis=2, prompt=prompt)
    return np.stack([result.map for result in found])


def difference(panel: Any, expected: np.ndarray, threshold: float) -> list[str]:
    """Where map and segment in the scene are not those of the library."""
    detection, problems = results(panel), []
    stored = slicer.util.arrayFromVolume(detection.mapNode)
    away = float(np.abs(stored - expected).max())
    if away > ACROSS_BATCHES:
        problems.append(f"the map differs by {away:.2g} from the library's")
    source = detection.volumeMap.source
    mask = slicer.util.arrayFromSegmentBinaryLabelmap(
        detection.segmentationNode, detection.volumeMap.segment_id, source
    )
    if not np.array_equal(mask.astype(bool), stored >= np.float32(detection.volumeMap.threshold)):
        problems.append("the segment is not what reaches the threshold")
    if abs(detection.volumeMap.threshold - threshold) > 1e-6:
        problems.append(f"the threshold is {detection.volumeMap.threshold:g}, not {threshold:g}")
    return problems


def seconds_of(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def tell(report: dict[str, Any]) -> None:
    print(
        f"{report['slices']} slices of {report['side']} x {report['side']}; milliseconds of the main thread"
    )
    names = ("turns", "median", "p99", "max", "over_limit", "processor_max", "drawing_max")
    print(f"{'':32}", *(f"{name:>13}" for name in names))
    for part, figures in report["milliseconds"].items():
        print(f"{part:32}", *(f"{figures[name]:>13}" for name in names))
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["seconds"].items()))
    print("full collections of garbage, ms:", *(report["full collections of garbage"] or ["none"]))
    for words in report["problems"]:
        print("WRONG:", words)


if __name__ == "__main__":
    sys.exit(main())
