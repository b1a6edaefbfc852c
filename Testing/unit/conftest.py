"""A tiny CLIP with random weights, and a bundle made of it: no test needs downloaded weights."""

from __future__ import annotations

from pathlib import Path

import pytest

ARCHITECTURES = Path(__file__).parents[1] / "data" / "architectures"


@pytest.fixture(scope="session")
def tiny_tower():
    """Specification of a 64 px tower: 4 x 4 patches, four layers of width 64, embedding 32."""
    from MedAnomalyCLIPLib.clip.importing import import_open_clip
    from MedAnomalyCLIPLib.clip.specification import TowerSpec

    open_clip = import_open_clip()
    if "tiny-test-clip" not in open_clip.list_models():
        open_clip.add_model_config(ARCHITECTURES)
    return TowerSpec("tiny-test-clip", 64, (2, 4))


@pytest.fixture(scope="session")
def tiny_manifest(tiny_tower):
    from MedAnomalyCLIPLib.bundle import FORMAT, BundleManifest, NormalReference
    from MedAnomalyCLIPLib.detectors.specification import DetectorSpec
    from MedAnomalyCLIPLib.preprocess import PreprocessSpec, WindowRule

    windows = {"default": WindowRule("percentile", 1.0, 99.0)}
    return BundleManifest(
        format=FORMAT,
        name="tiny",
        version="1",
        description="Random weights, for tests",
        licence="none",
        detector=DetectorSpec(tiny_tower),
        preprocess=PreprocessSpec(64, (0.5,) * 3, (0.25,) * 3, windows),
        threshold=0.5,
        reference=NormalReference("five made-up images", (0.1, 0.2, 0.3, 0.4, 0.5)),
    )


@pytest.fixture
def tiny_bundle(tmp_path, tiny_manifest):
    """A bundle on disk whose weights are random but always the same."""
    import torch

    from MedAnomalyCLIPLib.bundle import save_bundle
    from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector

    torch.manual_seed(0)
    detector = AnomalyDetector(tiny_manifest.detector)
    detector.text_bank.copy_(torch.nn.functional.normalize(torch.randn(2, 32), dim=-1))
    return save_bundle(tmp_path / "tiny", tiny_manifest, detector, "# tiny\n")


@pytest.fixture
def no_gradients():
    """For tests that compare numbers and train nothing."""
    import torch

    with torch.no_grad():
        yield
