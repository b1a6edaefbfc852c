"""Measure the way from an archive and back: a series fetched over DICOMweb, its results stored there.

    python Testing/benchmarks/dicomweb.py
    python Testing/benchmarks/dicomweb.py --slices 300 --side 256 --rounds 5 --json figures.json

Starts Orthanc on this computer, so that no network takes part, and gives it made-up CT series. Told are the
seconds of each step for one series, the median of all rounds with their spread, and the bytes that it moves.
Where other work runs beside it, all of them are longer than they need to be. What lies between, reading and
detecting, is told by the other benchmarks; here a stand-in detects, and masks cover some 5 % of each slice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydicom.uid import generate_uid

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "MedAnomalyCLIP"), str(ROOT / "Testing"), str(ROOT / "Testing" / "unit")]

from dicom_objects import identity  # noqa: E402
from images import write_dicom_series  # noqa: E402

from harness import orthanc  # noqa: E402
from harness.fake_detector import BrightnessDetector  # noqa: E402
from MedAnomalyCLIPLib.detection import detect_slices  # noqa: E402
from MedAnomalyCLIPLib.dicomweb import Archive  # noqa: E402
from MedAnomalyCLIPLib.dicomweb_login import PASSWORD, USER  # noqa: E402
from MedAnomalyCLIPLib.dicomweb_sink import StoredInArchive  # noqa: E402
from MedAnomalyCLIPLib.dicomweb_source import ArchivedSeries, search_archive  # noqa: E402
from MedAnomalyCLIPLib.export import ResultWriter  # noqa: E402
from MedAnomalyCLIPLib.volume import read_volume  # noqa: E402

KINDS = {"segmentation": ("segmentation",), "all three": ("segmentation", "report", "capture")}


class Clock:
    """Seconds and bytes of each step, over all rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.bytes: dict[str, int] = {}

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds.setdefault(step, []).append(time.perf_counter() - began)

    def figures(self) -> dict[str, dict[str, float]]:
        return {
            step: {
                "median_s": statistics.median(taken),
                "least_s": min(taken),
                "most_s": max(taken),
                "megabytes": self.bytes.get(step, 0) / 1e6,
            }
            for step, taken in self.seconds.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", type=int, default=60)
    parser.add_argument("--side", type=int, default=512, help="rows and columns of a slice")
    parser.add_argument("--rounds", type=int, default=5, help="one series each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    arguments = parser.parse_args()
    if not orthanc.IS_INSTALLED:
        sys.exit(orthanc.MISSING)
    os.environ.update({USER: orthanc.USER, PASSWORD: orthanc.PASSWORD})
    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "orthanc").mkdir()
        with orthanc.running(folder / "orthanc") as archive:
            for number in range(arguments.rounds):
                upload(archive, folder / f"series-{number}", arguments.slices, arguments.side)
            with clock.of("search, all series"):
                found = list(search_archive(Archive(archive.url), {}))
            for number, item in enumerate(found):
                go_through(item, folder / f"round-{number}", clock)
    figures = clock.figures()
    print(
        f"{arguments.rounds} series of {arguments.slices} slices, {arguments.side} x {arguments.side} pixels"
    )
    for step, told in figures.items():
        spread = f"{told['least_s']:.2f} to {told['most_s']:.2f}"
        print(f"{step:36} {told['median_s']:7.2f} s  ({spread})  {told['megabytes']:7.1f} MB")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def upload(archive: orthanc.Orthanc, folder: Path, slices: int, side: int) -> None:
    """Noise in the range of soft tissue, with a bright square of 5 % of each slice."""
    voxels = np.random.default_rng(0).integers(-100, 200, (slices, side, side)).astype(np.int16)
    edge = round(side * 0.05**0.5)
    voxels[:, :edge, :edge] += 800
    places = [(0, 0, 2.0 * k) for k in range(slices)]
    archive.upload(*write_dicom_series(folder, voxels, places, **identity(), StudyDescription=generate_uid()))


def go_through(item: ArchivedSeries, folder: Path, clock: Clock) -> None:
    """One series: fetched, detected on, and its results stored, once of one kind and once of all."""
    connection = item.archive.connect()
    (folder / "fetched").mkdir(parents=True)
    with clock.of("fetch"):
        connection.fetch(item.study_uid, item.series, folder / "fetched")
    clock.bytes["fetch"] = size_of(folder / "fetched")
    volume = read_volume(folder / "fetched")
    sha256 = BrightnessDetector.provenance.bundle_sha256
    for name, kinds in KINDS.items():
        sink = StoredInArchive(kinds)
        with clock.of(f"ask for earlier results, {name}"):
            sink.has(item, sha256)
        with ResultWriter(folder / name, volume, dicom=kinds) as writer:
            for result in detect_slices(BrightnessDetector(), volume):  # type: ignore[arg-type]
                writer.add(result)
        with clock.of(f"store, {name}"):
            sink.take(item, writer.folder, writer.manifest["files"])
        clock.bytes[f"store, {name}"] = size_of(writer.folder)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.dcm"))


if __name__ == "__main__":
    main()
