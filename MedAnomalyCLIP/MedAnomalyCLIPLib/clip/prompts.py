"""Learnable prompts: vectors beside a phrase, tuned while CLIP stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .phrases import ABNORMAL_PHRASES, NORMAL_PHRASES
from .specification import TowerSpec
from .text import encode_embeddings
from .tokenizer import create_tokenizer


class CoOpPrompts(nn.Module):
    """Phrases for "normal" and "abnormal", each beside learnable vectors of its own.

    A prompt reads [start][V1 ... Vn][phrase][.][end] (Zhou et al., CoOp, IJCV 2022; the phrases and the
    averaging are MediCLIP's, Zhang et al., MICCAI 2024). The features of a class's phrases are averaged, then
    brought to unit length. Deep vectors, where there are any, overwrite the first words of every prompt
    before layers 2, 3, ... (Zhou et al., AnomalyCLIP, ICLR 2024; MedVMAD takes its prompts from there).

    Args:
        spec, clip: the text tower.
        normal, abnormal: phrases.
        length: learnable vectors for each phrase.
        position: where they stand: "before" the phrase, half on each side "around" it, or "after" it.
        causal: see `text.encode_embeddings`.
        deep_depth: layers whose input has vectors of its own, the first (the prompt itself) among them.
        deep_length: how many vectors are written into each of the others.

    Shapes:
        returns: (2, E), unit length, normal first.
    """

    token_ids: Tensor
    order: Tensor

    def __init__(
        self,
        spec: TowerSpec,
        clip: Any,
        normal: Sequence[str] = NORMAL_PHRASES,
        abnormal: Sequence[str] = ABNORMAL_PHRASES,
        length: int = 8,
        *,
        position: str = "before",
        causal: bool = True,
        deep_depth: int = 1,
        deep_length: int = 0,
    ) -> None:
        super().__init__()
        self.causal = causal
        tokenizer = create_tokenizer(spec)
        placeholder = " ".join(["x"] * length)
        phrases = (*normal, *abnormal)
        self.register_buffer(
            "token_ids", tokenizer([f"{placeholder} {phrase}." for phrase in phrases]), persistent=False
        )
        orders = [
            vectors_at(position, length, len(tokenizer.encode(phrase)), self.token_ids.shape[1])
            for phrase in phrases
        ]
        self.register_buffer("order", torch.tensor(orders), persistent=False)
        width = clip.token_embedding.weight.shape[1]
        self.normal = nn.Parameter(0.02 * torch.randn(len(normal), length, width))
        self.abnormal = nn.Parameter(0.02 * torch.randn(len(abnormal), length, width))
        self.deep = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(deep_length, width)) for _ in range(deep_depth - 1)
        )

    def forward(self, clip: Any) -> Tensor:
        features = encode_embeddings(
            clip, self.embeddings(clip), self.token_ids, causal=self.causal, rewrite=self._write_deep
        )
        classes = (features[: len(self.normal)].mean(0), features[len(self.normal) :].mean(0))
        return F.normalize(torch.stack(classes), dim=-1)

    def embeddings(self, clip: Any) -> Tensor:
        """(T, C, width) embeddings of all prompts, learnable vectors in their places."""
        words = clip.token_embedding(self.token_ids)
        context = torch.cat([self.normal, self.abnormal])
        words = torch.cat([words[:, :1], context, words[:, 1 + context.shape[1] :]], dim=1)
        return words.gather(1, self.order[..., None].expand_as(words))

    def _write_deep(self, layer: int, tokens: Tensor) -> Tensor:
        return overwrite(tokens, self.deep[layer - 1]) if layer <= len(self.deep) else tokens


def overwrite(tokens: Tensor, vectors: Tensor) -> Tensor:
    """Vectors (n, width) in place of the n tokens after the start token of each text (T, C, width)."""
    vectors = vectors.expand(len(tokens), -1, -1)
    return torch.cat([tokens[:, :1], vectors, tokens[:, 1 + vectors.shape[1] :]], dim=1)


def vectors_at(position: str, length: int, words: int, context: int) -> list[int]:
    """Where each token of a prompt comes from in [start][V1 ... Vn][phrase][.][end].

    Args:
        position: of the vectors: "before", "around" or "after" the phrase.
        length: n, learnable vectors.
        words: tokens of the phrase.
        context: tokens of the whole text.
    """
    vectors = list(range(1, 1 + length))
    phrase = list(range(1 + length, 1 + length + words))
    before = {"before": length, "around": length // 2, "after": 0}[position]
    rest = range(1 + length + words, context)
    return [0, *vectors[:before], *phrase, *vectors[before:], *rest]
