"""What the bundled detector is measured beside: anomalib's detectors, and open_clip alone.

All weights are random, which changes no time: nothing is downloaded. The peers are set up as anomalib does
it, at their own input sizes; their memory banks hold as many rows as stated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from MedAnomalyCLIPLib.clip.importing import import_open_clip

from .pairs import Work

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def prepared(image: np.ndarray, side: int) -> torch.Tensor:
    """(1, 3, S, S): what every peer is given, made the plain way: rescaled, resized, normalised."""
    values = torch.from_numpy(image.astype(np.float32))[None, None]
    low, high = values.aminmax()
    values = F.interpolate((values - low) / (high - low), side, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (values.expand(-1, 3, -1, -1) - mean) / std


def at_full_size(network: Callable[[torch.Tensor], object], side: int) -> Work:
    """A detector as work on one image: its map is brought back to the image's size, as ours is."""

    def work(image: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            found = network(prepared(image, side))
            heat = found.anomaly_map  # type: ignore[attr-defined]
            return F.interpolate(heat.reshape(1, 1, *heat.shape[-2:]), image.shape, mode="bilinear")

    return work


def winclip(shots: int = 0) -> Work:
    """WinCLIP (Jeong et al., CVPR 2023): ViT-B/16+ at 240 px."""
    import_open_clip()  # anomalib then finds it, whatever torchvision stands beside it
    from anomalib.models.image.winclip.torch_model import WinClipModel

    with _random_weights():
        model = WinClipModel().eval()
        references = torch.randn(shots, 3, 240, 240) if shots else None
        with torch.inference_mode():
            model.setup("brain", references)
    return at_full_size(model, 240)


def patchcore(rows: int) -> Work:
    """PatchCore (Roth et al., CVPR 2022): WideResNet-50-2 at 256 px."""
    import_open_clip()
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(["layer2", "layer3"], pre_trained=False).eval()
    model.memory_bank = torch.randn(rows, 1536)
    return at_full_size(model, 256)


def anomaly_dino(rows: int) -> Work:
    """AnomalyDINO (Damm et al., WACV 2025): DINOv2 ViT-S/14 at 252 px."""
    import_open_clip()
    from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel

    with _random_weights():
        model = AnomalyDINOModel().eval()
    model.memory_bank = F.normalize(torch.randn(rows, 384), dim=1)
    return at_full_size(model, 252)


def plain_open_clip(name: str, side: int) -> Work:
    """What a first script does: open_clip's image encoder, a cosine with two texts, a resize."""
    clip = import_open_clip().create_model(name, pretrained=None, force_image_size=side).eval()
    text = F.normalize(torch.randn(2, clip.visual.output_dim), dim=1)

    def work(image: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return (100 * F.normalize(clip.encode_image(prepared(image, side)), dim=1) @ text.T).softmax(1)

    return work


@contextlib.contextmanager
def _random_weights() -> Iterator[None]:
    """Models are made without their weights, which could not be had without a network."""
    import timm

    open_clip = import_open_clip()

    clip, timm_model = open_clip.create_model_and_transforms, timm.create_model

    def without_weights(name: str, pretrained: object = None, **options: object) -> object:
        return clip(name, pretrained=None, **options)

    def untrained(name: str, pretrained: bool = False, **options: object) -> object:
        return timm_model(name, pretrained=False, **options)

    with (
        mock.patch.object(open_clip, "create_model_and_transforms", without_weights),
        mock.patch.object(timm, "create_model", untrained),
    ):
        yield
