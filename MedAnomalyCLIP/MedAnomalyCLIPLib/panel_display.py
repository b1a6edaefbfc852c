"""The panel's choices for all maps: colours, legend, hiding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .panel_keys import add_shortcut


class DisplayPanel:
    """The widgets of the Display section that no parameter can be bound to, and what follows them."""

    def __init__(self, ui: Any, parent: Any, logic: Any, keep: Callable[..., None]) -> None:
        """
        Args:
            ui: holds coloursSelector and overlayCheckBox.
            parent: the panel's outermost widget; keys work while it is visible.
            logic: MedAnomalyCLIPLogic.
            keep: called with `colours`, the colour node that the reader chose, None for our own colours.
        """
        self._ui, self._logic = ui, logic
        ui.coloursSelector.connect("currentNodeChanged(vtkMRMLNode*)", lambda node: keep(colours=node))
        self._shortcut = add_shortcut(parent, "Ctrl+Shift+H", ui.overlayCheckBox.toggle)

    def show(self, parameters: Any) -> None:
        """Show the maps as the parameters say."""
        if self._ui.coloursSelector.currentNode() is not parameters.colours:
            self._ui.coloursSelector.setCurrentNode(parameters.colours)
        self._logic.setColours(parameters.colours)
        self._logic.setLegend(parameters.legendVisible)
        self._logic.setVisible(parameters.overlayVisible, parameters.opacity)
