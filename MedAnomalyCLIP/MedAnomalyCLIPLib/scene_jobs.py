"""What the logic does with whole volumes: runs and exports in the background, and maps kept up to date.

There is one job at a time. Somebody calls `poll` from time to time; each call does one short step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

from .errors import InvalidRequest, MedAnomalyCLIPError
from .geometry import SlicePlane
from .result import AnomalyResult
from .scene_nodes import VOLUME_MAP, find_result_node
from .scene_run import ExportRun, RunOptions, VolumeDetection, VolumeRun
from .scene_views import Node
from .scene_volume_map import VolumeMap, is_volume_map
from .slice_stream import SliceOutcome

_REFRESH_SECONDS = 0.02  # of each poll, for slices that follow a new threshold

OnSlice = Callable[[int, int, "SliceOutcome | None"], None]
OnDone = Callable[["VolumeDetection | None", "MedAnomalyCLIPError | None"], None]


class VolumeJobs:
    """Runs over volumes, one at a time, and the maps they made."""

    def __init__(self, call: Callable[[Callable[[], Any]], Future[Any]]) -> None:
        """`call` lets the worker do something."""
        self._call = call
        self._maps: dict[str, VolumeMap] = {}  # one object for each node: runs and refreshes share its rows
        self._job: VolumeRun | ExportRun | None = None
        self._waited_for: VolumeRun | None = None  # by a loop that carries it on itself
        self._on_slice: OnSlice | None = None
        self._on_done: OnDone | None = None
        self._refreshes: dict[str, Iterator[int]] = {}  # by map node

    # Maps

    def map_of(self, node: Node | None) -> VolumeMap | None:
        """The map in a node, or the one made of a volume; None if there is none."""
        if node is None:
            return None
        if not is_volume_map(node):
            node = find_result_node("vtkMRMLScalarVolumeNode", VOLUME_MAP, node)
        if node is None or not is_volume_map(node):
            return None
        held = self._maps.get(node.GetID())
        if held is None or held.node is not node or not held.is_current:
            held = self._maps[node.GetID()] = VolumeMap(node)
        return held

    def detection(self, node: Node | None) -> VolumeDetection | None:
        """What the scene holds of a volume, or in a map."""
        volume_map = self.map_of(node)
        if volume_map is None:
            return None
        return VolumeDetection(volume_map, tuple(range(volume_map.slices)))

    def forget(self) -> None:
        """The scene is closed: its nodes are gone, and others may get their IDs."""
        self.cancel()
        self._maps.clear()
        self._refreshes.clear()

    # Runs

    def make_run(
        self,
        source: Node,
        submit: Callable[[SlicePlane], Future[AnomalyResult]],
        *,
        resume: bool,
        options: RunOptions,
        **request: Any,
    ) -> VolumeRun:
        """A run that starts at once; other arguments as for `VolumeRun`.

        Args:
            resume: keep the slices of an earlier run, and do the others only.
        """
        if self.busy:
            raise InvalidRequest(_("A run is on its way; wait for it or cancel it."))
        continued = self.map_of(options.map_node or source) if resume else None
        run = VolumeRun(source, submit, self._call, continued=continued, options=options, **request)
        slicer.mrmlScene.SaveStateForUndo()
        if continued is not None and run.threshold is not None:
            self.refresh(continued, threshold=run.threshold, min_area_mm2=run.min_area_mm2, wait=False)
        return run

    def start(self, job: VolumeRun | ExportRun, on_slice: OnSlice | None, on_done: OnDone | None) -> None:
        """Let `poll` carry a job on.

        Args:
            job: a run or an export.
            on_slice: called with slices done, slices to do, and what became of the last one.
            on_done: called with what there is now, and the error that ended the job or None.
        """
        if self.busy:
            job.cancel()
            raise InvalidRequest(_("A run is on its way; wait for it or cancel it."))
        self._job, self._on_slice, self._on_done = job, on_slice, on_done

    def finish(self, run: VolumeRun) -> Iterator[SliceOutcome]:
        """Carry a run to its end here, waiting for each slice; leaving the loop early cancels it."""
        self._waited_for = run
        try:
            while not run.ended:
                outcome = run.step()
                self._share(run)
                yield outcome
        finally:
            run.cancel()
            self._waited_for = None

    @property
    def busy(self) -> bool:
        return self._job is not None or self._waited_for is not None

    @property
    def running(self) -> VolumeRun | None:
        """The run over slices that is on its way."""
        return self._waited_for or (self._job if isinstance(self._job, VolumeRun) else None)

    def cancel(self) -> None:
        """End the job; slices that are done stay. An export leaves nothing."""
        for job in (self._job, self._waited_for):
            if job is not None:
                job.cancel()
        self._job = self._on_slice = self._on_done = None

    def poll(self) -> bool:
        """One short step; whether there is more to do."""
        # A run's own step follows in the same turn, and takes about as long.
        self._step_refreshes(_REFRESH_SECONDS if self._job is None else _REFRESH_SECONDS / 2)
        if self._job is not None:
            self._step_job(self._job)
        return self._job is not None or bool(self._refreshes)

    def _step_job(self, job: VolumeRun | ExportRun) -> None:
        error, on_slice, on_done = None, self._on_slice, self._on_done
        outcome: SliceOutcome | None = None
        ended = True
        try:
            if isinstance(job, VolumeRun):
                if not job.ended:
                    if not job.ready:
                        ended = False
                        return
                    outcome = job.step()
                    self._share(job)
                ended = job.ended
            elif not job.ready or job.step():
                ended = False
        except MedAnomalyCLIPError as reason:
            error = reason
        finally:
            if ended:
                self._job = self._on_slice = self._on_done = None
        if error is None and on_slice is not None:
            on_slice(job.done, job.total, outcome)
        if ended and on_done is not None:
            on_done(job.detection() if isinstance(job, VolumeRun) else None, error)

    def _share(self, run: VolumeRun) -> None:
        if run.volumeMap is not None:
            self._maps[run.volumeMap.node.GetID()] = run.volumeMap

    # Threshold and smallest area

    def refresh(
        self,
        volume_map: VolumeMap,
        *,
        wait: bool,
        threshold: float | None = None,
        min_area_mm2: float | None = None,
    ) -> None:
        """Apply them to a map and its segment, now or during the following polls; None changes nothing."""
        if volume_map.threshold is None:
            return
        threshold = volume_map.threshold if threshold is None else threshold
        min_area_mm2 = volume_map.min_area_mm2 if min_area_mm2 is None else min_area_mm2
        run = self.running
        if run is not None and run.volumeMap is volume_map:
            run.threshold, run.min_area_mm2 = threshold, min_area_mm2
        steps = volume_map.refresh(threshold, min_area_mm2)  # does what an unfinished one left, too
        self._refreshes.pop(volume_map.node.GetID(), None)
        if wait:
            for _step in steps:
                pass
        else:
            self._refreshes[volume_map.node.GetID()] = steps

    def _step_refreshes(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while self._refreshes and time.perf_counter() < end:
            key, steps = next(iter(self._refreshes.items()))
            if next(steps, None) is None:
                del self._refreshes[key]

    def export(
        self, volume_map: VolumeMap | None, folder: Path | str, overwrite: bool, dicom: Collection[str] = ()
    ) -> ExportRun:
        """An export that waits for its first step; `dicom` as for `export.ResultWriter`."""
        if volume_map is None:
            raise InvalidRequest(_("There are no results to export yet; detect first."))
        return ExportRun(volume_map, folder, self._call, overwrite=overwrite, dicom=dicom)
