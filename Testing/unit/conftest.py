"""Fixtures of the library's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_gradients():
    """For tests that compare numbers and train nothing."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, tiny_manifest):
    """A bundle that brings both towers of a tiny CLIP; not to be written to."""
    import torch

    from MedAnomalyCLIPLib.bundle import save_bundle
    from MedAnomalyCLIPLib.clip.towers import create_clip, text_side
    from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector

    torch.manual_seed(1)
    clip = create_clip(tiny_manifest.detector.tower)
    with torch.no_grad():
        for parameter in clip.parameters():  # open_clip starts some of them at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    detector = AnomalyDetector(tiny_manifest.detector)
    detector.tower.visual.load_state_dict(clip.visual.state_dict())
    detector.text_bank.copy_(torch.nn.functional.normalize(torch.randn(2, 32), dim=-1))
    folder = tmp_path_factory.mktemp("towers") / "clip"
    return save_bundle(folder, tiny_manifest, detector, "", text_side(clip)).folder


@pytest.fixture(scope="session")
def _dataset(tmp_path_factory):
    from small_runs import write_dataset

    root = tmp_path_factory.mktemp("images") / "data"
    write_dataset(root)
    return root


@pytest.fixture
def dataset(_dataset, tmp_path):
    """See `small_runs.write_dataset`; each test has its own copy."""
    import shutil

    return shutil.copytree(_dataset, tmp_path / "data")
