"""Fit the detector's heads longer, the towers as they are: what the towers give for many views is kept.

A model and packed images in; its adapters and class head, fitted, stay in the model. A step costs a small
part of one that runs the tower too, so that images with labels and outlines can be seen many times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.tokenizer import create_tokenizer
from ..clip.towers import TappedTokens
from ..synthesis import SynthesisConfig
from .anomaly_batches import AnomalyImages, JointBatches
from .anomaly_terms import TermWeights, Truth, anomaly_terms
from .captions import state_sentences
from .joint import MANY_SCALES, SENTENCES, JointModel
from .tower import CLIP_MEAN, CLIP_STD, adamw, as_numbers, learning_rate


@dataclass(frozen=True)
class HeadTraining:
    """Numbers of the recipe.

    Attributes:
        batches: of views whose tokens are kept; 0 leaves the heads as the joint training made them.
        outlined, painted, labelled: images of each part of a batch, see `JointBatches`.
        epochs: passes over what is kept.
        learning_rate, weight_decay, warmup: of AdamW.
        terms: weights of the losses.
        own_sentences: odds that an image is compared with sentences about its own kind, not about any.
        loss_side: side of the maps that the losses are taken of.
        synthesis: which lesions are painted.
        seed: of everything random.
    """

    batches: int = 0
    outlined: int = 12
    painted: int = 8
    labelled: int = 12
    epochs: int = 7
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 50
    terms: TermWeights = field(default_factory=TermWeights)
    own_sentences: float = 0.7
    loss_side: int = 128
    synthesis: SynthesisConfig = field(default_factory=lambda: MANY_SCALES)
    seed: int = 0


class Views(NamedTuple):
    """What the tower gives for many views, and what is known of them, on the device that trains.

    Attributes:
        patches: for each tap (V, N, D), half precision; classes: (V, D); pooled: (V, E); grid: (h, w).
        truth: of all views, masks at the side of the losses.
        kinds: of each view.
    """

    patches: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]
    pooled: Tensor
    grid: tuple[int, int]
    truth: Truth
    kinds: list[tuple[str, str]]


def train_heads(
    model: JointModel,
    images: AnomalyImages,
    training: HeadTraining,
    *,
    device: torch.device,
    workers: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Fit adapters and class head, in place.

    Args:
        model: trained; its towers are left alone.
        images: what is learned from.
        training: numbers of the recipe.
        device: where to run.
        workers: processes that draw and paint ahead; 0 for none beside this one.
        on_progress: called with the batches whose tokens are kept, and their number.
        on_step: called with the step, from 1, and the loss terms.
    """
    torch.manual_seed(training.seed)
    model.to(device).eval()
    views = keep_tokens(model, images, training, device=device, workers=workers, on_progress=on_progress)
    banks = _Sentences(model, list(dict.fromkeys(views.kinds)), device)
    detector = model.detector
    heads = torch.nn.ModuleDict({"adapters": detector.adapters, "class_head": detector.class_head})
    detector.class_head.reset_parameters()
    optimizer = adamw(heads, training.weight_decay)
    steps, step = training.epochs * training.batches, 0
    for epoch in range(training.epochs):
        rng = np.random.default_rng([training.seed, epoch, 2])
        for chosen in np.array_split(rng.permutation(len(views.pooled)), training.batches):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, training.warmup, training.learning_rate)
            some = torch.from_numpy(chosen).to(device)
            patches, classes = (tuple(tap[some] for tap in taps) for taps in (views.patches, views.classes))
            tokens = TappedTokens(patches, classes, views.pooled[some], views.grid)
            text = banks.draw([views.kinds[i] for i in chosen], training.own_sentences, rng)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                aligned = detector.align_tokens(tokens)
            truth = Truth(*(part[some] for part in views.truth))
            terms = anomaly_terms(detector, aligned, text, truth)
            loss = training.terms.sum(terms)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if on_step is not None:
                on_step(step, as_numbers({"loss": loss, **terms}))


@torch.no_grad()
def keep_tokens(
    model: JointModel,
    images: AnomalyImages,
    training: HeadTraining,
    *,
    device: torch.device,
    workers: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Views:
    """The tower's tokens of random views, of the same kinds as in the joint training."""
    batches = JointBatches(
        images,
        outlined=training.outlined,
        painted=training.painted,
        others=training.labelled,
        synthesis=training.synthesis,
        seed=training.seed + 1,
        labels_alone=True,
    )
    side = model.detector.spec.tower.image_size
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    found: list[Views] = []
    for number, batch in batches.batches(dict.fromkeys(range(training.batches), side), device, workers):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            tokens = model.detector.tower((batch.pictures - mean) / std)
        small = F.adaptive_avg_pool2d(batch.truth.masks[:, None].float(), training.loss_side)[:, 0] > 0.5
        found.append(
            Views(
                tuple(tap.half() for tap in tokens.patches),
                tuple(tap.half() for tap in tokens.classes),
                tokens.pooled.float(),
                tokens.grid,
                batch.truth._replace(masks=small),
                batch.kinds,
            )
        )
        if on_progress is not None:
            on_progress(number + 1, training.batches)
    return Views(
        tuple(torch.cat(taps) for taps in zip(*(views.patches for views in found), strict=True)),
        tuple(torch.cat(taps) for taps in zip(*(views.classes for views in found), strict=True)),
        torch.cat([views.pooled for views in found]),
        found[0].grid,
        Truth(*(torch.cat(parts) for parts in zip(*(views.truth for views in found), strict=True))),
        [kind for views in found for kind in views.kinds],
    )


class _Sentences:
    """Features of all sentences about some kinds of images, and about any."""

    def __init__(self, model: JointModel, kinds: Sequence[tuple[str, str]], device: torch.device) -> None:
        self.device = device
        tokenize = create_tokenizer(model.detector.spec.tower)
        clip: Any = model.clip
        self.features: dict[tuple[str, str], list[Tensor]] = {}
        with torch.no_grad():
            for family, part in [*kinds, ("", "")]:
                self.features[family, part] = [
                    clip.encode_text(
                        tokenize(state_sentences(family, part, abnormal=abnormal)).to(device), normalize=True
                    )
                    for abnormal in (False, True)
                ]

    def draw(self, kinds: Sequence[tuple[str, str]], own: float, rng: np.random.Generator) -> Tensor:
        """(B, 2, E) for images of these kinds, see `joint.train_jointly`."""
        banks = []
        for kind in kinds:
            classes = self.features[kind if rng.random() < own else ("", "")]
            drawn = [torch.from_numpy(rng.integers(len(c), size=SENTENCES)).to(c.device) for c in classes]
            banks.append(torch.stack([c[d].mean(0) for c, d in zip(classes, drawn, strict=True)]))
        return F.normalize(torch.stack(banks), dim=-1)
