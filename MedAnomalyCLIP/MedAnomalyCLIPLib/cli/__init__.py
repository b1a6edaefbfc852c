"""The command line: paths and options in; result folders, one line for each image and an exit code out.

Whatever a path leads to is read, detected and written by the library; nothing is computed here. Each command
is a module with `add_parser`, which tells its options, and `run`, which obeys them. torch and its like are
imported only when a command needs them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import MedAnomalyCLIPError, needs_full
from ..runtime import AUTO
from . import batch, convert, detect, evaluate, export_onnx, info, train, web
from .options import DetectorLoader, LoadingIn, load_detector
from .terminal import (
    EPILOG,
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    complain,
    failure,
    print_json,
)

__all__ = [
    "EXIT_BUG",
    "EXIT_DONE",
    "EXIT_INTERRUPTED",
    "EXIT_USER_ERROR",
    "load_detector",
    "main",
]

# What a light installation has not.
_FULL = ("torch", "torchvision", "monai", "open_clip", "timm")

_COMMANDS = (detect, batch, evaluate, train, convert, export_onnx, info, web)


def main(argv: Sequence[str] | None = None, *, load: DetectorLoader = load_detector) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: arguments without the program's name; those of the process when None.
        load: what turns a bundle and a device name into a detector.
    """
    arguments = _parser().parse_args(argv)
    runtime, precision = (getattr(arguments, name, AUTO) for name in ("runtime", "precision"))
    if (runtime, precision) != (AUTO, AUTO):
        load = LoadingIn(load, runtime, precision)
    try:
        return _run(arguments, load)
    except MedAnomalyCLIPError as error:
        complain(error)
        if arguments.json:
            print_json({"results": [], "failures": [failure(None, error)]})
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("medanomalyclip: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    """Raises DependencyMissing for what only the full installation has, beside what the command raises."""
    try:
        return arguments.run(arguments, load)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _FULL:
            raise
        raise needs_full("This needs", error) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medanomalyclip",
        description="Score, heat map and mask of abnormalities in slices of medical images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"medanomalyclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser
