"""Teaching with slices of a scene: cut on the main thread, one at each call, and taught on the worker.

Call everything here on the main thread.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from .errors import InvalidRequest, MedAnomalyCLIPError
from .geometry import SlicePlane
from .panel_packages import require_packages
from .runtime import DetectorWorker
from .scene_slices import SliceCutter
from .taught_detector import TaughtDetector, checked_name
from .teaching import TeachingProgress, teaching

_WAIT_SECONDS = 0.05

# Of a volume node, or of anything that stands for a volume where all its slices are planes.
Slices = Mapping[Any, Iterable[int | SlicePlane]]
OnDone = Callable[[TaughtDetector | None, MedAnomalyCLIPError | None], None]


@dataclass
class _Run:
    """A detector on its way.

    Attributes:
        name: of it.
        start: folder of the detector that it starts from; None for the bundled one.
        on_done: called at the end.
        cutter: holds slices that are not cut yet.
        planes, volumes: of the slices that are.
        future: of the detector, once the worker has the slices.
        progress: the last one that the worker told.
    """

    name: str
    start: str | None
    on_done: OnDone | None
    cutter: SliceCutter = field(default_factory=SliceCutter)
    planes: list[SlicePlane] = field(default_factory=list)
    volumes: list[Hashable] = field(default_factory=list)
    future: Future[TaughtDetector] | None = None
    progress: TeachingProgress | None = None

    def told(self, progress: TeachingProgress) -> None:
        self.progress = progress


class SceneTeaching:
    """Teaches one detector at a time in the background, others while their caller waits."""

    def __init__(self, worker: Callable[[], DetectorWorker]) -> None:
        """`worker` gives the thread that detects too; detections come between the steps of teaching."""
        self._worker = worker
        self._run: _Run | None = None

    @property
    def is_running(self) -> bool:
        return self._run is not None

    @property
    def progress(self) -> TeachingProgress | None:
        """Of the detector being taught; None before the worker began."""
        return None if self._run is None else self._run.progress

    def teach(
        self,
        slices: Slices,
        name: str,
        axis: int | None,
        detector: Path | str,
        on_progress: Callable[[TeachingProgress], None] | None,
    ) -> TaughtDetector:
        """See the logic's `teach`."""
        run = self._begin(slices, name, axis, detector, None)
        try:
            told = None
            while (taught := self._step(run)) is None:
                if on_progress is not None and run.progress is not None and run.progress is not told:
                    told = run.progress
                    on_progress(told)
                if run.future is not None:
                    wait([run.future], timeout=_WAIT_SECONDS)
            return taught
        except BaseException:  # Ctrl+C in the console too
            _stop(run)
            raise

    def start(
        self, slices: Slices, name: str, axis: int | None, detector: Path | str, on_done: OnDone | None
    ) -> None:
        """See the logic's `startTeaching`."""
        if self._run is not None:
            raise InvalidRequest(_("A detector is being taught; wait for it or cancel it"))
        self._run = self._begin(slices, name, axis, detector, on_done)

    def poll(self) -> bool:
        """Cut the next slice, or deliver the detector if it is there; whether teaching goes on."""
        run = self._run
        if run is None:
            return False
        taught, error = None, None
        try:
            taught = self._step(run)
            if taught is None:
                return True
        except MedAnomalyCLIPError as caught:
            error = caught
        except BaseException:
            self._run = None
            raise
        self._run = None
        if run.on_done is not None:
            run.on_done(taught, error)
        return self._run is not None

    def cancel(self) -> None:
        """Stop after the step that the worker is at; nothing is left of the detector."""
        if self._run is not None:
            _stop(self._run)
            self._run = None

    def _begin(
        self, slices: Slices, name: str, axis: int | None, detector: Path | str, on_done: OnDone | None
    ) -> _Run:
        require_packages()
        run = _Run(checked_name(name), str(detector or "") or None, on_done)
        for volume, of_volume in slices.items():
            wanted = list(of_volume)
            planes = [one for one in wanted if isinstance(one, SlicePlane)]
            run.planes += planes
            run.volumes += [volume.GetID() if hasattr(volume, "GetID") else volume] * len(planes)
            if len(planes) < len(wanted):
                run.cutter.add(volume, [one for one in wanted if not isinstance(one, SlicePlane)], axis)
        return run

    def _step(self, run: _Run) -> TaughtDetector | None:
        """Cut a slice if any is left, hand them over when none is; the detector when it is there."""
        if run.cutter:
            cut = run.cutter.cut()
            run.planes.append(cut.plane)
            run.volumes.append(cut.node.GetID())
        if run.future is None and not run.cutter:
            steps = teaching(run.planes, name=run.name, volumes=run.volumes, start=run.start)
            run.future = self._worker().work(steps, run.told)
        return run.future.result() if run.future is not None and run.future.done() else None


def _stop(run: _Run) -> None:
    run.cutter.clear()
    if run.future is not None and not run.future.cancel() and run.future.exception() is None:
        run.future.result().discard()
