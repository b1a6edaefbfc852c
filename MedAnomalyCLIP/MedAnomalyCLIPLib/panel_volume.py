"""The panel over a whole volume: which slices, a run over them, an export, and what the scene holds of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import slicer
import vtk
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

from .errors import MedAnomalyCLIPError
from .panel_outputs import OutputsPanel
from .panel_range import RangePanel
from .scene_run import VolumeDetection
from .scene_views import Node
from .slice_stream import SliceOutcome


class Panel(Protocol):
    """What the panel's widget gives to its parts."""

    logic: Any

    def parameters(self) -> Any: ...  # the parameter node, also while another module is shown

    def choice(self) -> dict[str, Any]: ...  # what the reader chose of a detection, for the logic

    def isShown(self) -> bool: ...  # whether this module is the one shown

    def showMessage(self, text: str) -> None: ...

    def updateButtons(self) -> None: ...

    def startPolling(self) -> None: ...

    def stopRun(self, message: str) -> None: ...

    def followThreshold(self, parameters: Any, threshold: float) -> None: ...


class VolumePanel(VTKObservationMixin):
    """Ties the slices on offer, the run and the outputs to the chosen volume."""

    def __init__(self, ui: Any, parent: Any, panel: Panel) -> None:
        """
        Args:
            ui: the widgets of the .ui file.
            parent: the panel's outermost widget.
            panel: whose part this is.
        """
        super().__init__()
        self._panel = panel
        self._logic = panel.logic
        self._range = RangePanel(ui, self._button_clicked, self._range_chosen)
        self._outputs = OutputsPanel(ui, parent, panel.logic, panel.showMessage, self.start_export)
        self._volume: Node | None = None  # what was last shown
        self._map: Node | None = None
        self._awaiting_first = False
        self._folder = ""

    def close(self) -> None:
        self.removeObservers()
        self._outputs.close()

    def forget(self) -> None:
        """Show nothing and follow nothing: the scene is closed, or another module shown."""
        self.removeObservers()
        self._volume = self._map = None

    def clear(self) -> None:
        """The scene is closed: its results are gone."""
        self.forget()
        self._outputs.show(None)

    # Showing

    def show(self) -> None:
        """Offer the slices of the chosen volume, and show what the scene holds of it."""
        parameters = self._panel.parameters()
        if parameters.inputVolume is not self._volume:
            self._follow(parameters.inputVolume)
            self._show_slices()
            detection = self._detection(parameters)
            self._map = detection.mapNode if detection is not None else None
            parameters.outputMap = self._map
            parameters.outputSegmentation = detection.segmentationNode if detection is not None else None
        elif parameters.outputMap is not self._map:
            self._map = parameters.outputMap
            self._logic.showVolumeMap(self._map, parameters.opacity)
        self.show_outputs()

    def _detection(self, parameters: Any) -> VolumeDetection | None:
        """What the chosen map holds, if it is one of the volume; else what the scene holds of that."""
        chosen: VolumeDetection | None = self._logic.volumeDetection(parameters.outputMap)
        if chosen is not None and chosen.volumeMap.source is self._volume:
            return chosen
        return self._logic.volumeDetection(self._volume)

    def show_outputs(self) -> None:
        """Show the chosen map's slices."""
        if self._panel.isShown():
            self._outputs.show(self._logic.volumeDetection(self._panel.parameters().outputMap))

    def update(self, ready: bool, running: bool) -> None:
        """Enable what can be done now.

        Args:
            ready: there is a volume.
            running: anything is on its way.
        """
        self._range.update(ready, busy_elsewhere=running and not self.is_working)
        self._outputs.update(busy=running)

    @property
    def is_working(self) -> bool:
        """Whether a run over slices, or an export, is on its way."""
        return bool(self._range.working)

    def _follow(self, volume: Node | None) -> None:
        self.removeObservers()
        self._volume = volume
        if volume is not None:
            transformed = slicer.vtkMRMLTransformableNode.TransformModifiedEvent
            for event in (vtk.vtkCommand.ModifiedEvent, transformed):
                self.addObserver(volume, event, self._volume_modified)

    def _volume_modified(self, _volume: Node, _event: str) -> None:
        """It got its voxels, after it was chosen, or was moved: its slices may be others."""
        self._show_slices()
        self._panel.updateButtons()

    def _show_slices(self) -> None:
        parameters = self._panel.parameters()
        chosen = (parameters.rangeAxis, parameters.rangeFirst, parameters.rangeLast)
        self._range.show_volume(self._volume, *chosen)

    def _range_chosen(self) -> None:
        if self._panel.isShown():
            parameters, chosen = self._panel.parameters(), self._range.indices
            parameters.rangeAxis = self._range.axis
            parameters.rangeFirst = chosen.start + 1
            parameters.rangeLast = 0 if self._range.is_whole else chosen.stop
            self._panel.updateButtons()

    # Working

    def _button_clicked(self) -> None:
        if not self._range.working:
            self.start_run()
        elif self._range.working == "export":
            self._panel.stopRun(_("Cancelled; nothing was written."))
        else:
            done, total = self._range.progress
            words = _("Cancelled after {done} of {total} slices; their results are kept.")
            self._panel.stopRun(words.format(done=done, total=total))

    def start_run(self) -> None:
        """Start on the chosen slices."""
        parameters = self._panel.parameters()
        self._awaiting_first = True
        self._start(
            "run",
            lambda: self._logic.startRange(
                parameters.inputVolume,
                axis=self._range.axis,
                indices=self._range.indices,
                resume=parameters.resume,
                opacity=parameters.opacity if parameters.overlayVisible else 0.0,
                mapNode=parameters.outputMap,
                segmentationNode=parameters.outputSegmentation,
                onSlice=self._slice_done,
                onDone=self._run_done,
                **self._panel.choice(),
            ),
        )

    def start_export(self, folder: str, dicom: tuple[str, ...] = ()) -> None:
        """Start to write the chosen map's results to a new folder, and some of them as DICOM."""
        self._folder = folder
        node = self._panel.parameters().outputMap
        self._start(
            "export",
            lambda: self._logic.startExport(
                node, folder, dicom=dicom, onSlice=self._slice_written, onDone=self._export_done
            ),
        )

    def end(self) -> None:
        """Nothing is on its way any more."""
        self._range.show_end()

    def _start(self, work: str, start: Callable[[], int]) -> None:
        self._panel.showMessage("")
        try:
            total = start()
        except MedAnomalyCLIPError as error:
            self._panel.showMessage(str(error))
            return
        self._range.show_progress(0, total, work)
        self._panel.startPolling()
        self._panel.updateButtons()

    def _slice_done(self, done: int, total: int, outcome: SliceOutcome | None) -> None:
        self._range.show_progress(done, total, "run")
        detection = self._logic.runningDetection()
        if detection is None or outcome is None:
            return
        parameters = self._panel.parameters()
        if self._awaiting_first:
            self._awaiting_first = False
            # First, for the slider must not seem to be moved when the nodes are set.
            self._panel.followThreshold(parameters, detection.volumeMap.threshold)
            self._map = detection.mapNode
            parameters.outputMap = detection.mapNode
        if parameters.outputSegmentation is not detection.segmentationNode:
            parameters.outputSegmentation = detection.segmentationNode
        self.show_outputs()

    def _run_done(self, detection: VolumeDetection | None, error: MedAnomalyCLIPError | None) -> None:
        if error is not None:
            self._panel.showMessage(str(error))
        elif detection is not None and detection.failures:
            index, reason = next(iter(detection.failures.items()))
            words = _("Slices without a result: {count}. Slice {number}: {reason}")
            count = len(detection.failures)
            self._panel.showMessage(words.format(count=count, number=index + 1, reason=reason))

    def _slice_written(self, done: int, total: int, _outcome: SliceOutcome | None) -> None:
        self._range.show_progress(done, total, "export")

    def _export_done(self, _detection: VolumeDetection | None, error: MedAnomalyCLIPError | None) -> None:
        words = _("Results are in {folder}.").format(folder=self._folder)
        self._panel.showMessage(words if error is None else str(error))
