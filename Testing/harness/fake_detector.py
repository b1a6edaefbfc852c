"""A detector without a network: what is bright is anomalous. Its map can be told from the pixels by eye."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from MedAnomalyCLIPLib.geometry import SlicePlane
from MedAnomalyCLIPLib.prompt import Prompt
from MedAnomalyCLIPLib.result import AnomalyResult, Provenance

WHITE = 1000.0
"""Pixel value whose map value is 1."""


class BrightnessDetector:
    """Has the face of `detection.SliceDetector`.

    Attributes:
        threads: names of the threads on which `detect` ran.
        gate: `detect` waits until it is set, so that a test can look at a run in progress.
    """

    name = "brightness"
    threshold = 0.75
    card = "Not a detector. For tests."
    provenance = Provenance(
        bundle="brightness",
        bundle_version="1.2",
        bundle_sha256="0" * 64,
        software_version="0.1.0",
        device="cpu",
        precision="float32",
    )

    presets = ()

    def guess_preset(self, modality: str, words: str = "") -> str:
        return ""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def detect(
        self,
        plane: SlicePlane,
        *,
        threshold: float | None = None,
        window: tuple[float, float] | None = None,
        prompt: Prompt | None = None,
    ) -> AnomalyResult:
        self.threads.append(threading.current_thread().name)
        if not self.gate.wait(timeout=20):
            raise TimeoutError("the test never opened the gate")
        grey = plane.pixels if plane.pixels.ndim == 2 else plane.pixels.mean(axis=-1)
        values = np.clip(np.nan_to_num(grey) / WHITE, 0, 1).astype(np.float32)
        values[~plane.valid] = 0
        return AnomalyResult(
            plane=plane,
            score=float(values.max()),
            map=values,
            threshold=self.threshold if threshold is None else threshold,
            provenance=self.provenance,
            percentile=97.5,
        )

    def detect_many(
        self, planes: Iterable[SlicePlane], *, batch_size: int = 8, **options: Any
    ) -> Iterator[AnomalyResult]:
        for plane in planes:
            yield self.detect(plane, **options)
