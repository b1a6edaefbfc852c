"""The panel's choice of a slice view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slicer.i18n import tr as _


class ViewSelector:
    """A combo box of slice views; its first entry is the view last touched, whichever that is."""

    def __init__(self, selector: Any, on_chosen: Callable[[str], None]) -> None:
        """`on_chosen` is called with the layout name that was chosen, empty for the view last touched."""
        self._selector = selector
        self._on_chosen = on_chosen
        selector.connect("currentIndexChanged(int)", self._item_chosen)

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
        self._on_chosen(self._selector.itemData(index) or "")
