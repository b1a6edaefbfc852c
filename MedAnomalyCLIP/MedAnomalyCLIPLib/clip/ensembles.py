"""A manual prompt ensemble: what is seen, said to be sound or damaged, in many sentences.

The states and templates are WinCLIP's (Jeong et al., CVPR 2023), as MVFA and AdaCLIP use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
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


class SentenceEnsemble(nn.Module):
    """Sentences whose features are brought to unit length, averaged over their class, and again.

    Shapes:
        returns: (2, E), unit length, normal first.
    """

    token_ids: Tensor

    def __init__(self, spec: TowerSpec, normal: Sequence[str], abnormal: Sequence[str]) -> None:
        super().__init__()
        self.normal_count = len(normal)
        token_ids = create_tokenizer(spec)([*normal, *abnormal])
        self.register_buffer("token_ids", token_ids, persistent=False)

    def forward(self, clip: Any) -> Tensor:
        batches = self.token_ids.split(SENTENCES_AT_ONCE)
        features = torch.cat([clip.encode_text(token_ids) for token_ids in batches])
        return self.average(features)

    def average(self, features: Tensor) -> Tensor:
        """(..., T, E) features of the sentences to (..., 2, E)."""
        unit = F.normalize(features, dim=-1)
        classes = unit[..., : self.normal_count, :].mean(-2), unit[..., self.normal_count :, :].mean(-2)
        return F.normalize(torch.stack(classes, dim=-2), dim=-1)
