"""`medanomalyclip batch`: studies in; results for each series, one manifest and one table out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from .options import DetectorLoader, add_dicom_options, fraction
from .terminal import (
    EPILOG,
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    print_json,
    stop_on_interrupt,
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    batch = commands.add_parser(
        "batch",
        help="detect on every image and series in folders, and go on where an earlier run stopped",
        description="Detect on every image and series of each INPUT. DIR gets a numbered folder for each in"
        " that of its study, manifest.json, which tells of each whether it is done or why it failed, and a"
        " table of all slices. The same command goes on where it was stopped. No file's name goes into DIR;"
        " --list tells which number is which.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = batch.add_argument
    add("input", type=Path, nargs="+", metavar="INPUT", help="image files, or folders of them at any depth")
    add("--output", type=Path, required=True, metavar="DIR", help="where results, manifests and table go")
    add("--list", action="store_true", help="tell which number is which file, and what became of it")
    add("--retry", action="store_true", help="do the series again that failed before")
    add("--table", choices=("csv", "parquet"), default="csv", help="format of the table (default: csv)")
    add("--middle", action="store_true", help="only the middle slice of each volume (default: every slice)")
    add(
        "--axis",
        default="acquisition",
        metavar="AXIS",
        help="direction across the slices: axial, coronal, sagittal, acquisition, I, J or K",
    )
    add("--modality", help="CT, MR, CR, DX, US, ...: instead of what the files say")
    add("--model", type=Path, metavar="BUNDLE", help="folder of a detector (default: the bundled one)")
    add(
        "--threshold",
        type=fraction,
        help="anomaly value from which a pixel counts, 0 to 1 (default: the model's)",
    )
    add(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="pixel values shown as black and white"
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--json", action="store_true", help="print the manifest instead of lines")
    add("--quiet", action="store_true", help="print errors only")
    add_dicom_options(batch)
    batch.set_defaults(run=run)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    from ..batch import InProcess, run_batch
    from ..batch_series import BatchSettings
    from ..batch_source import search

    if arguments.window and not arguments.window[0] < arguments.window[1]:
        raise InvalidRequest("--window wants the lower value first, and two different ones")
    if arguments.list:
        return _list(arguments)
    settings = BatchSettings(
        axis=arguments.axis,
        middle=arguments.middle,
        modality=arguments.modality,
        threshold=arguments.threshold,
        window=tuple(arguments.window) if arguments.window else None,
        dicom=tuple(sorted(set(arguments.dicom))),
    )
    quiet = arguments.json or arguments.quiet
    with stop_on_interrupt() as is_stopped:
        manifest = run_batch(
            search(arguments.input, leave_out=arguments.output),
            arguments.output,
            InProcess(lambda: load(arguments.model, arguments.device)),
            settings=settings,
            table=arguments.table,
            retry=arguments.retry,
            on_series=None if quiet else _tell,
            is_stopped=is_stopped,
        )
        stopped = is_stopped()
    return _conclude(manifest, arguments, stopped)


def _conclude(manifest: dict[str, Any], arguments: argparse.Namespace, stopped: bool) -> int:
    """Tell what became of all, and the exit code that goes with it."""
    counts = manifest["counts"]
    if arguments.json:
        print_json(manifest)
    elif not arguments.quiet:
        print(f"{counts['done']} done, {counts['failed']} failed, {counts['stopped']} stopped")
    if counts["failed"]:
        print(
            f"medanomalyclip: {counts['failed']} of {len(manifest['inputs'])} inputs failed;"
            " manifest.json tells why",
            file=sys.stderr,
        )
    if stopped:
        return EXIT_INTERRUPTED
    if any(record.get("error") == "Fault" for record in manifest["inputs"]):
        return EXIT_BUG
    return EXIT_USER_ERROR if counts["failed"] else EXIT_DONE


def _tell(settled: int, found: int, item: Any, record: dict[str, Any]) -> None:
    """One series in one line; the terminal is not the results, so the file may be named."""
    words = record["state"]
    if "highest" in record:
        top = record["highest"]
        words += f"  highest score {top['score']:.3f} at slice {top['index']} of {record['slices']}"
    elif "reason" in record:
        words += f"  {record['reason']}"
    print(f"{settled}/{found}  {record['number']:04d}  {item.place}  {words}", flush=True)


def _list(arguments: argparse.Namespace) -> int:
    from ..batch_records import read_records
    from ..batch_source import search

    records = read_records(arguments.output)
    for item in search(arguments.input, leave_out=arguments.output):
        record = records.get(item.key, {})
        number = f"{record['number']:04d}" if record else "----"
        print("  ".join(filter(None, (number, record.get("state") or "to do", item.place, item.series))))
    return EXIT_DONE
