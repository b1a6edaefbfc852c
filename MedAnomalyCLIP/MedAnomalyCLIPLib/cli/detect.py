"""`medanomalyclip detect`: images in; for each a folder of results and one line out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Cancelled, InvalidRequest, MedAnomalyCLIPError, OutputFailed
from .options import DetectorLoader, add_device_options, add_dicom_options, fraction
from .terminal import (
    EPILOG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    failure,
    print_json,
    stop_on_interrupt,
)

if TYPE_CHECKING:
    from ..detection import SliceDetector
    from ..prompt import Prompt
    from ..volume import Volume

_SUFFIXES = (
    *(".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"),
    *(".dcm", ".dicom", ".ima", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    detect = commands.add_parser(
        "detect",
        help="detect abnormalities and write the results",
        description="Detect abnormalities and write, for each INPUT, a folder DIR/<name of INPUT> with an "
        "overlay picture for each slice, the anomaly map, the segmentation, scores.csv and result.json.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = detect.add_argument
    add("input", type=Path, nargs="+", metavar="INPUT", help="image files or DICOM folders")
    which = detect.add_mutually_exclusive_group()
    which.add_argument(
        "--slice",
        type=int,
        metavar="N",
        help="index of the slice, counted from 0 (default: the middle slice of a volume)",
    )
    which.add_argument("--all", action="store_true", help="every slice")
    add(
        "--axis",
        metavar="AXIS",
        help="direction across the slices: axial, coronal, sagittal, acquisition, I, J or K "
        "(default: acquisition, as the image was taken)",
    )
    add("--modality", help="CT, MR, CR, DX, US, ...: instead of what the file says")
    add("--series", metavar="UID", help="which series of a DICOM folder; `info` lists them")
    add("--model", type=Path, metavar="BUNDLE", help="folder of a detector (default: the bundled one)")
    add(
        "--threshold",
        type=fraction,
        help="anomaly value from which a pixel counts, 0 to 1 (default: the model's)",
    )
    which_text = detect.add_mutually_exclusive_group()
    which_text.add_argument(
        "--preset",
        default="auto",
        metavar="NAME",
        help="kind of image whose text is compared with; 'auto' goes by what the image says of itself, "
        "'none' takes the text for all kinds (default: auto; `info --model` lists them)",
    )
    which_text.add_argument("--normal", nargs="+", metavar="PHRASE", help="own phrases for what is normal")
    add("--abnormal", nargs="+", metavar="PHRASE", help="own phrases for what is not, beside --normal")
    add(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="pixel values shown as black and white"
    )
    add_device_options(detect)
    add("--output", type=Path, required=True, metavar="DIR", help="where the result folders go")
    earlier = detect.add_mutually_exclusive_group()
    earlier.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
    earlier.add_argument(
        "--resume",
        action="store_true",
        help="leave out images whose results are there, whole and by the same detector and settings, as "
        "after a run that was ended",
    )
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--quiet", action="store_true", help="print errors only")
    add_dicom_options(detect)
    detect.set_defaults(run=run)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    """Each input in turn; one that fails does not keep the others from being done."""
    if bool(arguments.normal) != bool(arguments.abnormal):
        raise InvalidRequest("Own phrases are needed for both: --normal and --abnormal")
    if arguments.window and not arguments.window[0] < arguments.window[1]:
        raise InvalidRequest("--window wants the lower value first, and two different ones")
    folders = _result_folders(arguments.input, arguments.output)
    results: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    interrupted = False
    detector: SliceDetector | None = None
    with stop_on_interrupt() as is_stopped:
        for path, folder in folders:
            try:
                volume = _read(path, arguments)
            except MedAnomalyCLIPError as error:
                failures.append(failure(path, error))
                continue
            # Not before an image could be read: a detector takes seconds to load.
            detector = detector or load(arguments.model, arguments.device)
            try:
                manifest = _detect_volume(detector, volume, path.name, folder, arguments, is_stopped)
            except MedAnomalyCLIPError as error:
                failures.append(failure(path, error))
                continue
            if manifest:
                results.append({"name": path.name, "output": str(folder), **manifest})
                if not (arguments.json or arguments.quiet):
                    print(_line(results[-1]), flush=True)
            if is_stopped():
                interrupted = True
                break
    if arguments.json:
        print_json({"results": results, "failures": failures, "interrupted": interrupted})
    if failures and len(folders) > 1:
        names = ", ".join(failed["name"] for failed in failures)
        print(f"medanomalyclip: {len(failures)} of {len(folders)} inputs failed: {names}", file=sys.stderr)
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR if failures else EXIT_DONE


def _read(path: Path, arguments: argparse.Namespace) -> Volume:
    from ..volume import read_volume

    return read_volume(path, modality=arguments.modality, series=arguments.series)


def _detect_volume(
    detector: SliceDetector,
    volume: Volume,
    name: str,
    folder: Path,
    arguments: argparse.Namespace,
    is_stopped: Callable[[], bool],
) -> dict[str, Any]:
    """Detects and writes the wanted slices of one image; returns the manifest, empty when none was done.

    With --resume, the manifest of an earlier run that answers, with "resumed": true.
    """
    from tqdm import tqdm

    from ..detection import detect_slices
    from ..export import ResultWriter
    from ..geometry import resolve_axis, slice_count
    from ..resume import answers, earlier_results

    axis = resolve_axis(volume, arguments.axis or "acquisition")
    count = slice_count(volume, axis)
    indices = list(range(count)) if arguments.all else [arguments.slice]
    if indices == [None]:
        indices = [count // 2]
        if count > 1 and not arguments.quiet:
            print(
                f"{name}: slice {indices[0]} of 0 to {count - 1}, the middle one; see --slice and --all",
                file=sys.stderr,
            )
    window = tuple(arguments.window) if arguments.window else None
    prompt = _prompt(detector, volume, name, arguments)
    overwrite = arguments.overwrite
    if arguments.resume and (earlier := earlier_results(folder)) is not None:
        limit = detector.threshold_with(prompt) if arguments.threshold is None else arguments.threshold
        same = answers(
            earlier,
            volume=volume,
            provenance=detector.provenance,
            threshold=limit,
            window=window,
            prompt=detector.title_of(prompt),
            axis=axis,
            indices=indices,
            dicom=arguments.dicom,
        )
        if not same:
            raise OutputFailed(
                f"{folder.name} holds results of another image, detector or settings; "
                "use --overwrite, or another --output"
            )
        if earlier.get("complete"):
            return {**earlier, "resumed": True}
        overwrite = True
    writer = ResultWriter(
        folder,
        volume,
        requested=len(indices),
        window=window,
        overwrite=overwrite,
        dicom=arguments.dicom,
    )
    found = detect_slices(
        detector,
        volume,
        axis=axis,
        indices=indices,
        threshold=arguments.threshold,
        window=window,
        prompt=prompt,
        is_cancelled=is_stopped,
    )
    # None: no bar when nobody watches.
    hidden = True if arguments.quiet or len(indices) == 1 else None
    try:
        with writer, tqdm(found, name, len(indices), leave=False, unit="slice", disable=hidden) as progress:
            for result in progress:
                writer.add(result)
    except Cancelled:
        if not is_stopped():
            raise
    return writer.manifest


def _prompt(detector: SliceDetector, volume: Volume, name: str, arguments: argparse.Namespace) -> Prompt:
    """What the options ask to compare with."""
    from ..prompt import Prompt

    if arguments.normal:
        return Prompt(normal=tuple(arguments.normal), abnormal=tuple(arguments.abnormal))
    if arguments.preset == "auto":
        return Prompt(detector.guess_preset(volume.modality, f"{volume.body_part} {name}"))
    return Prompt("" if arguments.preset == "none" else arguments.preset)


def _result_folders(paths: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """(input, its folder) for each input, named after it, and after its parent where names are alike."""
    names = [_plain_name(path) for path in paths]
    names = [
        f"{path.resolve().parent.name}_{name}" if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"Two inputs would be written to the same folder, {name}; run them apart")
    return [(path, output / name) for path, name in zip(paths, names, strict=True)]


def _plain_name(path: Path) -> str:
    """The file's name without its format; other dots stay, as in names that are DICOM UIDs."""
    name = path.resolve().name
    suffix = next((s for s in _SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)] or name


def _line(result: dict[str, Any]) -> str:
    """One image in one line; with several slices, the one with the highest score."""
    from ..overlay import area_in_words

    slices = result["slices"]
    top = max(slices, key=lambda record: record["score"])
    place = f"{top['view'].lower()} slice {top['index']}"
    if len(slices) > 1:
        place += f" (highest of {len(slices)})"
    if result.get("resumed"):
        place += " (done before)"
    if not result["complete"]:
        place += f" (stopped: {len(slices)} of {result['slices_requested']} done)"
    percentile = "–" if top["percentile"] is None else f"{top['percentile']:.0f}"
    return "  ".join(
        (
            result["name"],
            place,
            f"score {top['score']:.3f}",
            f"percentile {percentile}",
            *(["UNLIKE what the detector was made for"] if top["unlike"] else []),
            f"area {area_in_words(top['area_mm2'], top['area_pixels'])}",
            str(Path(result["output"]) / top["overlay"]),
        )
    )
