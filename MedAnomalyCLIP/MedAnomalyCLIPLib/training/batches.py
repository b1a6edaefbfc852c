"""Batches to learn from: which images, how they are moved and shaded, what is painted into them.

A batch depends on nothing but the seed and its step, so that neither the number of workers nor an
interruption changes what is learned from.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..synthesis import AnomalySynthesizer, foreground, sample_generator
from .augmentation import random_appearance, random_placement
from .prepared import PreparedImages
from .recipe import Recipe
from .views import few_shot_views

_DONORS = 4  # images that a pasted patch may come from


class Batch(NamedTuple):
    """B images to learn from.

    Attributes:
        images: (B, C, S, S) in [0, 1], one channel or three.
        valid: (B, S, S) bool, False on padding.
        masks: (B, S, S) bool, lesions.
        has_mask: (B,) bool.
        abnormal: (B,) bool.
        objects: (B,) place among the names of what images show.
        indices: (B,) place among the prepared images.
    """

    images: Tensor
    valid: Tensor
    masks: Tensor
    has_mask: Tensor
    abnormal: Tensor
    objects: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in self))


def seeded_generator(seed: int, stream: int, step: int) -> torch.Generator:
    """torch's random numbers of one step; streams keep what is drawn for different ends apart."""
    number = np.random.default_rng([seed, stream, step]).integers(2**62)
    return torch.Generator().manual_seed(int(number))


class Batches(Dataset):
    """Batch number `step`, counted from 0 over all epochs.

    Args:
        prepared: images to learn from.
        recipe: its augmentation, painting, optimisation, data and seed.
    """

    def __init__(self, prepared: PreparedImages, recipe: Recipe) -> None:
        self.prepared, self.recipe = prepared, recipe
        self.steps_per_epoch = math.ceil(len(prepared) / recipe.optimisation.batch_size)
        self._synthesizer = AnomalySynthesizer(recipe.painting.synthesis)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.recipe.optimisation.epochs

    def __getitem__(self, step: int) -> Batch:
        indices = self._indices(step)
        chosen = self.prepared[torch.from_numpy(indices)]
        images, valid, masks = chosen.images.float() / 255, chosen.valid, chosen.masks
        generator = seeded_generator(self.recipe.seed, 0, step)
        if self.recipe.augmentation == "random":
            stacked = torch.cat([images, valid[:, None].float(), masks[:, None].float()], dim=1)
            stacked = random_placement(stacked, images.shape[-1], generator)
            images, valid, masks = stacked[:, :-2], stacked[:, -2] > 0.5, stacked[:, -1] > 0.5
        batch = Batch(
            images.contiguous(),
            valid,
            masks.clone(),
            chosen.has_mask.clone(),
            chosen.abnormal.clone(),
            chosen.objects,
            torch.from_numpy(indices),
        )
        self._paint(batch, step)
        if self.recipe.augmentation == "random":
            shaded = random_appearance(batch.images, generator) * batch.valid[:, None]
            batch = batch._replace(images=shaded)
        return batch

    def _indices(self, step: int) -> np.ndarray:
        epoch, position = divmod(step, self.steps_per_epoch)
        rng = np.random.default_rng([self.recipe.seed, 1, epoch])
        size = self.recipe.optimisation.batch_size
        if self.recipe.data.balanced:
            order = rng.choice(len(self.prepared), len(self.prepared), p=self._odds())
        else:
            order = rng.permutation(len(self.prepared))
        return order[position * size : (position + 1) * size]

    def _odds(self) -> np.ndarray:
        """Each kind of image, normal and abnormal of each object, is drawn equally often."""
        kinds = (2 * self.prepared.objects + self.prepared.abnormal).numpy()
        _, kind, counts = np.unique(kinds, return_inverse=True, return_counts=True)
        odds = 1.0 / counts[kind]
        return odds / odds.sum()

    def _paint(self, batch: Batch, step: int) -> None:
        """Anomalies into normal images; a lesion changes all channels of a pixel by the same amount."""
        painting = self.recipe.painting
        if painting.share == 0:
            return
        for place in range(len(batch.images)):
            rng = sample_generator(self.recipe.seed, step, place)
            if batch.abnormal[place] or rng.random() >= painting.share:
                continue
            grey = batch.images[place].mean(0).clamp(0, 1)
            body = foreground(grey.numpy()) & batch.valid[place].numpy() if painting.on_foreground else None
            donors = self._donors(int(batch.objects[place]), rng)
            painted = self._synthesizer(grey.numpy(), body, rng, donors)
            change = torch.from_numpy(painted.image) - grey
            batch.images[place] = (batch.images[place] + change).clamp(0, 1)
            batch.masks[place] = torch.from_numpy(painted.mask)
            batch.abnormal[place] = bool(painted.mask.any())

    def _donors(self, named: int, rng: np.random.Generator) -> list[np.ndarray]:
        """A few normal images (S, S) of the same object, that patches are cut out of."""
        alike = ~self.prepared.abnormal & (self.prepared.objects == named)
        pool = alike.nonzero()[:, 0].numpy()
        chosen = rng.choice(pool, min(_DONORS, len(pool)), replace=False)
        return [self.prepared.images[int(i)].float().mean(0).numpy() / 255 for i in chosen]


def with_views(prepared: PreparedImages) -> PreparedImages:
    """Eleven views of each image, one behind the other; they share their origin."""
    images, masks, valid = [], [], []
    for image, mask, shown in zip(prepared.images, prepared.masks, prepared.valid, strict=True):
        seen, lesion, inside = few_shot_views(image.float() / 255, mask, shown)
        images.append((seen.clamp(0, 1) * 255).round().to(torch.uint8))
        masks.append(lesion)
        valid.append(inside)
    count = len(images[0])

    def repeated(values: Tensor) -> Tensor:
        return values.repeat_interleave(count)

    return PreparedImages(
        images=torch.cat(images),
        valid=torch.cat(valid),
        masks=torch.cat(masks),
        has_mask=repeated(prepared.has_mask),
        abnormal=repeated(prepared.abnormal),
        origins=repeated(prepared.origins),
        objects=repeated(prepared.objects),
    )
