"""Real runs of the commands, killed with SIGKILL at random moments; what they leave must be whole or nothing.

`python -m endurance.kills --times 100` prints how many runs were killed, and what was wrong afterwards.
Each run is a process of its own, forked from one that has loaded everything, so that it takes its time where
files are written, not where libraries are imported.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Killed:
    """What came of killing one command.

    Attributes:
        command: its name.
        kills: runs that were killed before they ended.
        ended: runs that ended before they could be killed.
        nothing: kills after which no result was to be seen; the others had finished some or all results.
        faults: what was wrong afterwards; empty when all is as it should be.
        whole_seconds: what a run takes that nobody kills.
    """

    command: str
    kills: int = 0
    ended: int = 0
    nothing: int = 0
    faults: list[str] = field(default_factory=list)
    whole_seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """A command, and how to tell that its output is as it should be.

    Attributes:
        name: of the command.
        words: the command line, for a folder to write into.
        check: faults of what lies in that folder after a kill.
        content: hash of what must be the same in every finished run.
    """

    name: str
    words: Callable[[Path], Sequence[str]]
    check: Callable[[Path], list[str]]
    content: Callable[[Path], str]


def run_case(case: Case, root: Path, times: int, rng: random.Random) -> Killed:
    """Kill the command `times` times, letting one run end after each one or two kills."""
    told = Killed(case.name)
    started = time.monotonic()
    reference = root / "reference"
    if _run(case.words(reference)) != 0:
        raise RuntimeError(f"{case.name} does not run even when nobody kills it")
    told.whole_seconds = round(time.monotonic() - started, 2)
    expected = case.content(reference)
    while told.kills + told.ended < times:
        out = root / "out"
        for _ in range(rng.choice((1, 1, 2))):
            code = _run(case.words(out), kill_after=rng.uniform(0, 1.05 * told.whole_seconds))
            told.kills += code < 0
            told.ended += code >= 0
            told.nothing += code < 0 and not _seen(out)
            told.faults += case.check(out)
            if code > 0:
                told.faults.append(f"a run after a kill ended with {code}")
        code = _run(case.words(out))
        if code != 0:
            told.faults.append(f"the run that should go on ended with {code}")
        elif case.content(out) != expected:
            told.faults.append("the run that went on came to another result")
        told.faults += [f"left behind: {name}" for name in _remains(out)]
        shutil.rmtree(out, ignore_errors=True)
    return told


def _run(words: Sequence[str], kill_after: float | None = None) -> int:
    """Exit code of a command in a process of its own; negative when it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            log = nowhere if kill_after is not None else 2
            os.dup2(nowhere, 1)
            os.dup2(log, 2)
            from MedAnomalyCLIPLib.cli import main

            code = main([*map(str, words)])
        finally:
            os._exit(code)
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _seen(out: Path) -> list[Path]:
    return (
        [p for p in out.rglob("*") if p.name in ("result.json", "report.json", "bundle.json")]
        if out.is_dir()
        else []
    )


def _remains(out: Path) -> list[str]:
    """Files of half-finished work, below the output and beside it."""
    marks = (".partial", ".old", ".lock")
    found = [*out.rglob("*"), *out.parent.iterdir()]
    return [p.name for p in found if p.name.endswith(marks) and p.name != "run.lock"]


def _check_results(out: Path) -> list[str]:
    """Folders of results that can be seen are complete, and every file in them can be read."""
    stray = [p.name for p in out.glob("[!.]*") if not (p / "result.json").is_file()] if out.is_dir() else []
    faults = [f"{name} has no manifest" for name in stray]
    return faults + _check_manifests(out.glob("[!.]*/result.json") if out.is_dir() else [])


def _check_batch(out: Path) -> list[str]:
    """The same for a batch, whose results lie in folders of studies beside manifests that are whole."""
    for path in out.rglob("manifest.json") if out.is_dir() else []:
        json.loads(path.read_text())
    return _check_manifests(out.glob("*/[!.]*/result.json") if out.is_dir() else [])


def _check_manifests(manifests: Iterable[Path]) -> list[str]:
    import SimpleITK as sitk
    from PIL import Image

    faults = []
    for manifest in manifests:
        told = json.loads(manifest.read_text())
        names = {path.name for path in manifest.parent.iterdir()}
        if not told["complete"] or names != set(told["files"]):
            faults.append(f"{manifest.parent.name} is not whole")
        for name in names:
            path = manifest.parent / name
            if name.endswith(".gz"):
                gzip.decompress(path.read_bytes())
            if name.endswith((".nii.gz", ".nrrd")):
                sitk.ReadImage(str(path))
            if name.endswith(".png"):
                Image.open(path).load()
    return faults


def _check_report(out: Path) -> list[str]:
    if not out.is_dir():
        return []
    told = json.loads((out / "report.json").read_text())
    return [] if {p.name for p in out.iterdir()} == set(told["files"]) else ["the report is not whole"]


def _check_training(out: Path) -> list[str]:
    """A bundle that can be seen loads; tensor files that have their names are whole."""
    from safetensors.torch import load_file

    from MedAnomalyCLIPLib.bundle import Bundle

    if (out / "bundle").is_dir():
        Bundle.load(out / "bundle").build()
    for path in out.glob("*.safetensors") if out.is_dir() else []:
        load_file(path)
    return []


def _hash_of(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def cases(root: Path) -> list[Case]:
    """Small inputs for each command, on the detector that ships."""
    import SimpleITK as sitk

    from unit.small_runs import write_dataset

    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        voxels = rng.integers(0, 900, (2, 60, 52)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(root / f"{name}.nii.gz"))
    volumes = [root / f"{name}.nii.gz" for name in ("one", "two", "three")]
    write_dataset(root / "data")
    good = root / "data/heads_AD/train/good/img"
    common = ("--device", "cpu", "--quiet")
    recipe = (
        "--clip",
        "bundled",
        "--sets",
        "heads",
        "--set",
        "data.normal=4",
        "--set",
        "optimisation.epochs=2",
    )
    return [
        Case(
            "detect --all",
            lambda out: ["detect", *volumes, "--all", "--resume", "--output", out, *common],
            _check_results,
            lambda out: _hash_of(
                [*out.glob("*/*.png"), *out.glob("*/scores.csv"), *out.glob("*/map.nii.gz")]
            ),
        ),
        Case(
            "batch",
            lambda out: ["batch", *volumes, "--output", out, *common],
            _check_batch,
            lambda out: _hash_of([*out.glob("*/*/*.png"), *out.glob("*/*/map.nii.gz"), out / "slices.csv"]),
        ),
        Case(
            "evaluate",
            lambda out: ["evaluate", root / "data", "--draws", "20", "--overwrite", "--output", out, *common],
            _check_report,
            lambda out: _hash_of([out / "figures.csv", out / "images.csv"]),
        ),
        Case(
            "train --support",
            lambda out: ["train", "--support", good, "--output", out, *common],
            _check_training,
            lambda out: _hash_of([out / "bundle/weights.safetensors"]),
        ),
        Case(
            "train mediclip",
            lambda out: ["train", "mediclip", "--data", root / "data", *recipe, "--output", out, *common],
            _check_training,
            lambda out: _hash_of([out / "bundle/weights.safetensors", out / "validation.csv"]),
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m endurance.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="runs of each command to kill (default: 20)")
    parser.add_argument("--only", nargs="+", default=[], help="commands, by the beginning of their names")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    import MedAnomalyCLIPLib.evaluation.report
    import MedAnomalyCLIPLib.export
    import MedAnomalyCLIPLib.training.trainer  # noqa: F401
    from MedAnomalyCLIPLib.detection import SliceDetector

    SliceDetector.load(device="cpu")  # whatever that imports, forks have imported
    told = []
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        for number, case in enumerate(cases(Path(place))):
            if arguments.only and not case.name.startswith(tuple(arguments.only)):
                continue
            root = Path(place) / str(number)
            root.mkdir()
            told.append(run_case(case, root, arguments.times, random.Random(arguments.seed)))
            if not arguments.json:
                print(asdict(told[-1]), flush=True)
    if arguments.json:
        print(json.dumps([asdict(killed) for killed in told]))
    return 1 if any(killed.faults for killed in told) else 0


if __name__ == "__main__":
    sys.exit(main())
