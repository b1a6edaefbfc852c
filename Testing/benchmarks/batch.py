"""Measure a batch: worker processes against one, on as many cores as each is given.

    python Testing/benchmarks/batch.py
    python Testing/benchmarks/batch.py --series 40 --slices 16 --side 256 --rounds 3 --json figures.json

Runs the command `medanomalyclip batch` on made-up volumes with the bundled detector, each kind of run on its
own share of the cores: one process without Dask, one worker, two workers; for each round all of them in turn,
since other work on the machine slows all down. Told are series per minute
between the first that was done and the last, so without starting and loading, and the seconds of the whole
command. The first series of each worker counts as started.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import SimpleITK

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kind:
    """One way to run.

    Attributes:
        name: in the table.
        workers: worker processes; 0 for a batch without Dask.
        cores: processor cores that all of its processes may use.
    """

    name: str
    workers: int
    cores: int


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        kind: name of its kind.
        per_minute: series per minute, once all workers are at work.
        seconds: of the whole command.
        load: work that waited or ran on the whole machine when it began, as the system averages it.
    """

    kind: str
    per_minute: float
    seconds: float
    load: float


def main() -> None:
    arguments = parse_arguments()
    available = sorted(os.sched_getaffinity(0))
    kinds = [Kind("no Dask, 1 core", 0, 1), Kind("1 worker, 1 core", 1, 1)]
    for cores in arguments.cores:
        kinds += [Kind(f"no Dask, {cores} cores", 0, cores), Kind(f"1 worker, {cores} cores", 1, cores)]
        kinds.append(Kind(f"{cores} workers, {cores} cores", cores, cores))
    lacking = [kind.name for kind in kinds if kind.cores > len(available)]
    if lacking:
        sys.exit(f"This process may use {len(available)} cores; not enough for: {', '.join(lacking)}")
    measured = []
    with tempfile.TemporaryDirectory(prefix="batch-benchmark-") as place:
        studies = write_studies(Path(place) / "studies", arguments)
        for number in range(arguments.rounds):
            for kind in kinds:
                out = Path(place) / f"{number}-{kind.name}"
                measured.append(run(kind, studies, out, available))
                print(measured[-1], file=sys.stderr, flush=True)
    print_table(kinds, measured, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in measured], indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--series", type=int, default=24, help="volumes (default: 24)")
    add("--slices", type=int, default=8, help="of each (default: 8)")
    add("--side", type=int, default=256, help="rows and columns (default: 256)")
    add("--cores", type=int, nargs="*", default=[2], help="numbers of cores, and of workers (default: 2)")
    add("--rounds", type=int, default=3, help="how often each is run (default: 3)")
    add("--json", type=Path, help="file for all figures")
    return parser.parse_args()


def write_studies(folder: Path, arguments: argparse.Namespace) -> Path:
    """Noise in a bright disc, a folder for each ten volumes."""
    rng = np.random.default_rng(0)
    side = arguments.side
    rows, columns = np.indices((side, side)) - side / 2
    disc = 400 * (rows**2 + columns**2 < (0.4 * side) ** 2)
    for number in range(arguments.series):
        voxels = disc + rng.normal(0, 40, (arguments.slices, side, side))
        path = folder / f"study{number // 10}" / f"{number}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels.astype(np.int16)), str(path))
    return folder


def run(kind: Kind, studies: Path, out: Path, available: list[int]) -> Measured:
    cores = set(available[: kind.cores])
    words = ["batch", studies, "--output", out, "--device", "cpu", "--modality", "MR"]
    words += ["--workers", kind.workers] if kind.workers else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "MedAnomalyCLIP")}
    environment["OMP_NUM_THREADS"] = str(kind.cores // max(1, kind.workers))
    load, started, ends = os.getloadavg()[0], time.monotonic(), []
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # what is started now inherits it
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "MedAnomalyCLIPLib.cli", *map(str, words)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            ends = [time.monotonic() for line in process.stdout if "  done  " in line]
    finally:
        os.sched_setaffinity(0, before)
    if process.returncode != 0:
        sys.exit(f"{kind.name} ended with {process.returncode}")
    first = max(1, kind.workers)
    per_minute = 60 * (len(ends) - first) / (ends[-1] - ends[first - 1])
    return Measured(kind.name, per_minute, time.monotonic() - started, load)


def print_table(kinds: list[Kind], measured: list[Measured], arguments: argparse.Namespace) -> None:
    def of(kind: Kind) -> list[Measured]:
        return [each for each in measured if each.kind == kind.name]

    base = statistics.median(each.per_minute for each in of(kinds[1]))
    loads = [each.load for each in measured]
    print(
        f"{arguments.series} series of {arguments.slices} slices of {arguments.side} px squared,"
        f" {arguments.rounds} rounds; {os.cpu_count()} cores, load {min(loads):.1f} to {max(loads):.1f}"
    )
    print("| run | series a minute, median (range) | against 1 worker, 1 core | whole command, s |")
    print("|---|---|---|---|")
    for kind in kinds:
        rates = [each.per_minute for each in of(kind)]
        middle = statistics.median(rates)
        print(
            f"| {kind.name} | {middle:.1f} ({min(rates):.1f} to {max(rates):.1f}) | {middle / base:.2f} x |"
            f" {statistics.median(each.seconds for each in of(kind)):.0f} |"
        )


if __name__ == "__main__":
    main()
