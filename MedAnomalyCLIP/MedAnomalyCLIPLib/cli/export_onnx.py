"""`medanomalyclip export-onnx`: a detector in; the same with a graph that runs without PyTorch out."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import DetectorLoader
from .terminal import EPILOG, EXIT_DONE, print_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export-onnx",
        help="let a detector run in ONNX Runtime",
        description="Write network.onnx into the folder of a detector, so that it runs in ONNX Runtime on "
        "the CPU, without PyTorch. Its weights stay in weights.safetensors; it is compared with "
        "PyTorch before it is kept.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of a detector")
    export.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    export.set_defaults(run=run)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    from ..bundle import NETWORK
    from ..onnx_export import export_network

    manifest = export_network(arguments.bundle).manifest
    if arguments.json:
        print_json(
            {"name": manifest.name, "bytes": manifest.network_bytes, "sha256": manifest.network_sha256}
        )
    else:
        print(f"{arguments.bundle / NETWORK}  {manifest.network_bytes / 1000:.0f} kB")
    return EXIT_DONE
