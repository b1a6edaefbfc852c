"""`medanomalyclip convert`: published checkpoints and their CLIP in; a bundle out."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from ..detectors.presets import CONVERTIBLE, PRESETS
from .options import DetectorLoader, fraction
from .terminal import EPILOG, EXIT_DONE, print_json, stages


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser(
        "convert",
        help="make a detector of published weights",
        description="Make a detector of the weights that the authors of a published system offer. Files are "
        "read without running anything in them; a weight that is missing, unknown or of another shape is "
        "refused by name.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = convert.add_argument
    add("system", choices=CONVERTIBLE, metavar="SYSTEM", help=", ".join(CONVERTIBLE))
    add("checkpoint", type=Path, nargs="+", metavar="CHECKPOINT", help="file of the authors' weights")
    add(
        "--clip",
        required=True,
        metavar="FILE_OR_TAG",
        help="the CLIP that they stand on: a file, OpenAI's .pt among others, or open_clip's name of "
        "pretrained weights, for example openai",
    )
    add(
        "--download", action="store_true", help="let open_clip fetch the pretrained weights that --clip names"
    )
    add("--object", default="", metavar="NAME", help="what the images show, as the sentences name it: Brain")
    add(
        "--support",
        type=Path,
        metavar="DATASET",
        help="labelled images whose normal ones a few-shot system compares with",
    )
    add(
        "--threshold",
        type=fraction,
        default=0.5,
        help="anomaly value from which a pixel counts, 0 to 1 (default: 0.5, which nobody calibrated)",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the detector")
    add("--overwrite", action="store_true", help="replace a detector that is there")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--quiet", action="store_true", help="print errors only")
    convert.set_defaults(run=run)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    from ..clip.towers import pretrained_source
    from ..conversion import convert

    if arguments.download and not Path(arguments.clip).is_file() and not arguments.quiet:
        source = pretrained_source(PRESETS[arguments.system].detector.tower, arguments.clip)
        print(f"may fetch {source}", file=sys.stderr)
    with stages(arguments.quiet) as on_progress:
        done = convert(
            arguments.system,
            arguments.checkpoint,
            arguments.clip,
            arguments.output,
            shows=arguments.object,
            support=arguments.support,
            threshold=arguments.threshold,
            download=arguments.download,
            overwrite=arguments.overwrite,
            on_progress=on_progress,
        )
    if arguments.json:
        print_json(
            {
                "name": done.bundle.manifest.name,
                "output": str(done.bundle.folder),
                "sources": [asdict(source) for source in done.sources],
                "used": done.used,
                "unused": list(done.unused),
                "notes": list(done.notes),
            }
        )
    elif not arguments.quiet:
        print(f"{done.bundle.folder}  {done.used} weights used")
        if done.unused:
            print(f"Not needed, as in the published code: {', '.join(done.unused)}")
        for note in done.notes:
            print(note)
        print("Nothing was measured and no threshold calibrated; see `medanomalyclip evaluate`.")
    return EXIT_DONE
