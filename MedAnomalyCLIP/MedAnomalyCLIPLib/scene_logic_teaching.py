"""The logic's part that teaches detectors; the work itself is in `scene_teaching`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .scene_logic import LogicBase

if TYPE_CHECKING:
    from .scene_teaching import OnDone, SceneTeaching, Slices
    from .taught_detector import TaughtDetector
    from .teaching import TeachingProgress


class TeachingLogic(LogicBase):
    """One detector at a time is taught in the background, others while their caller waits."""

    _teaching: SceneTeaching | None = None

    def teach(
        self,
        slices: Slices,
        name: str,
        *,
        axis: int | None = None,
        detector: Path | str = "",
        onProgress: Callable[[TeachingProgress], None] | None = None,
    ) -> TaughtDetector:
        """Make a detector for one scanner and protocol of normal slices, and wait for it.

        Args:
            slices: {volume node: its slices}, each a position along `axis` from 0, or a
                MedAnomalyCLIPLib.geometry.SlicePlane that was cut from it. Where all are planes, anything
                else may stand for the volume.
            name: of the detector; it is shown and stored, so without patients' names.
            axis: 0, 1 or 2 for I, J or K; None for the axis along which each volume was acquired.
            detector: folder of the detector to start from; empty for the bundled one.
            onProgress: called with MedAnomalyCLIPLib.teaching.TeachingProgress.

        Returns:
            MedAnomalyCLIPLib.taught_detector.TaughtDetector: look at its `left_one_out`, then `keep` it in a
            folder, for example `detectorsFolder()`, or `discard` it.

        Raises:
            MedAnomalyCLIPError: the message says what is wrong and what to do.
        """
        return self._sceneTeaching().teach(slices, name, axis, detector, onProgress)

    def startTeaching(
        self,
        slices: Slices,
        name: str,
        *,
        axis: int | None = None,
        detector: Path | str = "",
        onDone: OnDone | None = None,
    ) -> None:
        """As `teach`, without waiting; call `pollTeaching` from time to time.

        Args:
            onDone: called by `pollTeaching` with a TaughtDetector and None, or with None and a
                MedAnomalyCLIPError.

        Raises:
            InvalidRequest: another detector is being taught.
        """
        self._sceneTeaching().start(slices, name, axis, detector, onDone)

    def pollTeaching(self) -> bool:
        """Cut the next slice, or deliver the detector if it is there; whether teaching goes on."""
        return self._teaching is not None and self._teaching.poll()

    def isTeaching(self) -> bool:
        return self._teaching is not None and self._teaching.is_running

    def teachingProgress(self) -> TeachingProgress | None:
        """MedAnomalyCLIPLib.teaching.TeachingProgress of the detector being taught; None before it begins."""
        return None if self._teaching is None else self._teaching.progress

    def cancelTeaching(self) -> None:
        """Stop after the step that the worker is at; nothing is left of the detector."""
        if self._teaching is not None:
            self._teaching.cancel()

    def detectorsFolder(self) -> Path:
        """Where the user's own detectors are."""
        from .panel_detectors import detectors_folder

        return detectors_folder()

    def _sceneTeaching(self) -> SceneTeaching:
        from .scene_teaching import SceneTeaching

        if self._teaching is None:
            self._teaching = SceneTeaching(self._workerThread)
        return self._teaching
