"""A detector's network in PyTorch: any device, every detector."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import cuda
from .clip.lowered import LoweredTower
from .device_preprocess import DevicePreprocessor
from .networks import SLICES_AT_ONCE, NetworkOutput
from .preprocess import PreprocessSpec, SlicePreprocessor

if TYPE_CHECKING:
    from .detection import FeatureMaps
    from .detectors.detector import AnomalyDetector

_logger = logging.getLogger(__name__)


class TorchNetwork:
    """See `networks.Network`.

    On CUDA, slices are prepared and maps brought back on the GPU, two batches are under way at once, and a
    batch that does not fit into memory is halved, from then on for good.

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
        if precision != torch.float32:
            self.module.tower = LoweredTower(module.tower, precision)  # type: ignore[assignment]
        self.precision = str(precision).removeprefix("torch.")
        self.runtime = f"PyTorch {torch.__version__.partition('+')[0]}"
        self.device = str(device)
        self._device, self._on_gpu = device, device.type == "cuda"
        self.preprocessor: SlicePreprocessor = (
            DevicePreprocessor(preprocess, device) if self._on_gpu else SlicePreprocessor(preprocess)
        )
        self.under_way = 2 if self._on_gpu else 1
        self._features = features
        self._chosen: int | None = None if self._on_gpu else SLICES_AT_ONCE
        self._limit: int | None = None  # since memory was full

    @property
    def batch_size(self) -> int:
        if self._chosen is None:
            self._chosen = cuda.choose_batch_size(self._device, self._try)
        return self._chosen if self._limit is None else min(self._chosen, self._limit)

    @property
    def preset_texts(self) -> np.ndarray:
        return self.module.preset_banks.float().cpu().numpy()

    @torch.inference_mode()
    def __call__(self, images: Any, valid: Any, text: np.ndarray | None) -> NetworkOutput:
        shown, inside = self._there(images), self._there(valid)
        bank = None if text is None else self._there(text)
        found: list[NetworkOutput] = []
        start = 0
        while start < len(shown):
            part = slice(start, min(len(shown), start + (self._limit or len(shown))))
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                found.append(self._run(shown[part], inside[part], bank))
                start = part.stop
                continue
            self._halve(part.stop - part.start)  # here, where the error holds no tensors any more
        return found[0] if len(found) == 1 else _joined(found)

    def fetch(self, values: Sequence[Any]) -> Callable[[], list[np.ndarray]]:
        if not self._on_gpu:
            arrays = [value.cpu().numpy() if isinstance(value, Tensor) else value for value in values]
            return lambda: arrays
        copies = [value.to("cpu", non_blocking=True) for value in values]  # page-locked by PyTorch
        arrived = torch.cuda.Event(blocking=True)
        arrived.record(torch.cuda.current_stream(self._device))

        def wait() -> list[np.ndarray]:
            arrived.synchronize()
            return [copy.numpy() for copy in copies]

        return wait

    def _run(self, images: Tensor, valid: Tensor, text: Tensor | None) -> NetworkOutput:
        features = None if self._features is None else self._features(images)
        tf32 = self.precision != "float32"
        with cuda.kernels(tf32=tf32) if self._on_gpu else contextlib.nullcontext():
            found = self.module(images, valid, features, text)
        unlike = None if found.unlikeness is None else found.unlikeness.float()
        return NetworkOutput(found.map.float(), found.score.float(), unlike)

    @torch.inference_mode()
    def _try(self, count: int) -> None:
        size = self.preprocessor.spec.size
        images = torch.zeros(count, 3, size, size, device=self._device)
        self._run(images, torch.ones(count, size, size, dtype=torch.bool, device=self._device), None)

    def _there(self, values: Any) -> Tensor:
        """On the device, without waiting for what it does."""
        if isinstance(values, Tensor):
            return values
        tensor = torch.from_numpy(values)
        return (
            tensor.pin_memory().to(self._device, non_blocking=True)
            if self._on_gpu
            else tensor.to(self._device)
        )

    def _halve(self, count: int) -> None:
        if count == 1:
            raise cuda.exhausted()
        if self._limit is None:
            _logger.warning(
                "The memory of %s does not hold %d slices at once; going on with %d or fewer",
                self.device,
                count,
                count // 2,
            )
        self._limit = count // 2
        torch.cuda.empty_cache()


def _joined(parts: Sequence[NetworkOutput]) -> NetworkOutput:
    unlike = [part.unlikeness for part in parts if part.unlikeness is not None]
    return NetworkOutput(
        torch.cat([part.map for part in parts]),
        torch.cat([part.score for part in parts]),
        torch.cat(unlike) if unlike else None,
    )
