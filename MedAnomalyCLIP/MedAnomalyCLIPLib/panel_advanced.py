"""The panel's section Advanced: device, precision, window, what the network sees, a log of what was done."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import qt
from slicer.i18n import tr as _

from .errors import MedAnomalyCLIPError
from .panel_background import BackgroundCall
from .runtime import AUTO, BFLOAT16, FLOAT32, INT8

OWN_WINDOW, VIEW_WINDOW, MANUAL_WINDOW = "detector", "view", "manual"

_LOG_LINES = 500
_PREVIEW_SIDE = 224


class ActivityLog:
    """Lines about what was done, in the panel only: nothing is written to a file, and no volume is named."""

    def __init__(self, text_edit: Any) -> None:
        self._text = text_edit
        self._text.readOnly = True
        self._text.maximumBlockCount = _LOG_LINES

    def add(self, line: str) -> None:
        self._text.appendPlainText(f"{datetime.now():%H:%M:%S}  {line}")


class AdvancedSection:
    """The widgets of the section Advanced. What is chosen lies in the parameter node.

    Attributes:
        log: what was done.
    """

    def __init__(
        self,
        ui: Any,
        logic: Any,
        parameters: Callable[[], Any],
        view_name: Callable[[], str],
    ) -> None:
        """
        Args:
            ui: holds advancedSection, deviceSelector, precisionSelector, windowSelector, windowLowBox,
                windowHighBox, previewButton, previewLabel, previewCaption and logText.
            logic: the module's.
            parameters: gives the parameter node, None while there is none.
            view_name: gives the layout name of the view to be looked at.
        """
        self.log = ActivityLog(ui.logText)
        self._ui, self._logic = ui, logic
        self._parameters, self._view_name = parameters, view_name
        self._asking_devices = BackgroundCall()
        self._preparing = BackgroundCall()
        self._devices: tuple[str, ...] | None = None  # as torch says; not asked yet
        self._folder = tempfile.TemporaryDirectory(prefix="medanomalyclip-")
        for selector, entries in ((ui.windowSelector, _windows()), (ui.precisionSelector, _precisions())):
            for title, kind in entries:
                selector.addItem(title, kind)
        self._show_devices(AUTO)
        ui.previewLabel.hide()
        ui.advancedSection.collapsed = True
        ui.advancedSection.connect("contentsCollapsed(bool)", self._folded)
        ui.deviceSelector.connect("currentIndexChanged(int)", self._device_chosen)
        ui.precisionSelector.connect("currentIndexChanged(int)", self._precision_chosen)
        ui.windowSelector.connect("currentIndexChanged(int)", self._window_chosen)
        ui.windowLowBox.connect("valueChanged(double)", self._range_changed)
        ui.windowHighBox.connect("valueChanged(double)", self._range_changed)
        ui.previewButton.connect("clicked(bool)", self.show_preview)

    def close(self) -> None:
        self._asking_devices.stop()
        self._preparing.stop()
        self._folder.cleanup()

    def window(self) -> tuple[float, float] | str | None:
        """The chosen window, as `MedAnomalyCLIPLogic.detect` takes it."""
        parameters = self._parameters()
        if parameters.windowRule == MANUAL_WINDOW:
            return parameters.windowLow, parameters.windowHigh
        return VIEW_WINDOW if parameters.windowRule == VIEW_WINDOW else None

    def update(self) -> None:
        """Show what the parameter node says."""
        parameters, ui = self._parameters(), self._ui
        if parameters is None:  # while a scene is closed
            ui.previewButton.enabled = False
            return
        self._show_devices(parameters.device)
        _select(ui.precisionSelector, parameters.precision)
        _select(ui.windowSelector, parameters.windowRule)
        for box, value in (
            (ui.windowLowBox, parameters.windowLow),
            (ui.windowHighBox, parameters.windowHigh),
        ):
            box.blockSignals(True)
            box.value = value
            box.blockSignals(False)
            box.enabled = parameters.windowRule == MANUAL_WINDOW
        ui.previewButton.enabled = parameters.inputVolume is not None and not self._preparing.running

    def show_preview(self) -> None:
        """Make the picture that the network is shown of the view's plane, as it stands now."""
        parameters = self._parameters()
        try:
            future = self._logic.previewInput(
                parameters.inputVolume,
                self._view_name(),
                detector=parameters.detector,
                window=self.window(),
            )
        except MedAnomalyCLIPError as error:
            self._refused(error)
            return
        self._ui.previewCaption.text = _("Preparing…")
        self._preparing.start(future, self._prepared)
        self.update()

    def _prepared(self, picture: Any, error: Exception | None) -> None:
        ui = self._ui
        self.update()
        if error is not None:
            self._refused(error)
            if not isinstance(error, MedAnomalyCLIPError):
                raise error
            return
        path = Path(self._folder.name) / "network_input.png"
        picture.save(path)
        pixmap = qt.QPixmap(str(path))
        ui.previewLabel.setPixmap(pixmap.scaled(_PREVIEW_SIDE, _PREVIEW_SIDE, qt.Qt.KeepAspectRatio))
        ui.previewLabel.show()
        words = _("{plane}: {side} × {side} pixels; black is {low}, white is {high}")
        low, high = (f"{value:.6g}" for value in picture.window)
        caption = words.format(plane=picture.description, side=picture.side, low=low, high=high)
        ui.previewCaption.text = caption
        self.log.add(_("Shown what the detector sees: {caption}").format(caption=caption))

    def _refused(self, error: Exception) -> None:
        """Say why there is no picture; that of another plane does not stay."""
        self._ui.previewLabel.hide()
        self._ui.previewCaption.text = str(error)

    def _folded(self, collapsed: bool) -> None:
        """Which devices there are only torch knows, whose import takes seconds: asked when looked at."""
        if (
            collapsed
            or self._devices is not None
            or self._asking_devices.running
            or not self._logic.isReady()
        ):
            return
        self._asking_devices.start(self._logic.availableDevices(), self._devices_known)

    def _devices_known(self, devices: tuple[str, ...] | None, error: Exception | None) -> None:
        if error is not None:
            self.log.add(str(error))
            return
        self._devices = devices
        self.update()

    def _show_devices(self, chosen: str) -> None:
        """The devices on offer; one that was chosen on another computer stays visible until changed."""
        names = [AUTO, *(self._devices or ("cpu",))]
        if chosen not in names:
            names.append(chosen)
        selector = self._ui.deviceSelector
        if [selector.itemData(index) for index in range(selector.count)] != names:
            selector.blockSignals(True)
            selector.clear()
            for name in names:
                selector.addItem(_device_title(name), name)
            selector.blockSignals(False)
        _select(selector, chosen)

    def _device_chosen(self, index: int) -> None:
        parameters = self._parameters()
        if parameters is not None:
            parameters.device = self._ui.deviceSelector.itemData(index) or AUTO

    def _precision_chosen(self, index: int) -> None:
        parameters = self._parameters()
        if parameters is not None:
            parameters.precision = self._ui.precisionSelector.itemData(index) or AUTO

    def _window_chosen(self, index: int) -> None:
        parameters = self._parameters()
        if parameters is None:
            return
        kind = self._ui.windowSelector.itemData(index) or OWN_WINDOW
        if kind == MANUAL_WINDOW and parameters.windowLow >= parameters.windowHigh:
            self._start_from_view(parameters)
        parameters.windowRule = kind

    def _start_from_view(self, parameters: Any) -> None:
        """A manual range that was never set starts as what the reader sees."""
        from .scene_views import displayed_window

        try:
            low, high = displayed_window(parameters.inputVolume)
        except MedAnomalyCLIPError:
            low, high = 0.0, 1.0
        parameters.windowLow, parameters.windowHigh = low, high

    def _range_changed(self) -> None:
        parameters = self._parameters()
        if parameters is not None:
            parameters.windowLow = self._ui.windowLowBox.value
            parameters.windowHigh = self._ui.windowHighBox.value


def _windows() -> list[tuple[str, str]]:
    return [
        (_("The detector's own rule"), OWN_WINDOW),
        (_("As the view shows it"), VIEW_WINDOW),
        (_("These values"), MANUAL_WINDOW),
    ]


def _precisions() -> list[tuple[str, str]]:
    return [
        (_("Automatic"), AUTO),
        (_("32-bit numbers, exact"), FLOAT32),
        (_("8-bit integers, fastest on the CPU"), INT8),
        (_("16-bit numbers (bfloat16), PyTorch"), BFLOAT16),
    ]


def _device_title(name: str) -> str:
    titles = {AUTO: _("Automatic"), "cpu": _("CPU"), "mps": _("Apple GPU")}
    return titles.get(name) or _("NVIDIA GPU ({name})").format(name=name)


def _select(selector: Any, data: str) -> None:
    selector.blockSignals(True)
    selector.setCurrentIndex(max(selector.findData(data), 0))
    selector.blockSignals(False)
