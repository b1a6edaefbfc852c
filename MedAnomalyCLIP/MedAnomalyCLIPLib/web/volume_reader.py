"""The session's part over a whole volume: slices on offer, a run over them, table, plot, jumps and export."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, MedAnomalyCLIPError
from ..geometry import resolve_axis, slice_count
from ..panel_range import DIRECTIONS, direction_words
from ..scene import volume_from_node

if TYPE_CHECKING:
    from trame_server import Server

    from ..scene_run import VolumeDetection
    from ..slice_stream import SliceOutcome
    from ..slice_table import SliceRow
    from .reader import Reader

RESULTS = "medanomalyclip-results"

STATE: dict[str, Any] = {
    "axis_items": [],  # directions across the slices, with their numbers of slices
    "axis": DIRECTIONS[0],
    "slice_limit": 1,
    "slice_range": [1, 1],  # of Detect range, from 1
    "resume": False,
    "done": 0,
    "total": 0,
    "rows": [],  # of the table, in the order of slices
    "plot_line": "",  # points of an SVG polyline in a square of 100 units
    "plot_limit": -1.0,  # height of the image threshold there; negative without one
    "current_slice": 0,  # the row last jumped to, from 1
    "candidates": [],  # slices that deserve a look, from 1
}


class VolumeReader:
    """What the page does with many slices.

    Attributes:
        deliver: called when an export is ready for the browser to fetch.
    """

    def __init__(self, server: Server, reader: Reader) -> None:
        self.deliver: Callable[[], None] = lambda: None
        self.state = server.state
        self._server, self._reader, self._logic = server, reader, reader.logic
        self._counts: dict[str, int] = {}
        self._export: TemporaryDirectory[str] | None = None
        self.state.update(STATE)
        self.state.change("axis")(self._axis_chosen)
        reader.on_study.append(self._study_changed)
        reader.on_idle.append(self._show_rows)

    # Runs

    def detect_range(self) -> None:
        """Detect on the chosen slices, or stop the run that is on its way: slices that are done stay."""
        if self.state.busy:
            self._reader.stop("Cancelled; the slices that were done are kept.")
            return
        first, last = (int(value) for value in self.state.slice_range)
        with self._reader.telling():
            total = self._logic.startRange(
                self._reader.node,
                axis=self.state.axis,
                indices=range(first - 1, last),
                resume=self.state.resume,
                opacity=self.state.opacity,
                onSlice=self._slice_done,
                onDone=self._run_done,
                **self._reader.choice(),
            )
            self._begin("range", total)

    def _begin(self, what: str, total: int) -> None:
        self.state.update({"busy": what, "done": 0, "total": total})
        self._reader.start_polling()

    def _slice_done(self, done: int, total: int, outcome: SliceOutcome | None) -> None:
        self.state.update({"done": done, "total": total})
        if done == 1 and outcome is not None and outcome.result is not None:
            self._reader.display.follow_threshold(outcome.result.threshold)
            self._reader.display.show_as_chosen()
        self._show_rows()

    def _run_done(self, detection: VolumeDetection | None, error: MedAnomalyCLIPError | None) -> None:
        if error is not None:
            self.state.message = str(error)
        elif detection is not None and detection.failures:
            reasons = "; ".join(f"{index + 1}: {why}" for index, why in detection.failures.items())
            self.state.message = f"Slices without a result: {reasons}"
        self._show_rows()

    # Slices on offer

    def _study_changed(self) -> None:
        self.state.update({**STATE, "axis_items": []})
        self._counts = {}
        volume = volume_from_node(self._reader.node)
        for name in DIRECTIONS:
            self._counts[name] = slice_count(volume, resolve_axis(volume, name))
        self.state.axis_items = [
            {"title": direction_words(volume, name, count), "value": name}
            for name, count in self._counts.items()
        ]
        self._axis_chosen(self.state.axis)

    def _axis_chosen(self, axis: str, **_: Any) -> None:
        if axis in self._counts:
            self.state.slice_limit = self._counts[axis]
            self.state.slice_range = [1, self._counts[axis]]

    # Table and plot

    def _show_rows(self) -> None:
        detection = self._logic.volumeDetection(self._reader.node)
        rows = [] if detection is None else detection.rows
        if detection is None or not rows:
            self.state.update({"rows": [], "plot_line": "", "candidates": []})
            return
        span = max(detection.volumeMap.slices - 1, 1)
        shown = [_row(row, span) for row in rows]
        limit = detection.volumeMap.image_threshold
        self.state.update(
            {
                "rows": shown,
                "plot_line": " ".join(f"{row['x']},{row['y']}" for row in shown),
                "plot_limit": -1.0 if limit is None else _height(limit),
                "candidates": [index + 1 for index in detection.candidates],
            }
        )

    def jump(self, number: int) -> None:
        """Bring the views to a slice that was analysed, numbered from 1."""
        if self._reader.node is not None:
            with self._reader.moving_views():
                self._logic.jumpToSlice(self._reader.node, int(number) - 1)
            self.state.current_slice = int(number)

    def next_candidate(self, step: int) -> None:
        """Jump to the next slice that deserves a look, or to the one before."""
        with self._reader.moving_views():
            found = self._logic.nextCandidate(self._reader.node, int(step))
        if found is None:
            self.state.message = "There is no further candidate that way."
        else:
            self.state.update({"current_slice": found + 1, "message": ""})

    # Export

    def export(self) -> None:
        """Write what the command line writes, and hand it to the browser as one archive."""
        if self.state.busy:
            self._reader.stop("Cancelled; nothing was exported.")
            return
        self._drop_export()
        self._export = TemporaryDirectory(prefix="medanomalyclip-")
        with self._reader.telling():
            total = self._logic.startExport(
                self._reader.node,
                Path(self._export.name) / RESULTS,
                onSlice=lambda done, total, _: self.state.update({"done": done, "total": total}),
                onDone=self._exported,
            )
            self._begin("export", total)

    async def fetch_export(self) -> Any:
        """The archive, as the page's script asks for it; it is gone from this computer then."""
        if self._export is None:
            raise InvalidRequest("There is no export to fetch")
        folder = Path(self._export.name)
        archive = await asyncio.to_thread(
            shutil.make_archive, str(folder / "archive"), "zip", folder, RESULTS
        )
        content = await asyncio.to_thread(Path(archive).read_bytes)
        self._drop_export()
        return self._server.protocol.addAttachment(content)

    def _exported(self, _detection: VolumeDetection | None, error: MedAnomalyCLIPError | None) -> None:
        if error is not None:
            self.state.message = str(error)
        else:
            self.deliver()

    def _drop_export(self) -> None:
        if self._export is not None:
            self._export.cleanup()
            self._export = None


def _row(row: SliceRow, span: int) -> dict[str, Any]:
    return {
        "number": row.index + 1,
        "score": f"{row.score:.2f}",
        "percentile": "" if row.percentile is None else f"{int(row.percentile)} %",
        "area": f"{row.area_mm2:.0f}",
        "remark": "empty" if row.empty else "unlike" if row.unlike else "",
        "x": round(100 * row.index / span, 2),
        "y": _height(row.score),
    }


def _height(score: float) -> float:
    """From the top of the plot, in its units."""
    return round(100 * (1 - min(max(score, 0.0), 1.0)), 2)
