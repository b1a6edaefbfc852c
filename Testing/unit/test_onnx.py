"""ONNX Runtime says what PyTorch says, of the very same weights; and which of them is taken when."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from pydicom.data import get_testdata_file

from MedAnomalyCLIPLib import onnx_export
from MedAnomalyCLIPLib.bundle import (
    MANIFEST,
    NETWORK,
    WEIGHTS,
    Bundle,
    default_bundle_path,
    file_sha256,
    read_manifest,
    save_bundle,
)
from MedAnomalyCLIPLib.cli import EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.detectors.specification import (
    AdapterSpec,
    ClusterSpec,
    FamiliaritySpec,
    FeatureFusionSpec,
    MemorySpec,
    PresetSpec,
    TextSpec,
)
from MedAnomalyCLIPLib.errors import BundleInvalid, DependencyMissing, InvalidRequest
from MedAnomalyCLIPLib.geometry import cut_slice
from MedAnomalyCLIPLib.onnx_export import export_network
from MedAnomalyCLIPLib.prompt import Prompt
from MedAnomalyCLIPLib.volume import Volume
from reference_maps import IMAGES, reference_maps

ACROSS_RUNTIMES = 2e-5
"""Largest difference of maps and scores between PyTorch and ONNX Runtime; sums are taken in another order."""


@pytest.fixture(scope="module")
def by_torch():
    return reference_maps(runtime="torch")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_the_bundled_detector_gives_the_same_maps_in_batches_of_any_size(batch_size, by_torch):
    _, maps, scores = reference_maps(batch_size, runtime="onnx")
    for name in IMAGES:
        assert np.ptp(maps[name]) > 0.05, "a map without contrast proves nothing"
        np.testing.assert_allclose(maps[name], by_torch[1][name], rtol=0, atol=ACROSS_RUNTIMES)
        assert scores[name] == pytest.approx(by_torch[2][name], abs=ACROSS_RUNTIMES)


def test_the_same_run_gives_the_same_map_to_the_last_bit():
    (_, one, first), (_, two, second) = (reference_maps(runtime="onnx") for _ in range(2))
    assert first == second
    assert all(np.array_equal(one[name], two[name]) for name in IMAGES)


def test_the_bundled_graph_holds_no_weights_but_points_to_them():
    folder = default_bundle_path()
    places, start = onnx_export._places(folder / WEIGHTS)
    model = onnx.load(folder / NETWORK, load_external_data=False)
    assert (folder / NETWORK).stat().st_size < 500_000
    assert len(model.graph.initializer) > 100
    for reference in model.graph.initializer:
        told = {entry.key: entry.value for entry in reference.external_data}
        begin, end = places[reference.name]["data_offsets"]
        assert told == {"location": WEIGHTS, "offset": str(start + begin), "length": str(end - begin)}
        assert list(reference.dims) == places[reference.name]["shape"]


# Detectors of other makes

PRESET = PresetSpec("brain-mr", "Brain, MR", ("MR",), "brain")
MAKES = {
    "presets": {
        "text": TextSpec(prompts="presets"),
        "presets": (PRESET, replace(PRESET, name="brain-ct", modalities=("CT",))),
        "familiarity": FamiliaritySpec(30),
        "adapter": AdapterSpec(kind="linear", subdivisions=2),
        "image_score": "class_and_peak",
        "clusters": ClusterSpec(weight=0),
        "smoothing": 2.0,
    },
    "memory": {"memory": MemorySpec(rows=50, precision="float16")},
}


@pytest.fixture(scope="module", params=list(MAKES))
def made(request, tmp_path_factory, tiny_manifest):
    """A detector with random weights, with its graph, which takes a while to make; not to be written to."""
    torch.manual_seed(0)
    spec = replace(tiny_manifest.detector, **MAKES[request.param])
    network = AnomalyDetector(spec)
    with torch.no_grad():
        for buffer in (network.text_bank, getattr(network, "preset_banks", None)):
            if buffer is not None:
                buffer.copy_(torch.nn.functional.normalize(torch.randn(buffer.shape), dim=-1))
        if spec.familiarity is not None:
            network.familiarity.fill(torch.randn(30, 2 * 2 * 64))
        if spec.memory is not None:
            network.memory.fill([torch.randn(60, 32) for _ in spec.tower.taps])
    folder = tmp_path_factory.mktemp("makes") / "made"
    save_bundle(folder, replace(tiny_manifest, detector=spec), network, "# made\n")
    return export_network(folder)


def planes(count=3):
    voxels = np.random.default_rng(0).integers(0, 200, (count, 40, 56), dtype=np.uint8)
    volume = Volume(voxels, np.eye(4), "MR")
    return [cut_slice(volume, 2, index) for index in range(count)]


def test_detectors_of_other_makes_say_the_same_in_both(made):
    by_onnx, by_torch = (
        SliceDetector.load(made.folder, device="cpu", runtime=runtime, precision="float32")
        for runtime in ("onnx", "torch")
    )
    assert by_onnx.provenance.runtime.startswith("ONNX Runtime 1.")
    assert by_torch.provenance.runtime.startswith("PyTorch 2.")
    for prompt in (Prompt(), *(Prompt(preset.name) for preset in by_onnx.presets)):
        one, two = (list(d.detect_many(planes(), prompt=prompt)) for d in (by_onnx, by_torch))
        for found, expected in zip(one, two, strict=True):
            np.testing.assert_allclose(found.map, expected.map, rtol=0, atol=ACROSS_RUNTIMES)
            assert found.score == pytest.approx(expected.score, abs=ACROSS_RUNTIMES)
            assert found.unlikeness == pytest.approx(expected.unlikeness, abs=1e-4)


def test_what_onnx_cannot_be_given_is_refused(tmp_path, make_bundle, tiny_manifest):
    spec = replace(tiny_manifest.detector, feature_fusion=FeatureFusionSpec((8, 8)))
    bundle = make_bundle("fused", detector=spec)
    with pytest.raises(InvalidRequest, match="PyTorch only"):
        export_network(bundle.folder)


def test_a_graph_that_differs_from_the_network_is_not_kept(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made.folder, tmp_path / "made")
    model = onnx.load(folder / NETWORK, load_external_data=False)
    (last,) = [node for node in model.graph.node if node.op_type == "Softmax"][-1:]
    last.op_type = "LogSoftmax"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(onnx_export, "_graph", lambda bundle: model)
    with pytest.raises(InvalidRequest, match="differs from PyTorch"):
        export_network(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_without_a_detector_the_command_says_so(tmp_path, capsys):
    assert main(["export-onnx", str(tmp_path)]) == EXIT_USER_ERROR
    assert "choose the folder of a detector" in capsys.readouterr().err


# Which is taken


def runtime_of(bundle=None, **choice):
    return SliceDetector.load(bundle, **choice).provenance.runtime.partition(" 1")[0].partition(" 2")[0]


def test_on_the_cpu_onnx_runtime_is_taken_where_it_serves(tiny_bundle):
    assert runtime_of(device="cpu") == "ONNX Runtime"
    assert runtime_of(device="cpu", runtime="torch") == "PyTorch"
    assert runtime_of(tiny_bundle.folder, device="cpu") == "PyTorch"
    assert runtime_of(device="cpu", features=lambda images: []) == "PyTorch"


def test_where_onnx_runtime_is_not_installed_torch_is_taken(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    assert runtime_of(device="cpu") == "PyTorch"


@pytest.mark.parametrize(("gpu", "taken"), [("cuda", "torch"), ("mps", "torch"), ("cpu", "onnx")])
def test_a_gpu_is_left_to_torch(monkeypatch, gpu, taken):
    from MedAnomalyCLIPLib import networks

    monkeypatch.setattr(networks.importlib.metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(networks, "select_device", lambda name: torch.device(gpu))
    manifest = read_manifest(default_bundle_path())
    chosen = networks._choose(manifest, "auto", "auto", "auto", with_features=False)
    assert chosen.runtime == taken


def test_a_torch_for_processors_alone_is_not_imported_to_look_for_a_gpu(monkeypatch):
    from MedAnomalyCLIPLib import networks

    monkeypatch.setattr(networks.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(networks, "select_device", lambda name: pytest.fail("it was looked for"))
    manifest = read_manifest(default_bundle_path())
    assert networks._choose(manifest, "auto", "auto", "auto", with_features=False).runtime == "onnx"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"runtime": "tensorrt"}, "one of auto, torch, onnx"),
        ({"runtime": "onnx", "device": "cuda"}, "on the CPU only"),
        ({"runtime": "onnx", "features": lambda images: []}, "no graph"),
    ],
)
def test_a_runtime_that_cannot_be_had_is_refused(choice, words):
    with pytest.raises(InvalidRequest, match=words):
        SliceDetector.load(**choice)


def test_a_detector_without_graph_says_how_to_get_one(tiny_bundle):
    with pytest.raises(InvalidRequest, match="export-onnx"):
        SliceDetector.load(tiny_bundle.folder, runtime="onnx")


def test_onnx_runtime_that_was_asked_for_and_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyMissing, match="onnxruntime"):
        SliceDetector.load(runtime="onnx")


# Damaged graphs


def named_to_fit(folder):
    """As whoever wanted a graph to be loaded would do."""
    told = {
        "network_bytes": (folder / NETWORK).stat().st_size,
        "network_sha256": file_sha256(folder / NETWORK),
    }
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text()) | told))


def test_an_altered_graph_is_refused(tiny_bundle):
    (tiny_bundle.folder / NETWORK).write_bytes(b"a graph")
    named_to_fit(tiny_bundle.folder)
    Bundle.load(tiny_bundle.folder)
    (tiny_bundle.folder / NETWORK).write_bytes(b"a grave")
    with pytest.raises(BundleInvalid, match=r"network\.onnx is incomplete or was altered"):
        Bundle.load(tiny_bundle.folder)


def test_a_file_that_is_no_graph_is_refused(tiny_bundle):
    (tiny_bundle.folder / NETWORK).write_bytes(b"no graph")
    named_to_fit(tiny_bundle.folder)
    with pytest.raises(BundleInvalid, match="cannot be used") as caught:
        SliceDetector.load(tiny_bundle.folder, device="cpu")
    assert str(tiny_bundle.folder.parent) not in str(caught.value), "a folder may be named after a patient"


@pytest.mark.parametrize(
    ("map_value", "score_value", "words"),
    [
        (0.5, 0.25, None),
        (1 + 1e-6, 0.25, None),
        (1.5, 0.25, "values that are no numbers, or none"),
        (float("nan"), 0.25, "values that are no numbers"),
        (0.5, -1.0, "values that are no numbers, or none"),
        (0.5, float("inf"), "values that are no numbers"),
    ],
)
def test_values_that_no_map_can_have_are_refused(tiny_bundle, map_value, score_value, words):
    from onnx import TensorProto, helper

    kinds = {"images": TensorProto.FLOAT, "valid": TensorProto.BOOL, "text": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("map", "score")]

    def full(name, value, like):
        shape = helper.make_node("Shape", ["images"], [f"{name}_shape"], end=1)
        held = helper.make_tensor(name, TensorProto.FLOAT, [1], [value])
        if like == "score":
            return [shape, helper.make_node("ConstantOfShape", [f"{name}_shape"], [name], value=held)]
        rest = helper.make_tensor("rest", TensorProto.INT64, [2], [64, 64])
        return [
            shape,
            helper.make_node("Constant", [], ["rest"], value=rest),
            helper.make_node("Concat", [f"{name}_shape", "rest"], ["whole"], axis=0),
            helper.make_node("ConstantOfShape", ["whole"], [name], value=held),
        ]

    nodes = [*full("map", map_value, "map"), *full("score", score_value, "score")]
    model = helper.make_model(
        helper.make_graph(nodes, "constant", inputs, told),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    (tiny_bundle.folder / NETWORK).write_bytes(model.SerializeToString())
    named_to_fit(tiny_bundle.folder)
    detector = SliceDetector.load(tiny_bundle.folder, device="cpu")
    if words is None:
        assert detector.detect(planes()[0]).map.max() == min(map_value, 1)
        return
    with pytest.raises(BundleInvalid, match=words):
        detector.detect(planes()[0])


@pytest.mark.parametrize(
    ("outputs", "words"),
    [(("map", "other"), "not the graph of a detector"), (("map", "score"), "another shape")],
)
def test_a_graph_of_something_else_is_refused(tiny_bundle, outputs, words):
    from onnx import TensorProto, helper

    kinds = {"images": TensorProto.FLOAT, "valid": TensorProto.BOOL, "text": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    nodes = [helper.make_node("Identity", ["images"], [name]) for name in outputs]
    graph = helper.make_graph(nodes, "other", inputs, told)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tiny_bundle.folder / NETWORK).write_bytes(model.SerializeToString())
    named_to_fit(tiny_bundle.folder)
    with pytest.raises(BundleInvalid, match=words):
        SliceDetector.load(tiny_bundle.folder, device="cpu").detect(planes()[0])


def test_a_normalisation_without_bias_does_not_end_the_process(tiny_bundle):
    """In a process of its own: ONNX Runtime's own way of fusing it does."""
    from onnx import TensorProto, helper, numpy_helper

    kinds = {"images": TensorProto.FLOAT, "valid": TensorProto.BOOL, "text": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("map", "score")]
    nodes = [
        helper.make_node("LayerNormalization", ["text", "scale", ""], ["map"], axis=-1),
        helper.make_node("Identity", ["text"], ["score"]),
    ]
    scale = numpy_helper.from_array(np.ones(32, np.float32), "scale")
    graph = helper.make_graph(nodes, "other", inputs, told, [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tiny_bundle.folder / NETWORK).write_bytes(model.SerializeToString())
    named_to_fit(tiny_bundle.folder)
    code = "from MedAnomalyCLIPLib.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    image = str(get_testdata_file("MR_small.dcm"))
    command = ["detect", image, "--model", str(tiny_bundle.folder), "--runtime", "onnx", "--output"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, str(tiny_bundle.folder.parent / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert "another shape" in done.stderr


def test_a_graph_may_not_read_other_files(tiny_bundle, tmp_path):
    """Where the weights lie is data of the graph, and must not lead out of the bundle."""
    from onnx import TensorProto, helper

    (tmp_path / "secret").write_bytes(np.ones(4, np.float32).tobytes())
    secret = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[4])
    secret.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../secret"), ("offset", "0"), ("length", "16")):
        secret.external_data.add(key=key, value=value)
    told = helper.make_tensor_value_info("map", TensorProto.FLOAT, [4])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["secret"], ["map"])], "reads", [], [told], [secret]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tiny_bundle.folder / NETWORK).write_bytes(model.SerializeToString())
    named_to_fit(tiny_bundle.folder)
    with pytest.raises(BundleInvalid, match="cannot be used"):
        SliceDetector.load(tiny_bundle.folder, device="cpu")
