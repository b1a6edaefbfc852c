"""The command line: paths and options in; result folders, one line for each image and an exit code out.

Whatever a path leads to is read, detected and written by the library; nothing is computed here. torch and its
like are imported only when a detector is loaded.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import Cancelled, InvalidRequest, MedAnomalyCLIPError, SeriesAmbiguous

if TYPE_CHECKING:
    from .detection import SliceDetector
    from .volume import Volume

EXIT_DONE, EXIT_BUG, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

_SUFFIXES = (
    *(".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"),
    *(".dcm", ".dicom", ".ima", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"),
)

_EPILOG = """\
exit codes:
  0    done
  1    a fault in the program; please report what was printed
  2    something the user can mend; with several inputs, the others were still done
  130  stopped with Ctrl-C; the slices finished by then are written

Research use only. A candidate, not a diagnosis.
"""

DetectorLoader = Callable[["Path | str | None", str], "SliceDetector"]


def load_detector(bundle: Path | str | None, device: str) -> SliceDetector:
    """The detector in a bundle's folder, or the bundled one, ready on its device."""
    from .detection import SliceDetector

    return SliceDetector.load(bundle, device=device)


def main(argv: Sequence[str] | None = None, *, load: DetectorLoader = load_detector) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: arguments without the program's name; those of the process when None.
        load: what turns a bundle and a device name into a detector.
    """
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "detect":
            return _detect(arguments, load)
        return _evaluate(arguments, load) if arguments.command == "evaluate" else _info(arguments)
    except MedAnomalyCLIPError as error:
        _complain(error)
        if arguments.json:
            _print_json({"results": [], "failures": [_failure(None, error)]})
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("medanomalyclip: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medanomalyclip",
        description="Score, heat map and mask of abnormalities in slices of medical images.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"medanomalyclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_detect(commands)
    _add_evaluate(commands)
    info = commands.add_parser("info", help="tell what would be read", description="Tell what would be read.")
    info.add_argument("input", type=Path, metavar="INPUT", help="image file or DICOM folder")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_detect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    detect = commands.add_parser(
        "detect",
        help="detect abnormalities and write the results",
        description="Detect abnormalities and write, for each INPUT, a folder DIR/<name of INPUT> with an "
        "overlay picture for each slice, the anomaly map, the segmentation, scores.csv and result.json.",
        epilog=_EPILOG,
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
        type=_fraction,
        help="anomaly value from which a pixel counts, 0 to 1 (default: the model's)",
    )
    add(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="pixel values shown as black and white"
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--output", type=Path, required=True, metavar="DIR", help="where the result folders go")
    add("--overwrite", action="store_true", help="replace the results of an earlier run")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--quiet", action="store_true", help="print errors only")


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a detector on labelled images",
        description="Measure a detector on labelled images and write a report: report.html to read, "
        "report.json, figures.csv and images.csv. Every figure stands beside what brightness, position and "
        "the shape of the picture reach alone.",
        epilog=_EPILOG,
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
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    add("--overwrite", action="store_true", help="replace an earlier report")
    add("--json", action="store_true", help="print report.json instead of lines")
    add("--quiet", action="store_true", help="print errors only")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


def _detect(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    """Each input in turn; one that fails does not keep the others from being done."""
    if arguments.window and not arguments.window[0] < arguments.window[1]:
        raise InvalidRequest("--window wants the lower value first, and two different ones")
    folders = _result_folders(arguments.input, arguments.output)
    results: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    interrupted = False
    detector: SliceDetector | None = None
    with _stop_on_interrupt() as is_stopped:
        for path, folder in folders:
            try:
                volume = _read(path, arguments)
            except MedAnomalyCLIPError as error:
                failures.append(_failure(path, error))
                continue
            # Not before an image could be read: a detector takes seconds to load.
            detector = detector or load(arguments.model, arguments.device)
            try:
                manifest = _detect_volume(detector, volume, path.name, folder, arguments, is_stopped)
            except MedAnomalyCLIPError as error:
                failures.append(_failure(path, error))
                continue
            if manifest:
                results.append({"name": path.name, "output": str(folder), **manifest})
                if not (arguments.json or arguments.quiet):
                    print(_line(results[-1]), flush=True)
            if is_stopped():
                interrupted = True
                break
    if arguments.json:
        _print_json({"results": results, "failures": failures, "interrupted": interrupted})
    if failures and len(folders) > 1:
        names = ", ".join(failure["name"] for failure in failures)
        print(f"medanomalyclip: {len(failures)} of {len(folders)} inputs failed: {names}", file=sys.stderr)
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR if failures else EXIT_DONE


def _read(path: Path, arguments: argparse.Namespace) -> Volume:
    from .volume import read_volume

    return read_volume(path, modality=arguments.modality, series=arguments.series)


def _detect_volume(
    detector: SliceDetector,
    volume: Volume,
    name: str,
    folder: Path,
    arguments: argparse.Namespace,
    is_stopped: Callable[[], bool],
) -> dict[str, Any]:
    """Detects and writes the wanted slices of one image; returns the manifest, empty when none was done."""
    from tqdm import tqdm

    from .detection import detect_slices
    from .export import ResultWriter
    from .geometry import resolve_axis, slice_count

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
    writer = ResultWriter(folder, volume, requested=len(indices), overwrite=arguments.overwrite)
    found = detect_slices(
        detector,
        volume,
        axis=axis,
        indices=indices,
        threshold=arguments.threshold,
        window=tuple(arguments.window) if arguments.window else None,
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


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Lets the first Ctrl-C finish the slice in progress; the second one stops at once."""
    stop = threading.Event()

    def on_interrupt(_signal: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nStopping after this slice; Ctrl-C again stops at once.", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _line(result: dict[str, Any]) -> str:
    """One image in one line; with several slices, the one with the highest score."""
    from .overlay import area_in_words

    slices = result["slices"]
    top = max(slices, key=lambda record: record["score"])
    place = f"{top['view'].lower()} slice {top['index']}"
    if len(slices) > 1:
        place += f" (highest of {len(slices)})"
    if not result["complete"]:
        place += f" (stopped: {len(slices)} of {result['slices_requested']} done)"
    percentile = "–" if top["percentile"] is None else f"{top['percentile']:.0f}"
    return "  ".join(
        (
            result["name"],
            place,
            f"score {top['score']:.3f}",
            f"percentile {percentile}",
            f"area {area_in_words(top['area_mm2'], top['area_pixels'])}",
            str(Path(result["output"]) / top["overlay"]),
        )
    )


def _evaluate(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    from .datasets import read_dataset
    from .evaluation.report import evaluate

    records = read_dataset(arguments.dataset, modality=arguments.modality)
    chosen = [record for record in records if record.split == arguments.split]
    if not chosen:
        splits = ", ".join(sorted({record.split for record in records}))
        raise InvalidRequest(f"{arguments.dataset.name} has no part {arguments.split!r}; it has: {splits}")
    with _stop_on_interrupt() as is_stopped, _stages(arguments.quiet) as on_progress:
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
        _print_json(report)
    elif not arguments.quiet:
        for entry in report["sets"]:
            print(_set_line(entry))
        print(arguments.output / "report.html")
    return EXIT_DONE


@contextmanager
def _stages(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each thing that is done, one after the other."""
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            for earlier in bars.values():
                earlier.close()
            bars[stage] = tqdm(desc=stage, total=total, leave=False, disable=True if quiet else None)
        bars[stage].update(done - bars[stage].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


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


def _info(arguments: argparse.Namespace) -> int:
    from .volume import list_contents

    summaries = list_contents(arguments.input)
    if arguments.json:
        _print_json({"name": arguments.input.name, "images": [summary.as_dict() for summary in summaries]})
    else:
        print("\n".join(summary.describe() for summary in summaries))
    return EXIT_DONE


def _failure(path: Path | None, error: MedAnomalyCLIPError) -> dict[str, Any]:
    """The error as data; also told to the user."""
    if path is not None:
        _complain(error, path.name)
    return {
        "name": path.name if path else None,
        "error": type(error).__name__,
        "message": str(error),
        "choices": list(error.choices) if isinstance(error, SeriesAmbiguous) else [],
    }


def _complain(error: MedAnomalyCLIPError, name: str = "") -> None:
    prefix = f"{name}: " if name not in str(error) else ""
    print(f"medanomalyclip: {prefix}{error}", file=sys.stderr)
    if isinstance(error, SeriesAmbiguous):
        for choice in error.choices:
            print(f"  {choice}", file=sys.stderr)


def _print_json(content: dict[str, Any]) -> None:
    from .result import RESEARCH_USE_ONLY

    print(json.dumps({"notice": RESEARCH_USE_ONLY, **content}, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
