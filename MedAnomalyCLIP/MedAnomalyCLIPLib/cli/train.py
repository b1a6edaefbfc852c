"""`medanomalyclip train`: a recipe and images in; a folder with the run and its detector out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Cancelled, InvalidRequest
from .options import DetectorLoader
from .terminal import EXIT_DONE, EXIT_INTERRUPTED, print_json, stages, stop_on_interrupt

if TYPE_CHECKING:
    from ..datasets import ImageRecord

SUPPORT_RECIPE = "memory"

_EPILOG = """\
examples:
  medanomalyclip train --support normal_slices/ --output runs/my-scanner
  medanomalyclip train mediclip --data dataset/ --sets busi --clip bundled --output runs/mediclip
  medanomalyclip train mvfa_few_shot --data dataset/ --clip openai --download --output runs/mvfa

The same command goes on where an interrupted run stopped. The detector is the folder `bundle` in DIR, for
`detect --model` and `evaluate --model`.

exit codes: 0 done, 1 a fault in the program, 2 something the user can mend, 130 stopped with Ctrl-C

Research use only.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a detector",
        description="Train a detector as a recipe says, or make one from normal images alone.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = train.add_argument
    add(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="name of a shipped recipe, or a TOML or JSON file; --list names those that are shipped "
        f"(default with --support: {SUPPORT_RECIPE})",
    )
    images = train.add_mutually_exclusive_group()
    images.add_argument(
        "--data",
        type=Path,
        metavar="DATASET",
        help="CSV manifest, JSON lines, folders as in BMAD or MVTec, or volumes with segmentations",
    )
    images.add_argument(
        "--support", type=Path, metavar="PATH", help="normal images: a folder of them, a volume, or a series"
    )
    images.add_argument("--list", action="store_true", help="name the shipped recipes and stop")
    add("--sets", nargs="+", metavar="SET", help="which sets of DATASET to learn from (default: all)")
    add("--modality", default="", help="CT, MR, ...: for images that do not say")
    add(
        "--object", default="", metavar="NAME", help="what the images show, for detectors that read sentences"
    )
    add(
        "--clip",
        metavar="CLIP",
        help="bundled, the folder of a detector, a file of weights, or a name that open_clip knows "
        "(default: the recipe's)",
    )
    add("--download", action="store_true", help="fetch CLIP weights that a recipe names")
    add(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="KEY=VALUE",
        help="change one value of the recipe, as in optimisation.epochs=5",
    )
    add("--seed", type=int, help="of everything random, few-shot draws included (default: the recipe's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--output", type=Path, metavar="DIR", help="folder of the run")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--quiet", action="store_true", help="print errors only")
    train.set_defaults(run=run)


def run(arguments: argparse.Namespace, _load: DetectorLoader) -> int:
    from ..training.recipe import read_recipe, shipped_recipes

    if arguments.list:
        for name, description in shipped_recipes().items():
            print(f"{name:24}{description}")
        return EXIT_DONE
    if arguments.output is None or not (arguments.data or arguments.support):
        raise InvalidRequest("train needs images, with --data or --support, and a folder, with --output")
    if arguments.recipe is None and arguments.support is None:
        raise InvalidRequest(f"Name a recipe: {', '.join(shipped_recipes())}, or a file")
    recipe = read_recipe(arguments.recipe or SUPPORT_RECIPE, _changes(arguments))
    text = recipe.detector.text
    if arguments.support and not recipe.start and text.prompts != "coop" and not text.name:
        raise InvalidRequest("Say with --object what the images show: this recipe's sentences name it")

    from ..runtime import select_device
    from ..training.trainer import train

    records = _records(arguments)
    with stop_on_interrupt("step") as is_stopped, stages(arguments.quiet) as on_progress:
        try:
            trained = train(
                recipe,
                records,
                arguments.output,
                device=select_device(arguments.device),
                download=arguments.download,
                quiet=arguments.quiet or arguments.json,
                on_progress=on_progress,
                is_cancelled=is_stopped,
            )
        except Cancelled as error:
            print(f"medanomalyclip: {error}", file=sys.stderr)
            return EXIT_INTERRUPTED
    told: dict[str, Any] = {
        "bundle": str(trained.bundle.folder),
        "epoch": trained.epoch,
        "validation": trained.figure,
        "threshold": trained.bundle.manifest.threshold,
    }
    if arguments.json:
        print_json(told)
    elif not arguments.quiet:
        figure = "" if trained.figure is None else f"  validation {trained.figure:.3f}"
        print(f"{recipe.name}  epoch {trained.epoch}{figure}  {trained.bundle.folder}")
    return EXIT_DONE


def _changes(arguments: argparse.Namespace) -> list[str]:
    """What options say, in the words of `--set`; `--set` itself has the last word."""
    changes = []
    if arguments.clip:
        changes.append(f"clip={json.dumps(arguments.clip)}")
    if arguments.sets:
        changes.append(f"data.sets={json.dumps(arguments.sets)}")
    if arguments.object:
        changes.append(f"detector.text.name={json.dumps(arguments.object)}")
    if arguments.support:
        changes.append("data.protocol='all'")
    if arguments.seed is not None:
        changes += [f"seed={arguments.seed}", f"data.shots_seed={arguments.seed}"]
    return changes + arguments.changes


def _records(arguments: argparse.Namespace) -> list[ImageRecord]:
    from ..datasets import read_dataset, read_support

    if arguments.support:
        words = {"modality": arguments.modality, "body_part": arguments.object}
        return read_support(arguments.support, **words)
    return read_dataset(arguments.data, modality=arguments.modality)
