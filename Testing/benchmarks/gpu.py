"""Measure detection on an NVIDIA GPU, end to end and part by part, and hold it against the CPU.

    python Testing/benchmarks/gpu.py --out figures --seconds 60

Two detectors: the bundled one, and one of ours with random weights on ViT-L/14 at 336 px, four taps. End to
end is from a uint16 volume in memory to a map of each slice, at its size, and a score. The floor is the bare
encoder: open_clip's forward of the same weights in bfloat16 on images that lie ready on the GPU.

Each figure is taken by itself, those that matter most first: what fails is told and left out, and so is what
the seconds do not suffice for. Writes `gpu.json` after each figure, and `gpu.txt`, a table. With
`--device cpu` the same steps run there, to try the command at small sizes:

    python Testing/benchmarks/gpu.py --device cpu --model tiny-test-clip --input 64 --slices 8 --side 96 \
        --batches 2 4 --out figures
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BEGAN = time.perf_counter()
TESTING = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTING), str(TESTING.parent / "MedAnomalyCLIP")]

import torch  # noqa: E402

from benchmarks.ours import random_manifest  # noqa: E402
from MedAnomalyCLIPLib import cuda  # noqa: E402
from MedAnomalyCLIPLib.bundle import Bundle, default_bundle_path  # noqa: E402
from MedAnomalyCLIPLib.clip.importing import import_open_clip  # noqa: E402
from MedAnomalyCLIPLib.clip.specification import TowerSpec  # noqa: E402
from MedAnomalyCLIPLib.detection import SliceDetector  # noqa: E402
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector  # noqa: E402
from MedAnomalyCLIPLib.detectors.specification import DetectorSpec  # noqa: E402
from MedAnomalyCLIPLib.device_preprocess import DevicePreprocessor  # noqa: E402
from MedAnomalyCLIPLib.geometry import cut_slices  # noqa: E402
from MedAnomalyCLIPLib.runtime import select_precision, usable_cores  # noqa: E402
from MedAnomalyCLIPLib.torch_network import TorchNetwork  # noqa: E402
from MedAnomalyCLIPLib.volume import Volume  # noqa: E402

CEILING = 2070  # images a second of ViT-L/14 at 336 px that an H200's arithmetic allows, 382 GFLOP each
BUNDLED, LARGE = "bundled", "large"
QUICK = "large, OpenAI's activation"
PRECISIONS = ("bfloat16", "float32")


@dataclass
class Bench:
    """What the figures are taken with, and the figures."""

    arguments: argparse.Namespace
    figures: dict[str, Any] = field(default_factory=dict)
    made: dict[str, tuple[Bundle, AnomalyDetector]] = field(default_factory=dict)
    volumes: dict[str, Volume] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device(self.arguments.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return float(self.arguments.seconds - (time.perf_counter() - BEGAN))

    def take(self, name: str, seconds: float, figure: Callable[[], Any]) -> None:
        """Take one figure that needs about so many seconds."""
        started = time.perf_counter()
        if self.left < seconds:
            self.figures[name] = f"left out: {self.left:.0f} s left"
        else:
            try:
                self.figures[name] = figure()
            except Exception:
                traceback.print_exc()
                self.figures[name] = "failed: " + traceback.format_exc(limit=-3)
            if self.on_gpu:
                torch.cuda.empty_cache()
        print(f"[{time.perf_counter() - BEGAN:5.1f} s] {name}: {self.figures[name]}", flush=True)
        self.figures.setdefault("seconds", {})[name] = round(time.perf_counter() - started, 2)
        (self.arguments.out / "gpu.json").write_text(json.dumps(self.figures, indent=1, default=str))

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def detector(self, name: str, precision: str) -> SliceDetector:
        """A detector of its own weights; on the CPU too by the way of a GPU."""
        bundle, module = self.made[name]
        network = TorchNetwork(
            copy.deepcopy(module),
            bundle.manifest.preprocess,
            self.device,
            precision=getattr(torch, precision),
        )
        if not self.on_gpu:
            network.preprocessor = DevicePreprocessor(bundle.manifest.preprocess, self.device)
            network.under_way = 2
        return SliceDetector(bundle, network)

    def volume(self, modality: str = "CT") -> Volume:
        """Ellipses with noise, (K, J, I) uint16; a CT's window is fixed, an MR's found for each slice."""
        if modality in self.volumes:
            return self.volumes[modality]
        count, side = self.arguments.slices, self.arguments.side
        random = np.random.default_rng(0)
        y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
        head = x**2 + (1.2 * y) ** 2 < 0.8
        waves = [head * (900 + 300 * np.sin(7 * x + i) * np.cos(5 * y)) for i in range(8)]
        few = np.stack([wave + random.normal(60, 20, head.shape) for wave in waves]).clip(0, 4000)
        few = (few / 6 if modality == "CT" else few).astype(np.uint16)  # soft tissue's values in HU
        turns = [np.roll(few, 3 * turn, axis=2) for turn in range(math.ceil(count / 8))]
        voxels = np.concatenate(turns)[:count]
        matrix = np.diag([-1.0, -1.0, 2.0, 1.0])
        self.volumes[modality] = Volume(voxels, matrix, modality, "HU" if modality == "CT" else "")
        return self.volumes[modality]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure detection on an NVIDIA GPU.")
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--seconds", type=float, default=60)
    add("--device", default="cuda:0")
    add("--model", default="ViT-L-14-336")
    add("--input", type=int, default=336, help="side of the large tower's input in pixels")
    add("--slices", type=int, default=512)
    add("--side", type=int, default=512, help="of a slice in pixels")
    add("--batches", type=int, nargs="+", default=[16, 32, 64, 128])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    try:
        figures(bench)
    finally:
        text = words(bench.figures)
        (arguments.out / "gpu.txt").write_text(text + "\n")
        print(text)


def figures(bench: Bench) -> None:
    """All of them, those that matter most first."""
    batches = bench.arguments.batches
    usual = min(64, max(batches))

    def take(name: str, seconds: float, figure: Callable[..., Any], *given: Any, **options: Any) -> None:
        bench.take(name, seconds, lambda: figure(bench, *given, **options))

    take("machine", 0, machine)
    take("detectors made", 0, make)
    take("agreement with the CPU", 4, agreement)
    take("chosen batches", 3, chosen)
    take(f"bare encoder, batch {usual}", 2, bare, usual)
    take(f"large, bfloat16, batch {usual}", 5, end_to_end, LARGE, "bfloat16", usual, runs=3)
    take(f"bundled, bfloat16, batch {usual}", 3, end_to_end, BUNDLED, "bfloat16", usual, runs=3)
    take("large, stages", 4, stages, LARGE, "bfloat16", usual)
    take("memory made scarce", 3, scarce, usual)
    for batch in (batch for batch in batches if batch != usual):
        take(f"bare encoder, batch {batch}", 1, bare, batch)
        take(f"large, bfloat16, batch {batch}", 2, end_to_end, LARGE, "bfloat16", batch)
    take("bundled, float32", 2, end_to_end, BUNDLED, "float32", usual)
    take("bundled, stages", 2, stages, BUNDLED, "bfloat16", usual)
    take("large, bfloat16, a window for each slice", 2, end_to_end, LARGE, "bfloat16", usual, "MR")
    take(f"{QUICK}, bfloat16", 2, end_to_end, QUICK, "bfloat16", usual)
    take("large, float32", 3, end_to_end, LARGE, "float32", min(32, usual), share=8)
    take(f"bundled, bfloat16, batch {min(batches)}", 2, end_to_end, BUNDLED, "bfloat16", min(batches))
    take("waits for the GPU", 2, waits, usual)
    take("one slice by itself, ms", 3, single)
    take("bare encoder again", 1, bare, usual)
    take("kernels of the encoder", 5, kernels, usual)
    take("CUDA graph of the encoder", 3, graphs, (1, usual))


def machine(bench: Bench) -> dict[str, Any]:
    told: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        told |= {"gpu": properties.name, "memory GiB": round(properties.total_memory / 2**30, 1)}
        told |= {"cuda": torch.version.cuda, "precision": str(select_precision("auto", bench.device))}
    return {**told, "cores": usable_cores()}


def make(bench: Bench) -> dict[str, str]:
    """The bundled detector, and one with random weights."""
    bundle = Bundle.load(default_bundle_path())
    bench.made[BUNDLED] = bundle, bundle.build().to(bench.device)
    import_open_clip().add_model_config(TESTING / "data" / "architectures")
    depth = 24 if bench.arguments.model.startswith("ViT-L") else 4
    taps = tuple(depth * tap // 4 for tap in range(1, 5))
    spec = DetectorSpec(TowerSpec(bench.arguments.model, bench.arguments.input, taps))
    module = random_weights(spec, bench.device)
    large = Bundle(bench.arguments.out, random_manifest(spec), "")
    bench.made[LARGE] = large, module
    quick = copy.deepcopy(module)
    for block in quick.tower.visual.transformer.resblocks:
        block.mlp.gelu = import_open_clip().transformer.QuickGELU()
    bench.made[QUICK] = large, quick
    return {name: made[0].manifest.name for name, made in bench.made.items()}


def random_weights(spec: DetectorSpec, device: torch.device) -> AnomalyDetector:
    """A detector whose weights are drawn where it runs, which takes no time."""
    with torch.device("meta"):
        module = AnomalyDetector(spec)
    module = module.to_empty(device=device).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, values in (*module.named_parameters(), *module.named_buffers()):
            if values.ndim > 1 or "embedding" in name:
                values.normal_(std=0.02)
            else:
                values.fill_(float(name.endswith("weight")))
        module.text_bank.copy_(torch.nn.functional.normalize(module.text_bank, dim=-1))
    return module


def agreement(bench: Bench) -> dict[str, Any]:
    """Largest differences of maps and scores of the bundled detector to those of the CPU in float32."""
    told = {}
    for modality in ("CT", "MR"):
        volume = bench.volume(modality)
        planes = list(cut_slices(volume, 2, range(min(6, len(volume.voxels)))))
        bundle = bench.made[BUNDLED][0]
        by_cpu = TorchNetwork(bundle.build(), bundle.manifest.preprocess, torch.device("cpu"))
        expected = list(SliceDetector(bundle, by_cpu).detect_many(planes))
        contrast = max(float(np.ptp(result.map)) for result in expected)
        for precision in ("float32", "bfloat16", "float16"):
            found = list(bench.detector(BUNDLED, precision).detect_many(planes, batch_size=4))
            pairs = list(zip(found, expected, strict=True))
            told[f"{modality}, {precision}"] = {
                "map": max(float(np.abs(one.map - other.map).max()) for one, other in pairs),
                "map, mean": float(np.mean([np.abs(one.map - other.map).mean() for one, other in pairs])),
                "score": max(abs(one.score - other.score) for one, other in pairs),
                "unlikeness": max(
                    abs((one.unlikeness or 0) - (other.unlikeness or 0)) for one, other in pairs
                ),
                "contrast of the maps": contrast,
            }
    return told


def chosen(bench: Bench) -> dict[str, Any]:
    """How many slices the network takes at once by itself."""
    told: dict[str, Any] = {}
    for name in (LARGE, BUNDLED):
        for precision in PRECISIONS:
            network = bench.detector(name, precision).network
            told[f"{name}, {precision}"] = network.batch_size
    if bench.on_gpu:
        told["free GiB"] = round(cuda.free_memory(bench.device) / 2**30, 1)
    return told


def rate(bench: Bench, work: Callable[[], object], count: int, seconds: float = 1.0) -> float:
    """Images a second of work on so many, after two warm-up runs."""
    for _ in range(2):
        started = time.perf_counter()
        work()
        bench.wait()
        once = time.perf_counter() - started
    rounds = max(2, math.ceil(seconds / once)) if bench.on_gpu else 2
    started = time.perf_counter()
    for _ in range(rounds):
        work()
    bench.wait()
    return rounds * count / (time.perf_counter() - started)


def ready_images(bench: Bench, batch: int, dtype: torch.dtype) -> torch.Tensor:
    side = bench.arguments.input
    return torch.randn(batch, 3, side, side, device=bench.device, dtype=dtype)


def encoder(bench: Bench) -> torch.nn.Module:
    """open_clip's own, in bfloat16."""
    return copy.deepcopy(bench.made[LARGE][1].tower.visual).bfloat16()


def bare(bench: Bench, batch: int) -> dict[str, float]:
    """Images a second of the encoder alone: with PyTorch's choice of attention, and with ours."""
    visual, images = encoder(bench), ready_images(bench, batch, torch.bfloat16)
    with torch.inference_mode():
        told = {"images/s": rate(bench, lambda: visual(images), batch, 0.7)}
        with cuda.kernels(tf32=True):
            told["images/s, attention as in detectors"] = rate(bench, lambda: visual(images), batch, 0.7)
    return told


def end_to_end(
    bench: Bench,
    name: str,
    precision: str,
    batch: int,
    modality: str = "CT",
    *,
    runs: int = 1,
    share: int = 1,
) -> dict[str, Any]:
    """Images a second from a volume, its slices twice over, to results: median of the runs, and the best."""
    detector, volume = bench.detector(name, precision), bench.volume(modality)
    count = max(batch, 2 * len(volume.voxels) // share)

    def run(count: int) -> dict[str, float]:
        steps: dict[str, float] = {}
        planes = cut_slices(volume, 2, (index % len(volume.voxels) for index in range(count)))
        for result in detector.detect_many(planes, batch_size=batch):
            for step, seconds in result.timings.items():
                steps[step] = steps.get(step, 0.0) + 1000 * seconds / count
        return steps

    run(2 * batch)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    taken, steps = [], {}
    for _ in range(runs):
        started = time.perf_counter()
        steps = run(count)
        taken.append(time.perf_counter() - started)
    told: dict[str, Any] = {
        "images/s": count / float(np.median(taken)),
        "best": count / min(taken),
        "slices": count,
        "ms a slice as told by results": {step: round(value, 4) for step, value in steps.items()},
    }
    if bench.on_gpu:
        told["peak GiB"] = round(torch.cuda.max_memory_allocated(bench.device) / 2**30, 2)
    return told


def stages(bench: Bench, name: str, precision: str, batch: int) -> dict[str, float]:
    """Milliseconds a slice of each part by itself, waited for."""
    detector, volume = bench.detector(name, precision), bench.volume()
    network, module = detector.network, detector.network.module  # type: ignore[attr-defined]
    indices = [index % len(volume.voxels) for index in range(batch)]
    planes = list(cut_slices(volume, 2, indices))
    prepared = network.preprocessor.prepare_many(planes)
    found = network(prepared.images, prepared.valid, None)
    maps = network.preprocessor.map_back_many(found.map, prepared.fits)
    stored = torch.empty(batch, *planes[0].shape, dtype=torch.int16, pin_memory=bench.on_gpu)
    with torch.inference_mode(), cuda.kernels(tf32=precision != "float32"):
        aligned = module.align(prepared.images)
        parts: dict[str, Callable[[], object]] = {
            "cut on the host": lambda: list(cut_slices(volume, 2, indices)),
            "prepare": lambda: network.preprocessor.prepare_many(planes),
            "of it, copy to the GPU": lambda: stored.to(bench.device, non_blocking=True),
            "tower": lambda: module.tower(prepared.images),
            "tower and adapters": lambda: module.align(prepared.images),
            "map and score": lambda: module.decide(aligned, module.text_features(aligned), prepared.valid),
            "map back": lambda: network.preprocessor.map_back_many(found.map, prepared.fits),
            "copy to the host": lambda: network.fetch([found.score, *maps])(),
            "copy into results": lambda: [np.array(m) for m in network.fetch(list(maps))()],
        }
        return {part: round(1000 / rate(bench, work, batch, 0.2), 4) for part, work in parts.items()}


def scarce(bench: Bench, batch: int) -> dict[str, Any]:
    """A batch that does not fit: what is done, and whether the maps stay the same."""
    detector, volume = bench.detector(LARGE, "bfloat16"), bench.volume()
    planes = list(cut_slices(volume, 2, range(min(batch, len(volume.voxels)))))
    expected = list(detector.detect_many(planes, batch_size=batch))
    if not bench.on_gpu:
        return {"maps": "only on a GPU can memory be made scarce"}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    list(detector.detect_many(planes, batch_size=batch))
    need = torch.cuda.max_memory_allocated(bench.device) - before
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(bench.device).total_memory
    allowed = torch.cuda.memory_reserved(bench.device) + need / 2
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append  # type: ignore[method-assign]
    logger = logging.getLogger("MedAnomalyCLIPLib")
    logger.addHandler(handler)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), bench.device)
    try:
        found = list(detector.detect_many(planes, batch_size=batch))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
        logger.removeHandler(handler)
    off = max(float(np.abs(a.map - b.map).max()) for a, b in zip(found, expected, strict=True))
    return {
        "batch": batch,
        "need GiB": round(need / 2**30, 2),
        "allowed GiB": round(allowed / 2**30, 2),
        "batch afterwards": detector.network.batch_size,
        "told": [record.getMessage() for record in told],
        "largest difference of maps": off,
    }


def single(bench: Bench) -> dict[str, float]:
    """Milliseconds from a plane to its result, medians."""
    told = {}
    plane = next(cut_slices(bench.volume(), 2, [0]))
    for name in (BUNDLED, LARGE):
        for precision in PRECISIONS:
            detector = bench.detector(name, precision)
            taken = []
            for _ in range(23 if bench.on_gpu else 4):
                started = time.perf_counter()
                detector.detect(plane)
                taken.append(time.perf_counter() - started)
            told[f"{name}, {precision}"] = round(1000 * float(np.median(taken[3:])), 2)
    return told


def waits(bench: Bench, batch: int) -> Any:
    """Where a batch that is begun makes the host wait for the GPU; nowhere, it should be."""
    if not bench.on_gpu:
        return "only on a GPU"
    told = {}
    for name in (BUNDLED, LARGE):
        detector, volume = bench.detector(name, "bfloat16"), bench.volume()
        planes = list(cut_slices(volume, 2, range(min(batch, len(volume.voxels)))))
        list(detector.detect_many(planes, batch_size=batch))
        network = detector.network
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                prepared = network.preprocessor.prepare_many(planes)
                found = network(prepared.images, prepared.valid, None)
                maps = network.preprocessor.map_back_many(found.map, prepared.fits)
                network.fetch([prepared.windows, found.score, *maps])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        told[name] = sorted({f"{Path(w.filename).name}:{w.lineno} {str(w.message)[:60]}" for w in caught})
    return told


def graphs(bench: Bench, batches: Sequence[int]) -> Any:
    """Milliseconds of a batch through the encoder, launched kernel by kernel and as one CUDA graph."""
    if not bench.on_gpu:
        return "only on a GPU"
    visual, told = encoder(bench), {}
    for batch in batches:
        images = ready_images(bench, batch, torch.bfloat16)
        with torch.inference_mode(), cuda.kernels(tf32=True):
            told[f"batch {batch}, eager"] = 1000 * batch / rate(bench, partial(visual, images), batch, 0.3)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    visual(images)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                visual(images)
            told[f"batch {batch}, graph"] = 1000 * batch / rate(bench, graph.replay, batch, 0.3)
            del graph
    return {name: round(value, 3) for name, value in told.items()}


def kernels(bench: Bench, batch: int) -> dict[str, Any]:
    """Which kernels take the time of the encoder in bfloat16, and whether attention is a fused one."""
    from torch.profiler import ProfilerActivity, profile

    detector = bench.detector(LARGE, "bfloat16")
    tower, images = detector.network.module.tower, ready_images(bench, batch, torch.float32)  # type: ignore[attr-defined]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with torch.inference_mode(), cuda.kernels(tf32=True):
        tower(images)
        bench.wait()
        with profile(activities=activities) as profiled:
            tower(images)
            bench.wait()
    events = profiled.key_averages()
    time_of = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    ranked = sorted(events, key=lambda event: getattr(event, time_of), reverse=True)
    return {
        "attention": sorted(
            {e.key[:90] for e in events if "flash" in e.key or "fmha" in e.key or "native_multi" in e.key}
        ),
        "ms": {event.key[:90]: round(getattr(event, time_of) / 1000, 3) for event in ranked[:14]},
    }


def words(found: dict[str, Any]) -> str:
    """The figures as tables in Markdown."""
    lines = [
        str(found.get("machine")),
        "",
        "| | images a second | of the bare encoder | of 2,070 |",
        "|---|---|---|---|",
    ]
    floors = [
        max(value.values())
        for name, value in found.items()
        if name.startswith("bare") and isinstance(value, dict)
    ]
    floor = max(floors, default=float("nan"))
    for name, value in found.items():
        if isinstance(value, dict) and "images/s" in value:
            speed = value["images/s"]
            large = not name.startswith("bundled")
            ratios = f"{speed / floor:.2f} | {speed / CEILING:.2f}" if large else "- | -"
            lines.append(f"| {name} | {speed:.0f} | {ratios} |")
    for name, value in found.items():
        if name not in ("machine", "seconds") and not (isinstance(value, dict) and "images/s" in value):
            lines += ["", f"{name}:"]
            entries = value.items() if isinstance(value, dict) else [("", value)]
            lines += [f"  {key}: {entry}" for key, entry in entries]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
