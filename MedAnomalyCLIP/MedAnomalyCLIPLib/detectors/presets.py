"""The published systems as rows of configuration: what their own checkpoints need to give their own maps."""

from __future__ import annotations

from dataclasses import dataclass

from ..clip.specification import TowerSpec
from .specification import AdapterSpec, DetectorSpec, MemorySpec, TextSpec

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preset:
    """One published system.

    Attributes:
        detector: its parts and numbers.
        interpolation: how its images are brought to size.
        mean, std: what its images, in [0, 1], are normalised with.
        source: paper, and the code that the values were read from.
    """

    detector: DetectorSpec
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str


def _mvfa(image_score: str, map_head: str = "segmentation", memory: MemorySpec | None = None) -> Preset:
    return Preset(
        DetectorSpec(
            TowerSpec("ViT-L-14-336", 240, (6, 12, 18, 24)),
            scale=100.0,
            image_score=image_score,
            adapter=AdapterSpec("two_heads", residual=0.1, map_head=map_head),
            text=TextSpec("ensemble"),
            memory=memory,
        ),
        interpolation="bicubic",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        source="Huang et al., CVPR 2024; MediaBrain-SJTU/MVFA-AD a30bf7b",
    )


# Four normal images in eleven views each, with 17 x 17 patches and a class token.
_MVFA_MEMORY = MemorySpec(rows=4 * 11 * 290, class_token=True)

PRESETS = {
    "mvfa_zero_shot": _mvfa("mean_patch"),
    "mvfa_few_shot": _mvfa("max_map", memory=_MVFA_MEMORY),
    "mvfa_few_shot_labels": _mvfa("mean_patch", "detection", _MVFA_MEMORY),
}
