"""The published systems as rows of configuration: what their own checkpoints need to give their own maps.

"diffusionclip_denoising" alone has no checkpoint: it is the method that DiffusionCLIP's abstract tells of.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..clip.specification import TowerSpec
from ..preprocess import PreprocessSpec, WindowRule
from .specification import (
    AdapterSpec,
    DenoiserSpec,
    DetectorSpec,
    FeatureFusionSpec,
    MemorySpec,
    TextSpec,
    VisualPromptSpec,
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The published code reads pictures of 8 bits as they are; CT in Hounsfield units needs a window first.
_WINDOWS = {"default": WindowRule("full"), "CT": WindowRule("range", -160.0, 240.0)}


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

    @property
    def preprocess(self) -> PreprocessSpec:
        """How a slice becomes the system's input; its authors read 8-bit pictures, windowed before."""
        return PreprocessSpec(
            self.detector.tower.image_size, self.mean, self.std, dict(_WINDOWS), self.interpolation
        )


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


def _mediclip(scale: float, fusion: str, causal: bool) -> Preset:
    return Preset(
        DetectorSpec(
            TowerSpec("ViT-L-14", 224, (12, 18, 24), activation="quick_gelu"),
            scale=scale,
            fusion=fusion,
            text=TextSpec(causal=causal),
        ),
        interpolation="bilinear",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        source="Zhang et al., MICCAI 2024; cnulab/MediCLIP ca99858",
    )


_MEDVMAD = Preset(
    DetectorSpec(
        TowerSpec("ViT-L-14-336", 336, (6, 12, 18, 24), text_activation="quick_gelu", attention=False),
        scale=1.0,
        image_score="mean_patch",
        smoothing=4.0,
        adapter=AdapterSpec("two_heads", residual=0.1),
        text=TextSpec(
            normal=("object",), abnormal=("abnormal object",), length=12, deep_depth=9, deep_length=4
        ),
    ),
    interpolation="bicubic",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    source="Guntur, course report, 2024; deeptiguntur/MedVMAD 3616c3e",
)


def _adaclip(
    source: str, feature_fusion: FeatureFusionSpec | None = None, denoiser: DenoiserSpec | None = None
) -> Preset:
    return Preset(
        DetectorSpec(
            TowerSpec("ViT-L-14-336", 518, (6, 12, 18, 24)),
            scale=100.0,
            fusion="mean_then_softmax",
            image_score="class_and_clusters",
            smoothing=4.0,
            text=TextSpec("hybrid", deep_depth=4, deep_length=5, templates=4),
            visual_prompts=VisualPromptSpec(length=5, depth=4),
            feature_fusion=feature_fusion,
            denoiser=denoiser,
        ),
        interpolation="bicubic",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        source=source,
    )


# Outputs of a Stable Diffusion v1 UNet: 77 of the channels are maps of its cross-attention.
_UNET_CHANNELS = (320, 717, 1357, 1280)

PRESETS = {
    "mvfa_zero_shot": _mvfa("mean_patch"),
    "mvfa_few_shot": _mvfa("max_map", memory=_MVFA_MEMORY),
    "mvfa_few_shot_labels": _mvfa("mean_patch", "detection", _MVFA_MEMORY),
    "mediclip": _mediclip(1.0, "mean_then_softmax", causal=False),
    "mediclip_paper": _mediclip(1 / 0.07, "softmax_then_mean", causal=True),
    "medvmad": _MEDVMAD,
    "adaclip": _adaclip("Cao et al., ECCV 2024; caoyunkang/AdaCLIP e27ee32"),
    "diffusionclip": _adaclip(
        "EAAI 161, 112181, 2025; wossg-999/DiffusionCLIP 6992f0d",
        FeatureFusionSpec(_UNET_CHANNELS, resize="line", join="norm"),
    ),
    "diffusionclip_denoising": _adaclip(
        "EAAI 161, 112181, 2025: features progressively denoised, as its abstract says; the numbers of the "
        "denoiser are ours, and the released code (wossg-999/DiffusionCLIP 6992f0d) holds no such step",
        denoiser=DenoiserSpec(),
    ),
}
# Those whose authors' code saves weights; nobody but us has any of the denoising one.
CONVERTIBLE = tuple(name for name, preset in PRESETS.items() if preset.detector.denoiser is None)
