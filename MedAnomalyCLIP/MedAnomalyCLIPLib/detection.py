"""A detector ready to use: planes in, results out.

This is the one way through that every face takes: Slicer's panel, the console, the command line.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import __version__
from .bundle import Bundle, NormalReference, default_bundle_path
from .errors import BundleInvalid, Cancelled, InvalidRequest
from .geometry import SlicePlane, acquisition_axis, cut_slice, slice_count
from .networks import Network, load_network
from .prompt import Prompt, guess_preset
from .result import AnomalyResult, Provenance
from .runtime import AUTO
from .volume import Volume

if TYPE_CHECKING:
    import torch

    from .detectors.specification import PresetSpec
    from .preprocess import Prepared

_SLICES_AT_ONCE = 8

Window = tuple[float, float]
# Another network: prepared images (B, 3, S, S) in, for each tap a feature map (B, channels, h, w) out.
FeatureMaps = Callable[["torch.Tensor"], "Sequence[torch.Tensor]"]


class SliceDetector:
    """A bundle's network where it runs, with everything that turns a plane into its input and back.

    Not safe for use by two threads at once: give it to one worker.
    """

    def __init__(self, bundle: Bundle, network: Network) -> None:
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._network = network
        self._preprocessor = network.preprocessor
        self._texts: dict[Prompt, np.ndarray] = {}
        self.card = bundle.card
        self.provenance = Provenance(
            bundle=self._manifest.name,
            bundle_version=self._manifest.version,
            bundle_sha256=self._manifest.weights_sha256,
            software_version=__version__,
            device=network.device,
            precision=network.precision,
            runtime=network.runtime,
        )

    @classmethod
    def load(
        cls,
        bundle: Path | str | None = None,
        *,
        device: str = "auto",
        runtime: str = AUTO,
        precision: str = AUTO,
        features: FeatureMaps | None = None,
    ) -> SliceDetector:
        """Read a detector from disk and make it ready.

        Args:
            bundle: folder of the detector; None for the one that ships with MedAnomalyCLIP.
            device: see `runtime.select_device`.
            runtime: "torch", "onnx" or "auto", see `networks.load_network`.
            precision: "float32", "int8", "bfloat16" or "auto", likewise.
            features: gives the maps of another network that some detectors fuse, DiffusionCLIP as published
                among them.

        Raises:
            BundleInvalid: the folder holds no detector, or a damaged one.
            DependencyMissing: a package is not installed that it needs.
            InvalidRequest: there is no such device, runtime or precision.
        """
        checked = Bundle.load(default_bundle_path() if bundle is None else bundle)
        network = load_network(
            checked, device=device, runtime=runtime, precision=precision, features=features
        )
        return cls(checked, network)

    @property
    def name(self) -> str:
        return self._manifest.name

    @property
    def threshold(self) -> float:
        """The bundle's own pixel threshold."""
        return self._manifest.threshold

    @property
    def image_threshold(self) -> float | None:
        """Score that 95 % of the bundle's normal reference images do not reach."""
        return self._manifest.image_threshold

    @property
    def unlike_threshold(self) -> float | None:
        """Distance from the training images that nearly all images of their kinds stay below."""
        return self._manifest.unlike_threshold

    @property
    def network(self) -> Network:
        """What is run."""
        return self._network

    @property
    def input_size(self) -> int:
        """Side of the network's square input in pixels."""
        return self._manifest.preprocess.size

    @property
    def presets(self) -> tuple[PresetSpec, ...]:
        """Kinds of images that it has text of their own for."""
        return self._manifest.presets

    @property
    def reads_phrases(self) -> bool:
        """Whether a reader's own phrases can take the place of its text."""
        return bool(self.presets) and bool(self._manifest.text_sha256)

    def threshold_with(self, prompt: Prompt) -> float:
        """The pixel threshold that goes with a prompt."""
        return self._calibration(prompt).threshold

    def title_of(self, prompt: Prompt) -> str:
        """A prompt in words, as results tell it; empty for the text about images of any kind."""
        return self._calibration(prompt).title

    def guess_preset(self, modality: str, words: str = "") -> str:
        """See `prompt.guess_preset`."""
        return guess_preset(self.presets, modality, words)

    def detect(
        self,
        plane: SlicePlane,
        *,
        threshold: float | None = None,
        window: Window | None = None,
        prompt: Prompt | None = None,
    ) -> AnomalyResult:
        """Detect on one plane; arguments as for `detect_many`."""
        return next(self.detect_many([plane], threshold=threshold, window=window, prompt=prompt))

    def detect_many(
        self,
        planes: Iterable[SlicePlane],
        *,
        threshold: float | None = None,
        window: Window | None = None,
        prompt: Prompt | None = None,
        batch_size: int = _SLICES_AT_ONCE,
    ) -> Iterator[AnomalyResult]:
        """Detect on planes, in their order, a batch at a time.

        While the network runs on one batch, a thread prepares the next; so two are held in memory at most.
        Planes that show nothing but noise (`SlicePlane.is_empty`) get map and score 0.

        Args:
            planes: slices, of any size.
            threshold: map value from which a pixel counts as anomalous; None for the bundle's own.
            window: (low, high) stored values shown as black and white; None for the bundle's rules.
            prompt: what the planes are compared with; None for the detector's text about images of any kind.
            batch_size: planes that go through the network together.

        Raises:
            InvalidRequest: a threshold outside [0, 1], a window that is none, or a prompt that the detector
                does not have.
            BundleInvalid: the network gives values that are no numbers.
        """
        prompt = prompt or Prompt()
        calibration = self._calibration(prompt)
        limit = calibration.threshold if threshold is None else float(threshold)
        if not 0 <= limit <= 1:
            raise InvalidRequest(f"The threshold must lie between 0 and 1, not at {limit:g}")
        source = iter(planes)
        with ThreadPoolExecutor(1, "MedAnomalyCLIP-prepare") as pool:

            def coming() -> Future[_Batch] | None:
                """The next batch, cut here and prepared there."""
                batch = list(itertools.islice(source, batch_size))
                return pool.submit(self._prepare, batch, window) if batch else None

            waiting = coming()
            while waiting is not None:
                batch, waiting = waiting.result(), coming()
                yield from self._detect_batch(batch, limit, prompt, calibration)

    def _prepare(self, planes: Sequence[SlicePlane], window: Window | None) -> _Batch:
        started = time.perf_counter()
        prepared = [self._preprocessor.prepare(plane, window) for plane in planes]
        images = np.stack([np.asarray(item.tensor) for item in prepared])
        valid = np.stack([np.asarray(item.valid) for item in prepared])
        return _Batch(planes, prepared, images, valid, time.perf_counter() - started)

    def _detect_batch(
        self, batch: _Batch, threshold: float, prompt: Prompt, calibration: _Calibration
    ) -> list[AnomalyResult]:
        planes, prepared = batch.planes, batch.prepared
        ready = time.perf_counter()
        found = self._network(batch.images, batch.valid, self._text(prompt))
        if not (np.isfinite(found.map).all() and np.isfinite(found.score).all()):
            raise BundleInvalid(
                f"Detector {self.name!r} gives values that are no numbers: its weights are damaged, or too "
                "large for what they are computed in; choose another detector"
            )
        unlike = [None] * len(planes) if found.unlikeness is None else found.unlikeness.tolist()
        done = time.perf_counter()
        plane_maps = [
            np.where(
                plane.valid & (not plane.is_empty),
                self._preprocessor.map_back(network_map, item.fit),
                np.float32(0),
            )
            for plane, item, network_map in zip(planes, prepared, found.map, strict=True)
        ]
        # A window stretches the noise of an empty slice until it looks like something.
        scores = [
            0.0 if plane.is_empty else score
            for plane, score in zip(planes, found.score.tolist(), strict=True)
        ]
        seconds = {
            "preprocess": batch.seconds / len(planes),
            "network": (done - ready) / len(planes),
            "map_back": (time.perf_counter() - done) / len(planes),
        }
        reference = calibration.reference
        return [
            AnomalyResult(
                plane=plane,
                score=score,
                map=plane_map,
                threshold=threshold,
                provenance=self.provenance,
                percentile=None if reference is None else reference.percentile(score),
                image_threshold=calibration.image_threshold,
                prompt=calibration.title,
                unlikeness=distance,
                unlike_threshold=self._manifest.unlike_threshold,
                window=None if plane.pixels.ndim == 3 else item.window,
                is_empty=plane.is_empty,
                timings=seconds,
            )
            for plane, item, plane_map, score, distance in zip(
                planes, prepared, plane_maps, scores, unlike, strict=True
            )
        ]

    def _text(self, prompt: Prompt) -> np.ndarray | None:
        """(2, E) what planes are compared with; None for what the network holds itself."""
        if prompt == Prompt():
            return None
        if prompt not in self._texts:
            if prompt.has_phrases:
                self._texts[prompt] = self._bundle.encode_phrases(prompt.normal, prompt.abnormal)
            else:
                self._texts[prompt] = self._network.preset_texts[self._preset_names().index(prompt.preset)]
        return self._texts[prompt]

    def _preset_names(self) -> list[str]:
        return [preset.name for preset in self.presets]

    def _calibration(self, prompt: Prompt) -> _Calibration:
        """What scores mean that are made with a prompt.

        Raises:
            InvalidRequest: the detector has no such preset, or reads no phrases.
        """
        manifest = self._manifest
        if prompt.has_phrases:
            if not self.reads_phrases:
                raise InvalidRequest(f"{self.name} was not made to read phrases; choose another detector")
            # No normal image was ever compared with these phrases.
            return _Calibration(", ".join(prompt.abnormal), manifest.threshold, None, None)
        if not prompt.preset:
            return _Calibration("", manifest.threshold, manifest.image_threshold, manifest.reference)
        if prompt.preset not in self._preset_names():
            known = ", ".join(self._preset_names()) or "none"
            raise InvalidRequest(f"{self.name} has no preset {prompt.preset!r}; it has: {known}")
        title = next(preset.title for preset in self.presets if preset.name == prompt.preset)
        own = manifest.calibration(prompt.preset)
        if own is None:
            return _Calibration(title, manifest.threshold, None, None)
        return _Calibration(title, own.threshold, own.image_threshold, own.reference)


class _Batch(NamedTuple):
    """Planes and what the network takes of them; seconds that preparing them took."""

    planes: Sequence[SlicePlane]
    prepared: Sequence[Prepared]
    images: np.ndarray
    valid: np.ndarray
    seconds: float


class _Calibration(NamedTuple):
    """What scores made with one prompt mean; None for what is not known."""

    title: str
    threshold: float
    image_threshold: float | None
    reference: NormalReference | None


def detect_slices(
    detector: SliceDetector,
    volume: Volume,
    *,
    axis: int | None = None,
    indices: Iterable[int] | None = None,
    threshold: float | None = None,
    window: Window | None = None,
    prompt: Prompt | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> Iterator[AnomalyResult]:
    """Detect on slices of a volume, one result after the other.

    Args:
        detector: what detects.
        volume: the image.
        axis: 0, 1 or 2 for I, J or K; None for the axis along which the slices were acquired.
        indices: slices along that axis, from 0; None for all.
        threshold, window, prompt: as for `SliceDetector.detect_many`.
        on_progress: called with the number of slices done and to do, after each slice.
        is_cancelled: asked before each slice.

    Raises:
        Cancelled: `is_cancelled` said so; the results yielded before stand.
        InvalidRequest: there is no such axis or slice; said before the first slice is detected.
    """
    axis = acquisition_axis(volume) if axis is None else axis
    count = slice_count(volume, axis)
    wanted = list(range(count)) if indices is None else list(indices)
    for index in wanted:
        if not 0 <= index < count:
            raise InvalidRequest(f"There is no slice {index} along this axis; choose 0 to {count - 1}")
    planes = (cut_slice(volume, axis, index) for index in wanted)
    results = detector.detect_many(planes, threshold=threshold, window=window, prompt=prompt)
    for done in range(len(wanted)):
        if is_cancelled is not None and is_cancelled():
            raise Cancelled(f"Stopped after {done} of {len(wanted)} slices")
        yield next(results)
        if on_progress is not None:
            on_progress(done + 1, len(wanted))
