"""The panel's button for the slice in a view, and what is said of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from slicer.i18n import tr as _

from .errors import MedAnomalyCLIPError
from .panel_keys import add_shortcut
from .panel_setup import Choice
from .panel_words import log_words, result_words
from .result import AnomalyResult


class Panel(Protocol):
    """What the panel's widget gives to this part."""

    logic: Any

    def parameters(self) -> Any: ...  # the parameter node, also while another module is shown

    def choice(self) -> dict[str, Any]: ...  # what the reader chose of a detection, for the logic

    def currentViewName(self) -> str: ...

    def showMessage(self, text: str) -> None: ...

    def updateButtons(self) -> None: ...

    def startPolling(self) -> None: ...

    def stopRun(self, message: str) -> None: ...

    def followThreshold(self, parameters: Any, threshold: float) -> None: ...


class DetectPanel:
    """Detects on the slice that a view shows, in the background, and shows the score.

    Attributes:
        result: the last one; None before there is any.
    """

    def __init__(
        self,
        ui: Any,
        parent: Any,
        panel: Panel,
        busy_elsewhere: Callable[[], bool],
        log: Callable[[str], None],
        learn_speed: Callable[[Choice, AnomalyResult], None],
    ) -> None:
        """
        Args:
            ui: holds detectButton, scoreLabel and resultLabel.
            parent: the panel's outermost widget; keys work while it is visible.
            panel: whose part this is.
            busy_elsewhere: whether what is on its way has a Cancel button of its own.
            log: keeps a line of what was done.
            learn_speed: told what was chosen and the result of each detection.
        """
        self.result: AnomalyResult | None = None
        self._ui, self._panel, self._busy_elsewhere = ui, panel, busy_elsewhere
        self._log, self._learn_speed = log, learn_speed
        ui.detectButton.toolTip = _("Detect on the plane that the view shows now (Ctrl+Return)")
        ui.detectButton.connect("clicked(bool)", self.click)
        self._shortcut = add_shortcut(parent, "Ctrl+Return", self.click)

    def click(self) -> None:
        """Start, or cancel what was started."""
        if self._panel.logic.isRunning() and not self._busy_elsewhere():
            self._panel.stopRun(_("Cancelled."))
        elif self._ui.detectButton.enabled:
            self._start()

    def clear(self) -> None:
        """The scene is closed: its result is gone."""
        self.result = None
        self.show()

    def show(self) -> None:
        """Show the last result in words."""
        if self.result is None:
            self._ui.scoreLabel.text = _("No result yet")
            self._ui.resultLabel.text = ""
            return
        self._ui.scoreLabel.text = _("Score {score:.2f}").format(score=self.result.score)
        self._ui.resultLabel.text = result_words(self.result)

    def update(self, ready: bool, running: bool) -> None:
        """Enable what can be done now.

        Args:
            ready: there is a volume.
            running: anything is on its way.
        """
        can_cancel = running and not self._busy_elsewhere()
        self._ui.detectButton.text = _("Cancel") if can_cancel else _("Detect")
        self._ui.detectButton.enabled = can_cancel or (ready and not running)

    def _start(self) -> None:
        panel = self._panel
        parameters = panel.parameters()
        # All may be changed before the result is there.
        asked = parameters.detector, parameters.device, parameters.precision
        panel.showMessage("")
        try:
            panel.logic.startDetection(
                parameters.inputVolume,
                panel.currentViewName(),
                opacity=parameters.opacity,
                onDone=lambda detection, error: self._done(detection, error, asked),
                **panel.choice(),
            )
        except MedAnomalyCLIPError as error:
            panel.showMessage(str(error))
            return
        self._ui.scoreLabel.text = _("Detecting…")
        self._ui.resultLabel.text = ""
        panel.startPolling()
        panel.updateButtons()

    def _done(self, detection: Any, error: MedAnomalyCLIPError | None, choice: Choice) -> None:
        """There is a detection, or an error that the reader can mend."""
        panel = self._panel
        if error is not None:
            panel.showMessage(str(error))
            self._log(str(error))
            return
        self.result = detection.result
        self._log(log_words(detection.result))
        # Both sliders may have been moved while the detector ran, or another module may be shown by now.
        parameters = panel.parameters()
        panel.followThreshold(parameters, detection.result.threshold)
        panel.logic.setVisible(parameters.overlayVisible, parameters.opacity)
        self._learn_speed(choice, detection.result)
