"""Fit adapters and prompts to lesions, the tower frozen: MediCLIP's scheme, and real lesions beside it.

Normal images, in which lesions are painted, images with outlined lesions, and a CLIP in; a detector out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..detectors.detector import AnomalyDetector
from ..detectors.specification import DetectorSpec
from ..detectors.text import create_prompts
from ..synthesis import AnomalySynthesizer, CutPaste, SynthesisConfig, foreground, sample_generator
from .augmentation import random_appearance, random_placement
from .losses import map_loss

# At the published overlap of one half, lesions stick out into the air, and a hard paste of air is a hole.
ON_THE_BODY = SynthesisConfig(cut_paste=CutPaste(blend="either"), foreground_overlap=0.95)


@dataclass(frozen=True, eq=False)
class TuningImages:
    """Grey images to learn from, all squares of one size.

    Attributes:
        normal: (M, H, W) uint8, without lesions.
        normal_odds: (M,) relative odds of drawing each.
        lesions: (L, H, W) uint8, each with an outlined lesion; may be empty.
        masks: (L, H, W) bool, the outlines filled.
        lesion_odds: (L,) relative odds of drawing each.
    """

    normal: np.ndarray
    normal_odds: Sequence[float]
    lesions: np.ndarray
    masks: np.ndarray
    lesion_odds: Sequence[float]


@dataclass(frozen=True)
class PromptTuning:
    """Numbers of the recipe.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step.
        learning_rate: of Adam at the start; it falls to zero along half a cosine (published: constant).
        prompt_length: learnable vectors in front of each phrase.
        real_share: share of each batch that is images with outlined lesions; MediCLIP has none.
        synthesis: which lesions are painted.
        seed: of everything random.
    """

    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 1e-3
    prompt_length: int = 8
    real_share: float = 0.5
    synthesis: SynthesisConfig = ON_THE_BODY
    seed: int = 0


def tune_prompts(
    spec: DetectorSpec,
    clip: Any,
    images: TuningImages,
    tuning: PromptTuning,
    normalise: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> AnomalyDetector:
    """Train a detector's adapters and text bank.

    Args:
        spec: the detector.
        clip: both towers of its CLIP, trained.
        images: what to learn from.
        tuning: numbers of the recipe.
        normalise: turns (B, 3, S, S) in [0, 1] into what the tower expects.
        device: where to run.
        on_step: called with the step, from 1, and the loss.

    Returns:
        The detector with its text bank filled in, on the CPU.
    """
    torch.manual_seed(tuning.seed)
    detector = AnomalyDetector(spec)
    detector.tower.visual.load_state_dict(clip.visual.state_dict())
    detector = detector.to(device).eval()
    detector.tower.requires_grad_(False)
    clip = clip.to(device).requires_grad_(False)
    text = replace(spec.text, length=tuning.prompt_length)
    prompts = create_prompts(text, spec.tower, clip).to(device)
    trained = [*detector.adapters.parameters(), *prompts.parameters()]
    optimizer = torch.optim.Adam(trained, lr=tuning.learning_rate, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, tuning.steps)
    batches = _Batches(images, spec.tower.image_size, tuning)
    for step in range(1, tuning.steps + 1):
        pictures, masks = (t.to(device) for t in batches.draw(step))
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            tokens = detector.tower(normalise(pictures))
        maps = detector.map_tokens(
            tokens._replace(patches=tuple(p.float() for p in tokens.patches)), prompts(clip)
        )
        loss = map_loss(maps, masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, {"loss": loss.item()})
    with torch.no_grad():
        detector.text_bank.copy_(prompts(clip))
    return detector.cpu().eval()


class _Batches:
    """Batches that depend only on the seed and the step."""

    def __init__(self, images: TuningImages, side: int, tuning: PromptTuning) -> None:
        self.images, self.side, self.tuning = images, side, tuning
        self.synthesizer = AnomalySynthesizer(tuning.synthesis)
        self.real_count = round(tuning.real_share * tuning.batch_size) if len(images.lesions) else 0

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, S, S) in [0, 1] with three equal channels, and masks (B, S, S) bool."""
        rng = np.random.default_rng([self.tuning.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        painted, painted_masks = self._painted(step, rng, generator)
        real, real_masks = self._real(rng, generator)
        pictures = torch.cat([painted, real])[:, None].expand(-1, 3, -1, -1)
        return random_appearance(pictures, generator), torch.cat([painted_masks, real_masks])

    def _painted(
        self, step: int, rng: np.random.Generator, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Normal images with lesions painted in, (n, S, S), and the masks of these."""
        count = self.tuning.batch_size - self.real_count
        chosen = rng.choice(len(self.images.normal), 2 * count, p=_shares(self.images.normal_odds))
        raw = torch.from_numpy(self.images.normal[chosen]).float()[:, None] / 255
        placed = random_placement(raw, self.side, generator)[:, 0].numpy()
        queries, support = placed[:count], list(placed[count:])
        painted = [
            self.synthesizer(image, foreground(image), sample_generator(self.tuning.seed, step, i), support)
            for i, image in enumerate(queries)
        ]
        return (
            torch.from_numpy(np.stack([p.image for p in painted])),
            torch.from_numpy(np.stack([p.mask for p in painted])),
        )

    def _real(self, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images with real lesions, (n, S, S), and their outlines filled, moved together."""
        if not self.real_count:
            nothing = torch.empty(0, self.side, self.side)
            return nothing, nothing > 0
        odds = _shares(self.images.lesion_odds)
        chosen = rng.choice(len(self.images.lesions), self.real_count, p=odds)
        pair = np.stack([self.images.lesions[chosen] / np.float32(255), self.images.masks[chosen]], axis=1)
        placed = random_placement(torch.from_numpy(pair.astype(np.float32)), self.side, generator)
        return placed[:, 0], placed[:, 1] > 0.5


def _shares(odds: Sequence[float]) -> np.ndarray:
    return np.asarray(odds, float) / np.sum(odds)
