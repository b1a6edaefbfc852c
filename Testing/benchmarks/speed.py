"""Measure speed: against peers, stage by stage, against the number of slices, and against their size.

    python Testing/benchmarks/speed.py            # ours, and open_clip alone
    python Testing/benchmarks/speed.py --peers    # beside WinCLIP, PatchCore, AnomalyDINO (of anomalib)
    python Testing/benchmarks/speed.py --large    # ViT-L/14 at 336 px too
    python Testing/benchmarks/speed_plot.py speed.json Testing/benchmarks/speed.svg

Everything is interleaved in one run (`pairs.py`): trust the ratios, not the times. All weights but those of
the bundled detector are random. Writes `speed.json`, and tables as text to the screen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
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
from benchmarks.ways import WAYS, load  # noqa: E402
from MedAnomalyCLIPLib.detection import SliceDetector, detect_slices  # noqa: E402
from MedAnomalyCLIPLib.geometry import cut_slice  # noqa: E402
from MedAnomalyCLIPLib.volume import read_volume  # noqa: E402

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
    add("--ways", nargs="+", choices=list(WAYS), default=["int8", "onnx", "torch"], help="how ours are run")
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
    for name, measure in (("slices", against_slices), ("sides", against_side), ("loading", loading)):
        figures[name] = {way: measure(way) for way in arguments.ways}
    for name, measure in (("stages", stages), ("scene", in_the_scene)):
        figures[name] = {way: measure(way, arguments.rounds) for way in arguments.ways}
    figures["module import"] = by_itself("loading")["module import"]
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
    for way in arguments.ways:
        detector = load(way)
        found.append(Contender(f"{US}, {way}", ours.detecting(detector)))
        if way == "torch":
            found.append(Contender("its tower alone, torch", ours.tower_alone(detector)))
    found += backbone(folder / "b16", "ViT-B/16+", B16_PLUS, arguments.ways, every=2)
    if arguments.large:
        found += backbone(folder / "l14", "ViT-L/14", L14, arguments.ways, every=5)
    if arguments.peers:
        found.append(Contender("WinCLIP", peers.winclip(), every=5))
        found.append(Contender("PatchCore, 1,000 rows", peers.patchcore(1000)))
        found.append(Contender("AnomalyDINO, 4,000 rows", peers.anomaly_dino(4000)))
    return found


def backbone(
    folder: Path, name: str, tower: tuple[str, int, tuple[int, ...]], ways: Sequence[str], *, every: int
) -> list[Contender]:
    """A detector of ours on an open_clip tower, and open_clip alone on the same."""
    make = ours.random_detector(folder, *tower)
    if {"int8", "onnx"} & set(ways):
        ours.export(folder)
    found = [Contender(f"ours on {name}, {way}", ours.detecting(make(way)), every) for way in ways]
    return [*found, Contender(f"open_clip {name}", peers.plain_open_clip(*tower[:2]), every)]


def stages(way: str, rounds: int) -> dict[str, float]:
    """Milliseconds of each stage of one slice, medians; reading is a slice's share of a series in NIfTI."""
    detector = load(way)
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
    return {"read": reading(), **{name: float(np.median(values[3:])) for name, values in found.items()}}


def reading(count: int = 100) -> float:
    """Milliseconds for each slice of a volume of 256 x 256 pixels, read from an uncompressed file."""
    import SimpleITK

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii"
        SimpleITK.WriteImage(
            SimpleITK.GetImageFromArray(np.resize(phantoms(4, 256), (count, 256, 256))), path
        )
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            read_volume(path)
            seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds)) / count


def in_the_scene(way: str, rounds: int) -> dict[str, dict[str, float]]:
    """See `scene.scene_run`."""
    return by_itself("scene", way, str(rounds))


def loading(way: str, runs: int = 5) -> dict[str, float]:
    """See `loading.ready_run`; medians."""
    found = [by_itself("loading", way) for _ in range(runs)]
    return {name: float(np.median([one[name] for one in found])) for name in found[0]}


def by_itself(module: str, *arguments: str) -> Any:
    """What a module of this package prints as JSON, run in a process of its own."""
    folders = [str(TESTING), str(TESTING.parent / "MedAnomalyCLIP")]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def against_slices(way: str) -> dict[int, dict[str, float]]:
    """Seconds and peak memory of volumes of a number of slices, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for count in SLICES:
        with context.Pool(1) as pool:
            found[count] = pool.apply(volume_run, (way, count))
    return found


def volume_run(way: str, count: int) -> dict[str, float]:
    """Detect on all slices of one volume; growth is what that took beside detector and volume."""
    detector = load(way)
    detector.detect(ours.plane_of(phantoms(1, 256)[0]))
    volume = ours.volume_of(np.resize(phantoms(4, 256), (count, 256, 256)))
    before = memory("VmRSS")
    forget_peak()
    started = time.perf_counter()
    for _result in detect_slices(detector, volume, axis=2):
        pass
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak MiB": memory("VmHWM"), "growth MiB": memory("VmHWM") - before}


def memory(kind: str) -> float:
    """MiB that this process has in memory (VmRSS), or had at most (VmHWM); Linux tells it."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def against_side(way: str) -> dict[int, float]:
    """Milliseconds of one slice of a size."""
    detector = load(way)
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
    sections = ("stages", "ms"), ("slices", ""), ("sides", "ms"), ("loading", "s"), ("scene", "ms")
    for title, unit in sections:
        lines += ["", f"{title} {unit}".strip() + ":"]
        for way, found in figures[title].items():
            shown = ", ".join(f"{key} {_short(value)}" for key, value in found.items())
            lines.append(f"  {way}: {shown}")
    lines += ["", f"module import: {figures['module import']:.3f} s", "", "| goal | found |", "|---|---|"]
    return "\n".join([*lines, *(f"| {goal} | {found} |" for goal, found in goals(figures))])


def goals(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What was aimed at, and what came of it by the first way; what was not measured is left out."""
    way = next(iter(figures["slices"]))
    found = [
        ("500 slices in 8 s", f"{figures['slices'][way][SLICES[-1]]['seconds']:.1f} s"),
        ("memory does not grow with the slices, 10 to 500", _growth(figures["slices"][way])),
        ("module imported in 0.3 s", f"{figures['module import']:.2f} s"),
        ("ready 1 s after the imports", f"{figures['loading'][way]['ready']:.2f} s"),
    ]
    for volume, steps in figures["scene"][way].items():
        found.append((f"click to overlay in 100 ms, {volume}", f"{steps['click to overlay']:.0f} ms"))
    aims = [(100, f"{US}, {way}")]
    aims += [(aim, f"ours on ViT-B/16+, {one}") for aim, one in ((60, "int8"), (15, "onnx"), (15, "torch"))]
    for aim, name in aims:
        if "WinCLIP" in figures["peers"] and name in figures["peers"]:
            times = figures["peers"]["WinCLIP"]["ratios"][name]
            shown = f"{times['median']:.0f} ({times['low']:.0f} to {times['high']:.0f})"
            found.append((f"{aim} times as fast as WinCLIP: {name}", shown))
    return found


def _growth(slices: dict[int, dict[str, float]]) -> str:
    return " · ".join(f"{count}: {slices[count]['growth MiB']:.0f} MiB" for count in SLICES)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {number:.2f}" for name, number in value.items()) + ")"
    return f"{value:.1f}"


if __name__ == "__main__":
    main()
