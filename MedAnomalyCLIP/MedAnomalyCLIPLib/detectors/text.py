"""The prompts that a `TextSpec` names: a text bank for all images, or text that each image takes part in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..clip.ensembles import SentenceEnsemble, ensemble_sentences
from ..clip.prompts import CoOpPrompts, overwrite
from ..clip.specification import TowerSpec
from ..clip.text import encode_embeddings
from ..clip.towers import create_text_tower
from ..errors import InvalidRequest
from .specification import TextSpec
from .stream import HybridPrompts


def create_prompts(text: TextSpec, tower: TowerSpec, clip: Any) -> nn.Module:
    """A module that, called with `clip`, gives the (2, E) text bank.

    Raises:
        InvalidRequest: an ensemble is asked for without saying what the images show.
    """
    if text.prompts == "ensemble":
        return sentence_ensemble(text, tower)
    return CoOpPrompts(
        tower,
        clip,
        text.normal,
        text.abnormal,
        text.length,
        position=text.position,
        causal=text.causal,
        deep_depth=text.deep_depth,
        deep_length=text.deep_length,
    )


class HybridText(nn.Module):
    """Sentences read by a text tower into whose first layers vectors are written, the image's own among them.

    The vectors overwrite the first words before layers 2, 3, ...; the words before layer 1 stay (Cao et al.,
    AdaCLIP, ECCV 2024).

    Shapes:
        pooled: (B, E) image features, of a pass without prompts; token_ids: (B, T, C), sentences of each
            image, where images differ in what they show.
        returns: (B, 2, E), unit length, normal first.
    """

    tower: Any

    def __init__(self, text: TextSpec, tower: TowerSpec, embed_dim: int) -> None:
        super().__init__()
        self.causal = text.causal
        self.tower = create_text_tower(tower)
        width = int(self.tower.positional_embedding.shape[1])
        self.sentences = sentence_ensemble(text, tower)
        self.prompts = HybridPrompts(
            width, embed_dim, text.deep_length, text.deep_depth - 1, static=text.static, dynamic=text.dynamic
        )

    def forward(self, pooled: Tensor, token_ids: Tensor | None = None) -> Tensor:
        if token_ids is None:
            token_ids = self.sentences.token_ids.expand(len(pooled), -1, -1)
        token_ids = token_ids.flatten(0, 1)
        sentences, images = len(self.sentences.token_ids), len(pooled)
        vectors = [v.expand(images, -1, -1).repeat_interleave(sentences, dim=0) for v in self.prompts(pooled)]

        def rewrite(layer: int, tokens: Tensor) -> Tensor:
            return overwrite(tokens, vectors[layer - 1]) if layer <= len(vectors) else tokens

        words = self.tower.token_embedding(token_ids)
        features = encode_embeddings(self.tower, words, token_ids, causal=self.causal, rewrite=rewrite)
        return self.sentences.average(features.unflatten(0, (len(pooled), -1)))


def sentence_ensemble(text: TextSpec, tower: TowerSpec) -> SentenceEnsemble:
    """The sentences that a specification asks for.

    Raises:
        InvalidRequest: it does not say what the images show.
    """
    if not text.name:
        raise InvalidRequest("Sentences need the name of what the images show, for example 'Brain'")
    return SentenceEnsemble(tower, *ensemble_sentences(text.name, text.templates))
