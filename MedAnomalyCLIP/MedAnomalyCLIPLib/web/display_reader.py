"""The session's part for looks: threshold, smallest area and colours of the maps, window of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..scene_views import Node, displayed_window

if TYPE_CHECKING:
    from trame_server.state import State

    from .reader import ReaderLogic

# Of Slicer's own colours those that grow brighter or darker steadily, and the rainbows that some are used to.
_COLOURS = ("Iron", "Warm1", "Cool1", "Grey", "InvertedGrey", "Ocean", "Desert", "Rainbow", "ReverseRainbow")

STATE: dict[str, Any] = {
    "window": [0.0, 1.0],  # voxel values shown as black and white
    "window_limits": [0.0, 1.0],
    "threshold": 0.5,
    "threshold_chosen": False,  # by the reader; until then it is the detector's own
    "smallest_area": 0.0,  # mm²; smaller parts do not count
    "opacity": 0.5,
    "overlay_visible": True,
    "colour_items": [{"title": "Heat", "value": ""}, *({"title": n, "value": n} for n in _COLOURS)],
    "colours": "",  # name of a colour node; empty for our own
}


class DisplayReader:
    """Answers what the reader moves in the section Display, or drags in a view.

    Attributes:
        own: the threshold of the selected detector.
    """

    def __init__(self, state: State, logic: ReaderLogic, start_polling: Callable[[], None]) -> None:
        """`start_polling` carries on what the logic has begun."""
        self.own = STATE["threshold"]
        self._state, self._logic, self._start_polling = state, logic, start_polling
        self._node: Node | None = None
        state.update(STATE)
        for names, answer in (
            (("threshold",), self._threshold_moved),
            (("smallest_area",), self._area_moved),
            (("opacity", "overlay_visible", "colours"), self._looks_changed),
            (("window",), self._window_moved),
        ):
            state.change(*names)(answer)

    def watch(self, node: Node) -> None:
        """Another image is shown."""
        self._node = node
        low, high = node.GetImageData().GetScalarRange()
        self._state.window_limits = [low, max(high, low + 1e-6)]
        node.GetDisplayNode().AddObserver("ModifiedEvent", self._window_changed)
        self._window_changed()

    # Maps

    def show_as_chosen(self) -> None:
        """Let maps follow the choices for all of them, of which the logic keeps none from study to study."""
        import slicer

        name = self._state.colours
        node = slicer.mrmlScene.GetFirstNode(name, "vtkMRMLColorTableNode") if name in _COLOURS else None
        self._logic.setColours(node)
        self._logic.setVisible(self._state.overlay_visible, float(self._state.opacity))

    def follow_threshold(self, threshold: float) -> None:
        """A first result is there: it follows the slider if the reader moved that, else the slider it."""
        if self._state.threshold_chosen:
            self._logic.setThreshold(self._state.threshold, wait=False)
        else:
            self._state.threshold = self._logic.threshold = float(threshold)

    def expect_own_threshold(self) -> None:
        """The next map will start with the detector's own threshold, unless the reader chose another."""
        if not self._state.threshold_chosen:
            self._state.threshold = self._logic.threshold = self.own

    def take_own_threshold(self) -> None:
        """Go back to the detector's own threshold."""
        self._state.threshold_chosen = False
        self._state.threshold = self.own
        self._logic.setThreshold(self.own, wait=False)
        self._start_polling()

    def _threshold_moved(self, threshold: float, **_: Any) -> None:
        if abs(threshold - self._logic.threshold) < 1e-6:
            return
        self._state.threshold_chosen = True
        self._logic.setThreshold(float(threshold), wait=False)
        self._start_polling()

    def _area_moved(self, smallest_area: float, **_: Any) -> None:
        if smallest_area != self._logic.smallestArea:
            self._logic.setSmallestArea(float(smallest_area), wait=False)
            self._start_polling()

    def _looks_changed(self, **_: Any) -> None:
        self.show_as_chosen()

    # The image's window

    def auto_window(self) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        if display is not None:
            display.AutoWindowLevelOff()
            display.AutoWindowLevelOn()
            self._window_changed()

    def _window_changed(self, *_: Any) -> None:
        """The window was dragged in a view, or set here."""
        window = [float(value) for value in displayed_window(self._node)]
        if window != list(self._state.window):
            with self._state:
                self._state.window = window

    def _window_moved(self, window: Sequence[float], **_: Any) -> None:
        if self._node is None or list(window) == list(displayed_window(self._node)):
            return
        display = self._node.GetDisplayNode()
        display.AutoWindowLevelOff()
        display.SetWindowLevelMinMax(*sorted(float(value) for value in window))
