"""The logic's part for many slices of a volume: detecting on them, going from one to the next, exporting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from slicer.i18n import tr as _

from .errors import InvalidRequest, MedAnomalyCLIPError
from .scene_logic_detection import Detection, DetectionLogic

if TYPE_CHECKING:
    from pathlib import Path

    from .prompt import Prompt
    from .result import AnomalyResult
    from .runtime import Window
    from .scene_jobs import OnDone, OnSlice
    from .scene_run import VolumeDetection, VolumeRun
    from .scene_views import Node
    from .slice_stream import SliceOutcome


class VolumeLogic(DetectionLogic):
    """Runs over the slices of a volume, and what the scene holds of them."""

    # Detecting on many slices

    def detectSlices(
        self,
        volumeNode: Node,
        *,
        onFailure: Callable[[int, MedAnomalyCLIPError], None] | None = None,
        **request: Any,
    ) -> Iterator[Detection]:
        """Detect on slices of a volume, one after the other; each is in the scene before it is yielded.

        All go to one map and one segmentation on the volume's own grid, and to one table. When the loop is
        left, or an error ends it, what was yielded stays, and `resume=True` goes on from there.

        Args:
            volumeNode: scalar or colour volume, under a linear transform or none.
            axis: 0, 1, 2 for I, J, K, or "axial", "coronal", "sagittal"; None as the slices were acquired.
            indices: slices along that axis, from 0; None for all.
            detector, threshold, opacity, device, precision, window, prompt: as for `detect`.
            resume: keep what an earlier run with the same detector left, and do the other slices only.
            viewNames: slice views that show the map; None for those that show the volume.
            mapNode, segmentationNode: nodes to write to; None for those of the volume.
            onFailure: called with index and MedAnomalyCLIPError of a slice that gave no result, before going
                on; None to raise the error.

        Yields:
            Detection

        Raises:
            MedAnomalyCLIPError: as for `detect`.
        """
        run = self._startRun(volumeNode, **request)
        for outcome in self._jobs().finish(run):
            if outcome.error is None:
                yield self._detectionOf(run, outcome)
            elif onFailure is None:
                raise outcome.error
            else:
                onFailure(outcome.index, outcome.error)

    def detectVolume(
        self,
        volumeNode: Node,
        *,
        onProgress: Callable[[int, int], None] | None = None,
        isCancelled: Callable[[], bool] | None = None,
        **request: Any,
    ) -> VolumeDetection | None:
        """Detect on a volume and wait; arguments as for `detectSlices`.

        Args:
            onProgress: called with the number of slices done and to do, after each slice.
            isCancelled: asked before each slice; what is done stays.

        Returns:
            MedAnomalyCLIPLib.scene_run.VolumeDetection: nodes, rows, `to_pandas()`, slices that failed.
        """
        run = self._startRun(volumeNode, **request)
        for _outcome in self._jobs().finish(run):
            self._showAsChosen(run.volumeMap)
            if onProgress is not None:
                onProgress(run.done, run.total)
            if isCancelled is not None and isCancelled():
                break
        return run.detection()

    def startRange(
        self,
        volumeNode: Node,
        *,
        onSlice: OnSlice | None = None,
        onDone: OnDone | None = None,
        **request: Any,
    ) -> int:
        """As `detectVolume`, without waiting; call `poll` from time to time, which writes one slice at most.

        Args:
            onSlice: called by `poll` with slices done, slices to do, and the outcome of the last one
                (MedAnomalyCLIPLib.slice_stream.SliceOutcome).
            onDone: called by `poll` with a VolumeDetection (None if there is no result at all), and a
                MedAnomalyCLIPError or None.

        Returns:
            int: slices to do.

        Raises:
            MedAnomalyCLIPError: nothing was started.
        """
        run = self._startRun(volumeNode, **request)

        def sliceDone(done: int, total: int, outcome: SliceOutcome | None) -> None:
            self._showAsChosen(run.volumeMap)
            if onSlice is not None:
                onSlice(done, total, outcome)

        self._jobs().start(run, sliceDone, onDone)
        return run.total

    def runningDetection(self) -> VolumeDetection | None:
        """What the run over a volume that is on its way has so far: a VolumeDetection or None."""
        run = self._jobs().running
        return run.detection() if run is not None else None

    def _startRun(
        self,
        volumeNode: Node,
        *,
        threshold: float | None = None,
        opacity: float = 0.5,
        viewNames: Iterable[str] | None = None,
        mapNode: Node | None = None,
        segmentationNode: Node | None = None,
        resume: bool = False,
        detector: Path | str = "",
        device: str = "auto",
        precision: str = "auto",
        window: Window | str | None = None,
        prompt: Prompt | str | None = "auto",
        **request: Any,
    ) -> VolumeRun:
        from .scene_navigation import views_of
        from .scene_run import RunOptions

        if self._run is not None:
            raise InvalidRequest(_("A detection is running; wait for it or cancel it"))
        if volumeNode is not None and viewNames is None:
            viewNames = views_of(volumeNode)
        options = RunOptions(
            tuple(viewNames or ()), opacity, self._display().colours, mapNode, segmentationNode
        )
        return self._jobs().make_run(
            volumeNode,
            self._submitter(volumeNode, detector, threshold, device, precision, window, prompt),
            resume=resume,
            options=options,
            threshold=threshold,
            min_area_mm2=self.smallestArea,
            **request,
        )

    def _detectionOf(self, run: VolumeRun, outcome: SliceOutcome) -> Detection:
        assert run.volumeMap is not None and outcome.result is not None  # both come with the first result
        self._showAsChosen(run.volumeMap)
        segmentation = run.volumeMap.segmentation
        return Detection(outcome.result, run.volumeMap.node, segmentation, run.volumeMap.segment_id)

    # What the scene holds

    def volumeDetection(self, node: Node | None) -> VolumeDetection | None:
        """What the scene holds of a volume, or in a map of one: a VolumeDetection, None if nothing."""
        return self._jobs().detection(node)

    def exportResults(
        self, node: Node, folder: Path | str, *, overwrite: bool = False, dicom: Collection[str] = ()
    ) -> None:
        """Write what the scene holds of a volume to a folder, with the files of the command line, and wait.

        Args:
            node: the volume, or the map of one.
            folder: appears when it is complete.
            overwrite: replace the results of an earlier export.
            dicom: what to write as DICOM too, "segmentation", "report", "capture": objects of the patient's
                study, for a volume that was loaded from DICOM. They hold the patient's identity.

        Raises:
            NotDicom: the volume did not come from DICOM, or its files are gone.
            GeometryRefused: the volume was moved since it was loaded from DICOM.
        """
        job = self._jobs().export(self._jobs().map_of(node), folder, overwrite, dicom)
        while job.step():
            pass

    def startExport(
        self,
        node: Node,
        folder: Path | str,
        *,
        overwrite: bool = False,
        dicom: Collection[str] = (),
        onSlice: OnSlice | None = None,
        onDone: OnDone | None = None,
    ) -> int:
        """As `exportResults`, without waiting; callbacks and returned value as for `startRange`."""
        job = self._jobs().export(self._jobs().map_of(node), folder, overwrite, dicom)
        self._jobs().start(job, onSlice, onDone)
        return job.total

    def exportDicom(
        self,
        volumeNode: Node,
        results: Iterable[AnomalyResult],
        folder: Path | str,
        dicom: Collection[str] = ("segmentation", "report", "capture"),
    ) -> list[Path]:
        """Write results of a volume that was loaded from DICOM as DICOM files: also of one, tilted, slice.

        Args:
            volumeNode: what they were detected on.
            results: as `detect` and `detectSlices` give them, `Detection.result`.
            folder: appears when it is complete.
            dicom: as for `exportResults`.

        Returns:
            list[pathlib.Path]: the files.

        Raises:
            MedAnomalyCLIPError: as for `exportResults`.
        """
        from pathlib import Path

        from .dicom_output import DicomSource, write_dicom_results
        from .export import MANIFEST
        from .output_folder import OutputFolder
        from .scene import volume_from_node
        from .scene_dicom import with_dicom_frames

        source = DicomSource.of_volume(with_dicom_frames(volume_from_node(volumeNode), volumeNode))
        with OutputFolder(folder, MANIFEST, overwrite=False) as output:
            written = write_dicom_results(results, source, output.staging, dicom)
        return [Path(folder) / path.name for path in written]

    # Going from slice to slice

    def jumpToSlice(self, node: Node, index: int) -> None:
        """Bring the views of a volume to a slice that was analysed, those across it to its highest value.

        Args:
            node: the volume, or the map of one.
            index: of the slice, from 0.
        """
        from .scene_navigation import jump_to_slice

        volumeMap = self._jobs().map_of(node)
        if volumeMap is not None:
            jump_to_slice(volumeMap, index)

    def nextCandidate(self, node: Node, step: int = 1) -> int | None:
        """Jump to the next candidate after the slice in view, or the one before it.

        Args:
            node: the volume, or the map of one.
            step: 1 for the next, -1 for the previous one.

        Returns:
            int: index of the slice; None when there is no further candidate that way.
        """
        from .scene_navigation import slice_in_views

        detection = self.volumeDetection(node)
        if detection is None:
            return None
        here = slice_in_views(detection.volumeMap)
        if here is None:
            here = -1 if step > 0 else detection.volumeMap.slices
        ahead = [index for index in detection.candidates if (index - here) * step > 0]
        if not ahead:
            return None
        found = min(ahead) if step > 0 else max(ahead)
        self.jumpToSlice(node, found)
        return found
