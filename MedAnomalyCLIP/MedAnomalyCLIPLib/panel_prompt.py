"""The panel's choice of what a slice is compared with: the kind of image, or a reader's own phrases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slicer.i18n import tr as _

from .bundle import BundleManifest
from .errors import InvalidRequest
from .prompt import Prompt, guess_preset

AUTOMATIC, OWN = "auto", "own"


class PromptSelector:
    """A combo box of the detector's presets, and two lines for phrases that are shown when they are wanted.

    What is chosen is a word that the parameter node keeps: "auto", "own", the name of a preset, or nothing
    for images of any kind.
    """

    def __init__(self, ui: Any, keep: Callable[..., None]) -> None:
        """
        Args:
            ui: holds presetCaption, presetSelector, and the captions and lines normalCaption,
                normalPhrasesEdit, abnormalCaption, abnormalPhrasesEdit.
            keep: called with `preset`, the word that the reader chose.
        """
        self._ui = ui
        self._keep = keep
        ui.presetSelector.connect("currentIndexChanged(int)", self._item_chosen)

    def show(self, manifest: BundleManifest | None, chosen: str, modality: str, words: str) -> None:
        """List what a detector offers.

        Args:
            manifest: of the detector; None when there is none.
            chosen: the word of the parameter node.
            modality, words: what the image says of itself, see `prompt.guess_preset`.
        """
        presets = () if manifest is None else manifest.presets
        reads = manifest is not None and bool(presets) and bool(manifest.text_sha256)
        guess = guess_preset(presets, modality, words)
        titles = {preset.name: preset.title for preset in presets}
        selector = self._ui.presetSelector
        selector.blockSignals(True)
        selector.clear()
        selector.addItem(
            _("Automatic ({kind})").format(kind=titles.get(guess, _("images of any kind"))), AUTOMATIC
        )
        selector.addItem(_("Images of any kind"), "")
        for name, title in titles.items():
            selector.addItem(title, name)
        if reads:
            selector.addItem(_("Own phrases"), OWN)
        selector.setCurrentIndex(max(selector.findData(chosen), 0))
        selector.blockSignals(False)
        for widget in (self._ui.presetCaption, selector):
            widget.setVisible(bool(presets))
        for widget in (
            *(self._ui.normalCaption, self._ui.normalPhrasesEdit),
            *(self._ui.abnormalCaption, self._ui.abnormalPhrasesEdit),
        ):
            widget.setVisible(reads and chosen == OWN)

    def _item_chosen(self, index: int) -> None:
        chosen = self._ui.presetSelector.itemData(index)
        self._keep(preset=AUTOMATIC if chosen is None else chosen)


def prompt_wanted(chosen: str, normal: str, abnormal: str) -> Prompt | str:
    """What the reader wants a slice compared with, as `MedAnomalyCLIPLogic.detect` takes it.

    Args:
        chosen: the word of the parameter node.
        normal, abnormal: the reader's own phrases, which count if the word is "own".

    Raises:
        InvalidRequest: own phrases are wanted and not written.
    """
    if chosen != OWN:
        return chosen
    prompt = Prompt(normal=split_phrases(normal), abnormal=split_phrases(abnormal))
    if not prompt.has_phrases:
        raise InvalidRequest(_("Write phrases for normal and for abnormal, or choose a preset"))
    return prompt


def chosen_prompt(manifest: BundleManifest, chosen: str, modality: str, words: str) -> Prompt:
    """What the choice of a preset asks for.

    Args:
        manifest: of the detector.
        chosen: "auto", the name of a preset, or nothing.
        modality, words: what the image says of itself.
    """
    known = manifest.presets
    if chosen == AUTOMATIC:
        return Prompt(guess_preset(known, modality, words))
    # A scene may remember a preset of another detector.
    return Prompt(chosen if chosen in {preset.name for preset in known} else "")


def split_phrases(text: str) -> tuple[str, ...]:
    """Phrases of a line, which semicolons divide."""
    return tuple(phrase.strip() for phrase in text.split(";") if phrase.strip())
