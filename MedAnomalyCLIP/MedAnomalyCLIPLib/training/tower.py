"""Train a compact CLIP from nothing: distil an ImageNet network's features, and match images with sentences.

Packed images and their records in, both towers out. The same seed gives the same batches, whether the run was
interrupted or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..clip.specification import TowerSpec
from ..clip.tokenizer import create_tokenizer
from ..clip.towers import TappedClipViT, clip_with_state, create_clip
from ..datasets.records import ImageRecord
from .augmentation import random_appearance, random_placement
from .captions import SentenceTokens, caption, subject
from .checkpoint import resume, save_checkpoint
from .teacher import CHANNELS, Teacher

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TowerTraining:
    """Numbers of the recipe.

    Attributes:
        steps: optimizer steps.
        side: of the images in pixels. A tower learns faster from small ones, and its positions are fitted to
            the size that it is used at.
        batch_size: images per step.
        learning_rate: highest rate of AdamW, reached after `warmup` steps, then a half cosine.
        horizon: step at which the rate would be zero; a training that another one goes on from ends before.
        weight_decay: of all weights of two or more dimensions.
        distillation: weight of the distillation loss, 0 to leave it out.
        contrastive_weight: weight of the image-sentence loss beside it, 0 to leave it out.
        appearance: whether the student sees views with another appearance than the teacher.
        ema_decay: decay of the running average of weights, which is what training returns.
        checkpoint_every: steps between checkpoints.
        seed: of batches, views and sentences.
    """

    steps: int = 2400
    horizon: int = 2800
    side: int = 192
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 300
    distillation: float = 1.0
    contrastive_weight: float = 0.3
    appearance: bool = True
    ema_decay: float = 0.999
    checkpoint_every: int = 1200
    seed: int = 0


class DistillingClip(nn.Module):
    """Both towers with the heads that training needs and inference drops."""

    clip: Any

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.clip = create_clip(spec)
        self.taps = tuple(spec.taps)
        width = self.clip.visual.positional_embedding.shape[1]
        self.token_heads = nn.ModuleList(nn.Linear(width, count) for count in CHANNELS)
        self.pooled_head = nn.Linear(self.clip.visual.output_dim, CHANNELS[-1])

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Predicted dense and pooled teacher features, and image and sentence embeddings (B, E)."""
        tapped = TappedClipViT(self.clip.visual, self.taps)(images)
        dense = [head(patches) for head, patches in zip(self.token_heads, tapped.patches, strict=True)]
        return (
            dense,
            self.pooled_head(tapped.pooled),
            F.normalize(tapped.pooled, dim=-1),
            self.clip.encode_text(tokens, normalize=True),
        )


def contrastive_loss(images: Tensor, sentences: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy between images and sentences, in both directions, with several right answers.

    Images of one subject share their sentences, so every pair of the same subject is a right answer (as in
    supervised contrastive learning, Khosla et al., NeurIPS 2020).

    Shapes:
        images, sentences: (B, E), unit length.
        same: (B, B) bool, symmetric, true on the diagonal.
    """
    logits = scale * images @ sentences.T
    target = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_tower(
    spec: TowerSpec,
    records: Sequence[ImageRecord],
    images: np.ndarray,
    teacher_weights: Path,
    training: TowerTraining,
    checkpoint: Path,
    *,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> DistillingClip:
    """Train both towers, going on from `checkpoint` when it exists.

    The teacher sees each view as it was placed, the student with another appearance: so the student learns
    features that do not depend on it.

    Args:
        spec: the architecture; four taps, one for each depth of the teacher.
        records: what is known of each image.
        images: (N, 3, H, W) uint8, in the order of `records`.
        teacher_weights: safetensors file of the teacher.
        training: numbers of the recipe.
        checkpoint: file that is written every `checkpoint_every` steps and at the end.
        device: where to run.
        weights: of both towers to begin with; None for random ones.
        on_step: called with the step, from 1, and the loss terms.

    Raises:
        InvalidRequest: the checkpoint was trained with other settings.

    Returns:
        Both towers and the heads of the distillation, with averaged weights, on the CPU.
    """
    torch.manual_seed(training.seed)
    student = DistillingClip(spec)
    if weights is not None:
        student.clip.load_state_dict(clip_with_state(spec, dict(weights), "the start").state_dict())
    student = student.to(device)
    # Running statistics of the stem are averages already: they are copied, not averaged again.
    average: Any = AveragedModel(
        student, multi_avg_fn=get_ema_multi_avg_fn(training.ema_decay), use_buffers=False
    )
    grid = training.side // int(student.clip.visual.patch_size[0])
    teacher = Teacher(teacher_weights, (grid, grid)).to(device)
    batches = _Batches(records, images, spec, training, device)
    teacher.fit_statistics(batches.plain_sample(384))
    optimizer = adamw(student, training.weight_decay)
    modules = {"student": student, "average": average}
    settings = {k: v for k, v in asdict(training).items() if k != "checkpoint_every"}
    start = resume(checkpoint, modules, optimizer, settings)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    student.train()
    for step in range(start + 1, training.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training.horizon, training.warmup, training.learning_rate)
        plain, views, tokens, same = batches.draw(step)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            targets, pooled_target = teacher(plain)
            dense, pooled, image, sentence = student((views - mean) / std, tokens)
        pairs = enumerate(zip(dense, targets, strict=True), start=1)
        terms = {f"tap{i}": cosine_distance(p, t) for i, (p, t) in pairs}
        terms["pooled"] = cosine_distance(pooled, pooled_target)
        scale = student.clip.logit_scale.clamp(max=math.log(100)).exp()
        terms["contrastive"] = contrastive_loss(image.float(), sentence.float(), same, scale)
        distillation = sum(terms[k] for k in terms if k != "contrastive")
        loss = training.distillation * distillation + training.contrastive_weight * terms["contrastive"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(student)
        if on_step is not None:
            on_step(step, as_numbers({"loss": loss, **terms}))
        if step % training.checkpoint_every == 0 or step == training.steps:
            save_checkpoint(checkpoint, modules, optimizer, {"step": step, "settings": settings})
    return average.module.cpu().eval()


class _Batches:
    """Batches that depend only on the seed and the step, made on the device that trains."""

    def __init__(
        self,
        records: Sequence[ImageRecord],
        images: np.ndarray,
        spec: TowerSpec,
        training: TowerTraining,
        device: torch.device,
    ) -> None:
        self.records, self.training, self.side = records, training, training.side
        self.device, self.images = device, torch.from_numpy(images).to(device)
        self.tokenize = SentenceTokens(create_tokenizer(spec))
        subjects = [subject(record) for record in records]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(subjects))}
        self.subject = torch.tensor([numbers[value] for value in subjects])
        sets = [record.set for record in records]
        counts = {name: sets.count(name) for name in set(sets)}
        # The square root keeps large collections from drowning small ones without showing these too often.
        weights = np.array([counts[name] ** -0.5 for name in sets])
        self.probability = weights / weights.sum()

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views (B, 3, S, S) in [0, 1], the same with another appearance, sentence tokens (B, T), and which
        pairs share a subject (B, B)."""
        rng = np.random.default_rng([self.training.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.choice(len(self.records), self.training.batch_size, replace=False, p=self.probability)
        plain = random_placement(self._raw(chosen), self.side, generator)
        views = random_appearance(plain, generator) if self.training.appearance else plain
        tokens = self.tokenize([caption(self.records[i], rng) for i in chosen]).to(self.device)
        subjects = self.subject[torch.from_numpy(chosen)].to(self.device)
        return plain, views, tokens, subjects[:, None] == subjects[None, :]

    def plain_sample(self, count: int) -> Tensor:
        """(count, 3, S, S) images in [0, 1] as they are, for statistics."""
        rng = np.random.default_rng([self.training.seed, 0])
        chosen = rng.choice(
            len(self.records), min(count, len(self.records)), replace=False, p=self.probability
        )
        return F.interpolate(self._raw(chosen), size=self.side, mode="bilinear", antialias=True)

    def _raw(self, chosen: np.ndarray) -> Tensor:
        """(B, 3, H, W) images in [0, 1]."""
        return self.images[torch.from_numpy(chosen).to(self.device)].float() / 255


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine over all but the last dimension, a scalar."""
    return (1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1)).mean()


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Rate in a step, from 1: a straight line up to the highest at `warmup`, then half a cosine to zero."""
    if step <= warmup:
        return highest * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return highest * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(module: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """The optimizer of all weights that learn; those of two or more dimensions decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=parameters[0].is_cuda)


def as_numbers(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars, fetched from their device at once."""
    values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
    return dict(zip(terms, values, strict=True))
