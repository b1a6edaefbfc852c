"""`medanomalyclip info`: what would be read from a file or folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import DetectorLoader
from .terminal import EXIT_DONE, print_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    info = commands.add_parser("info", help="tell what would be read", description="Tell what would be read.")
    info.add_argument("input", type=Path, metavar="INPUT", help="image file or DICOM folder")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=run)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    from ..volume import list_contents

    summaries = list_contents(arguments.input)
    if arguments.json:
        print_json({"name": arguments.input.name, "images": [summary.as_dict() for summary in summaries]})
    else:
        print("\n".join(summary.describe() for summary in summaries))
    return EXIT_DONE
