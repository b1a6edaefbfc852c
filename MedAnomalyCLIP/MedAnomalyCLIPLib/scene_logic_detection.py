"""The logic's part that detects on one plane, and knows whether anything is on its way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import slicer
from slicer.i18n import tr as _

from .errors import Cancelled, InvalidRequest, MedAnomalyCLIPError
from .scene_logic_display import DisplayLogic

if TYPE_CHECKING:
    from .geometry import SlicePlane
    from .result import AnomalyResult
    from .scene_views import Node

OnDone = Callable[["Detection | None", "MedAnomalyCLIPError | None"], None]


@dataclass(frozen=True)
class Detection:
    """A result and the nodes that hold it.

    Attributes:
        result: score, map, mask, plane.
        mapNode: volume node of the map.
        segmentationNode, segmentId: the mask; None when nothing reached the threshold.
    """

    result: AnomalyResult
    mapNode: Node
    segmentationNode: Node | None = None
    segmentId: str | None = None


@dataclass(frozen=True)
class _Run:
    """A detection on its way."""

    volumeNode: Node
    viewName: str
    opacity: float
    smallestArea: float
    future: Future[AnomalyResult]
    onDone: OnDone | None = None


class DetectionLogic(DisplayLogic):
    """Detection on the plane of a view, and the `poll` that carries on whatever runs in the background."""

    _run: _Run | None = None

    def detect(
        self,
        volumeNode: Node,
        viewName: str = "",
        *,
        plane: SlicePlane | None = None,
        opacity: float = 0.5,
        **choice: Any,
    ) -> Detection:
        """Detect on one plane, wait, and write the result to the scene.

        Args:
            volumeNode: scalar or colour volume.
            viewName: slice view to take the plane from and to show the map in; empty to show it nowhere.
            plane: MedAnomalyCLIPLib.geometry.SlicePlane to use instead of the view's.
            detector: folder of a detector (bundle.json, weights.safetensors, MODEL_CARD.md); empty for the
                bundled one. It is loaded at its first use and kept until another one is asked for.
            threshold: map value from which a pixel counts; None for the detector's own.
            opacity: of the map over the image.
            device: "auto" for the fastest, or as torch names it: "cpu", "cuda:1", "mps".
            precision: "float32", "int8", "bfloat16" or "auto", see `SliceDetector.load`.
            window: (low, high) voxel values that the detector is shown as black and white, or "view" for
                those that the reader sees; None for the detector's own rule.
            prompt: what the slice is compared with: the name of one of the detector's presets, "" for images
                of any kind, "auto" to go by what the volume says of itself, or
                MedAnomalyCLIPLib.prompt.Prompt(normal=(...,), abnormal=(...,)) for phrases of your own.

        Returns:
            Detection

        Raises:
            MedAnomalyCLIPError: the message says what is wrong and what to do.
        """
        run = self._start(volumeNode, viewName, plane, opacity, **choice)
        return self._deliver(run)

    def startDetection(
        self,
        volumeNode: Node,
        viewName: str,
        *,
        opacity: float = 0.5,
        onDone: OnDone | None = None,
        **choice: Any,
    ) -> None:
        """As `detect`, without waiting; call `poll` from time to time. The plane is that of this moment.

        Args:
            onDone: called by `poll` with a Detection and None, or with None and a MedAnomalyCLIPError.

        Raises:
            InvalidRequest: another detection is on its way.
        """
        if self.isRunning():
            raise InvalidRequest(_("A detection is running; wait for it or cancel it"))
        self._run = self._start(volumeNode, viewName, None, opacity, onDone, **choice)

    # On the way

    def poll(self) -> bool:
        """One short step of what is on its way, if it is due; whether there is more to do."""
        working = self._volumes is not None and self._volumes.poll()
        run = self._run
        if run is None or not run.future.done():
            return run is not None or working
        self._run = None
        detection, error = None, None
        try:
            detection = self._deliver(run)
        except MedAnomalyCLIPError as caught:
            error = caught
        if run.onDone is not None:
            run.onDone(detection, error)
        return self.isRunning()

    def isRunning(self) -> bool:
        return self._run is not None or (self._volumes is not None and self._volumes.busy)

    def cancel(self) -> None:
        """End what is on its way. Slices of a range that are done stay; anything else is dropped.

        A slice that the worker has begun is finished there, and then forgotten.
        """
        if self._run is not None:
            self._run.future.cancel()
            self._run = None
        if self._volumes is not None:
            self._volumes.cancel()

    def _start(
        self,
        volumeNode: Node,
        viewName: str,
        plane: SlicePlane | None,
        opacity: float,
        onDone: OnDone | None = None,
        **choice: Any,
    ) -> _Run:
        from . import scene

        submit = self._submitter(volumeNode, **choice)
        if plane is None:
            plane = scene.plane_in_view(volumeNode, viewName)
        return _Run(volumeNode, viewName, opacity, self.smallestArea, submit(plane), onDone)

    def _deliver(self, run: _Run) -> Detection:
        """Wait for a run and write its result to the scene."""
        from . import scene, scene_segments

        result = replace(run.future.result(), min_area_mm2=run.smallestArea)
        if not slicer.mrmlScene.IsNodePresent(run.volumeNode):
            raise Cancelled(_("The volume was deleted while the detector ran; the result was dropped."))
        slicer.mrmlScene.SaveStateForUndo()
        with slicer.util.RenderBlocker():
            mapNode = scene.write_map(result, run.volumeNode, run.viewName, self._display().colours)
            if run.viewName:
                scene.show_map(mapNode, run.viewName, run.opacity)
                self._display().apply()
            segmentationNode, segmentId = scene_segments.write_segment(result, run.volumeNode) or (None, None)
        self.threshold = result.threshold
        return Detection(result, mapNode, segmentationNode, segmentId)
