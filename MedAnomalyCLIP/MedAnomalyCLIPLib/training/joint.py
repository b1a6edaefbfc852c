"""Teach both towers and the detector's heads at once: features, sentences, and where something is wrong.

The tower that distillation gave, packed images and their records in; a CLIP and the detector on it out. What
is compared with a patch are sentences about the kind of image that it is from, drawn anew in each step, so
that sentences of a reader's own can take their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..clip.tokenizer import create_tokenizer
from ..configuration import to_mapping
from ..detectors.detector import AnomalyDetector
from ..detectors.specification import DetectorSpec
from ..synthesis import CutPaste, GaussIntensityChange, SourceDeformation, SynthesisConfig
from .anomaly_batches import AnomalyImages, JointBatch, JointBatches
from .anomaly_terms import TermWeights, anomaly_terms
from .captions import SentenceTokens, state_sentences
from .checkpoint import resume, save_checkpoint
from .teacher import Teacher
from .tower import (
    CLIP_MEAN,
    CLIP_STD,
    DistillingClip,
    adamw,
    as_numbers,
    contrastive_loss,
    cosine_distance,
    learning_rate,
)

# Lesions of all sizes and contrasts. At the published overlap of one half they stick out into the air, and a
# hard paste of air is a hole.
MANY_SCALES = SynthesisConfig(
    cut_paste=CutPaste(size=(0.05, 0.4), blend="either"),
    gauss_intensity=GaussIntensityChange(size=(0.06, 0.5), amplitude=(0.12, 0.6), share=2.0),
    source_deformation=SourceDeformation(size=(0.1, 0.5), share=0.7),
    identity_share=1.2,
    foreground_overlap=0.95,
)
SENTENCES = 3  # of each class that are drawn for each kind of image in each step


@dataclass(frozen=True)
class JointTraining:
    """Numbers of the recipe.

    Attributes:
        steps: optimizer steps.
        horizon: step at which the learning rate would be zero.
        outlined, painted, others: images of each part of a batch, see `JointBatches`.
        small_side, small_steps: side of the images in the first steps, and how many these are; the rest is at
            the detector's own size.
        learning_rate, weight_decay, warmup: of AdamW, as in `TowerTraining`.
        distillation, contrastive: weights of these losses. 0 leaves one out.
        terms: weights of the losses on maps and scores.
        appearance: whether views have another appearance than the teacher's.
        own_sentences: odds that an image is compared with sentences about its own kind, not about any.
        synthesis: which lesions are painted.
        ema_decay: decay of the running average of weights, which is what training returns.
        checkpoint_every: steps between checkpoints.
        seed: of everything random.
    """

    steps: int = 2200
    horizon: int = 2227
    outlined: int = 40
    painted: int = 24
    others: int = 64
    small_side: int = 192
    small_steps: int = 1100
    learning_rate: float = 6e-4
    weight_decay: float = 0.05
    warmup: int = 200
    distillation: float = 0.5
    contrastive: float = 0.2
    terms: TermWeights = field(default_factory=TermWeights)
    appearance: bool = True
    own_sentences: float = 0.7
    synthesis: SynthesisConfig = field(default_factory=lambda: MANY_SCALES)
    ema_decay: float = 0.999
    checkpoint_every: int = 275
    seed: int = 0

    def side(self, step: int, full: int) -> int:
        """Side of the images in a step, counted from 1."""
        return self.small_side if step <= self.small_steps else full


class JointModel(nn.Module):
    """Both towers, the heads of the distillation, and a detector whose tower is the CLIP's own."""

    def __init__(self, distilled: DistillingClip, spec: DetectorSpec) -> None:
        super().__init__()
        self.distilled = distilled
        self.detector = AnomalyDetector(spec)
        self.detector.tower.visual = distilled.clip.visual

    @property
    def clip(self) -> Any:
        return self.distilled.clip


def train_jointly(
    distilled: DistillingClip,
    spec: DetectorSpec,
    images: AnomalyImages,
    teacher_weights: Path,
    training: JointTraining,
    checkpoint: Path,
    *,
    device: torch.device,
    workers: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_checkpoint: Callable[[int, JointModel], None] | None = None,
) -> JointModel:
    """Train everything, going on from `checkpoint` when it exists.

    Args:
        distilled: what distillation gave.
        spec: the detector; linear adapters, scored by "class_and_peak".
        images: what is learned from.
        teacher_weights: safetensors file of the teacher.
        training: numbers of the recipe.
        checkpoint: file that is written every `checkpoint_every` steps and at the end.
        device: where to run.
        workers: processes that draw and paint ahead; 0 for none beside this one.
        on_step: called with the step, from 1, and the loss terms.
        on_checkpoint: called with the step and the averaged model after each checkpoint.

    Raises:
        InvalidRequest: the checkpoint was trained with other settings.

    Returns:
        The averaged model, on the CPU.
    """
    torch.manual_seed(training.seed)
    model = JointModel(distilled, spec).to(device)
    average: Any = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(training.ema_decay), use_buffers=False
    )
    batches = JointBatches(
        images,
        outlined=training.outlined,
        painted=training.painted,
        others=training.others,
        synthesis=training.synthesis,
        appearance=training.appearance,
        seed=training.seed,
    )
    optimizer = adamw(model, training.weight_decay)
    modules = {"model": model, "average": average}
    settings = {k: v for k, v in to_mapping(training).items() if k != "checkpoint_every"}
    start = resume(checkpoint, modules, optimizer, settings)
    losses = _Losses(model, spec, training, teacher_weights, images, device)
    model.train()
    sides = {s: training.side(s, spec.tower.image_size) for s in range(start + 1, training.steps + 1)}
    for step, batch in batches.batches(sides, device, workers):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training.horizon, training.warmup, training.learning_rate)
        terms = losses(batch, step)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        if on_step is not None:
            on_step(step, as_numbers(terms))
        if step % training.checkpoint_every == 0 or step == training.steps:
            save_checkpoint(checkpoint, modules, optimizer, {"step": step, "settings": settings})
            if on_checkpoint is not None:
                on_checkpoint(step, average.module)
    return average.module.cpu().eval()


class _Losses:
    """All terms of a batch."""

    def __init__(
        self,
        model: JointModel,
        spec: DetectorSpec,
        training: JointTraining,
        teacher_weights: Path,
        images: AnomalyImages,
        device: torch.device,
    ) -> None:
        self.model, self.spec, self.training, self.device = model, spec, training, device
        self.tokenize = SentenceTokens(create_tokenizer(spec.tower))
        self.patch = int(model.clip.visual.patch_size[0])
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        self.teacher: Teacher | None = None
        if training.distillation > 0:
            self.teacher = Teacher(teacher_weights, (1, 1)).to(device)
            self.teacher.fit_statistics(_sample(images, training, spec.tower.image_size).to(device))

    def __call__(self, batch: JointBatch, step: int) -> dict[str, Tensor]:
        training, device = self.training, self.device
        detector = self.model.detector
        pictures, side = batch.pictures, batch.pictures.shape[-1]
        rng = np.random.default_rng([training.seed, step, 1])
        with torch.autocast(device.type, dtype=torch.bfloat16):
            tokens = detector.tower((pictures - self.mean) / self.std)
            text = self._text(batch, rng)
            aligned = detector.align_tokens(tokens)
        zero = torch.zeros((), device=device)
        terms = {
            "distillation": zero if self.teacher is None else self._distillation(batch.plain, tokens, side),
            "contrastive": self._contrastive(batch, tokens.pooled) if training.contrastive > 0 else zero,
        }
        found = anomaly_terms(detector, aligned, text, batch.truth)
        towers = sum(getattr(training, name) * term for name, term in terms.items())
        return {"loss": towers + training.terms.sum(found), **terms, **found}

    def _distillation(self, plain: Tensor, tokens: Any, side: int) -> Tensor:
        assert self.teacher is not None
        self.teacher.grid = (side // self.patch, side // self.patch)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            targets, pooled_target = self.teacher(plain)
            heads = self.model.distilled.token_heads
            dense = [head(patches) for head, patches in zip(heads, tokens.patches, strict=True)]
            pooled = self.model.distilled.pooled_head(tokens.pooled)
        pairs = [*zip(dense, targets, strict=True), (pooled, pooled_target)]
        return torch.stack([cosine_distance(found, target) for found, target in pairs]).sum()

    def _contrastive(self, batch: JointBatch, pooled: Tensor) -> Tensor:
        clip = self.model.clip
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            sentences = clip.encode_text(self.tokenize(batch.captions).to(self.device), normalize=True)
        scale = clip.logit_scale.clamp(max=math.log(100)).exp()
        same = batch.subjects[:, None] == batch.subjects[None, :]
        return contrastive_loss(F.normalize(pooled.float(), dim=-1), sentences.float(), same, scale)

    def _text(self, batch: JointBatch, rng: np.random.Generator) -> Tensor:
        """(B, 2, E) what each image is compared with: sentences about its kind, or about any kind."""
        kinds = [kind if rng.random() < self.training.own_sentences else ("", "") for kind in batch.kinds]
        distinct = list(dict.fromkeys(kinds))
        sentences = [
            sentence
            for family, part in distinct
            for abnormal in (False, True)
            for sentence in rng.choice(state_sentences(family, part, abnormal=abnormal), SENTENCES)
        ]
        features = self.model.clip.encode_text(self.tokenize(sentences).to(self.device), normalize=True)
        banks = F.normalize(features.float().unflatten(0, (len(distinct), 2, SENTENCES)).mean(2), dim=-1)
        return banks[torch.tensor([distinct.index(kind) for kind in kinds], device=self.device)]


def _sample(images: AnomalyImages, training: JointTraining, side: int, count: int = 256) -> Tensor:
    """(count, 3, S, S) images in [0, 1] as they are, for the teacher's statistics."""
    rng = np.random.default_rng([training.seed, 0])
    chosen = rng.choice(len(images.images), min(count, len(images.images)), replace=False)
    raw = torch.from_numpy(images.images[np.sort(chosen)]).float() / 255
    return F.interpolate(raw, size=side, mode="bilinear", antialias=True)


def text_banks(clip: Any, spec: DetectorSpec) -> tuple[Tensor, Tensor]:
    """Text features from all sentences: (2, E) for images of any kind, and (P, 2, E) for the presets."""
    tokenize = create_tokenizer(spec.tower)

    def bank(families: tuple[str, ...], part: str) -> Tensor:
        classes = []
        for abnormal in (False, True):
            sentences = [s for f in families for s in state_sentences(f, part, abnormal=abnormal)]
            classes.append(clip.encode_text(tokenize(sentences), normalize=True).mean(0))
        return F.normalize(torch.stack(classes), dim=-1)

    with torch.no_grad():
        presets = [bank(preset.modalities, preset.part) for preset in spec.presets]
        return bank(("",), ""), torch.stack(presets) if presets else torch.empty(0)
