"""A detector on disk: `bundle.json`, `weights.safetensors` and `MODEL_CARD.md`, nothing executable.

`text_tower.safetensors` is the other half of the detector's CLIP. Detection needs it not, since text features
are stored; new detectors are trained from it. `network.onnx` is the network's graph for ONNX Runtime on the
CPU, which takes the weights from `weights.safetensors`; `network_int8.onnx` is the same with products of
8-bit integers. `onnx_export` makes them of a bundle that has none.

Every field of the JSON is checked by name and type, the weights by size, hash, key, shape and type, before
anything is built from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .configuration import from_mapping, to_mapping
from .detectors.specification import DetectorSpec, PresetSpec
from .errors import BundleInvalid, OutputFailed, needs_full
from .output_folder import Staging, clear_remains, writing
from .plain_files import read_small_file
from .preprocess import PreprocessSpec
from .resources import resource_path
from .tensor_file import write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from .detectors.detector import AnomalyDetector

FORMAT = 1
MANIFEST, WEIGHTS, CARD = "bundle.json", "weights.safetensors", "MODEL_CARD.md"
TEXT_TOWER, NETWORK, NETWORK_INT8 = "text_tower.safetensors", "network.onnx", "network_int8.onnx"
FILES = (MANIFEST, WEIGHTS, CARD, TEXT_TOWER, NETWORK, NETWORK_INT8)
_LARGEST_MANIFEST = 4 * 2**20
_LONGEST_CARD = 2**20
_FLOATING = ("F", "BF")  # how safetensors names such types


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
class PresetCalibration:
    """What scores mean for one kind of image.

    Attributes:
        preset: name of the detector's preset.
        threshold: map value from which a pixel counts as anomalous.
        image_threshold: score that 95 % of normal images do not exceed, as far as the reference tells.
        reference: scores of normal images of this kind.
    """

    preset: str
    threshold: float
    image_threshold: float
    reference: NormalReference


@dataclass(frozen=True)
class IntegerGraph:
    """What is known of `network_int8.onnx`.

    Attributes:
        bytes, sha256: of the file.
        score_drift, map_drift, unlikeness_drift: largest differences from float32 that the export found: of
            scores, of any pixel of a map, and of unlikeness as a share of it.
    """

    bytes: int
    sha256: str
    score_drift: float
    map_drift: float
    unlikeness_drift: float


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
        image_threshold: score that 95 % of normal images do not exceed, as far as the reference tells; None
            without one.
        reference: scores of normal images.
        calibrations: the same for the detector's presets, those that there were normal images for.
        unlike_threshold: distance from the training images that nearly all images of their kinds stay below.
        training_data: what the weights were learned from.
        quality: measured figures, {test set: {figure: value}}.
        weights_bytes, weights_sha256: of `weights.safetensors`.
        text_bytes, text_sha256: of `text_tower.safetensors`; 0 and "" where there is none.
        network_bytes, network_sha256: of `network.onnx`, likewise.
        int8: of `network_int8.onnx`; None where there is none.
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
    calibrations: tuple[PresetCalibration, ...] = ()
    unlike_threshold: float | None = None
    training_data: tuple[TrainingSource, ...] = ()
    quality: dict[str, dict[str, float]] | None = None
    weights_bytes: int = 0
    weights_sha256: str = ""
    text_bytes: int = 0
    text_sha256: str = ""
    network_bytes: int = 0
    network_sha256: str = ""
    int8: IntegerGraph | None = None

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
        known = {preset.name for preset in self.detector.presets}
        unknown = sorted({entry.preset for entry in self.calibrations} - known)
        if unknown:
            raise BundleInvalid(
                f"Detector {self.name!r} is calibrated for {', '.join(unknown)}, which it has no text for"
            )
        references = [self.reference, *(entry.reference for entry in self.calibrations)]
        for reference in references:
            if reference is not None and (
                not reference.scores or list(reference.scores) != sorted(reference.scores)
            ):
                raise BundleInvalid(
                    f"The reference scores of detector {self.name!r} are empty or not ascending"
                )

    @property
    def presets(self) -> tuple[PresetSpec, ...]:
        """Presets on offer: none beside a memory, whose scales were learned with the text for all kinds."""
        return self.detector.presets if self.detector.memory is None else ()

    def calibration(self, preset: str) -> PresetCalibration | None:
        """That of a preset; None where there is none."""
        return next((entry for entry in self.calibrations if entry.preset == preset), None)


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
        manifest = read_manifest(folder)
        _check_file(folder / WEIGHTS, manifest.weights_bytes, manifest.weights_sha256)
        if manifest.text_sha256:
            _check_file(folder / TEXT_TOWER, manifest.text_bytes, manifest.text_sha256)
        if manifest.network_sha256:
            _check_file(folder / NETWORK, manifest.network_bytes, manifest.network_sha256)
        if manifest.int8 is not None:
            _check_file(folder / NETWORK_INT8, manifest.int8.bytes, manifest.int8.sha256)
        return cls(folder, manifest, read_card(folder))

    def build(self) -> AnomalyDetector:
        """The network with its weights, in float32 on the CPU.

        Raises:
            BundleInvalid: the weights do not fit the network that the manifest describes.
        """
        import torch

        from .detectors.detector import AnomalyDetector

        where = f"{self.folder.name}/{WEIGHTS}"
        with torch.device("meta"):  # takes no memory, however large the network would be
            expected = AnomalyDetector(self.manifest.detector).state_dict()
        _check_fit(expected, _stored_shapes(self.folder / WEIGHTS), where)
        detector = AnomalyDetector(self.manifest.detector)
        _load_exactly(detector, _read_tensors(self.folder / WEIGHTS), where)
        return detector.eval()

    def encode_phrases(self, normal: Sequence[str], abnormal: Sequence[str]) -> np.ndarray:
        """(2, E) text features of phrases, unit length, normal first: those of a class averaged.

        Raises:
            BundleInvalid: the bundle comes without the text tower.
            DependencyMissing: PyTorch or open_clip, which read phrases, is not installed.
        """
        try:
            import torch
            from torch.nn import functional as F

            from .clip.tokenizer import create_tokenizer

            clip, tokenize = self.build_clip(), create_tokenizer(self.manifest.detector.tower)
        except ImportError as error:
            raise needs_full("Phrases of your own need", error) from error
        with torch.inference_mode():
            classes = [
                clip.encode_text(tokenize(list(phrases)), normalize=True).mean(0)
                for phrases in (normal, abnormal)
            ]
            return F.normalize(torch.stack(classes), dim=-1).numpy()

    def build_clip(self) -> Any:
        """Both towers of the detector's CLIP, in float32 on the CPU: open_clip's model.

        Raises:
            BundleInvalid: the bundle comes without the text tower, or its weights do not fit.
        """
        from .clip.towers import create_clip

        if not self.manifest.text_sha256:
            raise BundleInvalid(
                f"{self.folder.name} comes without the text tower of its CLIP, which is needed to train on it"
            )
        clip = create_clip(self.manifest.detector.tower)
        of_tower = "tower."
        vision = {
            key[len(of_tower) :]: value
            for key, value in _read_tensors(self.folder / WEIGHTS).items()
            if key.startswith(of_tower)
        }
        text = _read_tensors(self.folder / TEXT_TOWER)
        _load_exactly(clip, vision | text, f"{self.folder.name}/{TEXT_TOWER}")
        return clip.eval()


def save_bundle(
    folder: Path,
    manifest: BundleManifest,
    detector: AnomalyDetector,
    card: str,
    text_tower: Mapping[str, Tensor] | None = None,
) -> Bundle:
    """Write a bundle; the folder appears when it is complete, in place of one that was there.

    Weights are stored in half precision: their rounding moves maps far less than other hardware does.

    Args:
        folder: where to.
        manifest: what to say of it; sizes and hashes of files are filled in here.
        detector: whose weights to write.
        card: its model card, Markdown.
        text_tower: state of its CLIP without the vision tower, for detectors that others are trained from.

    Raises:
        OutputFailed: the folder cannot be written.
    """
    with writing(folder):
        staging = Staging(folder.absolute())
        partial = staging.folder
        try:
            size, sha256 = _write_tensors(partial / WEIGHTS, detector.state_dict())
            manifest = replace(manifest, weights_bytes=size, weights_sha256=sha256)
            # Graphs that there were are of other weights; `onnx_export` makes them anew.
            manifest = replace(manifest, text_bytes=0, text_sha256="")
            manifest = replace(manifest, network_bytes=0, network_sha256="", int8=None)
            if text_tower is not None:
                size, sha256 = _write_tensors(partial / TEXT_TOWER, text_tower)
                manifest = replace(manifest, text_bytes=size, text_sha256=sha256)
            write_manifest(partial, manifest)
            (partial / CARD).write_text(card, encoding="utf-8")
            staging.appear()
        finally:
            staging.discard()
    return Bundle(folder, manifest, card)


def check_bundle_place(folder: Path, *, overwrite: bool) -> None:
    """Raise unless a bundle can be written there and nothing else would be lost; to be asked before work.

    Args:
        folder: where to.
        overwrite: whether a bundle that is there may be replaced.

    Raises:
        OutputFailed: the place is taken, or cannot be looked at.
    """
    clear_remains(folder.absolute())
    with writing(folder):
        present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if present and not overwrite:
        raise OutputFailed(f"{folder.name} exists already; use --overwrite, or another --output")
    foreign = sorted(present - set(FILES))
    if foreign:
        raise OutputFailed(
            f"{folder.name} holds {foreign[0]}, which is no part of a detector; "
            "move it away, or use another --output"
        )


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


def read_manifest(folder: Path) -> BundleManifest:
    """What a bundle says of itself, checked by name and type; weights are not touched.

    Raises:
        BundleInvalid: the folder holds no manifest, or one that is not understood.
    """
    path = folder / MANIFEST
    where = f"{path.parent.name}/{path.name}"
    try:
        data = json.loads(read_small_file(path, _LARGEST_MANIFEST).decode("utf-8"))
    except OSError as error:
        raise BundleInvalid(
            f"{where} cannot be read ({error.strerror}); choose the folder of a detector"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BundleInvalid(f"{where} is not valid JSON: {error}") from error
    return from_mapping(BundleManifest, data, where, BundleInvalid)


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Write `bundle.json` into a folder that nobody reads yet."""
    text = json.dumps(to_mapping(manifest), indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_card(folder: Path) -> str:
    """A bundle's model card, Markdown; empty when none can be read. Bytes that are no UTF-8 become marks."""
    try:
        return read_small_file(folder / CARD, _LONGEST_CARD).decode("utf-8", errors="replace")
    except OSError:
        return ""


def check_size(path: Path, size: int) -> None:
    """Whether a file of a bundle is there in full length.

    Raises:
        BundleInvalid: it is not.
    """
    if not path.is_file():
        raise BundleInvalid(f"{path.parent.name} has no {path.name}; copy the whole folder of the detector")
    if path.stat().st_size != size:
        raise _altered(path)


def _check_file(path: Path, size: int, sha256: str) -> None:
    check_size(path, size)
    if file_sha256(path) != sha256:
        raise _altered(path)


def _altered(path: Path) -> BundleInvalid:
    return BundleInvalid(
        f"{path.parent.name}/{path.name} is incomplete or was altered; get the detector again"
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleInvalid(f"{path.parent.name}/{path.name} cannot be read: {error}") from error


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a state in half precision; returns size and hash of the file."""
    import torch

    write_tensors(path, {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in state.items()})
    return path.stat().st_size, file_sha256(path)


def _load_exactly(module: Any, state: Mapping[str, Tensor], where: str) -> None:
    """Put weights in place, each in the precision that the module has.

    Raises:
        BundleInvalid: a tensor is missing, has no place, or is of another shape or kind.
    """
    expected = module.state_dict()
    _check_fit(expected, {key: (tuple(v.shape), v.is_floating_point()) for key, v in state.items()}, where)
    module.load_state_dict({key: value.to(expected[key].dtype) for key, value in state.items()})


def _check_fit(
    expected: Mapping[str, Tensor], stored: Mapping[str, tuple[tuple[int, ...], bool]], where: str
) -> None:
    """Hold shapes, and whether values are floating, of stored tensors against those of a module."""
    wrong = [
        key
        for key in expected.keys() | stored.keys()
        if key not in expected
        or key not in stored
        or (tuple(expected[key].shape), expected[key].is_floating_point()) != stored[key]
    ]
    if wrong:
        raise BundleInvalid(
            f"{len(wrong)} tensors in {where} do not fit what {MANIFEST} describes, among them "
            f"{', '.join(sorted(wrong)[:3])}"
        )


def _stored_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of each tensor in a file, and whether it is floating, told from the file's header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {k: (tuple(p.get_shape()), p.get_dtype().startswith(_FLOATING)) for k, p in parts.items()}
    except (SafetensorError, OSError) as error:
        raise BundleInvalid(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
