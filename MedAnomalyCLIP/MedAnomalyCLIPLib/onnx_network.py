"""A detector's network in ONNX Runtime, on the CPU, without PyTorch.

The graph is the bundle's `network.onnx`, or `network_int8.onnx` for products of integers; either finds its
weights in the bundle's `weights.safetensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import NETWORK, NETWORK_INT8, WEIGHTS, Bundle
from .errors import BundleInvalid
from .networks import SLICES_AT_ONCE, NetworkOutput
from .numpy_preprocess import NumpyPreprocessor
from .runtime import FLOAT32, INT8, cpu_threads

INPUTS = ("images", "valid", "text")
OUTPUTS = ("map", "score", "unlikeness")
_UNSAFE = ["SkipLayerNormFusion"]
"""Ends the process, in ONNX Runtime 1.32, on a layer normalisation whose bias is left out; our graphs give it
nothing to do."""
_ROUNDING = 1e-5
_HIGHEST = {"map": 1.0, "score": 1.0, "unlikeness": float(np.finfo(np.float32).max)}


class OnnxNetwork:
    """See `networks.Network`."""

    device = "cpu"
    under_way, batch_size = 1, SLICES_AT_ONCE

    def __init__(
        self,
        session: Any,
        bundle: Bundle,
        text_bank: np.ndarray,
        preset_texts: np.ndarray,
        precision: str = FLOAT32,
    ) -> None:
        from onnxruntime import __version__

        self.preprocessor = NumpyPreprocessor(bundle.manifest.preprocess)
        self.runtime = f"ONNX Runtime {__version__}"
        self.precision = precision
        self.preset_texts = preset_texts
        self._session, self._text_bank = session, text_bank
        self._where = f"{bundle.folder.name}/{_graph_of(precision)}"
        self._size = bundle.manifest.preprocess.size
        self._outputs = [output.name for output in session.get_outputs()]
        inputs = tuple(entry.name for entry in session.get_inputs())
        if inputs != INPUTS or self._outputs != list(OUTPUTS[: len(self._outputs)]) or len(self._outputs) < 2:
            raise BundleInvalid(f"{self._where} is not the graph of a detector; get the detector again")

    @classmethod
    def load(cls, bundle: Bundle, precision: str = FLOAT32) -> OnnxNetwork:
        """Read graph and weights.

        Args:
            bundle: checked; has the graph.
            precision: "float32" or "int8".

        Raises:
            BundleInvalid: they cannot be used.
            ImportError: onnxruntime or safetensors is not installed.
        """
        from safetensors import SafetensorError, safe_open

        where = bundle.folder / WEIGHTS
        try:
            with safe_open(where, "np") as file:
                names = set(file.keys())
                text_bank = file.get_tensor("text_bank").astype(np.float32)
                presets = file.get_tensor("preset_banks") if "preset_banks" in names else text_bank[None][:0]
        except (SafetensorError, OSError) as error:
            raise BundleInvalid(f"{where.parent.name}/{where.name} cannot be read: {error}") from error
        session = _session(bundle.folder / _graph_of(precision))
        return cls(session, bundle, text_bank, presets.astype(np.float32), precision)

    def __call__(self, images: np.ndarray, valid: np.ndarray, text: np.ndarray | None) -> NetworkOutput:
        text = self._text_bank if text is None else text
        # The largest value of a product's input sets the scale of all: slices that went together would change
        # each other's maps.
        alone = range(len(images)) if self.precision == INT8 else ()
        parts = [slice(index, index + 1) for index in alone] or [slice(None)]
        found = [self._run(images[part], valid[part], text) for part in parts]
        return found[0] if len(found) == 1 else _joined(found)

    def _run(self, images: np.ndarray, valid: np.ndarray, text: np.ndarray) -> NetworkOutput:
        fed = {"images": images, "valid": valid, "text": text}
        try:
            found = dict(zip(self._outputs, self._session.run(None, fed), strict=True))
        except Exception as error:  # ONNX Runtime's errors have no class of their own in common
            raise _refused(f"{self._where} cannot be run", error) from error
        count = len(images)
        shapes = {"map": (count, self._size, self._size), "score": (count,), "unlikeness": (count,)}
        if any(values.shape != shapes[name] or values.dtype != np.float32 for name, values in found.items()):
            raise BundleInvalid(
                f"{self._where} gives maps or scores of another shape; get the detector again"
            )
        inside = {name: np.clip(values, 0, _HIGHEST[name]) for name, values in found.items()}
        if not all(
            np.allclose(inside[name], values, rtol=0, atol=_ROUNDING) for name, values in found.items()
        ):
            raise BundleInvalid(
                f"{self._where} gives values that are no numbers, or none that a map or score can have; "
                "get the detector again"
            )
        return NetworkOutput(inside["map"], inside["score"], inside.get("unlikeness"))

    def fetch(self, values: Sequence[Any]) -> Callable[[], list[np.ndarray]]:
        return lambda: list(values)


def _graph_of(precision: str) -> str:
    return NETWORK_INT8 if precision == INT8 else NETWORK


def _joined(parts: list[NetworkOutput]) -> NetworkOutput:
    maps, scores, unlike = zip(*parts, strict=True)
    known = None if unlike[0] is None else np.concatenate(unlike)
    return NetworkOutput(np.concatenate(maps), np.concatenate(scores), known)


def _session(graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised too; here they would name folders
    options.intra_op_num_threads = cpu_threads()
    try:
        return onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=_UNSAFE
        )
    except Exception as error:  # as above
        raise _refused(f"{graph.parent.name}/{graph.name} cannot be used", error) from error


def _refused(what: str, error: Exception) -> BundleInvalid:
    """ONNX Runtime's own words name the whole path of the detector, which may be a patient's."""
    return BundleInvalid(
        f"{what} by ONNX Runtime ({type(error).__name__}); get the detector again, or make its graph anew: "
        "medanomalyclip export-onnx"
    )
