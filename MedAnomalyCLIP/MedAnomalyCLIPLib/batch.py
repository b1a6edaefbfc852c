"""Many studies: every series of a source is found, detected on, and told of in one manifest and one table.

Each series gets a numbered folder, as `export` writes it, in the numbered folder of its study. The same call
goes on where an earlier one stopped. A series that fails does not stop the others.

No name goes into the results: files and folders are often named after patients. A series is known by a hash
of where it was found; `search` gives the same hash for the same series, and so the way from a result back to
its file, for whoever has the files.

`detect --resume` has no such records: it reads the image again and compares it with the results that lie
there (`resume.answers`). A batch does the same for a series whose end its records do not tell, as after a
kill; for all others the records spare it that, since opening each image of an archive again takes hours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batch_records import Record, Records, batch_folder
from .batch_series import (
    BatchSettings,
    Engine,
    Outcome,
    SeriesTask,
    Sink,
    detect_series,
    identity,
)
from .batch_source import SearchAhead, SeriesInput, SeriesSource
from .batch_table import TableFormat, check_table_format, write_table
from .errors import Cancelled, MedAnomalyCLIPError

if TYPE_CHECKING:
    from .detection import SliceDetector

_KNOWN_AFTER_SECONDS = 1.0

Told = Callable[[int, int, SeriesInput, Record], None]


class InProcess:
    """Does one series after the other, here."""

    def __init__(
        self, load: Callable[[], SliceDetector], on_slice: Callable[[int, int], None] | None = None
    ) -> None:
        """Take what makes the detector; it is called once, and not when nothing is left to do.

        Args:
            load: makes it.
            on_slice: called with slices done and to do of the series at hand.
        """
        self._load, self._on_slice = load, on_slice
        self._detector: SliceDetector | None = None

    def _loaded(self) -> SliceDetector:
        if self._detector is None:
            self._detector = self._load()
        return self._detector

    def identify(self, is_stopped: Callable[[], bool]) -> dict[str, str]:
        return identity(self._loaded())

    def run(
        self, tasks: Iterator[SeriesTask], is_stopped: Callable[[], bool]
    ) -> Iterator[tuple[SeriesTask, Outcome]]:
        for task in tasks:
            yield (
                task,
                detect_series(task, self._loaded(), on_slice=self._on_slice, is_stopped=is_stopped),
            )


def run_batch(
    source: SeriesSource,
    output: Path | str,
    engine: Engine,
    *,
    settings: BatchSettings | None = None,
    sinks: tuple[Sink, ...] = (),
    table: TableFormat = "csv",
    retry: bool = False,
    on_series: Told | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Detect on every series of a source, or on those that an earlier call left.

    Args:
        source: the series, for example `batch_source.search([folder], leave_out=output)`.
        output: results, manifests and table go here.
        engine: what does them: `InProcess`, or `cluster.Workers`.
        settings: what is done with each; None for all slices as acquired.
        sinks: who gets each series' results too, for example `dicomweb_sink.StoredInArchive`.
        table: format of the table of slices, `slices.csv` or `slices.parquet`.
        retry: do the series again that failed before.
        on_series: called after each series with the number of those that came to an end in this call, the
            number found so far, the series, and its record.
        is_stopped: asked before each slice and series.

    Returns:
        The manifest: "inputs" has a record for each, with "number", "key", "state" ("done", "failed",
        "stopped"), "folder", and "error" and "reason" of what failed.

    Raises:
        UnreadableImage: there is no image.
        InvalidRequest: the earlier call had other settings or another detector.
        OutputFailed: another batch holds the folder, or the records of this one cannot be written; series
            whose results cannot be written are told as failed, and done by the next call.
        DependencyMissing: a package for the table is not installed.
    """
    check_table_format(table)
    settings = settings or BatchSettings()
    output = Path(output).absolute()
    found = SearchAhead(source)
    try:
        found.wait(_KNOWN_AFTER_SECONDS)
        inputs = iter(found)
        first = list(itertools.islice(inputs, 1))  # nothing is written where nothing can be read
        with batch_folder(output):
            records = Records(output, settings)
            queue = _Queue(itertools.chain(first, inputs), records, retry=retry, is_stopped=is_stopped)
            tasks = queue.tasks(engine, settings, sinks)
            try:
                for task, outcome in engine.run(tasks, is_stopped):
                    record = records.of(task.item)
                    records.take(record, outcome)
                    queue.settled += 1
                    if on_series is not None:
                        on_series(queue.settled, found.found, task.item, record)
            except MedAnomalyCLIPError:
                records.save()
                raise
            records.save(ended=found.complete and not is_stopped())
            write_table(output, records.done(), table)
            return records.manifest
    finally:
        found.close()


class _Queue:
    """The series that are still to be done, in the order in which they are found.

    Attributes:
        settled: series that need nothing more: passed over, or counted by the caller when they are done.
    """

    def __init__(
        self,
        inputs: Iterable[SeriesInput],
        records: Records,
        *,
        retry: bool,
        is_stopped: Callable[[], bool],
    ) -> None:
        self.settled = 0
        self._inputs, self._records = inputs, records
        self._retry, self._is_stopped = retry, is_stopped

    def tasks(self, engine: Engine, settings: BatchSettings, sinks: tuple[Sink, ...]) -> Iterator[SeriesTask]:
        """What the engine is given; it has to name its detector before the first."""
        given: set[str] = set()
        for item in self._inputs:
            if self._is_stopped():
                return
            record = self._records.of(item)
            if item.key in given or not self._records.wants(record, retry=self._retry):
                self.settled += 1
                continue
            if not given:
                try:
                    self._records.check_detector(engine.identify(self._is_stopped))
                except Cancelled:
                    return
            given.add(item.key)
            yield SeriesTask(item, self._records.folder_of(record), settings, sinks)
