"""A detector on disk: `bundle.json`, `weights.safetensors` and `MODEL_CARD.md`, nothing executable.

Every field of the JSON is checked by name and type, the weights by size, hash, key, shape and type, before
anything is built from them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .configuration import from_mapping, to_mapping
from .detectors.specification import DetectorSpec
from .errors import BundleInvalid
from .output_folder import take_place, writing
from .preprocess import PreprocessSpec
from .resources import resource_path

if TYPE_CHECKING:
    from .detectors.detector import AnomalyDetector

FORMAT = 1
MANIFEST, WEIGHTS, CARD = "bundle.json", "weights.safetensors", "MODEL_CARD.md"
_LARGEST_MANIFEST = 4 * 2**20


@dataclass(frozen=True)
class TrainingSource:
    """One collection of images that the detector was trained on.

    Attributes:
        name: of the collection.
        content: modality and body part, in words.
        images: how many of its images were used.
        licence: its terms as far as they are known.
    """

    name: str
    content: str
    images: int
    licence: str


@dataclass(frozen=True)
class NormalReference:
    """Scores of normal images that a new score is compared with.

    Attributes:
        description: which images these are.
        scores: their image scores, ascending.
    """

    description: str
    scores: tuple[float, ...]

    def percentile(self, score: float) -> float:
        """Share in % of the reference images that score lower; equal scores count half."""
        below = np.searchsorted(self.scores, score, side="left")
        not_above = np.searchsorted(self.scores, score, side="right")
        return float(100 * (below + not_above) / 2 / len(self.scores))


@dataclass(frozen=True)
class BundleManifest:
    """What `bundle.json` says.

    Attributes:
        format: version of this schema.
        name, version, description: of the detector.
        licence: terms of the weights.
        detector: parts and numbers of the network.
        preprocess: how a slice becomes its input.
        threshold: map value from which a pixel counts as anomalous.
        image_threshold: score that 95 % of the normal reference images do not reach; None without reference.
        reference: scores of normal images.
        training_data: what the weights were learned from.
        quality: measured figures, {test set: {figure: value}}.
        weights_bytes, weights_sha256: of `weights.safetensors`.
    """

    format: int
    name: str
    version: str
    description: str
    licence: str
    detector: DetectorSpec
    preprocess: PreprocessSpec
    threshold: float
    image_threshold: float | None = None
    reference: NormalReference | None = None
    training_data: tuple[TrainingSource, ...] = ()
    quality: dict[str, dict[str, float]] | None = None
    weights_bytes: int = 0
    weights_sha256: str = ""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise BundleInvalid(
                f"Detector {self.name!r} is written in format {self.format}, this version reads {FORMAT}; "
                "upgrade MedAnomalyCLIP, or ask for a bundle of this format"
            )
        if not 0 <= self.threshold <= 1:
            raise BundleInvalid(
                f"The pixel threshold of detector {self.name!r} is {self.threshold}, not in [0, 1]"
            )
        if self.detector.tower.image_size != self.preprocess.size:
            raise BundleInvalid(
                f"Detector {self.name!r} takes {self.detector.tower.image_size} px, its preprocessing makes "
                f"{self.preprocess.size} px"
            )
        if self.reference is not None and (
            not self.reference.scores or list(self.reference.scores) != sorted(self.reference.scores)
        ):
            raise BundleInvalid(f"The reference scores of detector {self.name!r} are empty or not ascending")


@dataclass(frozen=True)
class Bundle:
    """A detector on disk, checked but not yet built.

    Attributes:
        folder: where it lies.
        manifest: what its JSON says.
        card: its model card, Markdown.
    """

    folder: Path
    manifest: BundleManifest
    card: str

    @classmethod
    def load(cls, folder: Path | str) -> Bundle:
        """Read and check a bundle's files, the hash of its weights included.

        Raises:
            BundleInvalid: a file is missing, altered, or not understood.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder / MANIFEST)
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise BundleInvalid(f"{folder.name} has no {WEIGHTS}; copy the whole folder of the detector")
        if (
            weights.stat().st_size != manifest.weights_bytes
            or file_sha256(weights) != manifest.weights_sha256
        ):
            raise BundleInvalid(
                f"{folder.name}/{WEIGHTS} is incomplete or was altered; get the detector again"
            )
        card = folder / CARD
        return cls(folder, manifest, card.read_text(encoding="utf-8") if card.is_file() else "")

    def build(self) -> AnomalyDetector:
        """The network with its weights, in float32 on the CPU.

        Raises:
            BundleInvalid: the weights do not fit the network that the manifest describes.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from .detectors.detector import AnomalyDetector

        detector = AnomalyDetector(self.manifest.detector)
        try:
            state = load_file(self.folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise BundleInvalid(f"{self.folder.name}/{WEIGHTS} cannot be read: {error}") from error
        expected = detector.state_dict()
        wrong = [
            key
            for key in expected.keys() | state.keys()
            if key not in expected
            or key not in state
            or expected[key].shape != state[key].shape
            or expected[key].is_floating_point() != state[key].is_floating_point()
        ]
        if wrong:
            raise BundleInvalid(
                f"{len(wrong)} tensors in {self.folder.name}/{WEIGHTS} do not fit the detector that "
                f"{MANIFEST} describes, among them {', '.join(sorted(wrong)[:3])}"
            )
        detector.load_state_dict({key: value.to(expected[key].dtype) for key, value in state.items()})
        return detector.eval()


def save_bundle(folder: Path, manifest: BundleManifest, detector: AnomalyDetector, card: str) -> Bundle:
    """Write a bundle; the folder appears when it is complete, in place of one that was there.

    Weights are stored in half precision: their rounding moves maps far less than other hardware does.

    Raises:
        OutputFailed: the folder cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            partial.chmod(0o755)
            tensors = {
                key: (value.to(torch.float16) if value.is_floating_point() else value).contiguous()
                for key, value in detector.state_dict().items()
            }
            save_file(tensors, partial / WEIGHTS)
            (partial / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
            manifest = replace(
                manifest,
                weights_bytes=(partial / WEIGHTS).stat().st_size,
                weights_sha256=file_sha256(partial / WEIGHTS),
            )
            text = json.dumps(to_mapping(manifest), indent=2)
            (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
            (partial / CARD).write_text(card, encoding="utf-8")
            take_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Bundle(folder, manifest, card)


def default_bundle_path() -> Path:
    """Folder of the detector that ships with the extension."""
    return resource_path("Models/default")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(path: Path) -> BundleManifest:
    where = f"{path.parent.name}/{path.name}"
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise BundleInvalid(f"{where} is too large to be the description of a detector")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleInvalid(
            f"{where} cannot be read ({error.strerror}); choose the folder of a detector"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BundleInvalid(f"{where} is not valid JSON: {error}") from error
    return from_mapping(BundleManifest, data, where, BundleInvalid)
