"""Sentences about an image, made from what its source says: modality, body part, view, finding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..datasets.records import ImageRecord, modality_family

_MODALITIES = {
    "MR": ("MR image", "MRI", "magnetic resonance image", "MR scan"),
    "CT": ("CT image", "CT scan", "computed tomography slice"),
    "US": ("ultrasound image", "ultrasound scan", "sonogram"),
    "XR": ("X-ray", "radiograph", "X-ray film"),
    "fundus": ("fundus photograph", "retinal photograph", "colour fundus image"),
    "microscopy": ("microscopy image", "micrograph", "microscope picture"),
}
_NORMAL = ("normal", "healthy", "no abnormality", "unremarkable", "no sign of disease", "no lesion")
_ABNORMAL = ("abnormal", "diseased", "with a lesion", "pathological", "with an abnormal finding")
_FRAMES = (
    "a {image} of the {part}, {finding}",
    "{image} of the {part}: {finding}",
    "{part} {image}, {finding}",
    "{finding}, {image} of the {part}",
    "a {view}{image} of the {part}, {finding}",
    "medical image, {image}, {part}, {finding}",
)
_FRAMES_WITHOUT_FINDING = (
    "a {image} of the {part}",
    "{part} {image}",
    "{image}, {part}",
    "a {view}{image} of the {part}",
    "medical image: {image} of the {part}",
)


_FRAMES_WITHOUT_SUBJECT = (
    "{finding}",
    "medical image, {finding}",
    "a medical image, {finding}",
    "{finding} image",
)


def state_sentences(family: str, part: str, *, abnormal: bool) -> list[str]:
    """All sentences that call an image of a kind normal, or abnormal.

    Args:
        family: of the modality, see `records.modality_family`; empty for any.
        part: of the body; empty for sentences about images of any kind.
        abnormal: which of the two.
    """
    findings = _ABNORMAL if abnormal else _NORMAL
    if not part:
        return [frame.format(finding=finding) for frame in _FRAMES_WITHOUT_SUBJECT for finding in findings]
    images = _MODALITIES.get(family, (f"{family} image".strip(),))
    return [
        frame.format(image=image, part=part, view="", finding=finding)
        for frame in _FRAMES
        for image in images
        for finding in findings
    ]


def subject(record: ImageRecord) -> tuple[str, str, str]:
    """What two images must share to count as described by the same sentence: modality, part, finding."""
    finding = {None: "", False: "normal", True: record.findings or "abnormal"}[record.abnormal]
    return modality_family(record.modality), record.body_part, finding


def caption(record: ImageRecord, rng: np.random.Generator) -> str:
    """One of many sentences that are true of the image."""

    def choose(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    family = modality_family(record.modality)
    image = choose(_MODALITIES.get(family, (record.modality,)))
    if rng.random() < 0.3:
        image = f"{record.modality} image"
    plane = record.view.split()[0].strip(",;") if record.view else ""
    words = {
        "image": image,
        "part": record.body_part.split(",")[0],
        "view": f"{plane} " if plane in ("axial", "coronal", "sagittal", "frontal") else "",
    }
    if record.abnormal is None:
        return choose(_FRAMES_WITHOUT_FINDING).format(**words)
    findings = tuple(term.strip() for term in record.findings.replace(";", ",").split(",") if term.strip())
    if record.abnormal:
        named = findings and rng.random() < 0.6
        words["finding"] = choose(findings) if named else choose(_ABNORMAL)
    else:
        words["finding"] = choose(_NORMAL)
    return choose(_FRAMES).format(**words)


class SentenceTokens:
    """Token ids of sentences, as a tokenizer gives them; each sentence is encoded once.

    Captions are put together from few words, so that the same ones come again and again.
    """

    def __init__(self, tokenize: Callable[[list[str]], Tensor]) -> None:
        self._tokenize = tokenize
        self._known: dict[str, Tensor] = {}

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """(T, context length) token ids."""
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in self._known]
        if new:
            self._known.update(zip(new, self._tokenize(new), strict=True))
        return torch.stack([self._known[sentence] for sentence in sentences])
