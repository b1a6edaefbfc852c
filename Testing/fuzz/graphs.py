"""Mutants of the graphs that ONNX Runtime is given, of both precisions, and of the weights they point to.

ONNX Runtime reads and runs them in C++, and so can bring the process down.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .mutations import TRICKY_NAMES, Rng, damaged, pick
from .targets import Target

_OPERATORS = (
    "MatMul",
    "Reshape",
    "Identity",
    "Loop",
    "If",
    "Expand",
    "Gather",
    "Nothing",
    "Softmax",
    "Range",
)
_NUMBERS = (0, 1, -1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))


class Graphs(Target):
    """The bundled detector, whose hashes are made to fit, as an attacker would."""

    name = "graphs"
    memory = 2 << 30

    def prepare(self, folder: Path) -> None:
        from MedAnomalyCLIPLib.bundle import (
            NETWORK,
            NETWORK_INT8,
            WEIGHTS,
            default_bundle_path,
            read_manifest,
            write_manifest,
        )
        from MedAnomalyCLIPLib.geometry import cut_slice
        from MedAnomalyCLIPLib.volume import Volume

        self._plane = cut_slice(Volume(np.arange(240.0).reshape(1, 15, 16), np.eye(4)), 2, 0)
        source = default_bundle_path()
        write_manifest(folder, replace(read_manifest(source), text_bytes=0, text_sha256=""))
        for name in (NETWORK, NETWORK_INT8, WEIGHTS):
            (folder / name).write_bytes((source / name).read_bytes())
        self._seed = folder
        self._parsed = {name: _parsed((folder / name).read_bytes()) for name in (NETWORK, NETWORK_INT8)}
        self._look(folder)

    def mutant(self, folder: Path, rng: Rng) -> Path:
        from MedAnomalyCLIPLib.bundle import WEIGHTS

        place = folder / "bundle"
        place.mkdir()
        for path in self._seed.iterdir():
            os.link(path, place / path.name)  # replaced below, never written to
        kind = rng.random()
        if kind < 0.1:
            victim, content = WEIGHTS, (self._seed / WEIGHTS).read_bytes()
            content = damaged(content, rng) if rng.random() < 0.5 else _other_numbers(content, rng)
        else:
            victim = str(pick(rng, sorted(self._parsed)))
            content = (self._seed / victim).read_bytes()
            content = damaged(content, rng) if kind < 0.35 else _rewritten(self._parsed[victim], rng)
        (place / victim).unlink()
        (place / victim).write_bytes(content)
        if rng.random() < 0.95:
            _fit(place, victim)
        return place

    def look(self, path: Path, output: Path) -> None:
        self._look(path)

    def _look(self, path: Path) -> None:
        from MedAnomalyCLIPLib.detection import SliceDetector

        for precision in ("float32", "int8"):
            detector = SliceDetector.load(path, device="cpu", runtime="onnx", precision=precision)
            result = detector.detect(self._plane)
            assert 0 <= result.map.min() <= result.map.max() <= 1, "the map is no map"
            assert 0 <= result.score <= 1, "the score is no score"
            assert result.unlikeness is None or result.unlikeness >= 0, "the unlikeness is none"


def _parsed(content: bytes) -> Any:
    import onnx

    return onnx.load_from_string(content)


def _fit(place: Path, victim: str) -> None:
    """Give the manifest size and hash of a file that was changed."""
    from MedAnomalyCLIPLib.bundle import MANIFEST, NETWORK, NETWORK_INT8, WEIGHTS, file_sha256

    data = json.loads((place / MANIFEST).read_bytes())
    size, sha256 = (place / victim).stat().st_size, file_sha256(place / victim)
    if victim == NETWORK_INT8:
        data["int8"] |= {"bytes": size, "sha256": sha256}
    else:
        part = {NETWORK: "network", WEIGHTS: "weights"}[victim]
        data |= {f"{part}_bytes": size, f"{part}_sha256": sha256}
    (place / MANIFEST).unlink()
    (place / MANIFEST).write_text(json.dumps(data))


def _other_numbers(content: bytes, rng: Rng) -> bytes:
    """Weights of which a stretch is no number, infinite, large, or noise."""
    start = 8 + int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    length = 2 * int(rng.integers(1, 40_000))
    at = start + 2 * int(rng.integers((len(content) - start - length) // 2))
    value = pick(rng, (np.nan, np.inf, -np.inf, 65504, 6e-8, None))
    piece = rng.bytes(length) if value is None else np.float16(value).tobytes() * (length // 2)
    changed[at : at + length] = piece
    return bytes(changed)


def _rewritten(model: Any, rng: Rng) -> bytes:
    """A graph that can be parsed, with one to three of its parts changed."""
    changed = type(model)()
    changed.CopyFrom(model)
    for _ in range(int(rng.integers(1, 4))):
        pick(rng, (_node, _node, _constant, _constant, _weight, _weight, _interface))(changed, rng)
    return bytes(changed.SerializeToString())


def _node(model: Any, rng: Rng) -> None:
    """Another operator, another input, none, one too many, an attribute of another value; or out of order."""
    graph = model.graph
    node = pick(rng, graph.node)
    kind = int(rng.integers(7))
    if kind == 0:
        node.op_type = str(pick(rng, _OPERATORS))
    elif kind == 1 and node.input:
        other = pick(rng, graph.node)
        node.input[int(rng.integers(len(node.input)))] = str(pick(rng, (*other.output, "", "nowhere")))
    elif kind == 2:
        graph.node.remove(node)
    elif kind == 3:
        node.input.append(str(pick(rng, ("text", "images", "", node.output[0]))))
    elif kind == 4 and node.attribute:
        attribute = pick(rng, node.attribute)
        attribute.i = int(pick(rng, _NUMBERS))
        attribute.ints.extend([int(pick(rng, _NUMBERS))])
        attribute.type = int(rng.integers(1, 12))
    elif kind == 5:
        node.output[0] = str(pick(rng, ("map", "score", node.output[0] * 2)))
    else:
        node.domain = str(pick(rng, ("com.microsoft", "com.example", "ai.onnx.ml")))


def _constant(model: Any, rng: Rng) -> None:
    """Shapes, axes and bounds are constants in the graph: other ones, of other types, and very large ones."""
    from onnx import numpy_helper

    held = [node for node in model.graph.node if node.op_type == "Constant" and node.attribute]
    node = pick(rng, held)
    attribute = node.attribute[0]
    values = np.atleast_1d(numpy_helper.to_array(attribute.t)) if attribute.HasField("t") else np.zeros(1)
    values = values.copy()
    kind = int(rng.integers(4))
    if kind == 0 and values.size:
        number = pick(rng, _NUMBERS)
        values.flat[int(rng.integers(values.size))] = _as(values.dtype, number)
    elif kind == 1:
        values = np.repeat(values, int(rng.integers(2, 9)))
    elif kind == 2:
        values = values.astype(pick(rng, (np.float32, np.int64, np.int8, np.float16)))
    else:
        attribute.t.dims.extend([int(pick(rng, _NUMBERS))])
        return
    attribute.t.CopyFrom(numpy_helper.from_array(values))


def _as(dtype: np.dtype, number: int) -> Any:
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return min(max(number, limits.min), limits.max)
    return number


def _weight(model: Any, rng: Rng) -> None:
    """Where a weight lies, how long it is, what shape and type it has."""
    weight = pick(rng, model.graph.initializer)
    kind = int(rng.integers(4))
    if kind == 0:
        entry = pick(rng, weight.external_data)
        name = str(pick(rng, TRICKY_NAMES)).replace("\ud800", "?")
        entry.value = name if entry.key == "location" else str(pick(rng, _NUMBERS))
    elif kind == 1:
        weight.dims[int(rng.integers(len(weight.dims)))] = int(pick(rng, _NUMBERS))
    elif kind == 2:
        weight.data_type = int(rng.integers(0, 24))
    else:
        weight.name = str(pick(rng, ("", "map", "images", "other")))


def _interface(model: Any, rng: Rng) -> None:
    """Names, types and shapes of what goes in and comes out; versions; parts that nobody asked for."""
    graph = model.graph
    value = pick(rng, (*graph.input, *graph.output))
    kind = int(rng.integers(5))
    if kind == 0:
        value.name = str(pick(rng, ("map", "score", "images", "other", "")))
    elif kind == 1:
        value.type.tensor_type.elem_type = int(rng.integers(0, 24))
    elif kind == 2 and value.type.tensor_type.shape.dim:
        pick(rng, value.type.tensor_type.shape.dim).dim_value = int(pick(rng, _NUMBERS))
    elif kind == 3:
        model.opset_import[0].version = int(pick(rng, (-1, 0, 1, 7, 13, 19, 21, 99, 2**62)))
    else:
        model.ir_version = int(pick(rng, (-1, 0, 3, 99, 2**62)))


TARGETS = (Graphs(),)
