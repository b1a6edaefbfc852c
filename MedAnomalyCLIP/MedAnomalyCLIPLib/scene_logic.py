"""What the parts of the module's logic share: the worker's thread, and the wishes for a detection made plain.

The logic in MedAnomalyCLIP.py is made of `scene_logic_display`, `scene_logic_detection`,
`scene_logic_volumes`, `scene_logic_setup` and `scene_logic_teaching`. Slicer loads all of them with the
module's file, so that anything else is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.i18n import tr as _

from .errors import InvalidRequest

if TYPE_CHECKING:
    from .detection import SliceDetector
    from .geometry import SlicePlane
    from .prompt import Prompt
    from .result import AnomalyResult
    from .runtime import DetectorWorker, Window
    from .scene_jobs import VolumeJobs
    from .scene_views import Node


class LogicBase:
    """State and steps that several parts need; its attributes are told of in MedAnomalyCLIPLogic."""

    detectorFactory: Callable[..., SliceDetector]
    threshold: float = 0.5
    smallestArea: float = 0.0
    _worker: DetectorWorker | None = None
    _volumes: VolumeJobs | None = None

    def _submitter(
        self,
        volumeNode: Node,
        detector: Path | str = "",
        threshold: float | None = None,
        device: str = "auto",
        precision: str = "auto",
        window: Window | str | None = None,
        prompt: Prompt | str | None = "auto",
    ) -> Callable[[SlicePlane], Future[AnomalyResult]]:
        """Hands planes of a volume to a detector on the worker."""
        key, load = self._detectorOf(detector, device, precision)
        window = self._windowOf(volumeNode, window)
        prompt = self._promptOf(volumeNode, detector, prompt)
        return lambda plane: self._workerThread().submit(key, load, plane, threshold, window, prompt)

    def _detectorOf(
        self, detector: Path | str, device: str, precision: str = "auto"
    ) -> tuple[object, Callable[[], SliceDetector]]:
        """What tells a detector from others, and how to make it."""
        from .bundle_list import BundleSummary

        folder = str(detector or "")
        # A folder whose detector was trained anew since is another detector.
        manifest = BundleSummary.read(folder).manifest if folder else None
        factory = self.detectorFactory
        arguments = (folder,) if device == "auto" else (folder, device)
        options = {} if precision == "auto" else {"precision": precision}
        return (factory, folder, manifest, device, precision), partial(factory, *arguments, **options)

    def _windowOf(self, volumeNode: Node, window: Window | str | None) -> Window | None:
        from .scene_views import displayed_window

        if not isinstance(window, str):
            return window
        if window != "view":
            raise InvalidRequest(
                _("A window is two voxel values, or the word view, not {window}").format(window=window)
            )
        return displayed_window(volumeNode)

    def _promptOf(self, volumeNode: Node, detector: Path | str, prompt: Prompt | str | None) -> Prompt | None:
        """What to compare with; a preset's name, or "auto", stands for it."""
        from .bundle import default_bundle_path
        from .bundle_list import BundleSummary
        from .panel_prompt import chosen_prompt
        from .scene import words_of

        if not isinstance(prompt, str):
            return prompt
        manifest = BundleSummary.read(detector or default_bundle_path()).manifest
        return chosen_prompt(manifest, prompt, *words_of(volumeNode))

    def _workerThread(self) -> DetectorWorker:
        from .runtime import DetectorWorker

        if self._worker is None:
            self._worker = DetectorWorker()
        return self._worker

    def _jobs(self) -> VolumeJobs:
        from .scene_jobs import VolumeJobs

        if self._volumes is None:
            self._volumes = VolumeJobs(lambda function: self._workerThread().call(function))
        return self._volumes
