"""Numbers from the published systems' own code, and tiny detectors to compare with them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from MedAnomalyCLIPLib.clip.importing import import_open_clip
from MedAnomalyCLIPLib.clip.towers import create_clip
from MedAnomalyCLIPLib.detectors import clusters
from MedAnomalyCLIPLib.detectors.presets import PRESETS
from MedAnomalyCLIPLib.detectors.specification import DetectorSpec
from MedAnomalyCLIPLib.detectors.stream import HybridPrompts

DATA = Path(__file__).parents[1] / "data"
WHOLE_SET = "MEDANOMALYCLIP_GOLDEN"
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def golden(system: str) -> dict[str, torch.Tensor]:
    """The arrays that the repository keeps of a system."""
    return _read(DATA / "golden" / f"{system}.npz")


def whole_golden(system: str) -> dict[str, torch.Tensor]:
    """All arrays of a system; skips the test where they are not at hand."""
    folder = os.environ.get(WHOLE_SET)
    if not folder:
        pytest.skip(f"{WHOLE_SET} names no folder with the whole set of golden numbers")
    return _read(Path(folder) / f"{system}_forward.npz")


def _read(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def tiny_spec(preset: str, system: str, size: int, taps: tuple[int, ...]) -> DetectorSpec:
    """A preset on the tiny model that the golden numbers were made with."""
    open_clip = import_open_clip()
    if f"golden-{system}" not in open_clip.list_models():
        open_clip.add_model_config(DATA / "architectures")
    spec = PRESETS[preset].detector
    return replace(spec, tower=replace(spec.tower, model=f"golden-{system}", image_size=size, taps=taps))


def golden_clip(arrays: dict[str, torch.Tensor], spec: DetectorSpec) -> torch.nn.Module:
    """Both towers; the vision tower keeps random weights where those at hand leave some out."""
    clip = create_clip(spec.tower)
    state = {key[5:]: value for key, value in arrays.items() if key.startswith("clip/")}
    embedding = torch.zeros_like(clip.token_embedding.weight)
    embedding[arrays["clip_rows/token_embedding.ids"].long()] = arrays["clip_rows/token_embedding.weight"]
    state["token_embedding.weight"] = embedding
    missing, unexpected = clip.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("visual.") or key == "logit_scale" for key in missing)
    return clip


def method_weights(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A system's own weights under its own names."""
    return {key[7:]: value for key, value in arrays.items() if key.startswith("method/")}


def everywhere(count: int, size: int) -> torch.Tensor:
    """(count, size, size) validity of images without padding."""
    return torch.ones(count, size, size, dtype=torch.bool)


def min_max(values: torch.Tensor) -> torch.Tensor:
    """Scaled to [0, 1] by the lowest and highest of all, as the published evaluation scales a test set."""
    return (values - values.min()) / (values.max() - values.min())


def round_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round hybrid prompts to half precision, as published, on the way there and on the way back."""
    exact = HybridPrompts.forward
    monkeypatch.setattr(HybridPrompts, "forward", lambda self, x: [p.half().float() for p in exact(self, x)])


def use_clusters(monkeypatch: pytest.MonkeyPatch, labels: torch.Tensor) -> None:
    """Clusters as stored, since the published ones start from random numbers."""
    monkeypatch.setattr(clusters, "k_means", lambda points, count: labels.long())
