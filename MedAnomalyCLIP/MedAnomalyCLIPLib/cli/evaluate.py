"""`medanomalyclip evaluate`: detectors and labelled images in; a report and one line for each set out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import Cancelled, InvalidRequest
from .options import DetectorLoader, add_device_options
from .terminal import EPILOG, EXIT_DONE, EXIT_INTERRUPTED, print_json, stages, stop_on_interrupt


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a detector on labelled images",
        description="Measure a detector on labelled images and write a report: report.html to read, "
        "report.json, figures.csv and images.csv. Every figure stands beside what brightness, position and "
        "the shape of the picture reach alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = evaluate.add_argument
    add(
        "dataset",
        type=Path,
        metavar="DATASET",
        help="CSV manifest, JSON lines, folders as in BMAD or MVTec, or volumes with segmentations",
    )
    add("--split", default="test", help="which part to measure on (default: test)")
    add("--modality", default="", help="CT, MR, ...: for sets that do not say")
    add(
        "--model", type=Path, nargs="+", metavar="BUNDLE", help="detectors, of which mean and spread are told"
    )
    add("--draws", type=int, default=1000, help="of the bootstrap, 0 for no intervals (default: 1000)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add("--names", action="store_true", help="name the image files in images.csv; names may tell who it is")
    add_device_options(evaluate)
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    add("--overwrite", action="store_true", help="replace an earlier report")
    add("--json", action="store_true", help="print report.json instead of lines")
    add("--quiet", action="store_true", help="print errors only")
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    from ..datasets import read_dataset
    from ..evaluation.report import evaluate

    records = read_dataset(arguments.dataset, modality=arguments.modality)
    chosen = [record for record in records if record.split == arguments.split]
    if not chosen:
        splits = ", ".join(sorted({record.split for record in records}))
        raise InvalidRequest(f"{arguments.dataset.name} has no part {arguments.split!r}; it has: {splits}")
    with stop_on_interrupt() as is_stopped, stages(arguments.quiet) as on_progress:
        try:
            report = evaluate(
                arguments.model,
                chosen,
                arguments.output,
                device=arguments.device,
                draws=arguments.draws,
                seed=arguments.seed,
                names=arguments.names,
                overwrite=arguments.overwrite,
                on_progress=on_progress,
                is_cancelled=is_stopped,
                load=load,
            )
        except Cancelled:
            print("medanomalyclip: stopped; nothing was written", file=sys.stderr)
            return EXIT_INTERRUPTED
    if arguments.json:
        print_json(report)
    elif not arguments.quiet:
        for entry in report["sets"]:
            print(_set_line(entry))
        print(arguments.output / "report.html")
    return EXIT_DONE


def _set_line(entry: dict[str, Any]) -> str:
    """One set in one line: the detector's own figures, each with its interval."""
    parts = [entry["name"], f"{entry['normal']} normal, {entry['abnormal']} abnormal"]
    for row in entry["rows"]:
        if row["ranker"] == "detector":
            for name in ("auroc", "ap"):
                low_high = row["intervals"].get(name)
                interval = f" ({low_high[0]:.2f} to {low_high[1]:.2f})" if low_high else ""
                if name in row["figures"]:
                    parts.append(f"{row['level']} {name.upper()} {row['figures'][name]:.2f}{interval}")
    return "  ".join(parts)
