"""Reference maps of the bundled detector: `python Testing/reference_maps.py --write` makes them anew.

The images are those that pydicom ships. A new bundled detector gives other maps; whoever changes it
writes them again, looks at what changed, and commits both together.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TESTING = Path(__file__).parent
FILE = TESTING / "data" / "reference_maps.npz"
IMAGES = ("CT_small.dcm", "MR_small.dcm")
STEP = 1 / 65535
"""Maps are stored in 16 bits."""


def reference_maps(
    batch_size: int = 1, runtime: str = "torch", precision: str = "float32"
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, float]]:
    """What the bundled detector says of the images, all in batches of this size, run as told.

    Returns:
        Name, version and hash of the detector; (H, W) float32 map and score of each image.
    """
    from pydicom.data import get_testdata_file

    from MedAnomalyCLIPLib.detection import SliceDetector
    from MedAnomalyCLIPLib.geometry import cut_slice
    from MedAnomalyCLIPLib.volume import read_volume

    detector = SliceDetector.load(device="cpu", runtime=runtime, precision=precision)
    planes = [cut_slice(read_volume(str(get_testdata_file(name))), 2, 0) for name in IMAGES]
    results = list(detector.detect_many(planes * 3, batch_size=batch_size))[: len(planes)]
    provenance = detector.provenance
    told = {
        "bundle": provenance.bundle,
        "version": provenance.bundle_version,
        "sha256": provenance.bundle_sha256,
    }
    maps = {name: result.map for name, result in zip(IMAGES, results, strict=True)}
    scores = {name: result.score for name, result in zip(IMAGES, results, strict=True)}
    return told, maps, scores


def stored_maps() -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, float]]:
    """The same as they were when they were written."""
    with np.load(FILE) as file:
        maps = {name: file[name].astype(np.float32) * np.float32(STEP) for name in IMAGES}
        told = json.loads(str(file["told"]))
    return told["detector"], maps, told["scores"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="store what the bundled detector says now")
    if parser.parse_args().write:
        detector, maps, scores = reference_maps()
        whole = {name: np.round(values / STEP).astype(np.uint16) for name, values in maps.items()}
        np.savez_compressed(FILE, told=json.dumps({"detector": detector, "scores": scores}), **whole)
    (now, maps, scores), (then, stored, before) = reference_maps(), stored_maps()
    same = now == then
    print(f"{now['bundle']} {now['version']}; stored maps are {'its own' if same else 'of another detector'}")
    for name in IMAGES:
        difference = np.abs(maps[name] - stored[name]).max()
        changed = abs(scores[name] - before[name])
        print(f"{name}: map differs by {difference:.2g} at most, score by {changed:.2g}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.path[:0] = [str(TESTING), str(TESTING.parent / "MedAnomalyCLIP")]
    sys.exit(main())
