"""`medanomalyclip info`: what would be read from a file or folder, or what a detector is."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import DetectorLoader
from .terminal import EXIT_DONE, print_json

BUNDLED = Path("bundled")
NOT_INSTALLED = "nothing that is installed; pip install 'medanomalyclip[full]'"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    info = commands.add_parser("info", help="tell what would be read", description="Tell what would be read.")
    which = info.add_mutually_exclusive_group(required=True)
    which.add_argument("input", type=Path, nargs="?", metavar="INPUT", help="image file or DICOM folder")
    which.add_argument(
        "--model",
        type=Path,
        nargs="?",
        const=BUNDLED,
        metavar="BUNDLE",
        help="tell of a detector (the bundled one)",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=run)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    if arguments.model is not None:
        return _tell_detector(arguments.model, arguments.json)
    from ..volume import list_contents

    summaries = list_contents(arguments.input)
    if arguments.json:
        print_json({"name": arguments.input.name, "images": [summary.as_dict() for summary in summaries]})
    else:
        print("\n".join(summary.describe() for summary in summaries))
    return EXIT_DONE


def _tell_detector(model: Path, as_json: bool) -> int:
    from ..bundle import default_bundle_path, read_manifest
    from ..networks import precision_of, runtime_of
    from ..result import RESEARCH_USE_ONLY

    manifest = read_manifest(default_bundle_path() if model == BUNDLED else model)
    presets = {preset.name: preset.title for preset in manifest.presets}
    if as_json:
        told = {"name": manifest.name, "version": manifest.version, "licence": manifest.licence}
        told |= {"runtime": runtime_of(manifest), "precision": precision_of(manifest)}
        print_json({**told, "threshold": manifest.threshold, "presets": presets, "notice": RESEARCH_USE_ONLY})
        return EXIT_DONE
    print(f"{manifest.name}, version {manifest.version}: {manifest.description}")
    print(f"licence: {manifest.licence}")
    runtime = runtime_of(manifest)
    print(f"runs on the CPU in: {f'{runtime}, {precision_of(manifest)}' if runtime else NOT_INSTALLED}")
    print(f"pixel threshold: {manifest.threshold:.2f}")
    for name, title in presets.items():
        calibration = manifest.calibration(name)
        known = "no normal reference" if calibration is None else calibration.reference.description
        print(f"preset {name}: {title}; {known}")
    print(RESEARCH_USE_ONLY)
    return EXIT_DONE
