"""The prompts that a `TextSpec` names."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..clip.ensembles import SentenceEnsemble, ensemble_sentences
from ..clip.prompts import CoOpPrompts
from ..clip.specification import TowerSpec
from ..errors import InvalidRequest
from .specification import TextSpec


def create_prompts(text: TextSpec, tower: TowerSpec, clip: Any) -> nn.Module:
    """A module that, called with `clip`, gives the (2, E) text bank.

    Raises:
        InvalidRequest: an ensemble is asked for without saying what the images show.
    """
    if text.prompts == "ensemble":
        if not text.name:
            raise InvalidRequest("Sentences need the name of what the images show, for example 'Brain'")
        return SentenceEnsemble(tower, *ensemble_sentences(text.name, text.templates))
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
