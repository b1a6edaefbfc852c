"""MedAnomalyCLIP as a contender: the bundled detector, and detectors of ours on backbones of the peers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from MedAnomalyCLIPLib.bundle import FORMAT, BundleManifest, save_bundle
from MedAnomalyCLIPLib.clip.specification import TowerSpec
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.detectors.specification import AdapterSpec, DetectorSpec
from MedAnomalyCLIPLib.geometry import SlicePlane, cut_slice
from MedAnomalyCLIPLib.preprocess import STANDARD_WINDOWS, PreprocessSpec
from MedAnomalyCLIPLib.volume import Volume

from .pairs import Work
from .peers import MEAN, STD
from .ways import load


def volume_of(slices: np.ndarray) -> Volume:
    """(K, J, I) voxels as a volume with millimetre voxels."""
    return Volume(slices, np.eye(4), modality="MR")


def plane_of(image: np.ndarray) -> SlicePlane:
    """(H, W) pixels as the one slice of a volume."""
    return cut_slice(volume_of(image[None]), 2, 0)


def detecting(detector: SliceDetector) -> Work:
    """All the way from pixels in memory to a map at their size, a mask and a score."""

    def work(image: np.ndarray) -> object:
        return detector.detect(plane_of(image))

    return work


def tower_alone(detector: SliceDetector) -> Work:
    """The floor: the vision tower of a detector in PyTorch, on an input that is ready."""
    tower = detector.network.module.tower  # type: ignore[attr-defined]
    ready = torch.randn(1, 3, detector.input_size, detector.input_size)

    def work(_image: np.ndarray) -> object:
        with torch.inference_mode():
            return tower(ready)

    return work


def random_manifest(spec: DetectorSpec) -> BundleManifest:
    """What is said of a detector with random weights."""
    return BundleManifest(
        format=FORMAT,
        name=f"{spec.tower.model} with random weights",
        version="1",
        description="Random weights, to measure time",
        licence="none",
        detector=spec,
        preprocess=PreprocessSpec(spec.tower.image_size, MEAN, STD, dict(STANDARD_WINDOWS)),
        threshold=0.5,
    )


def random_detector(
    folder: Path, model: str, side: int, taps: tuple[int, ...]
) -> Callable[[str], SliceDetector]:
    """A detector of ours with random weights on one of open_clip's towers, loaded in the way that is named.

    It compares the patches of four taps with texts through linear adapters, as MediCLIP and the bundled
    detector do.
    """
    tower = TowerSpec(model, side, taps)
    spec = DetectorSpec(tower, adapter=AdapterSpec())
    torch.manual_seed(0)
    detector = AnomalyDetector(spec)
    detector.text_bank.copy_(torch.nn.functional.normalize(torch.randn_like(detector.text_bank), dim=-1))
    save_bundle(folder, random_manifest(spec), detector, "# Random weights\n")
    return lambda way: load(way, folder)


def export(folder: Path) -> None:
    """Give it its graphs, that of integers too: for random weights, how much they drift means nothing."""
    from MedAnomalyCLIPLib import onnx_export
    from MedAnomalyCLIPLib.onnx_int8 import Drift

    with mock.patch.object(onnx_export, "drift", lambda exact, rounded: Drift(0, 0, 0)):
        onnx_export.export_network(folder)
