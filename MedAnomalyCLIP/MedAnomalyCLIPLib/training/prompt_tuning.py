"""Fit adapters and prompts to normal images with lesions painted in, the tower frozen (MediCLIP's scheme).

Normal images and a CLIP in, the weights of a detector out. Real lesions are never shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clip.prompts import CoOpPrompts
from ..detectors.detector import AnomalyDetector
from ..detectors.specification import DetectorSpec
from ..synthesis import AnomalySynthesizer, CutPaste, SynthesisConfig, foreground, sample_generator
from .augmentation import random_appearance, random_placement
from .losses import map_loss

# At the published overlap of one half, lesions stick out into the air, and a hard paste of air is a hole.
ON_THE_BODY = SynthesisConfig(cut_paste=CutPaste(blend="either"), foreground_overlap=0.95)


@dataclass(frozen=True)
class PromptTuning:
    """Numbers of the recipe.

    Attributes:
        steps: optimizer steps.
        batch_size: painted images per step.
        learning_rate: of Adam, constant, as published.
        prompt_length: learnable vectors in front of each phrase.
        synthesis: which lesions are painted.
        seed: of everything random.
    """

    steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3
    prompt_length: int = 8
    synthesis: SynthesisConfig = ON_THE_BODY
    seed: int = 0


def tune_prompts(
    spec: DetectorSpec,
    clip: Any,
    images: np.ndarray,
    weights: Sequence[float],
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
        images: (M, H, W) uint8 grey normal images.
        weights: (M,) relative odds of drawing each image.
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
    prompts = CoOpPrompts(spec.tower, clip, length=tuning.prompt_length).to(device)
    trained = [*detector.adapters.parameters(), *prompts.parameters()]
    optimizer = torch.optim.Adam(trained, lr=tuning.learning_rate, betas=(0.5, 0.999))
    painter = _Painter(images, weights, spec.tower.image_size, tuning)
    for step in range(1, tuning.steps + 1):
        pictures, masks = (t.to(device) for t in painter.draw(step))
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            tokens = detector.tower(normalise(pictures))
        maps = detector.map_tokens(
            tokens._replace(patches=tuple(p.float() for p in tokens.patches)), prompts(clip)
        )
        loss = map_loss(maps, masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step, {"loss": loss.item()})
    with torch.no_grad():
        detector.text_bank.copy_(prompts(clip))
    return detector.cpu().eval()


class _Painter:
    """Batches of painted images that depend only on the seed and the step."""

    def __init__(self, images: np.ndarray, weights: Sequence[float], side: int, tuning: PromptTuning) -> None:
        self.images, self.side, self.tuning = images, side, tuning
        self.synthesizer = AnomalySynthesizer(tuning.synthesis)
        self.odds = np.asarray(weights, float) / np.sum(weights)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, S, S) in [0, 1] with three equal channels, and masks (B, S, S) bool."""
        rng = np.random.default_rng([self.tuning.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.choice(len(self.images), 2 * self.tuning.batch_size, p=self.odds)
        raw = torch.from_numpy(self.images[chosen]).float()[:, None].expand(-1, 3, -1, -1) / 255
        placed = random_placement(raw, self.side, generator)[:, 0].numpy()
        queries, support = placed[: len(placed) // 2], list(placed[len(placed) // 2 :])
        painted = [
            self.synthesizer(image, foreground(image), sample_generator(self.tuning.seed, step, i), support)
            for i, image in enumerate(queries)
        ]
        pictures = torch.from_numpy(np.stack([p.image for p in painted]))[:, None].expand(-1, 3, -1, -1)
        masks = torch.from_numpy(np.stack([p.mask for p in painted]))
        return random_appearance(pictures, generator), masks
