"""A manual prompt ensemble: what is seen, said to be sound or damaged, in many sentences.

The states and templates are WinCLIP's (Jeong et al., CVPR 2023), as MVFA and AdaCLIP use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .specification import TowerSpec
from .tokenizer import create_tokenizer

NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ABNORMAL_STATES = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
_PHOTOS = (
    "a bad photo of a {}",
    "a low resolution photo of the {}",
    "a bad photo of the {}",
    "a cropped photo of the {}",
    "a bright photo of a {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a black and white photo of the {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a jpeg corrupted photo of a {}",
    "a blurry photo of the {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a photo of a {}",
    "a low resolution photo of a {}",
    "a photo of a large {}",
    "a blurry photo of a {}",
    "a jpeg corrupted photo of the {}",
    "a good photo of a {}",
    "a photo of the small {}",
    "a photo of the large {}",
    "a black and white photo of a {}",
    "a dark photo of a {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
_SCENES = ("there is a {}", "there is the {}", "this is a {}", "this is the {}", "this is one {}")
TEMPLATES = (*(f"{text}." for text in _PHOTOS), *(f"{text} in the scene." for text in _SCENES))

SENTENCES_AT_ONCE = 64


def ensemble_sentences(name: str, templates: int = len(TEMPLATES)) -> tuple[list[str], list[str]]:
    """Sentences for "normal" and for "abnormal", states in the outer loop.

    Args:
        name: what the images show, for example "Brain".
        templates: how many of the 35 templates are used, from the first.
    """
    normal, abnormal = (
        [template.format(state.format(name)) for state in states for template in TEMPLATES[:templates]]
        for states in (NORMAL_STATES, ABNORMAL_STATES)
    )
    return normal, abnormal


def ensemble_bank(spec: TowerSpec, clip: Any, normal: Sequence[str], abnormal: Sequence[str]) -> Tensor:
    """Text bank of sentences: each brought to unit length, averaged over its class, and again.

    Shapes:
        returns: (2, E), unit length, normal first.
    """
    tokenizer = create_tokenizer(spec)
    classes = []
    with torch.no_grad():
        for sentences in (normal, abnormal):
            token_ids = tokenizer(list(sentences)).to(clip.positional_embedding.device)
            features = torch.cat([clip.encode_text(ids) for ids in token_ids.split(SENTENCES_AT_ONCE)])
            classes.append(mean_direction(features))
    return torch.stack(classes)


def mean_direction(features: Tensor) -> Tensor:
    """Unit vector along the mean of unit vectors; (..., T, E) to (..., E)."""
    return F.normalize(F.normalize(features, dim=-1).mean(-2), dim=-1)
