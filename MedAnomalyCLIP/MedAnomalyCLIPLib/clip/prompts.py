"""Learnable prompts: vectors in front of a phrase, tuned while CLIP stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .specification import TowerSpec
from .tokenizer import create_tokenizer

NORMAL_PHRASES = (
    "normal",
    "healthy",
    "negative",
    "unremarkable",
    "clear",
    "asymptomatic",
    "normal findings",
    "no findings",
    "in good health",
    "no evidence of disease",
)
ABNORMAL_PHRASES = (
    "abnormal",
    "positive",
    "symptomatic",
    "disease",
    "lesion",
    "pathological",
    "impaired",
    "evidence of disease",
    "abnormal finding",
    "pathological condition",
    "pathological abnormality",
)


class CoOpPrompts(nn.Module):
    """Phrases for "normal" and "abnormal", each behind learnable vectors of its own.

    A prompt reads [start][V1 ... Vn][phrase][.][end] (Zhou et al., CoOp, IJCV 2022; the phrases and the
    averaging are MediCLIP's, Zhang et al., MICCAI 2024). The features of a class's phrases are averaged, then
    brought to unit length.

    Shapes:
        returns: (2, E), unit length, normal first.
    """

    token_ids: Tensor

    def __init__(
        self,
        spec: TowerSpec,
        clip: Any,
        normal: Sequence[str] = NORMAL_PHRASES,
        abnormal: Sequence[str] = ABNORMAL_PHRASES,
        length: int = 8,
    ) -> None:
        super().__init__()
        placeholder = " ".join(["x"] * length)
        phrases = [f"{placeholder} {phrase}." for phrase in (*normal, *abnormal)]
        self.register_buffer("token_ids", create_tokenizer(spec)(phrases), persistent=False)
        self.normal_count = len(normal)
        width = clip.token_embedding.weight.shape[1]
        self.context = nn.Parameter(0.02 * torch.randn(len(phrases), length, width))

    def forward(self, clip: Any) -> Tensor:
        embeddings = clip.token_embedding(self.token_ids)
        length = self.context.shape[1]
        embeddings = torch.cat([embeddings[:, :1], self.context, embeddings[:, 1 + length :]], dim=1)
        features = encode_embeddings(clip, embeddings, self.token_ids)
        classes = (features[: self.normal_count].mean(0), features[self.normal_count :].mean(0))
        return F.normalize(torch.stack(classes), dim=-1)


def encode_embeddings(clip: Any, embeddings: Tensor, token_ids: Tensor) -> Tensor:
    """Text features of token embeddings, as open_clip's `encode_text` makes them from token ids.

    Shapes:
        embeddings: (T, C, width); token_ids: (T, C), which tell where each text ends.
        returns: (T, E), not normalised.
    """
    tokens = clip.transformer(embeddings + clip.positional_embedding, attn_mask=clip.attn_mask)
    tokens = clip.ln_final(tokens)
    ends = token_ids.argmax(dim=-1)  # the end token has the highest id of all
    return tokens[torch.arange(len(tokens)), ends] @ clip.text_projection
