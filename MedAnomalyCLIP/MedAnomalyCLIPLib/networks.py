"""What runs a detector's network: PyTorch, or ONNX Runtime where that serves and is all that is needed.

Both take prepared slices and text and say the same of them; nothing in front of them or behind them asks
which it is.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .bundle import Bundle, BundleManifest
from .errors import DependencyMissing, InvalidRequest, needs_full
from .runtime import AUTO, ONNX, RUNTIMES, TORCH, select_device, select_precision

if TYPE_CHECKING:
    import numpy as np

    from .detection import FeatureMaps
    from .preprocess import PlanePreprocessor


SLICES_AT_ONCE = 8
"""Where memory and latency count for more than the little that a CPU gains by larger batches."""


class NetworkOutput(NamedTuple):
    """What a network says about B slices: arrays, or tensors that may not be computed yet.

    Attributes:
        map: (B, S, S) float32 in [0, 1], 0 on padding.
        score: (B,) float32 in [0, 1].
        unlikeness: (B,) float32, 0 and above; None for detectors that do not know what they learned from.
    """

    map: Any
    score: Any
    unlikeness: Any


class Network(Protocol):
    """A detector's network, ready to run.

    Attributes:
        runtime: what computes, with its version, for example "ONNX Runtime 1.32.0".
        device: as torch names it.
        precision: what it computes in.
        under_way: batches that it computes at once, when it is called again before what it gave is fetched.
    """

    runtime: str
    device: str
    precision: str
    under_way: int

    @property
    def preprocessor(self) -> PlanePreprocessor:
        """Makes its input of slices, and brings its maps back."""

    @property
    def preset_texts(self) -> np.ndarray:
        """(P, 2, E) stored text features of the detector's presets, in their order."""

    @property
    def batch_size(self) -> int:
        """Slices that best go through it together, as far as memory allows."""

    def __call__(self, images: Any, valid: Any, text: np.ndarray | None) -> NetworkOutput:
        """Run it.

        Shapes:
            images: (B, 3, S, S) float32; valid: (B, S, S) bool, as the preprocessor makes them; text: (2, E)
                to compare with, None for the detector's text about images of any kind.

        Raises:
            DeviceMemoryExhausted: a GPU's memory does not hold a single slice's work.
        """

    def fetch(self, values: Sequence[Any]) -> Callable[[], list[np.ndarray]]:
        """Begin to bring what it or its preprocessor made to the host; a call of the answer waits for it."""


def load_network(
    bundle: Bundle,
    *,
    device: str = "auto",
    runtime: str = AUTO,
    precision: str = AUTO,
    features: FeatureMaps | None = None,
) -> Network:
    """The network of a bundle, where and by what it is to run.

    Args:
        bundle: checked.
        device: see `runtime.select_device`.
        runtime: "torch"; "onnx", on the CPU only; or "auto", which takes ONNX Runtime where it is installed,
            the device is the CPU and the bundle has its graph, else PyTorch.
        precision: what the tower computes in, see `runtime.select_precision`; the parts around it keep to
            float32. ONNX Runtime knows no other.
        features: see `SliceDetector.load`.

    Raises:
        InvalidRequest: there is no such device or runtime, or the bundle or the device cannot do with it.
        DependencyMissing: a package is not installed.
        BundleInvalid: weights or graph cannot be used.
    """
    other = precision not in (AUTO, "float32")
    if runtime == ONNX and other:
        raise InvalidRequest(f"ONNX Runtime does not compute in {precision}; that takes --runtime torch")
    if _choose(bundle.manifest, device, runtime, with_features=features is not None or other) == ONNX:
        try:
            from .onnx_network import OnnxNetwork

            return OnnxNetwork.load(bundle)
        except ImportError as error:
            raise DependencyMissing(
                f"Python package {error.name} is not installed; install it with: pip install {error.name}"
            ) from error
    where = select_device(device)
    try:
        from .torch_network import TorchNetwork

        computed_in = select_precision(precision, where)
        return TorchNetwork(bundle.build(), bundle.manifest.preprocess, where, features, computed_in)
    except ImportError as error:
        raise needs_full("This detector needs", error) from error


def runtime_of(manifest: BundleManifest) -> str:
    """What a detector would run in on this computer's CPU, with its version; empty if it cannot.

    Nothing is imported to find out.
    """
    name, package = ("ONNX Runtime", "onnxruntime") if _serves(manifest) else ("PyTorch", "torch")
    try:
        return f"{name} {importlib.metadata.version(package)}".partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def runs_without_torch(manifest: BundleManifest) -> bool:
    """Whether ONNX Runtime alone serves for a detector on the CPU."""
    return bool(manifest.network_sha256)


def _choose(manifest: BundleManifest, device: str, runtime: str, *, with_features: bool) -> str:
    if runtime not in RUNTIMES:
        raise InvalidRequest(f"There is no runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")
    if runtime == TORCH:
        return TORCH
    able = runs_without_torch(manifest) and not with_features
    if runtime == ONNX:
        if device not in ("auto", "cpu"):
            raise InvalidRequest(f"ONNX Runtime is used on the CPU only; {device} takes --runtime torch")
        if not able:
            raise InvalidRequest(
                f"Detector {manifest.name!r} has no graph for ONNX Runtime; run it with --runtime torch, or "
                "make the graph with: medanomalyclip export-onnx"
            )
        return ONNX
    if with_features or not _serves(manifest):
        return TORCH
    return ONNX if device == "cpu" or (device == "auto" and not _gpu()) else TORCH


def _serves(manifest: BundleManifest) -> bool:
    return runs_without_torch(manifest) and importlib.util.find_spec("onnxruntime") is not None


def _gpu() -> bool:
    """Whether PyTorch is there and finds a GPU, or Apple's.

    A build for processors alone is not imported to find out: that takes seconds, during parts of which no
    other thread can run, Slicer's main thread among them.
    """
    with suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("torch").endswith("+cpu"):
            return False
    try:
        return select_device("auto").type != "cpu"
    except DependencyMissing:
        return False
