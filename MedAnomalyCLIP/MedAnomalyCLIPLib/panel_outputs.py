"""The panel's results of a volume: nodes, table, plot, candidates, Segment Editor, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from .panel_keys import add_shortcut
from .scene_dicom import is_from_dicom
from .scene_nodes import ROLE, VOLUME_MAP
from .scene_run import VolumeDetection
from .scene_segments import select_in_segment_editor
from .scene_table import chart_of, show_chart

_SELECTED = "dataSelected(vtkStringArray*,vtkCollection*)"
_FOLDER = "MedAnomalyCLIP results"


class OutputsPanel:
    """The widgets of the Outputs section.

    Attributes:
        shown: what the table shows, None if it is empty.
    """

    def __init__(
        self,
        ui: Any,
        parent: Any,
        logic: Any,
        tell: Callable[[str], None],
        export: Callable[[str, tuple[str, ...]], None],
    ) -> None:
        """
        Args:
            ui: holds the widgets.
            parent: the panel's outermost widget; keys work while it is visible.
            logic: MedAnomalyCLIPLogic, which knows what the scene holds and jumps to slices.
            tell: shows a message to the reader.
            export: starts an export to a folder; what is to be written as DICOM too.
        """
        self.shown: VolumeDetection | None = None
        self._ui, self._logic, self._tell, self._export = ui, logic, tell, export
        self._selecting = False
        self._plot_views: list[Any] = []
        ui.outputMapSelector.addAttribute("vtkMRMLScalarVolumeNode", ROLE, VOLUME_MAP)
        ui.outputSegmentationSelector.addAttribute("vtkMRMLSegmentationNode", ROLE, "segmentation")
        ui.resultsTable.verticalHeader().hide()  # its numbers are not those of the slices
        ui.resultsTable.connect("selectionChanged()", self._row_chosen)
        ui.previousButton.connect("clicked(bool)", self.go_to_previous)
        ui.nextButton.connect("clicked(bool)", self.go_to_next)
        ui.plotButton.connect("clicked(bool)", self.show_plot)
        ui.editorButton.connect("clicked(bool)", self.open_segment_editor)
        ui.exportButton.connect("clicked(bool)", self.choose_folder)
        self._dicom_boxes = {
            "segmentation": ui.dicomSegmentationBox,
            "report": ui.dicomReportBox,
            "capture": ui.dicomCaptureBox,
        }
        self._shortcuts = [
            add_shortcut(parent, "Alt+Left", self.go_to_previous),
            add_shortcut(parent, "Alt+Right", self.go_to_next),
        ]

    def close(self) -> None:
        """Let go of everything outside the panel."""
        self.show(None)
        for view in self._plot_views:
            view.disconnect(_SELECTED, self._points_chosen)
        self._plot_views.clear()

    def show(self, detection: VolumeDetection | None) -> None:
        """Show what the scene holds of a volume."""
        self.shown = detection
        table = detection.tableNode if detection is not None else None
        view = self._ui.resultsTable
        if view.mrmlTableNode() is not table:
            self._selecting = True
            view.setMRMLTableNode(table)
            self._selecting = False

    def update(self, busy: bool) -> None:
        """Enable what can be done now."""
        detection = self.shown
        volume_map = detection.volumeMap if detection is not None and detection.volumeMap.rows else None
        for button in (self._ui.previousButton, self._ui.nextButton, self._ui.plotButton):
            button.enabled = volume_map is not None
        usable = volume_map is not None and volume_map.source is not None and not busy
        self._ui.exportButton.enabled = usable
        from_dicom = usable and volume_map is not None and is_from_dicom(volume_map.source)
        for box in (self._ui.dicomLabel, *self._dicom_boxes.values()):
            box.enabled = from_dicom
        has_segmentation = volume_map is not None and volume_map.segmentation is not None
        self._ui.editorButton.enabled = usable and has_segmentation

    # From slice to slice

    def go_to_next(self) -> None:
        self._go(1)

    def go_to_previous(self) -> None:
        self._go(-1)

    def _go(self, step: int) -> None:
        if self.shown is None:
            return
        index = self._logic.nextCandidate(self.shown.mapNode, step)
        if index is not None:
            self._tell("")
            self._select(sorted(self.shown.volumeMap.rows).index(index))
        elif step > 0:
            self._tell(_("There is no candidate after this slice."))
        else:
            self._tell(_("There is no candidate before this slice."))

    def _select(self, row: int) -> None:
        """Select a row without going to its slice again."""
        self._selecting = True
        self._ui.resultsTable.selectRow(row)
        self._selecting = False

    def _row_chosen(self) -> None:
        if not self._selecting:
            self._go_to_row(self._ui.resultsTable.currentIndex().row())

    def _go_to_row(self, row: int) -> None:
        rows = self.shown.rows if self.shown is not None else []
        if self.shown is not None and 0 <= row < len(rows):
            self._logic.jumpToSlice(self.shown.mapNode, rows[row].index)

    # Plot

    def show_plot(self) -> None:
        """Show the scores in a plot view, whose points lead to their slices."""
        chart = chart_of(self.shown and self.shown.tableNode)
        if chart is None:
            return
        for view in show_chart(chart):
            if view not in self._plot_views:
                view.connect(_SELECTED, self._points_chosen)
                self._plot_views.append(view)

    def _points_chosen(self, series_ids: Any, points: Any) -> None:
        """A click on points of any chart in the view; the first point of ours counts."""
        table = self.shown and self.shown.tableNode
        for number in range(series_ids.GetNumberOfValues()):
            series = slicer.mrmlScene.GetNodeByID(series_ids.GetValue(number))
            rows = points.GetItemAsObject(number)
            if series is not None and series.GetTableNode() is table and rows.GetNumberOfValues():
                self._go_to_row(rows.GetValue(0))
                return

    # Further

    def open_segment_editor(self) -> None:
        detection = self.shown
        if detection is None or detection.segmentationNode is None:
            return
        volume_map = detection.volumeMap
        select_in_segment_editor(volume_map.segmentation, volume_map.source, volume_map.segment_id or "")
        slicer.util.selectModule("SegmentEditor")

    def choose_folder(self) -> None:
        """Export into a new folder in one that the reader chooses; never named after the patient."""
        parent = qt.QFileDialog.getExistingDirectory(
            self._ui.exportButton.window(), _("Choose where to put the folder of results"), str(Path.home())
        )
        if parent:
            wanted = tuple(kind for kind, box in self._dicom_boxes.items() if box.enabled and box.checked)
            self._export(str(_free(Path(parent))), wanted)


def _free(parent: Path) -> Path:
    """A folder that does not exist yet."""
    folder, number = parent / _FOLDER, 1
    while folder.exists():
        number += 1
        folder = parent / f"{_FOLDER} {number}"
    return folder
