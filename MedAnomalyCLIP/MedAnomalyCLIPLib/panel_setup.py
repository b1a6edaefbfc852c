"""The panel's section Setup: what is installed, what is missing, how fast it is, and what can be deleted."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from .downloads import delete_downloads, downloaded_bytes, downloads_folder
from .errors import MedAnomalyCLIPError
from .panel_background import BackgroundCall
from .panel_install import installation_pending
from .panel_packages import FULL
from .panel_words import duration_words, size_words
from .readiness import Package, Readiness, Speed, check_packages, plan_installation
from .resources import resource_path
from .result import AnomalyResult
from .runtime import AUTO, device_title

Choice = tuple[str, str, str]
"""The folder of a detector, a device and a precision."""

_SPEEDS_SETTING = "MedAnomalyCLIP/Speeds"
_WHEELS_SETTING = "MedAnomalyCLIP/FolderOfWheels"
WARM_UP_AFTER_MS = 200  # when the panel has been drawn


class SetupSection:
    """The widgets of the section Setup. It folds itself when all is ready, and opens when it is not.

    Attributes:
        readiness: as it was last looked at; None before that.
    """

    def __init__(
        self,
        ui: Any,
        logic: Any,
        chosen: Callable[[], Choice],
        log: Callable[[str], None],
    ) -> None:
        """
        Args:
            ui: holds setupSection, packagesLabel, installLightButton, installButton, wheelsPath, speedLabel,
                measureButton, downloadsLabel, deleteDownloadsButton and setupMessageLabel.
            logic: the module's.
            chosen: gives the folder of the detector, the device and the precision that are chosen.
            log: keeps a line of what was done.
        """
        self.readiness: Readiness | None = None
        self._ui, self._logic = ui, logic
        self._chosen, self._log = chosen, log
        self._measuring = BackgroundCall()
        self._warm: frozenset[Choice] = frozenset()  # those that have run
        self._tell("")
        ui.wheelsPath.currentPath = qt.QSettings().value(_WHEELS_SETTING, "") or ""
        ui.installLightButton.connect("clicked(bool)", self._install_light_clicked)
        ui.installButton.connect("clicked(bool)", self._install_clicked)
        ui.measureButton.connect("clicked(bool)", self._measure_clicked)
        ui.deleteDownloadsButton.connect("clicked(bool)", self._delete_clicked)
        self._warm_up_timer = qt.QTimer()
        self._warm_up_timer.singleShot = True
        self._warm_up_timer.connect("timeout()", self._warm_up)
        self.update(fold=True)
        # When the panel is there: installing takes minutes.
        self._resume_timer = qt.QTimer()
        self._resume_timer.singleShot = True
        self._resume_timer.connect("timeout()", self._resume)
        if installation_pending():
            self._resume_timer.start(0)

    def enter(self) -> None:
        """The panel is shown: soon load the bundled detector, so that the first click need not wait for it.

        Python holds the main thread while large packages are imported; now the reader does nothing yet.
        """
        self._warm_up_timer.start(WARM_UP_AFTER_MS)

    def exit(self) -> None:
        """Another module is shown: what was not begun is not wanted any more."""
        self._warm_up_timer.stop()

    def close(self) -> None:
        self._warm_up_timer.stop()
        self._resume_timer.stop()
        self._measuring.stop()

    def update(self, *, fold: bool = False) -> None:
        """Look at what is there, and say so.

        Args:
            fold: close the section if all is ready, open it if not; else leave it as the reader has it.
        """
        readiness = self.readiness = self._logic.isReady()
        ui = self._ui
        full = check_packages(resource_path(FULL))
        lacking = any(not package.satisfied for package in full)
        if not readiness:
            ui.setupSection.text = _("Setup: not ready")
        else:
            ui.setupSection.text = _("Setup: ready, light") if lacking else _("Setup: ready")
        ui.packagesLabel.text = packages_words(readiness, full)
        ui.installLightButton.enabled = bool(readiness.missing)
        ui.installButton.enabled = lacking
        ui.wheelsPath.enabled = lacking
        self.update_speed()
        taken = downloaded_bytes()
        folder = downloads_folder()
        ui.downloadsLabel.text = size_words(taken / 1e6) if taken else _("None")
        words = _(
            "Model files that were fetched are kept in {folder}. The bundled detector, and those that you"
            " choose from a folder, need none."
        )
        ui.downloadsLabel.toolTip = words.format(folder=folder)
        ui.deleteDownloadsButton.enabled = taken > 0
        if fold:
            ui.setupSection.collapsed = bool(readiness)

    def update_speed(self) -> None:
        """Say how fast the chosen detector is on the chosen device, as far as that was measured."""
        speed = remembered_speed(*self._chosen())
        ready = bool(self.readiness)
        if self._measuring.running:
            text = _("Measuring…")
        elif speed is not None:
            words = _("{device}: about {duration} per slice")
            text = words.format(device=speed.title, duration=duration_words(speed.seconds))
        elif ready:
            text = _("Not measured yet on this device")
        else:
            text = _("Known when everything is installed")
        self._ui.speedLabel.text = text
        self._ui.measureButton.enabled = ready and not self._measuring.running

    def learn_speed(self, choice: Choice, result: AnomalyResult) -> None:
        """Remember how long a detection took; not the first of a detector on a device, which warms it up."""
        seconds = sum(result.timings.values())
        warm, self._warm = choice in self._warm, self._warm | {choice}
        if warm and seconds > 0:
            where = result.provenance
            title = device_title(where.device, where.runtime, where.precision)
            remember_speed(choice, Speed(where.device, title, seconds))
            self.update_speed()

    def _tell(self, text: str) -> None:
        self._ui.setupMessageLabel.text = text
        self._ui.setupMessageLabel.setVisible(bool(text))

    def _install_light_clicked(self) -> None:
        self._install(light=True)

    def _install_clicked(self) -> None:
        self._install(light=False)

    def _install(self, *, light: bool) -> None:
        wheels = self._ui.wheelsPath.currentPath
        qt.QSettings().setValue(_WHEELS_SETTING, wheels)
        folder = Path(wheels) if wheels else None
        self._run_install(
            lambda: self._logic.setupPythonRequirements(ask=True, wheels=folder, tell=self._log, light=light)
        )

    def _resume(self) -> None:
        self._run_install(lambda: self._logic.resumeSetup(tell=self._log))

    def _run_install(self, install: Callable[[], Any]) -> None:
        self._tell("")
        self._ui.installLightButton.enabled = self._ui.installButton.enabled = False
        try:
            install()
        except MedAnomalyCLIPError as error:
            self._tell(str(error))
            self._log(str(error))
        finally:
            self.update(fold=True)
            self._warm_up_timer.start(WARM_UP_AFTER_MS)

    def _warm_up(self) -> None:
        folder, device, precision = self._chosen()
        # Others may be large, and are loaded when they are used; a run keeps the one that it goes on with.
        if self.readiness and not folder and not self._logic.isRunning():
            self._logic.warmUp(device=device, precision=precision)

    def _measure_clicked(self) -> None:
        choice = folder, device, precision = self._chosen()
        self._tell("")
        try:
            future = self._logic.measureSpeed(detector=folder, device=device, precision=precision)
        except MedAnomalyCLIPError as error:
            self._tell(str(error))
            return
        self._measuring.start(future, lambda speed, error: self._measured(choice, speed, error))
        self.update_speed()

    def _measured(self, choice: Choice, speed: Speed | None, error: Exception | None) -> None:
        self.update_speed()
        if error is not None:
            self._tell(str(error))
            if not isinstance(error, MedAnomalyCLIPError):
                raise error
        elif speed is not None:
            remember_speed(choice, speed)
            self.update_speed()
            words = _("Measured: {device}, {duration} per slice")
            self._log(words.format(device=speed.title, duration=duration_words(speed.seconds)))

    def _delete_clicked(self) -> None:
        taken = size_words(downloaded_bytes() / 1e6)
        words = _(
            "Delete {size} of downloaded model files in {folder}? Detectors that were made from them go on"
            " working."
        )
        text = words.format(size=taken, folder=downloads_folder())
        if not slicer.util.confirmOkCancelDisplay(text, _("Delete downloaded models")):
            return
        try:
            freed = delete_downloads()
            self._log(_("Deleted downloaded models: {size}").format(size=size_words(freed / 1e6)))
        except MedAnomalyCLIPError as error:
            self._tell(str(error))
        self.update()


def packages_words(readiness: Readiness, full: Sequence[Package]) -> str:
    """What is missing and what is there, as rich text whose words come from package names only.

    Args:
        readiness: for the bundled detector.
        full: packages of the full installation.
    """
    lacking = [package for package in full if not package.satisfied]
    lines = []
    if readiness and not lacking:
        lines.append(_("All packages are installed."))
    elif readiness:
        lines.append(_("The bundled detector is ready, on the CPU."))
    else:
        lines += [f"<b>{html.escape(reason)}</b>" for reason in readiness.reasons]
    if readiness.missing:
        words = _("Light: the bundled detector on the CPU; {size}.")
        lines.append(words.format(size=_room(readiness.packages)))
    if lacking:
        words = _("Full: also GPUs, other detectors, phrases of your own and Teach; {size}.")
        lines.append(words.format(size=_room(full)))
    present = [f"{p.name} {p.installed}".strip() for p in full if p.satisfied]
    if present:
        lines.append(html.escape(_("Installed: {names}").format(names=", ".join(present))))
    return "<br>".join(lines)


def _room(packages: Sequence[Package]) -> str:
    """How much room installing what is missing would take."""
    return size_words(plan_installation(packages).megabytes)


def remembered_speed(folder: str, device: str, precision: str = AUTO) -> Speed | None:
    """How fast a detector was on a device on this computer, None if that was never measured."""
    try:
        return Speed(**_speeds()[_speed_key((folder, device, precision))])
    except (KeyError, TypeError, ValueError):
        return None


def remember_speed(choice: Choice, speed: Speed) -> None:
    speeds = {**_speeds(), _speed_key(choice): asdict(speed)}
    qt.QSettings().setValue(_SPEEDS_SETTING, json.dumps(speeds))


def _speeds() -> dict[str, Any]:
    try:
        speeds = json.loads(qt.QSettings().value(_SPEEDS_SETTING, "{}"))
    except (ValueError, TypeError):
        return {}
    return speeds if isinstance(speeds, dict) else {}


def _speed_key(choice: Choice) -> str:
    folder, device, precision = choice
    return f"{device}|{precision}|{folder}"
