"""Measure what an archive costs beside detection: searching, results on disk, records, the table.

    python Testing/benchmarks/archive.py
    python Testing/benchmarks/archive.py --folder /archive/2024/01     # searching of images of your own

Writes made-up CT series (512 x 512, 16 bit) if no folder is given. Times are those of the processor, for one
process of this computer, so that other work on it does not count, and waiting for disks neither.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TESTING = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTING.parent / "MedAnomalyCLIP"), str(TESTING), str(TESTING / "unit")]

from images import write_dicom  # noqa: E402

from endurance import resident_bytes  # noqa: E402
from harness.fake_detector import BrightnessDetector  # noqa: E402
from MedAnomalyCLIPLib.batch import InProcess, run_batch  # noqa: E402
from MedAnomalyCLIPLib.batch_records import Records, batch_folder  # noqa: E402
from MedAnomalyCLIPLib.batch_series import DONE, BatchSettings  # noqa: E402
from MedAnomalyCLIPLib.batch_source import FileInput, search  # noqa: E402
from MedAnomalyCLIPLib.batch_table import check_table_format, write_table  # noqa: E402
from MedAnomalyCLIPLib.detection import SliceDetector, detect_slices  # noqa: E402
from MedAnomalyCLIPLib.geometry import acquisition_axis, slice_count  # noqa: E402


class Brightness(BrightnessDetector):
    """Takes no time, so that the rest can be seen."""

    def threshold_with(self, prompt: object) -> float:
        return self.threshold

    def title_of(self, prompt: object) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="DICOM series to search, instead of made-up ones")
    parser.add_argument("--series", type=int, default=10, help="made-up series (default: 10)")
    parser.add_argument("--slices", type=int, default=50, help="of each (default: 50)")
    parser.add_argument("--records", type=int, default=100_000, help="series in records (default: 100,000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="archive-") as place:
        folder = arguments.folder or write_archive(Path(place) / "archive", arguments)
        measure_search(folder)
        measure_detection(folder)
        measure_results(folder, Path(place) / "out")
        measure_records(Path(place) / "records", arguments.records)


def write_archive(folder: Path, arguments: argparse.Namespace) -> Path:
    rng = np.random.default_rng(0)
    rows, columns = np.indices((512, 512)) - 256.0
    body = np.where(
        rows**2 + columns**2 < 200**2, 40.0 + 60 * np.sin(rows / 30) * np.cos(columns / 40), -1000
    )
    for series in range(arguments.series):
        place = folder / f"{series}"
        place.mkdir(parents=True)
        for number in range(arguments.slices):
            write_dicom(
                place / f"{number}.dcm",
                (body + rng.normal(0, 12, body.shape)).astype(np.int16),
                StudyInstanceUID=f"1.2.{series}",
                SeriesInstanceUID=f"1.2.{series}.1",
                InstanceNumber=number + 1,
                ImagePositionPatient=[0.0, 0.0, 2.0 * number],
            )
    return folder


def measure_search(folder: Path) -> None:
    files = sum(path.is_file() for path in folder.rglob("*"))
    started = time.process_time()
    series = len(list(search([folder])))
    seconds = time.process_time() - started
    print(f"search: {series} series, {files} files, {1000 * seconds / files:.2f} ms a file")


def measure_results(folder: Path, out: Path) -> None:
    started = time.process_time()
    manifest = run_batch(search([folder]), out, InProcess(Brightness))
    seconds = time.process_time() - started
    done = [record for record in manifest["inputs"] if record["state"] == DONE]
    slices = sum(record["slices"] for record in done)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    count = sum(path.is_file() for path in out.rglob("*"))
    print(f"reading and writing, without a network: {1000 * seconds / slices:.1f} ms a slice")
    print(f"results: {size / slices / 1e3:.0f} kB and {count / slices:.2f} files a slice")
    check_table_format("parquet")  # imports what it takes
    for form in ("csv", "parquet"):
        started = time.process_time()
        path = write_table(out, done, form)  # type: ignore[arg-type]
        seconds = time.process_time() - started
        print(
            f"table, {form}: {1e6 * seconds / slices:.0f} µs and {path.stat().st_size / slices:.0f} B a slice"
        )


def measure_detection(folder: Path) -> None:
    """The bundled detector on one thread, on the middle slices of a series, once it is warm."""
    import torch

    torch.set_num_threads(1)
    volume = next(search([folder])).read(None)
    detector = SliceDetector.load(device="cpu")
    middle = slice_count(volume, acquisition_axis(volume)) // 2
    few = range(max(0, middle - 4), middle + 4)
    list(detect_slices(detector, volume, indices=few))
    started = time.process_time()
    count = len(list(detect_slices(detector, volume, indices=few)))
    print(f"bundled detector: {1000 * (time.process_time() - started) / count:.0f} ms a slice")


def measure_records(out: Path, count: int) -> None:
    outcome = {"state": DONE, "modality": "CT", "slices": 200}
    highest = {"index": 17, "score": 0.512345, "percentile": 98.25, "area_mm2": 123.4567}
    before = resident_bytes()
    with batch_folder(out):
        records = Records(out, BatchSettings())
        started = time.process_time()
        for number in range(count):
            item = FileInput(Path(f"{number}"), f"{number // 10}/{number}")
            records.take(records.of(item), {**outcome, "highest": dict(highest)})
        seconds = time.process_time() - started
        grown = resident_bytes() - before
        started = time.process_time()
        records.save()
        saved = time.process_time() - started
        size = (out / "manifest.json").stat().st_size
    print(f"records: {1e6 * seconds / count:.0f} µs and {grown / count:.0f} B of memory a series")
    print(f"manifests of {count:,} series: {saved:.1f} s, {size / count:.0f} B a series in manifest.json")


if __name__ == "__main__":
    main()
