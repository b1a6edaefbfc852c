"""A folder of studies: every image and series in it is found, detected on, and told of in one manifest.

Each input gets a numbered folder as `export` writes it. The manifest, `manifest.json`, is brought up to date
after each of them; the same call goes on where an earlier one stopped. An input that fails does not stop the
others.

No name goes into the results: files and folders are often named after patients. An input is known by a hash
of its path within the folder and of its series; `find_inputs` gives the same hash for the same input, and so
the way from a result back to its file, for whoever has the files.
"""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import Cancelled, InvalidRequest, MedAnomalyCLIPError, OutputFailed, UnreadableImage
from .geometry import resolve_axis, slice_count
from .output_folder import writing
from .prompt import Prompt
from .result import RESEARCH_USE_ONLY
from .volume import list_contents, read_volume, reading, recognise, shown_name

if TYPE_CHECKING:
    from .detection import SliceDetector
    from .volume import Volume

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
DONE, FAILED, STOPPED = "done", "failed", "stopped"

_SEGMENTATION = ".seg.nrrd"


@dataclass(frozen=True)
class BatchInput:
    """One image file, or one series of a folder of DICOM files.

    Attributes:
        path: the file or folder.
        place: its path within the folder that was searched; may name the patient, for the terminal only.
        series: which series of a folder; empty for a file.
        problem: why nothing can be read there; empty when nothing stands against it.
    """

    path: Path
    place: str
    series: str = ""
    problem: str = ""

    @property
    def key(self) -> str:
        """The same for the same input, and no name."""
        return hashlib.sha256(f"{self.place}\n{self.series}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BatchSettings:
    """What is done with each input.

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


def find_inputs(folder: Path | str, *, leave_out: Path | None = None) -> list[BatchInput]:
    """Every image and series in a folder and its subfolders, in the order of their paths.

    Files are known by their content. Hidden files, segmentations and whatever is no image are passed over.

    Args:
        folder: where to look.
        leave_out: a folder not to look into, for results that lie within.

    Raises:
        UnreadableImage: the folder is not there, or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UnreadableImage(f"{shown_name(folder)} is no folder; give one that holds images or studies")
    hidden = None if leave_out is None else leave_out.resolve()
    found = list(_walk(folder, folder, hidden, within_dicom=False))
    if not found:
        raise UnreadableImage(f"{shown_name(folder)} holds no image that can be read")
    return found


def _walk(place: Path, root: Path, hidden: Path | None, *, within_dicom: bool) -> Iterator[BatchInput]:
    files: list[Path] = []
    folders: list[Path] = []
    with reading(place, "folder"):
        for path in sorted(place.iterdir()):
            if path.name.startswith(".") or path.resolve() == hidden:
                continue
            (folders if path.is_dir() else files).append(path)
    kinds = {path: _kind(path) for path in files}
    if "DICOM" in kinds.values() and not within_dicom:
        within_dicom = True  # series are gathered from here downward
        yield from _series(place, root)
    for path, kind in kinds.items():
        if kind and kind != "DICOM" and not path.name.lower().endswith(_SEGMENTATION):
            yield BatchInput(path, path.relative_to(root).as_posix())
    for path in folders:
        yield from _walk(path, root, hidden, within_dicom=within_dicom)


def _kind(path: Path) -> str:
    try:
        return recognise(path) if path.is_file() else ""
    except OSError:
        return ""


def _series(place: Path, root: Path) -> Iterator[BatchInput]:
    within = place.relative_to(root).as_posix()
    try:
        summaries = list_contents(place)
    except MedAnomalyCLIPError as error:
        yield BatchInput(place, within, problem=str(error))
        return
    for summary in summaries:
        yield BatchInput(place, within, summary.identifier)


def run_batch(
    folder: Path | str,
    output: Path | str,
    load: Callable[[], SliceDetector],
    *,
    settings: BatchSettings | None = None,
    retry: bool = False,
    on_input: Callable[[int, int, BatchInput, dict[str, Any]], None] | None = None,
    on_slice: Callable[[int, int], None] | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Detect on every input of a folder, or on those that an earlier call left.

    Args:
        folder: the studies.
        output: results and manifest go here.
        load: makes the detector; called once, and not when nothing is left to do.
        settings: what is done with each input; None for all slices as acquired.
        retry: do the inputs again that failed before.
        on_input: called after each input with its position, the number of inputs, the input, and its record.
        on_slice: called with slices done and to do of the input at hand.
        is_stopped: asked before each slice and input.

    Returns:
        The manifest: "inputs" has a record for each, with "number", "key", "state" ("done", "failed",
        "stopped"), "folder", and "error" and "reason" of what failed.

    Raises:
        UnreadableImage: the folder holds no image.
        InvalidRequest: the earlier call had other settings or another detector.
        OutputFailed: nothing can be written; what is done by then is in the manifest.
    """
    settings = settings or BatchSettings()
    output = Path(output).absolute()
    inputs = find_inputs(folder, leave_out=output)
    batch = _Batch.open(output, settings)
    detector: SliceDetector | None = None
    for position, item in enumerate(inputs, start=1):
        if is_stopped():
            break
        record = batch.record(item)
        if record["state"] == DONE or (record["state"] == FAILED and not retry):
            continue
        if detector is None:
            detector = load()
            batch.check_detector(detector)
        batch.detect(item, record, detector, on_slice, is_stopped)
        if on_input is not None:
            on_input(position, len(inputs), item, record)
    batch.save(inputs, stopped=is_stopped())
    return batch.manifest


def read_records(output: Path | str) -> dict[str, dict[str, Any]]:
    """The records of an earlier call by their key; none if there was no such call.

    Raises:
        OutputFailed: the manifest cannot be read.
    """
    path = Path(output) / MANIFEST
    try:
        if not path.exists():
            return {}
        return {record["key"]: record for record in json.loads(path.read_text(encoding="utf-8"))["inputs"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputFailed(
            f"{MANIFEST} in {path.parent.name} cannot be read; use another --output"
        ) from error


class _Batch:
    """The manifest of a folder of results, and what is done for one of its records."""

    def __init__(self, output: Path, manifest: dict[str, Any], settings: BatchSettings) -> None:
        self._output, self.manifest, self._settings = output, manifest, settings
        self._records = {record["key"]: record for record in manifest["inputs"]}

    @classmethod
    def open(cls, output: Path, settings: BatchSettings) -> _Batch:
        chosen = json.loads(json.dumps(asdict(settings)))  # tuples become lists, as in a file
        path = output / MANIFEST
        if not path.exists():
            with writing(output):
                taken = output.exists() and any(output.iterdir())
            if taken:
                raise OutputFailed(f"{output.name} holds other files; use another --output")
            manifest = {"schema_version": SCHEMA_VERSION, "notice": RESEARCH_USE_ONLY, "settings": chosen}
            return cls(output, {**manifest, "detector": None, "inputs": []}, settings)
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            earlier = {"dicom": [], **manifest["settings"]}  # which earlier versions did not know
            batch = cls(output, manifest, settings)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputFailed(f"{MANIFEST} in {output.name} cannot be read; use another --output") from error
        if earlier != chosen:
            raise InvalidRequest(
                f"{output.name} was made with other settings; repeat them, or use another --output"
            )
        return batch

    def record(self, item: BatchInput) -> dict[str, Any]:
        """The record of an input, made at the first time."""
        if item.key not in self._records:
            number = 1 + max((r["number"] for r in self._records.values()), default=0)
            record = {"number": number, "key": item.key, "state": "", "folder": None}
            self._records[item.key] = record
            self.manifest["inputs"].append(record)
        return self._records[item.key]

    def check_detector(self, detector: SliceDetector) -> None:
        made = detector.provenance
        this = {"name": made.bundle, "version": made.bundle_version, "sha256": made.bundle_sha256}
        if self.manifest["detector"] not in (None, this):
            earlier = self.manifest["detector"]["name"]
            raise InvalidRequest(
                f"{self._output.name} was made with another detector, {earlier}; use it, or another --output"
            )
        self.manifest["detector"] = this

    def detect(
        self,
        item: BatchInput,
        record: dict[str, Any],
        detector: SliceDetector,
        on_slice: Callable[[int, int], None] | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        """Do one input, and tell in its record what became of it."""
        for key in ("error", "reason"):
            record.pop(key, None)
        try:
            if item.problem:
                raise UnreadableImage(item.problem)
            volume = read_volume(item.path, series=item.series or None, modality=self._settings.modality)
            result = self._write(volume, f"{record['number']:04d}", detector, on_slice, is_stopped)
            record.update(result)
        except OutputFailed:
            raise
        except MedAnomalyCLIPError as error:
            record.update(
                state=FAILED, error=type(error).__name__, reason=_without_names(str(error), item), folder=None
            )
        except Exception as error:
            # A bug meets one study of a night's hundreds: told with its place in the program, and gone on.
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"A fault in the program: {type(error).__name__} in {Path(where.filename).name}"
            record.update(state=FAILED, error="Fault", reason=f"{reason}, line {where.lineno}", folder=None)
        self.save()

    def _write(
        self,
        volume: Volume,
        name: str,
        detector: SliceDetector,
        on_slice: Callable[[int, int], None] | None,
        is_stopped: Callable[[], bool],
    ) -> dict[str, Any]:
        from .detection import detect_slices
        from .export import ResultWriter

        settings = self._settings
        axis = resolve_axis(volume, settings.axis)
        count = slice_count(volume, axis)
        indices = [count // 2] if settings.middle else list(range(count))
        # Results of an input that was stopped, or not told of any more, are replaced.
        writer = ResultWriter(
            self._output / name, volume, requested=len(indices), overwrite=True, dicom=settings.dicom
        )
        try:
            with writer:
                for result in detect_slices(
                    detector,
                    volume,
                    prompt=Prompt(detector.guess_preset(volume.modality, volume.body_part)),
                    axis=axis,
                    indices=indices,
                    threshold=settings.threshold,
                    window=settings.window,
                    on_progress=on_slice,
                    is_cancelled=is_stopped,
                ):
                    writer.add(result)
        except Cancelled:
            written = bool(writer.manifest)
            return {"state": STOPPED, "folder": name if written else None}
        top = max(writer.manifest["slices"], key=lambda record: record["score"])
        facts = ("index", "score", "percentile", "area_mm2")
        return {
            "state": DONE,
            "folder": name,
            "modality": volume.modality,
            "slices": len(writer.manifest["slices"]),
            "highest": {key: top[key] for key in facts},
        }

    def save(self, inputs: list[BatchInput] | None = None, *, stopped: bool = False) -> None:
        """Write the manifest; it is whole at every moment.

        Args:
            inputs: all that there are, when the call has come to its end.
            stopped: whether it was stopped before it had seen all of them.
        """
        records = self.manifest["inputs"]
        self.manifest["updated"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.manifest["complete"] = (
            inputs is not None and not stopped and all(r["state"] in (DONE, FAILED) for r in records)
        )
        self.manifest["counts"] = {
            state: sum(record["state"] == state for record in records) for state in (DONE, FAILED, STOPPED)
        }
        path = self._output / MANIFEST
        with writing(path):
            self._output.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{MANIFEST}.partial")
            text = json.dumps(self.manifest, indent=2, ensure_ascii=False, allow_nan=False)
            fresh.write_text(text + "\n", encoding="utf-8")
            fresh.replace(path)


def _without_names(message: str, item: BatchInput) -> str:
    """A message without the names of files and folders, which often are those of patients."""
    names = {*Path(item.place).parts, item.path.name, item.path.stem, item.series}
    if item.path.is_dir():
        names |= {name for path in item.path.rglob("*") for name in (path.name, path.stem)}
    for name in sorted(filter(None, names), key=len, reverse=True):
        message = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", message)
    return message
