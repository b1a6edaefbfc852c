"""What is paid once: Slicer's import of the module, and the first click of Detect.

    python -m benchmarks.loading           # the import
    python -m benchmarks.loading int8      # a detector, run so

Each in a process of its own; prints seconds as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

MODULE = Path(__file__).parents[2] / "MedAnomalyCLIP" / "MedAnomalyCLIP.py"
NEEDED = {
    "onnx": ("onnxruntime", "safetensors.numpy", "MedAnomalyCLIPLib.onnx_network"),
    "torch": ("safetensors.torch", "MedAnomalyCLIPLib.torch_network", "MedAnomalyCLIPLib.detectors.detector"),
}
HEAVY = ("torch", "monai", "open_clip", "onnxruntime", "scipy", "SimpleITK")


def import_run() -> dict[str, float]:
    """Seconds that importing the module's file takes where Slicer runs already.

    Raises:
        RuntimeError: it imported one of the packages that only detection needs.
    """
    from harness import application, scripted_module

    application.start()
    before = set(sys.modules)
    started = time.perf_counter()
    scripted_module.HostedModule(MODULE)
    seconds = time.perf_counter() - started
    heavy = sorted({name.split(".")[0] for name in set(sys.modules) - before} & set(HEAVY))
    if heavy:
        raise RuntimeError(f"The module's file imports {', '.join(heavy)}")
    return {"module import": seconds}


def ready_run(way: str) -> dict[str, float]:
    """Seconds until the bundled detector can be used.

    Returns:
        imports: of what detection needs; ready: from there to a loaded detector; first and second: slices.
    """
    started = time.perf_counter()
    import numpy as np

    from MedAnomalyCLIPLib.geometry import cut_slice
    from MedAnomalyCLIPLib.volume import Volume

    from .ways import WAYS, load

    for name in NEEDED[WAYS[way]["runtime"]]:
        importlib.import_module(name)
    imported = time.perf_counter()
    detector = load(way)
    ready = time.perf_counter()
    voxels = np.random.default_rng(0).integers(0, 900, (1, 256, 256)).astype(np.uint16)
    plane = cut_slice(Volume(voxels, np.eye(4), modality="MR"), 2, 0)
    detector.detect(plane)
    first = time.perf_counter()
    detector.detect(plane)
    return {
        "imports": imported - started,
        "ready": ready - imported,
        "first": first - ready,
        "second": time.perf_counter() - first,
    }


if __name__ == "__main__":
    print(json.dumps(ready_run(sys.argv[1]) if sys.argv[1:] else import_run()))
