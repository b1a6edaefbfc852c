"""What a batch does with one series, in whatever process.

An image in; results into its folder, and from there to further sinks. A small dict comes back that tells what
became of it; an error is part of that, never raised.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .batch_source import SeriesInput
from .errors import Cancelled, MedAnomalyCLIPError, UnreadableImage
from .export import MANIFEST as RESULT
from .geometry import resolve_axis, slice_count
from .prompt import Prompt

if TYPE_CHECKING:
    from .detection import SliceDetector
    from .volume import Volume

DONE, FAILED, STOPPED = "done", "failed", "stopped"
PRESENT = "present"  # results by the same detector were there, where this batch would have sent its own

Outcome = dict[str, Any]
"""With "state" and, when done, "modality", "slices", "highest"; when failed, "error" and "reason"."""


@dataclass(frozen=True)
class BatchSettings:
    """What is done with each series.

    Attributes:
        axis: direction across the slices, see `geometry.resolve_axis`.
        middle: only the middle slice of each volume, not all.
        modality: DICOM code that stands above what files say; None for what they say.
        threshold, window: see `SliceDetector.detect_many`.
        dicom: what to write as DICOM too, see `export.ResultWriter`; inputs that are not DICOM fail then.
    """

    axis: str = "acquisition"
    middle: bool = False
    modality: str | None = None
    threshold: float | None = None
    window: tuple[float, float] | None = None
    dicom: tuple[str, ...] = ()


class Sink(Protocol):
    """Gets the results of each series when they are in its folder; it travels by pickle."""

    def has(self, item: SeriesInput, bundle_sha256: str) -> bool:
        """Whether it has results of this series by this detector already, from whatever run."""

    def take(self, item: SeriesInput, folder: Path, files: Sequence[str]) -> None:
        """Take results; those of a series that failed here are offered again, the very same ones."""


@dataclass(frozen=True)
class SeriesTask:
    """One series to do.

    Attributes:
        item: the series.
        folder: where its results go; they are what a later run and the table of slices go by.
        settings: what is done.
        sinks: who gets the results too. A series is done when all of them have taken it.
    """

    item: SeriesInput
    folder: Path = field(repr=False)
    settings: BatchSettings
    sinks: tuple[Sink, ...] = ()


def detect_series(
    task: SeriesTask,
    detector: SliceDetector,
    *,
    on_slice: Callable[[int, int], None] | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Do one series. Results that lie there, whole and of the very same request, are taken for done."""
    item = task.item
    try:
        if item.problem:
            raise UnreadableImage(item.problem)
        if _had_by_all(task, detector):
            return {"state": PRESENT}
        with item.opened(task.settings.modality, is_stopped) as volume:
            return _detect(task, volume, detector, on_slice, is_stopped)
    except Cancelled:
        return {"state": STOPPED}
    except MedAnomalyCLIPError as error:
        return failed(type(error).__name__, _without_names(str(error), item))
    except Exception as error:
        # A bug meets one study of a night's hundreds: told with its place in the program, and gone on.
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"A fault in the program: {type(error).__name__} in {Path(where.filename).name}"
        return failed("Fault", f"{reason}, line {where.lineno}")


def failed(error: str, reason: str) -> Outcome:
    return {"state": FAILED, "error": error, "reason": reason}


def _had_by_all(task: SeriesTask, detector: SliceDetector) -> bool:
    """Whether nothing is left to do. Results that lie in the folder are of this batch, and told as done."""
    if not task.sinks or (task.folder / RESULT).is_file():
        return False
    return all(sink.has(task.item, detector.provenance.bundle_sha256) for sink in task.sinks)


def _detect(
    task: SeriesTask,
    volume: Volume,
    detector: SliceDetector,
    on_slice: Callable[[int, int], None] | None,
    is_stopped: Callable[[], bool],
) -> Outcome:
    from .detection import detect_slices
    from .export import ResultWriter

    settings = task.settings
    axis = resolve_axis(volume, settings.axis)
    count = slice_count(volume, axis)
    indices = [count // 2] if settings.middle else list(range(count))
    prompt = Prompt(detector.guess_preset(volume.modality, volume.body_part))
    manifest = _earlier(task, volume, detector, prompt, axis, indices)
    if manifest is None:
        # Results of a series that was stopped are replaced.
        writer = ResultWriter(
            task.folder,
            volume,
            requested=len(indices),
            window=settings.window,
            overwrite=True,
            dicom=settings.dicom,
        )
        with writer:
            for result in detect_slices(
                detector,
                volume,
                prompt=prompt,
                axis=axis,
                indices=indices,
                threshold=settings.threshold,
                window=settings.window,
                on_progress=on_slice,
                is_cancelled=is_stopped,
            ):
                writer.add(result)
        manifest = writer.manifest
    for sink in task.sinks:
        sink.take(task.item, task.folder, manifest["files"])
    return _done(volume, manifest["slices"])


def _earlier(
    task: SeriesTask,
    volume: Volume,
    detector: SliceDetector,
    prompt: Prompt,
    axis: int,
    indices: Sequence[int],
) -> dict[str, Any] | None:
    """Manifest of whole results that were made by a run which ended before it could tell of them."""
    from .resume import answers, earlier_results

    earlier = earlier_results(task.folder)
    if earlier is None or not earlier.get("complete"):
        return None
    limit = task.settings.threshold
    same = answers(
        earlier,
        volume=volume,
        provenance=detector.provenance,
        threshold=detector.threshold_with(prompt) if limit is None else limit,
        window=task.settings.window,
        prompt=detector.title_of(prompt),
        axis=axis,
        indices=indices,
        dicom=task.settings.dicom,
    )
    return earlier if same else None


def _done(volume: Volume, slices: list[dict[str, Any]]) -> Outcome:
    top = max(slices, key=lambda record: record["score"])
    return {
        "state": DONE,
        "modality": volume.modality,
        "slices": len(slices),
        "highest": {key: top[key] for key in ("index", "score", "percentile", "area_mm2")},
    }


def _without_names(message: str, item: SeriesInput) -> str:
    """A message without the names of files and folders, which often are those of patients."""
    for name in sorted(filter(None, item.private_words()), key=len, reverse=True):
        message = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", message)
    return message


class Engine(Protocol):
    """Where series are done: in this process (`batch.InProcess`), or by many (`cluster.Workers`)."""

    def identify(self, is_stopped: Callable[[], bool]) -> dict[str, str]:
        """Name, version and hash of its detector, which is loaded now if it was not.

        Raises:
            Cancelled: it was stopped while it waited.
            MedAnomalyCLIPError: it cannot be loaded.
        """

    def run(
        self, tasks: Iterator[SeriesTask], is_stopped: Callable[[], bool]
    ) -> Iterator[tuple[SeriesTask, Outcome]]:
        """Do tasks, and tell of each when it has come to its end; no more are taken once it is stopped."""


def identity(detector: SliceDetector) -> dict[str, str]:
    made = detector.provenance
    return {"name": made.bundle, "version": made.bundle_version, "sha256": made.bundle_sha256}
