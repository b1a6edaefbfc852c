"""A detector ready to use: planes in, results out.

This is the one way through that every face takes: Slicer's panel, the console, the command line.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import __version__
from .bundle import Bundle, default_bundle_path
from .errors import BundleInvalid, Cancelled, DependencyMissing, InvalidRequest
from .geometry import SlicePlane, acquisition_axis, cut_slice, slice_count
from .result import AnomalyResult, Provenance
from .runtime import select_device
from .volume import Volume

if TYPE_CHECKING:
    import torch

    from .detectors.detector import AnomalyDetector
    from .preprocess import SlicePreprocessor

Window = tuple[float, float]
# Another network: prepared images (B, 3, S, S) in, for each tap a feature map (B, channels, h, w) out.
FeatureMaps = Callable[["torch.Tensor"], "Sequence[torch.Tensor]"]


class SliceDetector:
    """A bundle's network on a device, with everything that turns a plane into its input and back.

    Not safe for use by two threads at once: give it to one worker.
    """

    def __init__(
        self,
        bundle: Bundle,
        network: AnomalyDetector,
        preprocessor: SlicePreprocessor,
        device: torch.device,
        features: FeatureMaps | None = None,
    ) -> None:
        self._manifest = bundle.manifest
        self._network = network.to(device).eval()
        self._preprocessor = preprocessor
        self._device = device
        self._features = features
        self.card = bundle.card
        self.provenance = Provenance(
            bundle=self._manifest.name,
            bundle_version=self._manifest.version,
            bundle_sha256=self._manifest.weights_sha256,
            software_version=__version__,
            device=str(device),
            precision="float32",
        )

    @classmethod
    def load(
        cls, bundle: Path | str | None = None, *, device: str = "auto", features: FeatureMaps | None = None
    ) -> SliceDetector:
        """Read a detector from disk and make it ready.

        Args:
            bundle: folder of the detector; None for the one that ships with MedAnomalyCLIP.
            device: see `runtime.select_device`.
            features: gives the maps of another network that some detectors fuse, DiffusionCLIP as published
                among them.

        Raises:
            BundleInvalid: the folder holds no detector, or a damaged one.
            DependencyMissing: torch, MONAI or open_clip is not installed.
        """
        where = select_device(device)
        checked = Bundle.load(default_bundle_path() if bundle is None else bundle)
        try:
            from .preprocess import SlicePreprocessor

            preprocessor = SlicePreprocessor(checked.manifest.preprocess)
            network = checked.build()
        except ImportError as error:
            raise DependencyMissing(
                f"Python package {error.name} is not installed; install it with: pip install {error.name}"
            ) from error
        return cls(checked, network, preprocessor, where, features)

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

    def detect(
        self, plane: SlicePlane, *, threshold: float | None = None, window: Window | None = None
    ) -> AnomalyResult:
        """Detect on one plane; arguments as for `detect_many`."""
        return next(self.detect_many([plane], threshold=threshold, window=window))

    def detect_many(
        self,
        planes: Iterable[SlicePlane],
        *,
        threshold: float | None = None,
        window: Window | None = None,
        batch_size: int = 8,
    ) -> Iterator[AnomalyResult]:
        """Detect on planes, in their order, a batch at a time; only one batch is held in memory.

        Args:
            planes: slices, of any size.
            threshold: map value from which a pixel counts as anomalous; None for the bundle's own.
            window: (low, high) stored values shown as black and white; None for the bundle's rules.
            batch_size: planes that go through the network together.

        Raises:
            InvalidRequest: a threshold outside [0, 1], or a window that is none.
            BundleInvalid: the network gives values that are no numbers.
        """
        limit = self.threshold if threshold is None else float(threshold)
        if not 0 <= limit <= 1:
            raise InvalidRequest(f"The threshold must lie between 0 and 1, not at {limit:g}")
        source = iter(planes)
        while batch := list(itertools.islice(source, batch_size)):
            yield from self._detect_batch(batch, limit, window)

    def _detect_batch(
        self, planes: list[SlicePlane], threshold: float, window: Window | None
    ) -> list[AnomalyResult]:
        import torch

        started = time.perf_counter()
        prepared = [self._preprocessor.prepare(plane, window) for plane in planes]
        images = torch.stack([p.tensor for p in prepared]).to(self._device)
        valid = torch.stack([p.valid for p in prepared]).to(self._device)
        ready = time.perf_counter()
        with torch.inference_mode():
            features = None if self._features is None else self._features(images)
            detection = self._network(images, valid, features)
            maps, scores = detection.map.float().cpu(), detection.score.float().cpu()
        if not (maps.isfinite().all() and scores.isfinite().all()):
            raise BundleInvalid(
                f"Detector {self.name!r} gives values that are no numbers: its weights are damaged, or too "
                "large for what they are computed in; choose another detector"
            )
        done = time.perf_counter()
        plane_maps = [
            np.where(plane.valid, self._preprocessor.map_back(network_map, item.fit), np.float32(0))
            for plane, item, network_map in zip(planes, prepared, maps, strict=True)
        ]
        seconds = {
            "preprocess": (ready - started) / len(planes),
            "network": (done - ready) / len(planes),
            "map_back": (time.perf_counter() - done) / len(planes),
        }
        reference = self._manifest.reference
        return [
            AnomalyResult(
                plane=plane,
                score=score,
                map=plane_map,
                threshold=threshold,
                provenance=self.provenance,
                percentile=None if reference is None else reference.percentile(score),
                image_threshold=self.image_threshold,
                window=None if plane.pixels.ndim == 3 else item.window,
                timings=seconds,
            )
            for plane, item, plane_map, score in zip(
                planes, prepared, plane_maps, scores.tolist(), strict=True
            )
        ]


def detect_slices(
    detector: SliceDetector,
    volume: Volume,
    *,
    axis: int | None = None,
    indices: Iterable[int] | None = None,
    threshold: float | None = None,
    window: Window | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> Iterator[AnomalyResult]:
    """Detect on slices of a volume, one result after the other.

    Args:
        detector: what detects.
        volume: the image.
        axis: 0, 1 or 2 for I, J or K; None for the axis along which the slices were acquired.
        indices: slices along that axis, from 0; None for all.
        threshold, window: as for `SliceDetector.detect_many`.
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
    for done, index in enumerate(wanted, start=1):
        if is_cancelled is not None and is_cancelled():
            raise Cancelled(f"Stopped after {done - 1} of {len(wanted)} slices")
        yield detector.detect(cut_slice(volume, axis, index), threshold=threshold, window=window)
        if on_progress is not None:
            on_progress(done, len(wanted))
