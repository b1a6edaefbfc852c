"""A detector's ONNX graph with its large matrix products in 8-bit integers, and what that changes.

Like the graph that it is made of, it holds no weights: it rounds those of `weights.safetensors` when ONNX
Runtime loads it, each output's column to a scale of its own, and the activations as they come. Needs the
package onnx; whoever runs the graph does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .geometry import SlicePlane
from .prompt import Prompt

if TYPE_CHECKING:
    from .detection import SliceDetector

_STEPS = 63
"""From 0 to a column's largest weight. With all 127, processors without VNNI would lose the highest bit of
two products' sum; so every processor comes to the same integers."""
_PARTS = ("tower.visual.transformer.", "adapters.")
_FIRST_BLOCK = "tower.visual.transformer.resblocks.0."
"""Left in float32: its rounding goes through all others, and made half of the largest differences of maps."""
LEFT_OUT: tuple[tuple[str, ...], ...] = ((), (".mlp.c_proj.",))
"""What the export leaves in float32 beside it: nothing, or, where that moves too much, the second product of
each MLP. What goes into it is more uneven than what goes into the others: it made three quarters of the
differences of the bundled detector's scores, and is a third of its arithmetic."""
_SMALLEST = 2**14
"""Weights of a product; with fewer, rounding the activations costs more than it saves."""


class Drift(NamedTuple):
    """Largest differences between two detectors.

    Attributes:
        score: of scores.
        map: of any pixel of a map.
        unlikeness: of unlikeness, as a share of it; 0 for detectors that do not tell it.
    """

    score: float
    map: float
    unlikeness: float

    @property
    def is_small(self) -> bool:
        """Whether it stays inside the gate. Drift that is no number does not."""
        return all(mine <= allowed for mine, allowed in zip(self, ALLOWED, strict=True))

    def words(self) -> str:
        return f"scores by {self.score:.2g}, maps by {self.map:.2g}, unlikeness by {self.unlikeness:.1%}"


ALLOWED = Drift(score=0.005, map=0.02, unlikeness=0.02)
"""The gate. A reader is shown scores in two digits, of which this is half a unit. An image's contrast changed
by 2 % moves scores of the bundled detector by up to 0.02, its maps by up to 0.05."""


def integer_graph(model: Any, left_out: Sequence[str] = ()) -> Any:
    """The same graph with products of integers.

    Args:
        model: an ONNX model whose initializers are the detector's weights, by their names.
        left_out: parts of the names of weights whose products stay as they are.

    Returns:
        Another model; None if no product is large enough.
    """
    from onnx import ModelProto

    found = ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    weight_of = _weights_behind(graph)
    nodes: list[Any] = _constants()
    count = 0
    for node in graph.node:
        weight = weight_of(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or not _is_worth_it(weight) or any(part in weight.name for part in left_out):
            nodes.append(node)
        else:
            nodes += _integer_product(node, f"int8_{count}_")
            count += 1
    if not count:
        return None
    del graph.node[:]
    graph.node.extend(nodes)
    return found


def drift(exact: SliceDetector, other: SliceDetector, planes: Sequence[SlicePlane] | None = None) -> Drift:
    """How far two detectors differ, with every text that they know.

    Args:
        exact, other: the same detector, run in different ways.
        planes: slices to compare them on; made-up ones if None.
    """
    planes = made_up_planes(6) if planes is None else planes
    found = []
    for prompt in (Prompt(), *(Prompt(preset.name) for preset in exact.presets)):
        both = (detector.detect_many(planes, prompt=prompt) for detector in (exact, other))
        for one, two in zip(*both, strict=True):
            unlike = 0.0
            if one.unlikeness is not None and two.unlikeness is not None:
                unlike = abs(two.unlikeness / max(one.unlikeness, 1e-6) - 1)
            found.append((abs(one.score - two.score), np.abs(one.map - two.map).max(), unlike))
    return Drift(*np.max(found, axis=0).tolist())  # unlike Python's, this maximum keeps what is no number


def made_up_planes(count: int, side: int = 256) -> list[SlicePlane]:
    """Slices with what detectors react to: a body, structures of all sizes, noise, a bright or dark spot."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    planes = []
    for _ in range(count):
        slope = random.uniform(1.2, 2.2)
        spectrum = np.fft.fft2(random.normal(size=(side, side))) / np.maximum(frequency, 1 / side) ** slope
        texture = np.fft.ifft2(spectrum).real
        body = (x / random.uniform(0.6, 0.95)) ** 2 + (y / random.uniform(0.6, 0.95)) ** 2 < 1
        pixels = body * (500 + 120 * texture / texture.std())
        centre, width = random.uniform(-0.4, 0.4, 2), random.uniform(0.05, 0.2)
        spot = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * width**2))
        pixels += body * spot * random.choice([-300, 400]) + random.normal(0, 10, (side, side))
        pixels = np.clip(pixels, 0, 2000).astype(np.uint16)
        planes.append(SlicePlane(pixels, np.eye(4), np.ones(pixels.shape, bool), description="made up"))
    return planes


def _weights_behind(graph: Any) -> Callable[[str], Any]:
    """Finds the stored weight that a value is, cast or transposed perhaps; None for other values."""
    stored = {held.name: held for held in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def weight_of(name: str) -> Any:
        while name not in stored:
            maker = makers.get(name)
            if maker is None or maker.op_type not in ("Cast", "Transpose"):
                return None
            name = maker.input[0]
        return stored[name]

    return weight_of


def _is_worth_it(weight: Any) -> bool:
    return (
        weight.name.startswith(_PARTS)
        and not weight.name.startswith(_FIRST_BLOCK)
        and len(weight.dims) == 2
        and weight.dims[0] * weight.dims[1] >= _SMALLEST
    )


_AXIS, _LEVELS, _TINY = "int8_axis", "int8_levels", "int8_tiny"


def _constants() -> list[Any]:
    from onnx import helper, numpy_helper

    values: dict[str, np.ndarray] = {
        _AXIS: np.array([0], np.int64),
        _LEVELS: np.array(_STEPS, np.float32),
        _TINY: np.array(1e-12, np.float32),
    }
    return [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))
        for name, value in values.items()
    ]


def _integer_product(node: Any, prefix: str) -> list[Any]:
    """Nodes that do what a MatMul or Gemm does, in a form that ONNX Runtime makes one kernel of.

    Weights W (K, N) are held as round(W / scale), scale (N,) = max |W| / steps; all of that is computed once.
    """
    from onnx import TensorProto, helper

    nodes: list[Any] = []

    def make(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        names = [prefix + output for output in outputs]
        nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0]

    values, weight = node.input[0], node.input[1]
    told = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if told.get("transB"):
        weight = make("Transpose", [weight], "transposed", perm=[1, 0])
    largest = make("ReduceMax", [make("Abs", [weight], "size"), _AXIS], "largest", keepdims=0)
    scale = make("Div", [make("Max", [largest, _TINY], "range"), _LEVELS], "scale")
    rounded = make("Round", [make("Div", [weight, scale], "divided")], "rounded")
    integers = make("Cast", [rounded], "weight", to=TensorProto.INT8)
    quantised = make("DynamicQuantizeLinear", [values], "values", "values_scale", "values_zero")
    product = make("MatMulInteger", [quantised, integers, prefix + "values_zero"], "product")
    product = make("Cast", [product], "floating", to=TensorProto.FLOAT)
    make("Mul", [product, make("Mul", [prefix + "values_scale", scale], "scales")], "scaled")
    if len(node.input) > 2:
        make("Add", [prefix + "scaled", node.input[2]], "sum")
    nodes[-1].output[0] = node.output[0]
    return nodes
