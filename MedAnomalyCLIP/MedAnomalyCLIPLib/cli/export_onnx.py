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
        "the CPU, without PyTorch, and network_int8.onnx, so that it does so in 8-bit integers. Its weights "
        "stay in weights.safetensors. The one is compared with PyTorch before it is kept, the other with the "
        "one: it is left out if scores or maps would move by more than is stated.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of a detector")
    export.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    export.set_defaults(run=run)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    from ..bundle import NETWORK, NETWORK_INT8
    from ..onnx_export import export_network

    refusals: list[str] = []
    manifest = export_network(arguments.bundle, refusals.append).manifest
    integers = manifest.int8
    if arguments.json:
        told = {"name": manifest.name, "bytes": manifest.network_bytes, "sha256": manifest.network_sha256}
        print_json({**told, "int8": None if integers is None else vars(integers), "refused": refusals})
        return EXIT_DONE
    print(f"{arguments.bundle / NETWORK}  {manifest.network_bytes / 1000:.0f} kB")
    if integers is not None:
        print(
            f"{arguments.bundle / NETWORK_INT8}  {integers.bytes / 1000:.0f} kB; moves scores by "
            f"{integers.score_drift:.2g} at most, maps by {integers.map_drift:.2g}"
        )
    for line in refusals:
        print(line)
    return EXIT_DONE
