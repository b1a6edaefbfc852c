"""What a slice is compared with: sentences about its kind, or phrases of the reader's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .datasets.records import modality_family
from .detectors.specification import PresetSpec
from .errors import InvalidRequest

ANY_KIND = ""
LONGEST_PHRASE = 200
MOST_PHRASES = 50


@dataclass(frozen=True)
class Prompt:
    """A choice of text, for detectors that offer one.

    Attributes:
        preset: name of one of the detector's presets; empty for its text about images of any kind.
        normal, abnormal: phrases that stand in place of any preset, either both or none.
    """

    preset: str = ANY_KIND
    normal: tuple[str, ...] = ()
    abnormal: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.normal) != bool(self.abnormal):
            raise InvalidRequest("Own phrases are needed for both, normal and abnormal, or for neither")
        if self.normal and self.preset:
            raise InvalidRequest("Choose a preset or own phrases, not both")
        phrases = (*self.normal, *self.abnormal)
        if len(phrases) > MOST_PHRASES or any(not p.strip() or len(p) > LONGEST_PHRASE for p in phrases):
            raise InvalidRequest(
                f"Give at most {MOST_PHRASES} phrases, none empty or longer than {LONGEST_PHRASE} letters"
            )

    @property
    def has_phrases(self) -> bool:
        return bool(self.normal)


def guess_preset(presets: Sequence[PresetSpec], modality: str, words: str) -> str:
    """The preset that an image belongs to, as far as it says; empty when it says too little.

    Args:
        presets: of the detector.
        modality: of the image, DICOM's code or in words, for example "MR".
        words: whatever names what it shows: body part, series description, name of a node or file.
    """
    family = modality_family(modality)
    of_modality = [preset for preset in presets if family in preset.modalities]
    text = words.lower()
    named = [p for p in of_modality if any(word in text for word in (p.part.lower(), *p.aliases))]
    return named[0].name if len(named) == 1 else ANY_KIND
