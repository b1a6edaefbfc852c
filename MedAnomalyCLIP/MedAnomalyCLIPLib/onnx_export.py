"""Makes the graphs that let a detector run in ONNX Runtime, without PyTorch.

A bundle in, the same bundle with `network.onnx` out, and with `network_int8.onnx` if that is as good. The
graphs hold no weights: they point to where they lie in `weights.safetensors`, so what runs is the very same
detector. Needs the packages onnx and onnxscript; whoever runs the detector needs neither.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .bundle import (
    FILES,
    MANIFEST,
    NETWORK,
    NETWORK_INT8,
    WEIGHTS,
    Bundle,
    IntegerGraph,
    file_sha256,
    write_manifest,
)
from .detection import SliceDetector
from .detectors.detector import AnomalyDetector
from .errors import DependencyMissing, InvalidRequest
from .networks import load_network
from .onnx_int8 import ALLOWED, LEFT_OUT, drift, integer_graph
from .onnx_network import INPUTS, OUTPUTS, OnnxNetwork
from .output_folder import Staging, writing
from .runtime import FLOAT32, INT8, ONNX, TORCH

OPSET = 20  # the first that knows GELU
LARGEST_DIFFERENCE = 2e-5
"""Of maps, scores and unlikeness, between the graph and PyTorch, both in float32."""


def export_network(folder: Path | str, tell: Callable[[str], None] | None = None) -> Bundle:
    """Give a bundle its graphs, in place of those there were; the folder changes as a whole or not at all.

    Before that, graph and PyTorch are compared on made-up images. The graph of 8-bit integers is kept if it
    moves no score and no map by more than `onnx_int8.Drift.is_small` allows.

    Args:
        folder: of the bundle.
        tell: called with a line if there is no graph of integers, and why.

    Raises:
        BundleInvalid: the folder holds no detector, or a damaged one.
        DependencyMissing: a package is not installed.
        InvalidRequest: ONNX cannot express the detector, or says something else than PyTorch does.
        OutputFailed: the folder cannot be written.
    """
    bundle = Bundle.load(folder)
    try:
        model = _graph(bundle)
    except ImportError as error:
        raise DependencyMissing(
            f"Python package {error.name} is not installed; the export needs: "
            "pip install onnx onnxscript onnxruntime"
        ) from error
    with writing(bundle.folder):
        staging = Staging(bundle.folder.absolute())
        try:
            partial = staging.folder
            for name in set(FILES) - {MANIFEST, NETWORK, NETWORK_INT8}:
                if (bundle.folder / name).is_file():
                    shutil.copyfile(bundle.folder / name, partial / name)
            size, sha256 = _write(partial / NETWORK, model)
            manifest = replace(bundle.manifest, network_bytes=size, network_sha256=sha256, int8=None)
            write_manifest(partial, manifest)
            made = Bundle(partial, manifest, bundle.card)
            _compare(made)
            write_manifest(partial, replace(manifest, int8=_integer_graph(made, model, tell)))
            staging.appear()
        finally:
            staging.discard()
    return Bundle.load(folder)


def _write(path: Path, model: Any) -> tuple[int, str]:
    """Size and hash of the file."""
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path.stat().st_size, file_sha256(path)


def _integer_graph(bundle: Bundle, model: Any, tell: Callable[[str], None] | None) -> IntegerGraph | None:
    """Write the graph of integers beside the other; None, and no file, if it is not as good."""
    path, why = bundle.folder / NETWORK_INT8, "no product of the network is large enough"
    for left_out in LEFT_OUT:
        integers = integer_graph(model, left_out)
        if integers is None:
            break
        size, sha256 = _write(path, integers)
        exact, rounded = (
            SliceDetector(bundle, OnnxNetwork.load(bundle, precision)) for precision in (FLOAT32, INT8)
        )
        found = drift(exact, rounded)
        if found.is_small:
            return IntegerGraph(size, sha256, *found)
        path.unlink()
        why = f"it would move {found.words()}, and may move {ALLOWED.words()}"
    if tell is not None:
        tell(f"No graph of 8-bit integers was made: {why}")
    return None


def _graph(bundle: Bundle) -> Any:
    """The network as an ONNX model whose weights are references into the bundle's file."""
    import onnxscript  # noqa: F401  PyTorch's exporter needs it, and says so less clearly

    spec = bundle.manifest.detector
    if spec.feature_fusion is not None or spec.text.prompts == "hybrid":
        raise InvalidRequest(
            f"Detector {bundle.manifest.name!r} needs more than images and stored text; "
            "it runs in PyTorch only"
        )
    exported = _Exported(bundle.build())
    images = torch.zeros(2, 3, bundle.manifest.preprocess.size, bundle.manifest.preprocess.size)
    valid = torch.ones(images.shape[0], *images.shape[2:], dtype=torch.bool)
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                exported,
                (images, valid, exported.detector.text_bank),
                dynamo=True,
                optimize=False,  # ONNX Runtime does so when it loads the graph; weights keep their names
                verbose=False,
                opset_version=OPSET,
                input_names=INPUTS,
                output_names=OUTPUTS[: 2 if spec.familiarity is None else 3],
                dynamic_shapes=({0: batch}, {0: batch}, None),
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        why = str(error.__cause__ or error).partition("\n")[0]
        raise InvalidRequest(f"ONNX cannot express detector {bundle.manifest.name!r}: {why}") from error
    model = program.model_proto
    _strip(model)
    _refer(model.graph, bundle.folder / WEIGHTS)
    return model


class _Exported(nn.Module):
    """A detector whose inputs and outputs are tensors alone."""

    def __init__(self, detector: AnomalyDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, valid: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        found = self.detector(images, valid, None, text)
        return tuple(value for value in found if value is not None)


def _strip(model: Any) -> None:
    """Remove what only tells where in our code each node comes from, most of the file."""
    model.doc_string = ""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


def _refer(graph: Any, weights: Path) -> None:
    """Replace each weight by a reference into a safetensors file, cast to what the network computes in.

    Raises:
        InvalidRequest: the graph holds a large constant that is none of the stored weights.
    """
    from onnx import TensorProto, helper

    places, start = _places(weights)
    kinds = {"F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT}
    references, casts = [], []
    for held in graph.initializer:
        name = held.name.removeprefix("detector.")
        if name not in places or list(held.dims) != places[name]["shape"]:
            raise InvalidRequest(f"The graph would hold {held.name}, which is none of the stored weights")
        begin, end = places[name]["data_offsets"]
        stored = TensorProto(name=name, data_type=kinds[places[name]["dtype"]], dims=held.dims)
        stored.data_location = TensorProto.EXTERNAL
        for key, value in (("location", weights.name), ("offset", start + begin), ("length", end - begin)):
            stored.external_data.add(key=key, value=str(value))
        references.append(stored)
        casts.append(helper.make_node("Cast", [name], [held.name], to=held.data_type))
    nodes = [*casts, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(references)
    graph.node.extend(nodes)


def _places(weights: Path) -> tuple[dict[str, Any], int]:
    """Where each tensor lies in a safetensors file: its header, and where what it counts from begins."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _compare(bundle: Bundle) -> None:
    """Run the graph and PyTorch on noise, one image and three.

    Raises:
        InvalidRequest: they differ by more than rounding.
    """
    graph, original = (
        load_network(bundle, device="cpu", runtime=runtime, precision=FLOAT32) for runtime in (ONNX, TORCH)
    )
    generator, size = np.random.default_rng(0), bundle.manifest.preprocess.size
    for count in (1, 3):
        images = generator.normal(size=(count, 3, size, size)).astype(np.float32)
        valid = np.ones((count, size, size), bool)
        valid[:, : size // 5] = False
        one, other = (
            network.fetch([values for values in network(images, valid, None) if values is not None])()
            for network in (graph, original)
        )
        off = max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
        if not off <= LARGEST_DIFFERENCE:
            raise InvalidRequest(f"The graph differs from PyTorch by {off:.2g}; it was not kept")
