"""The panel's choice of a slice view, and the line that tells its plane in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import qt
from slicer.i18n import tr as _

from .errors import MedAnomalyCLIPError
from .scene_views import Node

_DELAY_MS = 150  # after the last movement; a plane is cut to tell of it


class ViewPanel:
    """A combo box of slice views; its first entry is the view last touched, whichever that is."""

    def __init__(
        self,
        ui: Any,
        logic: Any,
        inputs: Callable[[], tuple[Node | None, str, str]],
        keep: Callable[..., None],
        on_settled: Callable[[], None],
    ) -> None:
        """
        Args:
            ui: holds viewSelector and planeLabel.
            logic: MedAnomalyCLIPLogic.
            inputs: tells volume, view and detector that are chosen at this moment.
            keep: called with `viewName`, the layout name that was chosen, empty for the view last touched.
            on_settled: called a moment after the last movement of a view.
        """
        self._ui, self._logic, self._inputs = ui, logic, inputs
        self._selector = ui.viewSelector
        self._keep, self._on_settled = keep, on_settled
        self._timer = qt.QTimer()
        self._timer.interval = _DELAY_MS
        self._timer.singleShot = True
        self._timer.connect("timeout()", self._settle)
        self._selector.connect("currentIndexChanged(int)", self._item_chosen)

    def stop(self) -> None:
        self._timer.stop()

    def plane_changed(self) -> None:
        """A view moved, or another volume was chosen: tell the plane in words, a moment later."""
        self._timer.start()

    def _settle(self) -> None:
        volume, view_name, _detector = self._inputs()
        text = ""
        if volume is not None:
            try:
                text = self._logic.describePlane(volume, view_name)
            except MedAnomalyCLIPError as error:
                text = str(error)
        self._ui.planeLabel.text = text
        self._on_settled()

    def show(self, names: Sequence[str], touched: str, chosen: str) -> None:
        selector = self._selector
        selector.blockSignals(True)
        if tuple(names) != tuple(selector.itemData(index) for index in range(1, selector.count)):
            selector.clear()
            selector.addItem("", "")
            for name in names:
                selector.addItem(name, name)
        selector.setItemText(0, _("Last touched ({view})").format(view=touched or _("none")))
        selector.setCurrentIndex(max(selector.findData(chosen), 0))
        selector.blockSignals(False)

    def _item_chosen(self, index: int) -> None:
        self._keep(viewName=self._selector.itemData(index) or "")
