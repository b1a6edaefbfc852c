"""Products of 8-bit integers, and other precisions: how little they change, and when they are taken."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from pydicom.data import get_testdata_file

from MedAnomalyCLIPLib import networks, onnx_export, onnx_int8
from MedAnomalyCLIPLib.bundle import (
    MANIFEST,
    NETWORK_INT8,
    WEIGHTS,
    Bundle,
    IntegerGraph,
    default_bundle_path,
    read_manifest,
)
from MedAnomalyCLIPLib.bundle_list import list_bundles
from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest
from MedAnomalyCLIPLib.geometry import SlicePlane, cut_slice
from MedAnomalyCLIPLib.onnx_int8 import ALLOWED, Drift, drift, integer_graph, made_up_planes
from MedAnomalyCLIPLib.volume import Volume, read_volume


@pytest.fixture(scope="module")
def exact():
    return SliceDetector.load(device="cpu", runtime="onnx", precision="float32")


@pytest.fixture(scope="module")
def rounded():
    return SliceDetector.load(device="cpu", precision="int8")


def heads(count=4, side=200):
    """Discs with a ring, stripes, noise and a spot, unlike those that the export looks at."""
    random = np.random.default_rng(7)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    for number in range(count):
        radius = np.hypot(x, (1 + 0.1 * number) * y)
        pixels = 700 * (radius < 0.8) + 500 * ((radius > 0.7) & (radius < 0.8))
        pixels = pixels + 60 * np.sin(9 * x + number) * (radius < 0.7) + random.normal(0, 15, x.shape)
        pixels[np.hypot(x - 0.2, y + 0.1 * number) < 0.12] += 350
        yield cut_slice(Volume(np.clip(pixels, 0, None)[None].astype(np.int16), np.eye(4), "MR"), 2, 0)


@pytest.fixture(scope="module")
def planes():
    files = (read_volume(str(get_testdata_file(name))) for name in ("CT_small.dcm", "MR_small.dcm"))
    return [*(cut_slice(volume, 2, 0) for volume in files), *heads()]


# What it changes


def test_the_bundled_detector_stays_inside_the_gate(exact, rounded, planes):
    assert rounded.provenance.precision == "int8"
    assert max(np.ptp(result.map) for result in exact.detect_many(planes)) > 0.3, "a flat map proves nothing"
    found = drift(exact, rounded, planes)
    assert found.is_small, found.words()
    assert found.score > 0
    assert found.map > 0


def test_the_bundled_detector_tells_how_far_it_was_found_to_drift():
    told = read_manifest(default_bundle_path()).int8
    assert Drift(told.score_drift, told.map_drift, told.unlikeness_drift).is_small
    assert told.map_drift > 0


def test_slices_that_go_together_do_not_change_each_other(rounded, planes):
    together = list(rounded.detect_many(planes, batch_size=len(planes)))
    for plane, one in zip(planes, together, strict=True):
        alone = rounded.detect(plane)
        assert np.array_equal(alone.map, one.map)
        assert (alone.score, alone.unlikeness) == (one.score, one.unlikeness)


def test_drift_is_told_where_it_is_and_no_number_is_never_small(exact, planes):
    class Shifted:
        presets = exact.presets

        def detect_many(self, planes, prompt):
            for number, result in enumerate(exact.detect_many(planes, prompt=prompt)):
                shifted = result.map.copy()
                shifted[0, 0] += 0.25 * (number == 1)
                unlike = result.unlikeness * 1.1
                yield replace(result, map=shifted, score=result.score - 0.125, unlikeness=unlike)

    found = drift(exact, Shifted(), planes[:2])
    assert found == pytest.approx((0.125, 0.25, 0.1), abs=1e-6)
    assert not found.is_small
    assert Drift(0, 0, 0).is_small
    for place in range(3):
        assert not Drift(*(float("nan") if place == n else 0 for n in range(3))).is_small
        assert not Drift(*(ALLOWED[n] * 1.01 if place == n else 0 for n in range(3))).is_small


def test_made_up_slices_differ_from_each_other_and_are_the_same_each_time():
    one, two = made_up_planes(3), made_up_planes(3)
    assert all(isinstance(plane, SlicePlane) and not plane.is_empty for plane in one)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0].pixels, one[1].pixels)


# The graph


def products(kind, rows=3, depth=128, columns=160):
    """A graph of one product, its weight (K, N), its bias, and values to multiply."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(depth, columns)).astype(np.float32) * random.uniform(0.01, 3, columns)
    weight = weight.astype(np.float32)
    weight[:, 5] = 0
    bias = random.normal(size=columns).astype(np.float32)
    values = random.normal(0.5, 2, (rows, depth)).astype(np.float32)
    name = "tower.visual.transformer.resblocks.1.mlp"
    if kind == "Gemm":
        stored = [numpy_helper.from_array(weight.T.copy(), name), numpy_helper.from_array(bias, "bias")]
        nodes = [helper.make_node("Gemm", ["values", name, "bias"], ["found"], transB=1)]
    else:
        stored, bias = [numpy_helper.from_array(weight.T.astype(np.float16).copy(), name)], np.float32(0)
        weight = weight.astype(np.float16).astype(np.float32)
        nodes = [
            helper.make_node("Cast", [name], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["cast"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["values", "turned"], ["found"]),
        ]
    told = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("values", "found")]
    graph = helper.make_graph(nodes, "product", told[:1], told[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model, weight, bias, values


def in_integers(values, weight):
    """The product as it is defined: values in 256 steps of their range, each column in 127 of its own."""
    low, high = min(values.min(), 0), max(values.max(), 0)
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    steps = np.clip(np.round(values / scale) + zero, 0, 255) - zero
    scales = np.maximum(np.abs(weight).max(0), 1e-12) / 63
    return steps @ np.round(weight / scales) * scale * scales


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_a_product_is_that_of_rounded_numbers_by_one_kernel(kind, tmp_path):
    model, weight, bias, values = products(kind)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(integer_graph(model).SerializeToString(), options)
    (found,) = session.run(None, {"values": values})
    np.testing.assert_allclose(found, in_integers(values, weight) + bias, rtol=0, atol=1e-3)
    plain = values @ weight + bias
    assert 1e-4 < np.abs(found - plain).max() / np.abs(plain).max() < 0.05
    run = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert run == ["DynamicQuantizeMatMul"]


def test_the_sum_of_two_products_fits_into_sixteen_bits():
    """What processors without VNNI keep; one that did not fit would be cut there, and nowhere else."""
    assert 2 * 255 * onnx_int8._STEPS < 2**15


def test_small_products_and_those_of_other_parts_stay_as_they_are():
    model, *_ = products("Gemm", columns=100)
    assert integer_graph(model) is None
    for name in ("familiarity.rows", "tower.visual.transformer.resblocks.0.mlp"):
        model, *_ = products("Gemm")
        model.graph.initializer[0].name = model.graph.node[0].input[1] = name
        assert integer_graph(model) is None


def test_the_bundled_graph_holds_no_weights():
    path = default_bundle_path() / NETWORK_INT8
    model = onnx.load(path, load_external_data=False)
    assert path.stat().st_size < 500_000
    assert len(model.graph.initializer) > 100
    for reference in model.graph.initializer:
        told = {entry.key: entry.value for entry in reference.external_data}
        assert told["location"] == WEIGHTS
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulInteger") > 20


# The export


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Export the bundled detector anew, with a graph that is there already and a drift that is made up."""
    model = onnx.load(default_bundle_path() / "network.onnx", load_external_data=False)
    monkeypatch.setattr(onnx_export, "_graph", lambda bundle: model)
    monkeypatch.setattr(onnx_export, "_compare", lambda bundle: None)

    def export(found):
        folder = shutil.copytree(default_bundle_path(), tmp_path / "detector")
        monkeypatch.setattr(onnx_export, "drift", lambda exact, rounded: found)
        return folder, onnx_export.export_network(folder, told.append), told

    told: list[str] = []
    return export


def test_a_graph_inside_the_gate_is_kept_and_its_drift_told(exported):
    folder, bundle, told = exported(Drift(0.001, 0.002, 0.003))
    manifest = bundle.manifest.int8
    assert (manifest.score_drift, manifest.map_drift, manifest.unlikeness_drift) == (0.001, 0.002, 0.003)
    assert (folder / NETWORK_INT8).stat().st_size == manifest.bytes
    assert told == []


def test_a_graph_outside_of_the_gate_is_left_out_and_the_reason_told(exported):
    folder, bundle, told = exported(Drift(0.001, 0.5, 0.003))
    assert bundle.manifest.int8 is None
    assert not (folder / NETWORK_INT8).exists()
    (line,) = told
    assert "maps by 0.5" in line
    assert "maps by 0.02" in line
    assert SliceDetector.load(folder, device="cpu").provenance.precision == "float32"


def test_an_altered_or_missing_graph_is_refused(tmp_path):
    folder = shutil.copytree(default_bundle_path(), tmp_path / "detector")
    graph = bytearray((folder / NETWORK_INT8).read_bytes())
    graph[1000] ^= 1
    (folder / NETWORK_INT8).write_bytes(graph)
    with pytest.raises(BundleInvalid, match=r"network_int8\.onnx is incomplete or was altered"):
        Bundle.load(folder)
    (folder / NETWORK_INT8).unlink()
    assert list(list_bundles(tmp_path)[1]) == [folder]
    with pytest.raises(BundleInvalid, match=r"has no network_int8\.onnx"):
        Bundle.load(folder)


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    folder = shutil.copytree(default_bundle_path(), tmp_path / "detector")
    (folder / NETWORK_INT8).write_bytes(b"no graph")
    told = json.loads((folder / MANIFEST).read_text())
    told["int8"] |= vars(IntegerGraph(8, onnx_export.file_sha256(folder / NETWORK_INT8), 0.0, 0.0, 0.0))
    (folder / MANIFEST).write_text(json.dumps(told))
    with pytest.raises(BundleInvalid, match="cannot be used"):
        SliceDetector.load(folder, device="cpu")


# Which is taken


def choose(manifest=None, device="cpu", runtime="auto", precision="auto", with_features=False):
    manifest = manifest or read_manifest(default_bundle_path())
    return tuple(networks._choose(manifest, device, runtime, precision, with_features=with_features))


@pytest.mark.parametrize(
    ("choice", "taken"),
    [
        ({}, ("onnx", "int8")),
        ({"precision": "float32"}, ("onnx", "float32")),
        ({"runtime": "torch"}, ("torch", "auto")),
        ({"precision": "bfloat16"}, ("torch", "bfloat16")),
        ({"device": "cuda"}, ("torch", "auto")),
        ({"device": "auto", "precision": "int8"}, ("onnx", "int8")),
        ({"with_features": True}, ("torch", "auto")),
    ],
)
def test_integers_are_taken_where_nothing_else_was_asked_for(choice, taken):
    assert choose(**choice) == taken


def test_without_a_graph_of_integers_it_is_float32():
    plain = replace(read_manifest(default_bundle_path()), int8=None)
    assert choose(plain) == ("onnx", "float32")
    with pytest.raises(InvalidRequest, match="export-onnx"):
        choose(plain, precision="int8")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"precision": "int4"}, "one of auto, float32, bfloat16, float16, int8"),
        ({"precision": "int8", "runtime": "torch"}, "takes --runtime onnx"),
        ({"precision": "int8", "device": "cuda"}, "on the CPU only"),
        ({"precision": "bfloat16", "runtime": "onnx"}, "takes --runtime torch"),
    ],
)
def test_what_cannot_be_had_is_refused(choice, words):
    with pytest.raises(InvalidRequest, match=words):
        choose(**choice)


def test_the_command_takes_and_tells_a_precision(tmp_path, capsys):
    image = str(get_testdata_file("MR_small.dcm"))
    for precision in ("float32", "int8"):
        output = tmp_path / precision
        assert main(["detect", image, "--output", str(output), "--precision", precision]) == EXIT_DONE
        told = json.loads((output / "MR_small" / "result.json").read_text())
        assert told["precision"] == precision
    refused = ["--precision", "int8", "--runtime", "torch"]
    assert main(["detect", image, "--output", str(tmp_path / "no"), *refused]) == EXIT_USER_ERROR
    assert "takes --runtime onnx" in capsys.readouterr().err


# bfloat16


def test_bfloat16_is_refused_where_the_processor_has_no_instructions_for_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    with pytest.raises(InvalidRequest, match="no instructions for bfloat16"):
        SliceDetector.load(device="cpu", precision="bfloat16")


def test_bfloat16_moves_the_bundled_detector_little(exact, planes):
    """Computed by any processor, with or without instructions of its own."""
    from MedAnomalyCLIPLib.torch_network import TorchNetwork

    bundle = Bundle.load(default_bundle_path())
    lowered = SliceDetector(
        bundle,
        TorchNetwork(
            bundle.build(), bundle.manifest.preprocess, torch.device("cpu"), precision=torch.bfloat16
        ),
    )
    assert lowered.provenance.precision == "bfloat16"
    found = drift(exact, lowered, planes[1:4])
    assert 1e-4 < found.map < 0.05
    assert found.score < 0.02
