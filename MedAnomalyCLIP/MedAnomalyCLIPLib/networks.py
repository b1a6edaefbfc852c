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
from .runtime import (
    AUTO,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    ONNX,
    PRECISIONS,
    RUNTIMES,
    TORCH,
    select_device,
    select_precision,
)

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
        precision: what large products are computed in; the parts around them keep to float32. "int8", for
            products of integers, in ONNX Runtime, of bundles that have a graph for it, so that they were
            found to move scores and maps little (`onnx_int8`); "bfloat16" or "float16", in PyTorch, see
            `runtime.select_precision`; "float32"; or "auto", which takes int8 where ONNX Runtime is taken
            and the bundle has the graph, else what PyTorch is best asked for on the device.
        features: see `SliceDetector.load`.

    Raises:
        InvalidRequest: there is no such device, runtime or precision, or the bundle or the device cannot do
            with it.
        DependencyMissing: a package is not installed.
        BundleInvalid: weights or graph cannot be used.
    """
    chosen = _choose(bundle.manifest, device, runtime, precision, with_features=features is not None)
    if chosen.runtime == ONNX:
        try:
            from .onnx_network import OnnxNetwork

            return OnnxNetwork.load(bundle, chosen.precision)
        except ImportError as error:
            raise DependencyMissing(
                f"Python package {error.name} is not installed; install it with: pip install {error.name}"
            ) from error
    where = select_device(device)
    dtype = select_precision(chosen.precision, where)
    try:
        from .torch_network import TorchNetwork

        return TorchNetwork(bundle.build(), bundle.manifest.preprocess, where, features, dtype)
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


def precision_of(manifest: BundleManifest) -> str:
    """What a detector would compute in there, unless told otherwise."""
    return INT8 if _serves(manifest) and manifest.int8 is not None else FLOAT32


def runs_without_torch(manifest: BundleManifest) -> bool:
    """Whether ONNX Runtime alone serves for a detector on the CPU."""
    return bool(manifest.network_sha256)


class _Choice(NamedTuple):
    runtime: str
    precision: str


def _choose(
    manifest: BundleManifest, device: str, runtime: str, precision: str, *, with_features: bool
) -> _Choice:
    if precision not in PRECISIONS:
        raise InvalidRequest(f"There is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    only = {INT8: ONNX, BFLOAT16: TORCH, FLOAT16: TORCH}.get(precision, AUTO)
    if only != AUTO and runtime in RUNTIMES:
        if runtime not in (AUTO, only):
            raise InvalidRequest(f"{precision} takes --runtime {only}, not {runtime}; leave one of them away")
        runtime = only
    chosen = _choose_runtime(manifest, device, runtime, with_features=with_features)
    if precision == INT8 and manifest.int8 is None:
        raise InvalidRequest(
            f"Detector {manifest.name!r} has no graph of 8-bit integers; run it in float32, or make the "
            "graph with: medanomalyclip export-onnx"
        )
    if precision == AUTO and chosen == ONNX:
        precision = precision_of(manifest)
    return _Choice(chosen, precision)


def _choose_runtime(manifest: BundleManifest, device: str, runtime: str, *, with_features: bool) -> str:
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
