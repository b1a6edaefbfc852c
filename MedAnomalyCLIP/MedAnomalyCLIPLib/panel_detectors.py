"""The panel's choice of a detector: the list, the folder dialog, the model card.

Which detectors there are comes from `bundle_list`. Which one the reader chose goes to the panel: its folder
as text, empty for the bundled one.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from .bundle import default_bundle_path, read_card
from .bundle_list import BundleSummary, list_bundles, titles
from .errors import BundleInvalid, MedAnomalyCLIPError

_RECENT_SETTING = "MedAnomalyCLIP/RecentDetectors"
_RECENT_COUNT = 10
_CARD_SIZE = 640, 720


def detectors_folder() -> Path:
    """Where the user's own detectors are: beside Slicer's settings file, like the user's terminologies."""
    return Path(slicer.app.slicerUserSettingsFilePath).parent / "MedAnomalyCLIP" / "Detectors"


class DetectorSelector:
    """The widgets of the .ui file that have to do with detectors.

    Attributes:
        folder: of the selected detector; empty for the bundled one.
        selected: that detector; None when not even the bundled one can be read.
    """

    def __init__(self, ui: Any, on_chosen: Callable[[str], None], tell: Callable[[str], None]) -> None:
        """
        Args:
            ui: holds detectorSelector, detectorBrowseButton, detectorLabel, modelCardButton and
                detectorsFolderButton.
            on_chosen: called with the folder that the reader chose, whatever it holds.
            tell: shows a message to the reader.
        """
        self.folder = ""
        self.selected: BundleSummary | None = None
        self._ui = ui
        self._on_chosen = on_chosen
        self._tell = tell
        self._card_dialog: Any = None
        self._card_text: Any = None
        ui.detectorSelector.connect("currentIndexChanged(int)", self._item_chosen)
        ui.detectorBrowseButton.connect("clicked(bool)", self._browse)
        ui.modelCardButton.connect("clicked(bool)", self.show_card)
        ui.detectorsFolderButton.connect("clicked(bool)", self._open_detectors_folder)

    def close(self) -> None:
        if self._card_dialog is not None:
            self._card_dialog.close()
            self._card_dialog.deleteLater()
            self._card_dialog = None

    def select(self, folder: str) -> None:
        """Select the detector in a folder; if that fails, stay with the one before, or take the bundled one.

        Raises:
            MedAnomalyCLIPError: why the folder cannot be used; another detector is selected.
        """
        folder = _normal(folder)
        before = self.folder
        try:
            self._take(folder)
        except MedAnomalyCLIPError:
            for other in (before, ""):
                try:
                    self._take(other)
                    break
                except MedAnomalyCLIPError:
                    self.folder, self.selected = "", None
            raise
        finally:
            self._show()

    def select_or_tell(self, folder: str) -> None:
        """Select the detector in a folder, or tell the reader why it cannot be and which one is."""
        try:
            self.select(folder)
        except MedAnomalyCLIPError as error:
            words = _("The detector in {folder} cannot be used: {reason}.\nSelected is: {detector}")
            detector = self.title() or _("none")
            self._tell(words.format(folder=folder or _("the installation"), reason=error, detector=detector))

    def title(self) -> str:
        """Name and version of the selected detector."""
        return "" if self.selected is None else self.selected.title

    def show_card(self) -> None:
        """Show the selected detector's model card in a window of its own, beside which work can go on."""
        if self.selected is None:
            return
        if self._card_dialog is None:
            self._card_dialog, self._card_text = _make_card_dialog(self._ui.detectorSelector.window())
        card = read_card(self.selected.folder) or _("This detector has no model card.")
        self._card_dialog.windowTitle = _("Model card: {detector}").format(detector=self.title())
        self._card_text.setMarkdown(inert_markdown(card))
        self._card_dialog.show()
        self._card_dialog.activateWindow()

    def _take(self, folder: str) -> None:
        self.selected = BundleSummary.read(folder or default_bundle_path())
        self.folder = folder
        if folder and Path(folder).parent != detectors_folder():
            _remember(folder)

    def _show(self) -> None:
        """List the detectors that there are now, and say which is selected."""
        selector = self._ui.detectorSelector
        selector.blockSignals(True)
        selector.clear()
        for index, (title, folder, words) in enumerate(_entries()):
            selector.addItem(title, folder)
            selector.setItemData(index, words, qt.Qt.ToolTipRole)
        selector.setCurrentIndex(max(selector.findData(self.folder), 0))
        selector.blockSignals(False)
        label = self._ui.detectorLabel
        if self.selected is None:
            label.text = label.toolTip = _("The detector that ships with this module is missing.")
        else:
            words = _("{name}, version {version}. Research use only.")
            label.text = words.format(name=self.selected.name, version=self.selected.version)
            label.toolTip = _tooltip(self.selected.description, self.selected.manifest.licence)
        self._ui.modelCardButton.enabled = self.selected is not None

    def _item_chosen(self, index: int) -> None:
        self._on_chosen(self._ui.detectorSelector.itemData(index) or "")

    def _browse(self) -> None:
        start = Path(self.folder).parent if self.folder else detectors_folder()
        folder = qt.QFileDialog.getExistingDirectory(
            self._ui.detectorSelector.window(),
            _("Choose the folder of a detector"),
            str(start if start.is_dir() else Path.home()),
        )
        if folder:
            self._on_chosen(folder)

    def _open_detectors_folder(self) -> None:
        folder = detectors_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._tell(_("{folder} cannot be made: {reason}").format(folder=folder, reason=error.strerror))
            return
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(folder)))


def inert_markdown(text: str) -> str:
    """Markdown whose pictures have become links and whose tags text, so that showing it opens no file.

    A card comes with its detector from somebody else, and Windows opens a network path that is only shown.
    """
    text = re.sub(r"!+(?=\[)", "", text)
    return re.sub(r"<(?=[A-Za-z/!?])(?!https?://)", "&lt;", text)


def _entries() -> list[tuple[str, str, str]]:
    """Title, folder and tooltip of the detectors on offer: the bundled, the user's own, the recent ones."""
    entries: list[tuple[str, str, str]] = []
    try:
        bundled = BundleSummary.read(default_bundle_path())
        entries.append((_("Bundled detector"), "", _tooltip(bundled.title, bundled.description)))
    except MedAnomalyCLIPError as error:
        entries.append((_("Bundled detector (cannot be used)"), "", _tooltip(str(error))))
    found, damaged = list_bundles(detectors_folder())
    for folder in _recent():
        with suppress(BundleInvalid):  # on a disk that is not there now, perhaps
            found.append(BundleSummary.read(folder))
    for bundle, title in zip(found, titles(found), strict=True):
        entries.append((title, str(bundle.folder), _tooltip(bundle.description, str(bundle.folder))))
    for path, reason in damaged.items():
        title = _("{folder} (cannot be used)").format(folder=path.name)
        entries.append((title, str(path), _tooltip(str(reason), str(path))))
    return entries


def _tooltip(*lines: str) -> str:
    """Lines of a tooltip that wraps; what a detector says of itself is no markup."""
    return "<qt>" + "<br>".join(html.escape(line) for line in lines if line) + "</qt>"


def _normal(folder: str) -> str:
    """A folder as the list has it; empty for that of the bundled detector."""
    if not folder:
        return ""
    path = Path(folder).absolute()
    with suppress(MedAnomalyCLIPError):
        if path == default_bundle_path():
            return ""
    return str(path)


def _recent() -> list[str]:
    """Folders chosen before, the last one first."""
    try:
        folders = json.loads(qt.QSettings().value(_RECENT_SETTING, "[]"))
    except ValueError:
        return []
    return [folder for folder in folders if isinstance(folder, str)] if isinstance(folders, list) else []


def _remember(folder: str) -> None:
    recent = [folder, *(other for other in _recent() if other != folder)][:_RECENT_COUNT]
    # As JSON: a settings file gives a list of one back as plain text.
    qt.QSettings().setValue(_RECENT_SETTING, json.dumps(recent))


def _make_card_dialog(parent: Any) -> tuple[Any, Any]:
    """A dialog, not modal, and the text in it."""
    dialog = qt.QDialog(parent)
    layout = qt.QVBoxLayout(dialog)
    text = qt.QTextBrowser()
    text.openLinks = False
    layout.addWidget(text)
    buttons = qt.QDialogButtonBox()
    buttons.setStandardButtons(qt.QDialogButtonBox.Close)
    buttons.connect("rejected()", dialog.close)
    layout.addWidget(buttons)
    dialog.resize(*_CARD_SIZE)
    return dialog, text
