"""What a training says of itself: loss terms of each step and figures of each validation.

Numbers go in; a CSV file of each kind, TensorBoard's event files and a progress bar come out. A run that goes
on after an interruption leaves the same files as one that was never interrupted.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from ..errors import OutputFailed
from ..output_folder import writing

LOSSES, VALIDATION = "log.csv", "validation.csv"


class TrainingLog:
    """The log of one training in a folder of its own, used with `with`.

    What is told first decides where the run goes on: what an earlier run, interrupted after its last
    checkpoint, said of this step and later ones is dropped.

    Attributes:
        tensorboard: whether event files are written too, which takes the package `tensorboard`.
    """

    def __init__(self, folder: Path | str, steps: int, *, title: str = "train", quiet: bool = False) -> None:
        """Prepare a log; the folder is made by `with`.

        Args:
            folder: where `log.csv`, `validation.csv` and event files go.
            steps: how many the whole training has.
            title: what stands in front of the bar.
            quiet: show no bar; without a terminal there is none anyway.
        """
        self.folder = Path(folder)
        self._losses, self._validation = _Table(self.folder / LOSSES), _Table(self.folder / VALIDATION)
        self._steps, self._title, self._quiet = steps, title, quiet
        self._bar: tqdm | None = None
        self._events: Any = None
        self._writer_class = _summary_writer()
        self.tensorboard = self._writer_class is not None

    def __enter__(self) -> TrainingLog:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def step(self, step: int, terms: Mapping[str, float], *, epoch: int | None = None) -> None:
        """Tell the loss terms of one step.

        Args:
            step: counted from 1.
            terms: by name, the same names in each step.
            epoch: which the step belongs to, in all steps or in none.

        Raises:
            OutputFailed: the log cannot be written, or the one that is there has other terms.
        """
        bar = self._begin(step - 1) if self._bar is None else self._bar
        values = {name: float(value) for name, value in terms.items()}
        place = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        self._losses.write(place, values)
        self._show(step, "loss", values)
        bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
        bar.update(step - bar.n)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell what a validation after this step gave, by name, the same names each time.

        Raises:
            OutputFailed: the log cannot be written, or the one that is there has other figures.
        """
        if self._bar is None:
            self._begin(step)
            self._validation.rewind(step - 1)
        values = {name: float(value) for name, value in figures.items()}
        self._validation.write({"step": step}, values)
        self._show(step, "validation", values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        self._losses.close()
        self._validation.close()
        if self._events is not None:
            self._events.close()

    def _begin(self, done: int) -> tqdm:
        """Go on after a step, the last that an earlier run told of for good."""
        self._losses.rewind(done)
        self._validation.rewind(done)
        if self._writer_class is not None:
            with writing(self.folder):
                # Readers of the events leave out what older files say of steps after this one.
                self._events = self._writer_class(str(self.folder), purge_step=done + 1, flush_secs=10)
        self._bar = tqdm(
            total=self._steps,
            initial=done,
            desc=self._title,
            unit="step",
            dynamic_ncols=True,
            disable=True if self._quiet else None,
        )
        return self._bar

    def _show(self, step: int, group: str, values: Mapping[str, float]) -> None:
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{group}/{name}", value, step)


class _Table:
    """A CSV file of one row for each step, on disk as soon as it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def rewind(self, last: int) -> None:
        """Drop the rows of steps after `last`, and a row that a kill cut short."""
        if not self.path.is_file():
            return
        with writing(self.path):
            text = self.path.read_text(encoding="utf-8", errors="replace")
            header, *rows = [line for line in text.splitlines(keepends=True) if line.endswith("\n")] or [""]
            kept = [row for row in rows if self._step_of(row) <= last]
            if not kept:
                self.path.unlink()
                self._columns = []  # so that the next row comes with its header again
                return
            self._columns = header.strip().split(",")
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join([header, *kept]), encoding="utf-8")
            partial.replace(self.path)

    def write(self, place: Mapping[str, int], values: Mapping[str, float]) -> None:
        names = [*place, *values]
        if names != (self._columns or names):
            raise OutputFailed(
                f"{self.path.name} has the columns {', '.join(self._columns)}, not {', '.join(names)}; "
                "move it away if it is another training's"
            )
        with writing(self.path):
            if self._file is None:
                self._file = self.path.open("a", newline="", encoding="utf-8")
            rows = csv.writer(self._file, lineterminator="\n")
            if not self._columns:
                rows.writerow(names)
                self._columns = names
            rows.writerow([*place.values(), *(f"{value:.6g}" for value in values.values())])
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _step_of(self, row: str) -> int:
        try:
            return int(row.split(",", 1)[0])
        except ValueError:
            raise OutputFailed(f"{self.path.name} is no log of a training; move it away") from None


def _summary_writer() -> Any:
    """TensorBoard's writer, or None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter
