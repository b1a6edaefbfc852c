"""The panel's section Teach: make a detector of the chosen normal slices, look at its scores, keep it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from .errors import MedAnomalyCLIPError
from .panel_detectors import detectors_folder
from .panel_slices import Inputs, SliceList
from .taught_detector import TaughtDetector
from .teaching import LEAST_SLICES

_POLL_MS = 50


class TeachSection:
    """The widgets of the .ui file whose names begin with "teach"."""

    def __init__(
        self, ui: Any, logic: Any, inputs: Callable[[], Inputs], on_kept: Callable[[str], None]
    ) -> None:
        """
        Args:
            ui: holds the widgets.
            logic: the module's logic, which teaches.
            inputs: tells what is chosen in the panel at this moment.
            on_kept: called with the folder of a detector that was kept.
        """
        self._ui, self._logic, self._inputs, self._on_kept = ui, logic, inputs, on_kept
        self._taught: TaughtDetector | None = None
        self._order: list[int] = []  # of the slices, as they were handed over
        self._begun = 0.0
        self._timer = qt.QTimer()
        self._timer.interval = _POLL_MS
        self._timer.connect("timeout()", self._poll)
        self._list = SliceList(ui, inputs, self._slices_changed, self._tell)
        ui.teachButton.connect("clicked(bool)", self._teach_or_cancel)
        ui.teachKeepButton.connect("clicked(bool)", self._keep)
        ui.teachDiscardButton.connect("clicked(bool)", self._discard)
        ui.teachNameEdit.connect("textChanged(QString)", self.update)
        ui.teachSection.connect("contentsCollapsed(bool)", self.update_inputs)
        self._tell("")
        self.update()
        ui.teachSection.collapsed = True

    def close(self) -> None:
        """The panel goes: teaching stops, and what was not kept is gone."""
        self._timer.stop()
        self._list.close()
        self._logic.cancelTeaching()
        self._forget()

    def scene_closed(self) -> None:
        """Slices, teaching and a taught detector stay; only the nodes are gone."""
        self._list.scene_closed()
        self.update()

    def update_inputs(self, *_arguments: Any) -> None:
        """Volume or view changed, or the plane that the view shows; or the section was opened."""
        self._list.update_range()
        self.update()

    def _slices_changed(self) -> None:
        """What was taught with other slices is gone; so the scores in the table are always those of Keep."""
        self._forget()
        self._show_slices()
        if self._list.is_adding:
            self._timer.start()

    def _show_slices(self) -> None:
        """As they were added; once a detector was taught with them, the worst first."""
        if self._taught is None:
            self._list.show(range(len(self._list.slices)), {})
        else:
            scores = dict(zip(self._order, self._taught.left_one_out, strict=True))
            self._list.show([self._order[place] for place in self._taught.worst_first()], scores)
        self.update()

    def _poll(self) -> None:
        try:
            if self._list.is_adding:
                self._list.cut_some()
            with slicer.util.tryWithErrorDisplay(_("Teaching failed.")):
                self._logic.pollTeaching()
        finally:
            if not self._list.is_adding and not self._logic.isTeaching():
                self._timer.stop()
            self.update()

    def _teach_or_cancel(self) -> None:
        if self._logic.isTeaching():
            self._logic.cancelTeaching()
            self._tell(_("Cancelled. The slices are still in the list."))
            self.update()
            return
        self._tell("")
        self._discard()
        slices = self._list.slices
        of_volume: dict[Hashable, list[int]] = {}
        for place, one in enumerate(slices):
            of_volume.setdefault(one.volume, []).append(place)
        self._order = [place for places in of_volume.values() for place in places]
        planes = {volume: [slices[place].plane for place in places] for volume, places in of_volume.items()}
        name, detector = self._ui.teachNameEdit.text, self._inputs().detector
        try:
            self._logic.startTeaching(planes, name, detector=detector, onDone=self._done)
        except MedAnomalyCLIPError as error:
            self._tell(str(error))
            return
        self._begun = time.monotonic()
        self._timer.start()
        self.update()

    def _done(self, taught: TaughtDetector | None, error: MedAnomalyCLIPError | None) -> None:
        """There is a detector, or an error that the reader can mend."""
        self._taught = taught
        if error is not None:
            self._tell(str(error))
        self._show_slices()

    def _keep(self) -> None:
        taught = self._taught
        if taught is None:
            return
        try:
            folder = taught.keep(detectors_folder())
        except MedAnomalyCLIPError as error:
            self._tell(str(error))
            return
        self._discard()
        self._on_kept(str(folder))
        self._tell(_("{detector} was kept and is selected now.").format(detector=taught.name))

    def _discard(self) -> None:
        self._forget()
        self._show_slices()

    def _forget(self) -> None:
        """Let go of a detector that was not kept."""
        if self._taught is not None:
            self._taught.discard()
            self._taught = None

    # What the section says

    def _tell(self, text: str) -> None:
        self._ui.teachMessageLabel.text = text
        self._ui.teachMessageLabel.setVisible(bool(text))

    def update(self, *_arguments: Any) -> None:
        """Enable what can be done now, and say how far things are."""
        ui, teaching, adding = self._ui, self._logic.isTeaching(), self._list.is_adding
        self._list.enable(not teaching and not adding)
        ui.teachNameEdit.enabled = not teaching
        named, enough = bool(ui.teachNameEdit.text.strip()), len(self._list.slices) >= LEAST_SLICES
        ui.teachButton.text = _("Cancel") if teaching else _("Teach")
        ui.teachButton.enabled = teaching or (enough and named and not adding)
        for button in (ui.teachKeepButton, ui.teachDiscardButton):
            button.setVisible(self._taught is not None)
        ui.teachProgressBar.setVisible(teaching)
        ui.teachStatusLabel.text = self._status_words(named or not enough)
        ui.teachStatusLabel.setVisible(bool(ui.teachStatusLabel.text))

    def _status_words(self, named: bool) -> str:
        if self._logic.isTeaching():
            return self._progress_words()
        if self._taught is not None:
            scores = [one.score for one in self._taught.left_one_out]
            words = _(
                "Each slice scored without having been seen: half of them up to {median:.2f}, the highest"
                " {highest:.2f}. Look at the highest: they may not be normal, or be the only ones of their"
                " kind."
            )
            return words.format(median=statistics.median(scores), highest=max(scores))
        return "" if named else _("Give the detector a name, then teach it.")

    def _progress_words(self) -> str:
        progress = self._logic.teachingProgress()
        if progress is None or progress.seconds_left is None:
            self._ui.teachProgressBar.value = 0
            return _("Loading the detector…")
        passed = time.monotonic() - self._begun
        self._ui.teachProgressBar.value = int(100 * passed / (passed + progress.seconds_left + 1e-3))
        seconds = max(1, round(progress.seconds_left))
        if seconds < 90:
            return _("About {seconds} s left").format(seconds=seconds)
        return _("About {minutes} min left").format(minutes=round(seconds / 60))
