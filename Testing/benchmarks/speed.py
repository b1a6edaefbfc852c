"""How long a slice takes on the CPU, and how much of it is spent around the vision tower.

    OMP_NUM_THREADS=1 taskset -c 1 python Testing/benchmarks/speed.py

Tower, whole in PyTorch and whole in ONNX Runtime are timed in turn, so that what else the machine does falls
on all of them alike; ratios are medians over the rounds. A whole is `SliceDetector.detect`: from the plane to
the map on its pixels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TESTING = Path(__file__).parents[1]
sys.path[:0] = [str(TESTING), str(TESTING.parent / "MedAnomalyCLIP")]


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--side", type=int, default=512, help="rows and columns of the slice")
    arguments = parser.parse_args()

    import torch

    from MedAnomalyCLIPLib.detection import SliceDetector
    from MedAnomalyCLIPLib.geometry import SlicePlane
    from MedAnomalyCLIPLib.torch_network import TorchNetwork

    shape = (arguments.side, arguments.side)
    noise = np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)
    plane = SlicePlane(noise, np.eye(4), np.ones(shape, bool), modality="MR")
    by_onnx, by_torch = (SliceDetector.load(device="cpu", runtime=name) for name in ("onnx", "torch"))
    network = by_torch.network
    assert isinstance(network, TorchNetwork)
    image = torch.randn(1, 3, by_torch.input_size, by_torch.input_size)
    tower = torch.inference_mode()(network.module.tower)
    works: dict[str, Callable[[], object]] = {
        "tower in PyTorch": lambda: tower(image),
        "whole in PyTorch": lambda: by_torch.detect(plane),
        "whole in ONNX Runtime": lambda: by_onnx.detect(plane),
        "16 slices in PyTorch, each": lambda: list(by_torch.detect_many([plane] * 16)),
        "16 slices in ONNX Runtime, each": lambda: list(by_onnx.detect_many([plane] * 16)),
    }
    several = {name: 16 if name.startswith("16") else 1 for name in works}
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(arguments.rounds):
        for name, work in works.items():
            if several[name] == 1 or turn % 8 == 0:
                times[name].append(milliseconds(work) / several[name])
    tower_times = np.array(times["tower in PyTorch"])
    told = {}
    for name, found in times.items():
        told[name] = {"median ms": round(float(np.median(found)), 1), "least ms": round(min(found), 1)}
        if several[name] == 1:
            told[name]["times the tower"] = round(float(np.median(np.array(found) / tower_times)), 2)
    print(json.dumps({"threads": torch.get_num_threads(), **told}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
