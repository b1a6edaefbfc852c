"""A detector's network in PyTorch: any device, every detector."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from .networks import NetworkOutput
from .preprocess import PreprocessSpec, SlicePreprocessor

if TYPE_CHECKING:
    from .detection import FeatureMaps
    from .detectors.detector import AnomalyDetector


class TorchNetwork:
    """See `networks.Network`.

    Attributes:
        module: the network itself, on its device.
    """

    def __init__(
        self,
        module: AnomalyDetector,
        preprocess: PreprocessSpec,
        device: torch.device,
        features: FeatureMaps | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.module = module.to(device).eval()
        self.preprocessor = SlicePreprocessor(preprocess)
        self.runtime = f"PyTorch {torch.__version__.partition('+')[0]}"
        self.device = str(device)
        self.precision = str(precision).removeprefix("torch.")
        self._dtype = precision
        self._features = features

    @property
    def preset_texts(self) -> np.ndarray:
        return self.module.preset_banks.float().cpu().numpy()

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, valid: np.ndarray, text: np.ndarray | None) -> NetworkOutput:
        shown, inside = (torch.from_numpy(values).to(self.device) for values in (images, valid))
        bank = None if text is None else torch.from_numpy(text).to(self.device)
        features = None if self._features is None else self._features(shown)
        lowered = self._dtype != torch.float32
        kind = torch.device(self.device).type
        with torch.autocast(kind, self._dtype) if lowered else contextlib.nullcontext():
            found = self.module(shown, inside, features, bank)
        unlike = None if found.unlikeness is None else found.unlikeness.float().cpu().numpy()
        return NetworkOutput(found.map.float().cpu().numpy(), found.score.float().cpu().numpy(), unlike)
