"""Text features of token embeddings, among which learnable vectors may stand, at the start or deeper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rewrite = Callable[[int, Tensor], Tensor]


def encode_embeddings(
    clip: Any, embeddings: Tensor, token_ids: Tensor, *, causal: bool = True, rewrite: Rewrite | None = None
) -> Tensor:
    """Text features of token embeddings, as open_clip's `encode_text` makes them from token ids.

    Args:
        clip: open_clip's model.
        embeddings: (T, C, width).
        token_ids: (T, C), which tell where each text ends.
        causal: whether a token sees only those before it, as CLIP was trained.
        rewrite: called as rewrite(layer, tokens) after every layer, 1-based, with (T, n, width) tokens; what
            it returns goes on into the next layer.

    Returns:
        (T, E), not normalised.
    """
    ends = token_ids.argmax(dim=-1)  # the end token has the highest id of all
    length = int(ends.max()) + 1 if causal else embeddings.shape[1]  # nothing looks at what comes after
    mask = clip.attn_mask[:length, :length] if causal else None
    tokens = embeddings[:, :length] + clip.positional_embedding[:length]
    for layer, block in enumerate(clip.transformer.resblocks, start=1):
        tokens = block(tokens, attn_mask=mask)
        if rewrite is not None:
            tokens = rewrite(layer, tokens)
    return clip.ln_final(tokens)[torch.arange(len(tokens)), ends] @ clip.text_projection
