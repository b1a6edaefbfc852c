"""Measure speed: against peers, stage by stage, against the number of slices, and against their size.

    python Testing/benchmarks/speed.py            # ours, and open_clip alone
    python Testing/benchmarks/speed.py --peers    # beside WinCLIP, PatchCore, AnomalyDINO (of anomalib)
    python Testing/benchmarks/speed.py --large    # ViT-L/14 at 336 px too

Everything is interleaved in one run (`pairs.py`): trust the ratios, not the times. All weights but those of
the bundled detector are random. Writes `speed.json`, and tables as text to the screen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

TESTING = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTING), str(TESTING.parent / "MedAnomalyCLIP")]

from benchmarks import ours, peers  # noqa: E402
from benchmarks.pairs import Contender, interleaved, milliseconds, ratio  # noqa: E402
from MedAnomalyCLIPLib.detection import SliceDetector, detect_slices  # noqa: E402
from MedAnomalyCLIPLib.geometry import cut_slice  # noqa: E402

SLICES = (1, 10, 100, 500)
SIDES = (128, 256, 512, 1024, 2048)
B16_PLUS = ("ViT-B-16-plus-240", 240, (3, 6, 9, 12))
L14 = ("ViT-L-14-336", 336, (6, 12, 18, 24))
US = "bundled detector"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed.")
    add = parser.add_argument
    add("--rounds", type=int, default=40)
    add("--peers", action="store_true", help="anomalib's detectors too; pip install anomalib")
    add("--large", action="store_true", help="ViT-L/14 at 336 px too, seconds per image")
    add("--runtimes", nargs="+", default=["torch", "onnx"])
    add("--output", type=Path, default=Path("speed.json"))
    arguments = parser.parse_args()
    images = phantoms(4, 256)
    with tempfile.TemporaryDirectory() as folder:
        contenders = all_contenders(Path(folder), arguments)
        figures: dict[str, Any] = {"machine": machine()}
        bar = tqdm(total=arguments.rounds, desc="rounds")
        times = interleaved(contenders, images, arguments.rounds, on_round=lambda *_: bar.update())
        bar.close()
    figures["peers"] = {
        contender.name: {
            "ms": milliseconds(times, contender.name),
            "ratios": {
                other.name: vars(ratio(times, contender.name, other.name))
                for other in contenders
                if other is not contender
            },
        }
        for contender in contenders
    }
    figures["stages"] = {runtime: stages(runtime, arguments.rounds) for runtime in arguments.runtimes}
    figures["slices"] = {runtime: against_slices(runtime) for runtime in arguments.runtimes}
    figures["sides"] = {runtime: against_side(runtime) for runtime in arguments.runtimes}
    arguments.output.write_text(json.dumps(figures, indent=1))
    print(words(figures))


def machine() -> dict[str, Any]:
    """What it ran on."""
    found = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {**found, "processor": platform.processor() or platform.machine(), "load": os.getloadavg()[0]}


def phantoms(count: int, side: int) -> np.ndarray:
    """(count, S, S) uint16 ellipses with noise, sharp and full of detail enough for any reader of pixels."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    head = (x**2 + (1.2 * y) ** 2 < 0.8).astype(float)
    slices = [
        head * (900 + 300 * np.sin(7 * x + i) * np.cos(5 * y)) + random.normal(60, 20, (side, side))
        for i in range(count)
    ]
    return np.clip(slices, 0, 4000).astype(np.uint16)


def all_contenders(folder: Path, arguments: argparse.Namespace) -> list[Contender]:
    """Ours, and what it is compared with; what takes seconds runs in every fifth round."""
    found = []
    for runtime in arguments.runtimes:
        detector = SliceDetector.load(device="cpu", runtime=runtime)
        found.append(Contender(f"{US}, {runtime}", ours.detecting(detector)))
        if runtime == "torch":
            found.append(Contender("its tower alone, torch", ours.tower_alone(detector)))
    found += backbone(folder / "b16", "ViT-B/16+", B16_PLUS, arguments.runtimes, every=2)
    if arguments.large:
        found += backbone(folder / "l14", "ViT-L/14", L14, arguments.runtimes, every=5)
    if arguments.peers:
        found.append(Contender("WinCLIP", peers.winclip(), every=5))
        found.append(Contender("PatchCore, 1,000 rows", peers.patchcore(1000)))
        found.append(Contender("AnomalyDINO, 4,000 rows", peers.anomaly_dino(4000)))
    return found


def backbone(
    folder: Path, name: str, tower: tuple[str, int, tuple[int, ...]], runtimes: Sequence[str], *, every: int
) -> list[Contender]:
    """A detector of ours on an open_clip tower, and open_clip alone on the same."""
    make = ours.random_detector(folder, *tower)
    if "onnx" in runtimes:
        from MedAnomalyCLIPLib.onnx_export import export_network

        export_network(folder)
    found = [
        Contender(f"ours on {name}, {runtime}", ours.detecting(make(runtime)), every) for runtime in runtimes
    ]
    return [*found, Contender(f"open_clip {name}", peers.plain_open_clip(*tower[:2]), every)]


def stages(runtime: str, rounds: int) -> dict[str, float]:
    """Milliseconds of each stage of one slice, medians."""
    detector = SliceDetector.load(device="cpu", runtime=runtime)
    volume = ours.volume_of(phantoms(rounds, 256))
    found: dict[str, list[float]] = {}
    for index in range(rounds):
        started = time.perf_counter()
        plane = cut_slice(volume, 2, index)
        cut = time.perf_counter()
        result = detector.detect(plane)
        whole = time.perf_counter()
        taken = {"plane": cut - started, **result.timings, "detect": whole - cut}
        for name, seconds in taken.items():
            found.setdefault(name, []).append(1000 * seconds)
    return {name: float(np.median(values[3:])) for name, values in found.items()}


def against_slices(runtime: str) -> dict[int, dict[str, float]]:
    """Seconds and peak memory of volumes of a number of slices, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for count in SLICES:
        with context.Pool(1) as pool:
            found[count] = pool.apply(volume_run, (runtime, count))
    return found


def volume_run(runtime: str, count: int) -> dict[str, float]:
    """Detect on all slices of one volume."""
    detector = SliceDetector.load(device="cpu", runtime=runtime)
    detector.detect(ours.plane_of(phantoms(1, 256)[0]))
    volume = ours.volume_of(phantoms(count, 256))
    before = peak_memory()
    started = time.perf_counter()
    for _result in detect_slices(detector, volume, axis=2):
        pass
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak MiB": peak_memory(), "growth MiB": peak_memory() - before}


def peak_memory() -> float:
    """MiB that this process had in memory at most; what the resource module tells is inherited on Linux."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def against_side(runtime: str) -> dict[int, float]:
    """Milliseconds of one slice of a size."""
    detector = SliceDetector.load(device="cpu", runtime=runtime)
    works = [Contender(str(side), _on(detector, side)) for side in SIDES]
    times = interleaved(works, phantoms(1, 8), 15)
    return {side: milliseconds(times, str(side)) for side in SIDES}


def _on(detector: SliceDetector, side: int) -> ours.Work:
    plane = ours.plane_of(phantoms(1, side)[0])
    return lambda _image: detector.detect(plane)


def words(figures: dict[str, Any]) -> str:
    """The figures as tables in Markdown."""
    reference = next(iter(figures["peers"]))
    lines = [
        f"{figures['machine']}",
        "",
        f"| | ms | times {reference} (10th to 90th percentile) |",
        "|---|---|---|",
    ]
    for name, found in figures["peers"].items():
        times = found["ratios"].get(reference)
        told = "1" if times is None else f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})"
        lines.append(f"| {name} | {found['ms']:.1f} | {told} |")
    for title, unit in (("stages", "ms"), ("slices", ""), ("sides", "ms")):
        lines += ["", f"{title} {unit}".strip() + ":"]
        for runtime, found in figures[title].items():
            lines.append(
                f"  {runtime}: " + ", ".join(f"{key} {_short(value)}" for key, value in found.items())
            )
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {number:.2f}" for name, number in value.items()) + ")"
    return f"{value:.1f}"


if __name__ == "__main__":
    main()
