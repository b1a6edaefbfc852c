"""Runs that are killed, and long ones. MEDANOMALYCLIP_LONG=1 runs the long forms and prints figures."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resource", reason="this system sets no limits for processes")

from endurance import LONG, resident_bytes
from MedAnomalyCLIPLib.detection import SliceDetector, detect_slices
from MedAnomalyCLIPLib.export import ResultWriter
from MedAnomalyCLIPLib.volume import Volume

TESTING = Path(__file__).parents[1]
KILLS = 100 if LONG else 2  # of each command
SLICES = 2000 if LONG else 80
GROWTH = 8 * 2**20  # bytes; an allocator's own ups and downs are about a tenth of it


@pytest.mark.timeout(0 if LONG else 300)
def test_what_is_killed_at_any_moment_leaves_nothing_corrupt_and_goes_on():
    words = [sys.executable, "-m", "endurance.kills", "--times", str(KILLS)]
    folders = [str(TESTING), str(TESTING.parent / "MedAnomalyCLIP")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, "--json"], env=environment, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout or "[]")
    assert len(told) == 5, done.stderr[-2000:]
    if LONG:
        print(f"\n{told}")
    assert not [fault for case in told for fault in case["faults"]]
    assert all(case["kills"] + case["ended"] >= KILLS for case in told)


def grown(step, count, every):
    """Resident memory from a tenth of the way to the end, in bytes, and the most it was above the first."""
    seen = []
    for number in range(count):
        step(number)
        if number >= count // 10 and number % every == 0:
            gc.collect()
            seen.append(resident_bytes())
    return seen[-1] - seen[0], max(seen) - seen[0]


@pytest.mark.timeout(0 if LONG else 300)
def test_memory_does_not_grow_with_the_number_of_slices(tiny_bundle, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 1000, (SLICES, 48, 40)).astype(np.int16)
    volume = Volume(voxels, np.diag([1.0, 1.0, 2.0, 1.0]), modality="MR")
    detector = SliceDetector.load(tiny_bundle.folder, device="cpu")
    threads = threading.active_count()
    with ResultWriter(tmp_path / "out", volume, requested=SLICES) as writer:
        results = detect_slices(detector, volume)
        last, most = grown(lambda number: writer.add(next(results)), SLICES, every=10)
        results.close()
    if LONG:
        print(f"\n{SLICES} slices: resident memory {last / 2**20:+.1f} MiB, at most {most / 2**20:+.1f} MiB")
    # The volume's map and mask become resident as they are filled; the short form's are a tenth of the bound.
    result_volume = voxels.size * (np.float32().nbytes + np.uint8().nbytes) if LONG else 0
    assert most - result_volume < GROWTH
    assert threading.active_count() <= threads
    assert len(writer.manifest["slices"]) == SLICES
