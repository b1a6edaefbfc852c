"""Phrases to token ids, with open_clip's tokenizer and the merges that a tower was trained with."""

from __future__ import annotations

from typing import Any

from .importing import import_open_clip
from .specification import TowerSpec
from .towers import ARCHITECTURES, model_config

FULL_VOCABULARY = 49408
REDUCED_MERGES = ARCHITECTURES / "merges-4096.txt.gz"


def create_tokenizer(spec: TowerSpec) -> Any:
    """The tokenizer of a CLIP: called with a list of T phrases it returns (T, context length) token ids.

    Compact architectures keep the first 4,096 of CLIP's merges, in their order, so that any phrase can still
    be written, in more pieces, with a tenth of the embedding table.
    """
    open_clip = import_open_clip()
    text = model_config(spec)["text_cfg"]
    context = int(text.get("context_length", 77))
    if int(text.get("vocab_size", FULL_VOCABULARY)) == FULL_VOCABULARY:
        return open_clip.SimpleTokenizer(context_length=context)
    return open_clip.SimpleTokenizer(str(REDUCED_MERGES), context_length=context)
