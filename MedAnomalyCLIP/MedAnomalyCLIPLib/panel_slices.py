"""The list of normal slices in the panel: adding, taking out, and the way back to a slice.

Slices are copied when they are added. So a scene may be closed and the next patient's opened meanwhile, and
nodes may be deleted: the list stays, only the way back to the slice is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import qt
import slicer
from slicer.i18n import tr as _

from .background import LEAST_ANATOMY
from .errors import InvalidRequest, MedAnomalyCLIPError
from .geometry import SlicePlane
from .neighbours import Origin
from .scene import plane_in_view
from .scene_navigation import show_plane
from .scene_slices import CutSlice, SliceCutter, SliceStack
from .taught_detector import LeaveOneOut
from .teaching import ENOUGH_SLICES, LEAST_SLICES, check_beside

_CUTTING_SECONDS = 0.02  # of the main thread, at each call
_RANGE_SLICES = 16  # that a range starts with


class Inputs(NamedTuple):
    """What is chosen in the panel: a volume node or None, the name of a view, a detector's folder."""

    volume: Any
    view: str
    detector: str


@dataclass(frozen=True, eq=False)
class ChosenSlice:
    """A slice in the list.

    Attributes:
        volume: how many scenes were closed before, and the ID of the volume's node in that scene.
        name: of the volume.
        plane: the slice.
        origin: where it lies in its volume.
    """

    volume: tuple[int, str]
    name: str
    plane: SlicePlane
    origin: Origin


class SliceList:
    """The widgets of the section Teach that have to do with slices.

    Attributes:
        slices: in the order in which they were added.
    """

    def __init__(
        self,
        ui: Any,
        inputs: Callable[[], Inputs],
        on_changed: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        """
        Args:
            ui: holds teachTable, the buttons around it, and the choice of a range.
            inputs: tells what is chosen in the panel at this moment.
            on_changed: called when slices came or went, or are going to: then `cut_some` is to be called.
            tell: shows a message to the reader.
        """
        self.slices: list[ChosenSlice] = []
        self._ui, self._inputs, self._on_changed, self._tell = ui, inputs, on_changed, tell
        self._order: Sequence[int] = ()  # of the slices in the table
        self._cutter = SliceCutter()
        self._skipped: list[str] = []  # why slices of a range were left out
        self._stack: tuple[str, SliceStack] | None = None
        self._scene = 0
        header = ui.teachTable.horizontalHeader()
        header.setSectionResizeMode(0, qt.QHeaderView.Stretch)
        for column in (1, 2):
            header.setSectionResizeMode(column, qt.QHeaderView.ResizeToContents)
        for widget, signal, slot in (
            (ui.teachAddButton, "clicked(bool)", self._add_current),
            (ui.teachAddRangeButton, "clicked(bool)", self._add_range),
            (ui.teachRemoveButton, "clicked(bool)", self._remove),
            (ui.teachClearButton, "clicked(bool)", self._clear),
            (ui.teachTable, "cellClicked(int,int)", self._jump),
            (ui.teachTable, "currentCellChanged(int,int,int,int)", self._jump),
            (ui.teachTable, "itemSelectionChanged()", self._selection_changed),
            (ui.teachVolumeSelector, "currentNodeChanged(vtkMRMLNode*)", self.update_range),
        ):
            widget.connect(signal, slot)

    @property
    def is_adding(self) -> bool:
        """Whether slices of a range are still to be cut."""
        return len(self._cutter) > 0

    def close(self) -> None:
        self._cutter.clear()

    def scene_closed(self) -> None:
        """The nodes are gone, and others may get their IDs."""
        self._scene += 1
        self._stack = None
        if self.is_adding:
            self._cutter.clear()
            self._tell(_("The scene was closed before all slices were added."))

    def cut_some(self) -> None:
        """Add slices that were asked for, for a moment, at least one."""
        end = time.perf_counter() + _CUTTING_SECONDS
        while self.is_adding:
            try:
                self._add(self._cutter.cut())
            except MedAnomalyCLIPError as error:
                self._skipped.append(str(error))
            if time.perf_counter() > end:
                break
        if not self.is_adding and self._skipped:
            first, *others = self._skipped
            words = _("{reason}; {count} more slices were left out") if others else "{reason}"
            self._tell(words.format(reason=first, count=len(others)))
        self._on_changed()

    def update_range(self, *_arguments: Any) -> None:
        """Offer the slices of the chosen volume, along the axis that the view shows."""
        node = self._ui.teachVolumeSelector.currentNode()
        if self._ui.teachSection.collapsed:
            return
        try:
            stack = None if node is None else (node.GetID(), SliceStack.of(node, self._inputs().view))
        except MedAnomalyCLIPError:
            stack = None  # it is told when slices are added
        if stack is not None and stack != self._stack:
            count = stack[1].count
            for spin, value in (
                (self._ui.teachFirstSpin, 1),
                (self._ui.teachLastSpin, count),
                (self._ui.teachStepSpin, max(1, count // _RANGE_SLICES)),
            ):
                spin.maximum = count
                spin.value = value
            self._ui.teachRangeLabel.text = _("{view} slices").format(view=stack[1].view)
        self._stack = stack
        self._ui.teachAddRangeButton.enabled = node is not None and self._ui.teachVolumeSelector.enabled

    def show(self, order: Sequence[int], scores: Mapping[int, LeaveOneOut]) -> None:
        """Fill the table.

        Args:
            order: places of the slices, from the top.
            scores: for each place what the taught detector says of it, where there is one.
        """
        table, self._order = self._ui.teachTable, tuple(order)
        table.blockSignals(True)
        table.clearContents()
        table.rowCount = len(self._order)
        for row, place in enumerate(self._order):
            one, score = self.slices[place], scores.get(place)
            # The place first: a long name of a volume is cut off.
            place_words = one.plane.description.removesuffix(", aligned")
            texts = [_("{slice}: {volume}").format(slice=place_words, volume=one.name)]
            if score is not None:
                texts += [f"{score.score:.2f}", f"{100 * score.marked_share:.1f} %"]
            for column, text in enumerate(texts):
                table.setItem(row, column, qt.QTableWidgetItem(text))
        table.clearSelection()
        table.blockSignals(False)

    def enable(self, free: bool) -> None:
        """Let the list be changed, or not."""
        ui, has_volume = self._ui, self._ui.teachVolumeSelector.currentNode() is not None
        for name in ("VolumeSelector", "FirstSpin", "LastSpin", "StepSpin"):
            getattr(ui, f"teach{name}").enabled = free
        ui.teachAddButton.enabled = free and self._inputs().volume is not None
        ui.teachAddRangeButton.enabled = free and has_volume
        ui.teachRemoveButton.enabled = free and bool(ui.teachTable.selectionModel().selectedRows())
        ui.teachClearButton.enabled = free and bool(self.slices)
        ui.teachCountLabel.text = self._count_words()

    def _add_current(self) -> None:
        volume, view, _detector = self._inputs()
        self._tell("")
        try:
            # The plane of the click; it goes through a cutter of its own, which measures what it shows.
            cutter = SliceCutter()
            cutter.add(volume, [plane_in_view(volume, view)])
            self._add(cutter.cut())
        except MedAnomalyCLIPError as error:
            self._tell(str(error))
        self._on_changed()

    def _add_range(self) -> None:
        ui, node = self._ui, self._ui.teachVolumeSelector.currentNode()
        self._tell("")
        self._skipped.clear()
        try:
            stack = SliceStack.of(node, self._inputs().view)
            if self._stack is None or stack != self._stack[1]:
                raise InvalidRequest(
                    _("The view shows other slices now: look at the range again, then add it")
                )
            wanted = range(ui.teachFirstSpin.value - 1, ui.teachLastSpin.value, ui.teachStepSpin.value)
            self._cutter.add(node, wanted, stack.axis)
        except MedAnomalyCLIPError as error:
            self.update_range()
            self._tell(str(error))
            return
        self._on_changed()

    def _add(self, cut: CutSlice) -> None:
        """Put a slice into the list.

        Raises:
            InvalidRequest: it is there already, shows little, or does not fit to the others.
        """
        volume = self._scene, cut.node.GetID()
        origin = Origin.of_plane(cut.plane, volume)
        planes, origins = ([getattr(one, key) for one in self.slices] for key in ("plane", "origin"))
        check_beside(cut.plane, origin, planes, origins)
        if cut.anatomy < LEAST_ANATOMY:
            raise InvalidRequest(_("{slice} shows little but background").format(slice=cut.plane.description))
        self.slices.append(ChosenSlice(volume, cut.node.GetName() or "", cut.plane, origin))

    def _remove(self) -> None:
        rows = {index.row() for index in self._ui.teachTable.selectionModel().selectedRows()}
        gone = {self._order[row] for row in rows}
        self.slices = [one for place, one in enumerate(self.slices) if place not in gone]
        self._on_changed()

    def _clear(self) -> None:
        self.slices = []
        self._tell("")
        self._on_changed()

    def _selection_changed(self) -> None:
        selected = bool(self._ui.teachTable.selectionModel().selectedRows())
        self._ui.teachRemoveButton.enabled = selected and self._ui.teachVolumeSelector.enabled

    def _jump(self, row: int, *_arguments: Any) -> None:
        """Bring the view to the slice of a row."""
        if not 0 <= row < len(self._order):
            return
        one = self.slices[self._order[row]]
        scene, node_id = one.volume
        node = slicer.mrmlScene.GetNodeByID(node_id) if scene == self._scene else None
        if node is None:
            self._tell(_("The volume of this slice is no longer open."))
            return
        self._tell("")
        show_plane(node, one.plane, self._inputs().view)

    def _count_words(self) -> str:
        count, volumes = len(self.slices), len({one.volume for one in self.slices})
        if not count:
            return _("No slices yet")
        words = _("{count} slices of {volumes} volumes") if volumes > 1 else _("{count} slices of one volume")
        if count < LEAST_SLICES:
            words = _("{count} slice; {least} are needed, {enough} or more are better")
        elif count < ENOUGH_SLICES:
            words += _("; {enough} or more are better")
        return words.format(count=count, volumes=volumes, least=LEAST_SLICES, enough=ENOUGH_SLICES)
