"""The panel's choice of slices, and the button, the bar and the words of a run over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slicer.i18n import tr as _

from .errors import MedAnomalyCLIPError
from .geometry import acquisition_axis, resolve_axis, slice_count, view_name
from .scene import volume_from_node
from .volume import Volume

DIRECTIONS = ("acquisition", "axial", "coronal", "sagittal")


class RangePanel:
    """The widgets of the .ui file that have to do with many slices.

    Attributes:
        working: "run" or "export" while one is on its way, else empty.
    """

    def __init__(self, ui: Any, on_button: Callable[[], None], on_changed: Callable[[], None]) -> None:
        """
        Args:
            ui: holds rangeAxisSelector, rangeWidget, rangeResumeCheckBox, rangeButton and rangeProgress.
            on_button: the button was clicked.
            on_changed: the reader chose another axis or other slices.
        """
        self.working = ""
        self._ui = ui
        self._on_changed = on_changed
        self._counts: list[int] = []
        ui.rangeProgress.hide()
        ui.rangeAxisSelector.connect("currentIndexChanged(int)", self._axis_chosen)
        ui.rangeWidget.connect("valuesChanged(double,double)", self._values_chosen)
        ui.rangeButton.connect("clicked(bool)", on_button)

    @property
    def axis(self) -> str:
        """The chosen direction, as `geometry.resolve_axis` takes it."""
        return self._ui.rangeAxisSelector.currentData or DIRECTIONS[0]

    @property
    def indices(self) -> range:
        """The chosen slices, from 0."""
        widget = self._ui.rangeWidget
        return range(round(widget.minimumValue) - 1, round(widget.maximumValue))

    @property
    def is_whole(self) -> bool:
        """Whether all slices are chosen."""
        return len(self.indices) == round(self._ui.rangeWidget.maximum)

    @property
    def progress(self) -> tuple[int, int]:
        """Slices done and to do, as shown."""
        return self._ui.rangeProgress.value, self._ui.rangeProgress.maximum

    def show_volume(self, node: Any, axis: str = "", first: int = 1, last: int = 0) -> None:
        """Offer the directions and slices of a volume.

        Args:
            node: the volume; None for none.
            axis: direction to choose.
            first, last: slices to choose, from 1; 0 for the last one.
        """
        selector = self._ui.rangeAxisSelector
        selector.blockSignals(True)
        selector.clear()
        self._counts = []
        try:
            volume = None if node is None else volume_from_node(node)
        except MedAnomalyCLIPError:
            volume = None  # Detect says why
        if volume is not None:
            for name in DIRECTIONS:
                self._counts.append(slice_count(volume, resolve_axis(volume, name)))
                selector.addItem(direction_words(volume, name, self._counts[-1]), name)
            selector.setCurrentIndex(max(selector.findData(axis), 0))
        selector.blockSignals(False)
        self._show_limits(first, last)

    def show_progress(self, done: int, total: int, working: str) -> None:
        """Show a run or an export that goes on."""
        self.working = working
        bar = self._ui.rangeProgress
        bar.maximum, bar.value = max(total, 1), done
        bar.show()

    def show_end(self) -> None:
        self.working = ""
        self._ui.rangeProgress.hide()

    def update(self, ready: bool, busy_elsewhere: bool) -> None:
        """Enable what can be done now.

        Args:
            ready: there is a volume.
            busy_elsewhere: a detection on one slice is on its way.
        """
        button = self._ui.rangeButton
        button.text = _("Cancel") if self.working else self._button_words()
        button.enabled = bool(self.working) or (ready and bool(self._counts) and not busy_elsewhere)
        for widget in (self._ui.rangeAxisSelector, self._ui.rangeWidget, self._ui.rangeResumeCheckBox):
            widget.enabled = not self.working and bool(self._counts)

    def _button_words(self) -> str:
        if not self._counts:
            return _("Detect range")
        if self.is_whole:
            return _("Detect on all {count} slices").format(count=len(self.indices))
        return _("Detect on {count} slices").format(count=len(self.indices))

    def _show_limits(self, first: int, last: int) -> None:
        widget = self._ui.rangeWidget
        index = self._ui.rangeAxisSelector.currentIndex
        count = self._counts[index] if self._counts else 1
        last = last if 0 < last <= count else count
        widget.blockSignals(True)
        widget.maximum = count
        widget.minimumValue, widget.maximumValue = min(first, last), last
        widget.blockSignals(False)

    def _axis_chosen(self, _index: int) -> None:
        self._show_limits(1, 0)
        self._on_changed()

    def _values_chosen(self, _first: float, _last: float) -> None:
        self._on_changed()


def direction_words(volume: Volume, name: str, count: int) -> str:
    """One of `DIRECTIONS` in words, with the number of slices along it."""
    axis = resolve_axis(volume, name)
    view = {"Axial": _("Axial"), "Coronal": _("Coronal"), "Sagittal": _("Sagittal")}[view_name(volume, axis)]
    if name == "acquisition":
        assert axis == acquisition_axis(volume)
        return _("As acquired: {view}, {count} slices").format(view=view.lower(), count=count)
    return _("{view}, {count} slices").format(view=view, count=count)
