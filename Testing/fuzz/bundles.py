"""Mutants of detectors on disk: manifest, weights, cards; hashes made to fit, as an attacker would."""

from __future__ import annotations

import json
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .mutations import TRICKY_NAMES, Rng, damaged, damaged_value, pick
from .targets import Target

_ARCHITECTURES = Path(__file__).parents[1] / "data" / "architectures"


def tiny_specs() -> list[Any]:
    """Detectors of the smallest CLIP, with the parts that detectors can have."""
    from MedAnomalyCLIPLib.clip.importing import import_open_clip
    from MedAnomalyCLIPLib.clip.specification import TowerSpec
    from MedAnomalyCLIPLib.detectors import specification as parts

    open_clip = import_open_clip()
    if "tiny-test-clip" not in open_clip.list_models():
        open_clip.add_model_config(_ARCHITECTURES)
    tower = TowerSpec("tiny-test-clip", 64, (2, 4))
    return [
        parts.DetectorSpec(tower),
        parts.DetectorSpec(
            tower,
            memory=parts.MemorySpec(8),
            visual_prompts=parts.VisualPromptSpec(),
            denoiser=parts.DenoiserSpec(steps=1, width=8, blocks=1),
            text=parts.TextSpec("hybrid", name="Brain"),
            image_score="class_and_clusters",
        ),
        parts.DetectorSpec(tower, feature_fusion=parts.FeatureFusionSpec((3, 5))),
        parts.DetectorSpec(
            tower, adapter=parts.AdapterSpec("two_heads"), text=parts.TextSpec("ensemble", name="Brain")
        ),
    ]


class Bundles(Target):
    """A folder that is loaded and built, and listed as the panel lists it."""

    name = "bundles"
    memory = 2 << 30

    def prepare(self, folder: Path) -> None:
        import torch

        from MedAnomalyCLIPLib.bundle import FORMAT, BundleManifest, NormalReference, save_bundle
        from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
        from MedAnomalyCLIPLib.errors import InvalidRequest
        from MedAnomalyCLIPLib.geometry import cut_slice
        from MedAnomalyCLIPLib.preprocess import STANDARD_WINDOWS, PreprocessSpec
        from MedAnomalyCLIPLib.volume import Volume

        torch.set_num_threads(1)
        self._plane = cut_slice(Volume(np.arange(240.0).reshape(1, 15, 16), np.eye(4)), 2, 0)
        self._seeds = []
        for number, spec in enumerate(tiny_specs()):
            manifest = BundleManifest(
                format=FORMAT,
                name="tiny",
                version="1",
                description="for tests",
                licence="none",
                detector=spec,
                preprocess=PreprocessSpec(64, (0.5,) * 3, (0.25,) * 3, dict(STANDARD_WINDOWS)),
                threshold=0.5,
                reference=NormalReference("made up", (0.1, 0.2)),
                quality={"set": {"auroc": 0.5}},
            )
            saved = save_bundle(folder / str(number), manifest, AnomalyDetector(spec), "# card\n")
            self._seeds.append({p.name: p.read_bytes() for p in saved.folder.iterdir()})
            with suppress(InvalidRequest):  # one fuses features that nobody hands in
                self._look(saved.folder)

    def mutant(self, folder: Path, rng: Rng) -> Path:
        from MedAnomalyCLIPLib.bundle import CARD, MANIFEST, WEIGHTS, file_sha256

        place = folder / "bundle"
        place.mkdir()
        for name, content in pick(rng, self._seeds).items():
            (place / name).write_bytes(content)
        kind = rng.random()
        manifest = place / MANIFEST
        data = json.loads(manifest.read_bytes())
        if kind < 0.6:
            for _ in range(int(rng.integers(1, 3))):
                data = damaged_value(data, rng)
            manifest.write_text(json.dumps(data))
        elif kind < 0.7:
            manifest.write_bytes(damaged(manifest.read_bytes(), rng))
        elif kind < 0.9:
            weights = place / WEIGHTS
            change = damaged_weights if rng.random() < 0.6 else damaged
            weights.write_bytes(change(weights.read_bytes(), rng))
            if rng.random() < 0.8:  # as whoever wanted it to be loaded would do
                data |= {"weights_bytes": weights.stat().st_size, "weights_sha256": file_sha256(weights)}
                manifest.write_text(json.dumps(data))
        else:
            victim = place / pick(rng, (MANIFEST, WEIGHTS, CARD))
            victim.unlink()
            _put_something_else(victim, rng)
        return place

    def look(self, path: Path, output: Path) -> None:
        self._look(path)

    def _look(self, path: Path) -> None:
        from MedAnomalyCLIPLib.bundle_list import list_bundles
        from MedAnomalyCLIPLib.detection import SliceDetector

        list_bundles(path.parent)
        result = SliceDetector.load(path, device="cpu").detect(self._plane)
        assert 0 <= result.map.min() <= result.map.max() <= 1, "the map is no map"
        assert 0 <= result.score <= 1, "the score is no score"


def damaged_weights(content: bytes, rng: Rng) -> bytes:
    """Other names, shapes, types and places in the header of a safetensors file."""
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.3:
        name = pick(rng, list(header))
        header[str(pick(rng, (*TRICKY_NAMES, "extra")))] = header.pop(name)
    else:
        header = damaged_value(header, rng)
    text = json.dumps(header).encode()
    stated = len(text) if rng.random() < 0.9 else int(pick(rng, (0, 1, 2**31, 2**63, len(text) - 1)))
    return struct.pack("<Q", stated) + text + content[8 + length :]


def _put_something_else(path: Path, rng: Rng) -> None:
    """Nothing, a folder, a pipe, a link, or very much, in the place of a file."""
    kind = int(rng.integers(6))
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(str(pick(rng, ("/dev/zero", "/etc/passwd", "/dev/full", path.name, ".."))))
    elif kind == 4:
        with path.open("wb") as file:
            file.truncate(1 << 33)
    elif kind == 5:
        shutil.copy(__file__, path)


TARGETS = (Bundles(),)
