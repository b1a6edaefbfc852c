"""Batches of the joint training: outlined lesions, painted ones, and whatever else is known of images.

Packed images and their records in; pictures with all that the losses ask for out. A batch depends on seed and
step alone. It is drawn and painted on the CPU, by several processes where there are cores for them, and shown
on the device that trains, which holds all images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..datasets.records import ImageRecord, modality_family
from ..synthesis import AnomalySynthesizer, SynthesisConfig, foreground, sample_generator
from .anomaly_terms import Truth
from .augmentation import place, random_appearance, random_matrices
from .captions import caption, subject

# Collections whose images nobody labelled, but which hold no lesions as far as their sources tell.
HEALTHY_COLLECTIONS = (
    "templates",
    "totalseg_ct",
    "slicer_cthead_dicom",
    "mednist_abdomen_ct",
    "mednist_chest_ct",
    "mednist_breast_mr",
    "mednist_hand_xray",
)
# Collections whose normal and abnormal images come from different sources, so that labels tell the source.
LABELS_TELL_THE_SOURCE = ("fundus_glaucoma_dr", "brain_mr_4class", "chest_ct_cancer", "blood_smear_rbc")
ANATOMY = ("MR", "CT", "US", "XR", "fundus")


class DrawnBatch(NamedTuple):
    """Which images a batch shows and how, before anything is computed on the device.

    Attributes:
        chosen: (B,) indices of images.
        matrices: (B, 2, 3) where each is looked at, see `augmentation.place`.
        painted: first place of the images to paint on, and what these P places show: (P, 3, S, S) uint8
            pictures and (P, S, S) bool lesions.
        truth: has_mask, abnormal, has_label, see `Truth`.
        subjects, captions, kinds: see `JointBatch`.
        side: S.
        seed: of the appearance.
    """

    chosen: Tensor
    matrices: Tensor
    painted: tuple[int, Tensor, Tensor]
    truth: tuple[Tensor, Tensor, Tensor]
    subjects: Tensor
    captions: list[str]
    kinds: list[tuple[str, str]]
    side: int
    seed: int


class JointBatch(NamedTuple):
    """Images and what is known of them, on the device that trains.

    Attributes:
        plain: (B, 3, S, S) in [0, 1], before their appearance was changed; what the teacher sees.
        pictures: (B, 3, S, S) in [0, 1].
        truth: lesions, at the side of the pictures, and labels.
        subjects: (B,) which images share a caption's subject, as numbers.
        captions: B sentences.
        kinds: (family of the modality, body part) of each image.
    """

    plain: Tensor
    pictures: Tensor
    truth: Truth
    subjects: Tensor
    captions: list[str]
    kinds: list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class AnomalyImages:
    """What is learned from, in memory.

    Attributes:
        records: what is known of each image.
        images: (N, 3, H, W) uint8, padded to squares.
        masks: {index: (H, W) bool}, outlined lesions.
        inner: (N,) side of the largest square inside the picture, as a share of its padded square.
    """

    records: Sequence[ImageRecord]
    images: np.ndarray
    masks: dict[int, np.ndarray]
    inner: np.ndarray

    def chosen(self, indices: Sequence[int]) -> AnomalyImages:
        """Some of them."""
        masks = {new: self.masks[old] for new, old in enumerate(indices) if old in self.masks}
        records = [self.records[i] for i in indices]
        return AnomalyImages(records, self.images[list(indices)], masks, self.inner[list(indices)])


def can_be_painted(record: ImageRecord) -> bool:
    """Whether an image shows anatomy without a lesion, so that what is painted on it is the only one."""
    healthy = record.abnormal is False or record.set in HEALTHY_COLLECTIONS
    return healthy and modality_family(record.modality) in ANATOMY and record.set != "chest_ct_cancer"


def tells_normal(record: ImageRecord) -> bool:
    """Whether an image's label is one of the image, and not of its source."""
    return record.abnormal is not None and record.set not in LABELS_TELL_THE_SOURCE


class JointBatches:
    """Draws batches of three parts: outlined lesions, images to paint on, and any images.

    Args:
        images: what is learned from.
        outlined: images with outlined lesions in a batch.
        painted: images without lesions in a batch, most of them painted on.
        others: images of all kinds in a batch, those with labels twice as often.
        synthesis: which lesions are painted.
        appearance: whether pictures have another appearance than the images.
        seed: of everything random.
    """

    def __init__(
        self,
        images: AnomalyImages,
        *,
        outlined: int,
        painted: int,
        others: int,
        synthesis: SynthesisConfig,
        seed: int,
        appearance: bool = True,
    ) -> None:
        self.images, self.seed, self.appearance = images, seed, appearance
        records = images.records
        self.synthesizer = AnomalySynthesizer(synthesis)
        self.lesions = sorted(images.masks)
        self.normal = [i for i, record in enumerate(records) if can_be_painted(record)]
        every = range(len(records))
        attention = np.array([1.0 + tells_normal(record) for record in records])
        self.parts = (
            _Part(self.lesions, _odds(records, self.lesions), outlined if self.lesions else 0),
            _Part(self.normal, _odds(records, self.normal), painted),
            _Part(every, _odds(records, every, attention), others),
        )
        names = [subject(record) for record in records]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.subject = torch.tensor([numbers[name] for name in names])
        self.painted_subject = len(numbers)
        self._held: tuple[Tensor, Tensor, Tensor] | None = None

    def batches(
        self, sides: Mapping[int, int], device: torch.device, workers: int = 0
    ) -> Iterator[tuple[int, JointBatch]]:
        """Batches on a device, with their steps.

        Args:
            sides: {step: side of its pictures}, in the order of the steps.
            device: where they are shown.
            workers: processes that draw ahead; 0 for none beside this one. They change no batch.
        """
        steps = list(sides)
        drawn = DataLoader(
            _Draws(self, sides),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=4 if workers else None,
        )
        for step, batch in zip(steps, drawn, strict=True):
            yield step, self.show(batch, device)

    def draw(self, step: int, side: int) -> DrawnBatch:
        """The batch of a step, for pictures of this side."""
        rng = np.random.default_rng([self.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = np.concatenate([part.draw(rng) for part in self.parts])
        first, behind = self.parts[0].count, self.parts[0].count + self.parts[1].count
        records = [self.images.records[i] for i in chosen]
        cropped = torch.rand(len(chosen), generator=generator) < 0.5
        inner = torch.where(cropped, torch.from_numpy(self.images.inner[chosen]), torch.ones(()))
        matrices = random_matrices(len(chosen), generator, inner)
        abnormal = torch.tensor([float(bool(r.abnormal)) for r in records])
        has_label = torch.tensor([tells_normal(r) or can_be_painted(r) for r in records])
        has_mask = torch.tensor([self._mask_is_known(i) for i in chosen])
        subjects = self.subject[torch.from_numpy(chosen)].clone()
        captions = [caption(r, rng) for r in records]
        plain = torch.zeros(behind - first, 3, side, side)
        if first < behind:
            raw = torch.from_numpy(self.images.images[chosen[first:behind]]).float() / 255
            plain = place(raw, matrices[first:behind], side)
        lesions = torch.zeros(behind - first, side, side, dtype=torch.bool)
        for number in range(behind - first):
            at = first + number
            lesion = self._paint(plain[number], step, at)
            if lesion is not None:
                plain[number], lesions[number] = lesion
                abnormal[at] = 1.0
                subjects[at] = self.painted_subject + at  # its caption may no longer be true
        return DrawnBatch(
            torch.from_numpy(chosen),
            matrices,
            (first, (plain * 255).round().to(torch.uint8), lesions),
            (has_mask, abnormal, has_label),
            subjects,
            captions,
            [(modality_family(r.modality), r.body_part.split(",")[0]) for r in records],
            side,
            int(rng.integers(2**62)),
        )

    def show(self, drawn: DrawnBatch, device: torch.device) -> JointBatch:
        """The pictures of a batch, on a device that then keeps all images for later ones."""
        images, masks, row = self._on(device)
        chosen = drawn.chosen.to(device)
        pair = torch.cat([images[chosen].float() / 255, masks[row[chosen]][:, None].float()], dim=1)
        placed = place(pair, drawn.matrices, drawn.side)
        plain, mask = placed[:, :3].contiguous(), placed[:, 3] > 0.5
        first, painted, lesions = drawn.painted
        behind = first + len(painted)
        plain[first:behind] = painted.to(device).float() / 255
        mask[first:behind] = lesions.to(device)
        has_mask, abnormal, has_label = (part.to(device) for part in drawn.truth)
        # A lesion that was moved out of the picture leaves no abnormal one behind that could be known.
        has_label[:first] &= mask[:first].flatten(1).any(1)
        generator = torch.Generator().manual_seed(drawn.seed)
        return JointBatch(
            plain,
            random_appearance(plain, generator) if self.appearance else plain,
            Truth(mask, has_mask, abnormal, has_label),
            drawn.subjects.to(device),
            drawn.captions,
            drawn.kinds,
        )

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) images, (M + 1, H, W) lesions and an empty one, and which of these is each image's."""
        if self._held is None or self._held[0].device != torch.empty(0, device=device).device:
            rows = torch.full((len(self.images.images),), len(self.lesions))
            rows[self.lesions] = torch.arange(len(self.lesions))
            empty = np.zeros((1, *self.images.images.shape[-2:]), bool)
            masks = np.concatenate([*(self.images.masks[i][None] for i in self.lesions), empty])
            pictures = torch.from_numpy(self.images.images).to(device)
            self._held = (pictures, torch.from_numpy(masks).to(device), rows.to(device))
        return self._held

    def _mask_is_known(self, index: int) -> bool:
        return int(index) in self.images.masks or can_be_painted(self.images.records[index])

    def _paint(self, image: Tensor, step: int, at: int) -> tuple[Tensor, Tensor] | None:
        """(3, S, S) picture with a lesion and (S, S) its mask; None when it was left as it is."""
        grey = image.mean(0).clamp(0, 1).numpy()
        rng = sample_generator(self.seed, step, at)
        support = self.images.images[int(self.parts[1].draw(rng, 1)[0])].mean(0) / 255
        # Of every second pixel, the body is found in a tenth of the time, which was most of painting.
        body = foreground(grey[::2, ::2]).repeat(2, axis=0).repeat(2, axis=1)
        body = body[: grey.shape[0], : grey.shape[1]]
        anomaly = self.synthesizer(grey, body, rng, [support.astype(np.float32)])
        if not anomaly.mask.any():
            return None
        change = torch.from_numpy(anomaly.image - grey)
        return (image + change).clamp(0, 1), torch.from_numpy(anomaly.mask)


class _Draws(Dataset):
    """Batches by their steps, as drawing processes are asked for them."""

    def __init__(self, batches: JointBatches, sides: Mapping[int, int]) -> None:
        self.batches, self.sides = batches, sides

    def __getitem__(self, step: int) -> DrawnBatch:
        return self.batches.draw(step, self.sides[step])


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True, eq=False)
class _Part:
    """One part of each batch: images, their odds, how many are drawn."""

    images: Sequence[int]
    odds: np.ndarray
    count: int

    def draw(self, rng: np.random.Generator, count: int | None = None) -> np.ndarray:
        count = self.count if count is None else count
        if count == 0:  # of no images, as it may be
            return np.empty(0, int)
        return rng.choice(np.asarray(self.images, int), count, replace=False, p=self.odds)


def _odds(
    records: Sequence[ImageRecord], chosen: Sequence[int], attention: np.ndarray | None = None
) -> np.ndarray:
    """Odds of drawing each image: a collection counts with the square root of its size."""
    sets = [records[i].set for i in chosen]
    counts = {name: sets.count(name) for name in set(sets)}
    odds = np.array([counts[name] ** -0.5 for name in sets]) * (1.0 if attention is None else attention)
    return odds / odds.sum() if len(odds) else odds
