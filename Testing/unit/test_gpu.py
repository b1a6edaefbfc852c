"""What runs on a GPU, on the CPU: the same numbers as without it, and fakes in place of a GPU's memory."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from MedAnomalyCLIPLib import cuda
from MedAnomalyCLIPLib.cli import main
from MedAnomalyCLIPLib.clip.lowered import LoweredTower, fold_quick_gelu
from MedAnomalyCLIPLib.clip.towers import create_vision_tower
from MedAnomalyCLIPLib.detection import SliceDetector, detect_slices
from MedAnomalyCLIPLib.detectors.specification import AdapterSpec
from MedAnomalyCLIPLib.device_preprocess import DevicePreprocessor, percentile
from MedAnomalyCLIPLib.errors import DeviceMemoryExhausted, InvalidRequest
from MedAnomalyCLIPLib.geometry import SlicePlane, cut_slices
from MedAnomalyCLIPLib.preprocess import STANDARD_WINDOWS, PreprocessSpec, SlicePreprocessor, WindowRule
from MedAnomalyCLIPLib.torch_network import TorchNetwork
from MedAnomalyCLIPLib.volume import Volume
from unit.grids import bounded

CPU = torch.device("cpu")
GPU = torch.device("cuda:0")
SPEC = PreprocessSpec(48, (0.5, 0.4, 0.3), (0.25, 0.3, 0.2), dict(STANDARD_WINDOWS))
PIXEL = 1e-5
"""How far two ways to prepare a slice may be apart, in units of the window."""
GIB = 2**30


def plane_of(pixels, modality="", units="", valid=None, spacing=(1.0, 1.0)):
    valid = np.ones(pixels.shape[:2], bool) if valid is None else valid
    return SlicePlane(pixels, np.diag([spacing[1], spacing[0], 1.0, 1.0]), valid, None, modality, units)


@st.composite
def runs_of_planes(draw):
    """Neighbours that are alike, in two kinds, and one that is prepared by itself."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for _ in range(2):
        shape = draw(st.tuples(*[st.integers(2, 90)] * 2))
        dtype = draw(st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.int32, ">u2", "f4", "f8"]))
        modality, units = draw(st.sampled_from([("", ""), ("MR", ""), ("CT", "HU")]))
        spacing = draw(st.tuples(*[st.floats(0.2, 4.0)] * 2))
        limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(np.float32)
        for _ in range(draw(st.integers(1, 3))):
            pixels = generator.normal(500, 40000, shape).clip(limits.min, limits.max).astype(dtype)
            found.append(plane_of(pixels, modality, units, spacing=spacing))
    lone = found[0].pixels.astype(np.float32)
    lone.flat[0] = np.nan
    valid = np.isfinite(lone)
    valid.flat[-1] = draw(st.booleans())
    found.insert(draw(st.integers(0, len(found))), plane_of(lone, "MR", valid=valid))
    return found


@bounded
@given(
    planes=runs_of_planes(),
    window=st.none() | st.tuples(st.floats(-500, 500), st.floats(501, 2000)),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_slices_prepared_together_are_those_prepared_one_by_one(planes, window, interpolation):
    spec = replace(SPEC, interpolation=interpolation)
    found = DevicePreprocessor(spec, CPU).prepare_many(planes, window)
    expected = SlicePreprocessor(spec).prepare_many(planes, window)
    assert found.fits == expected.fits
    np.testing.assert_allclose(found.windows.numpy(), expected.windows, rtol=1e-12, atol=1e-9)
    assert found.images.dtype == torch.float32
    np.testing.assert_allclose(found.images.numpy(), expected.images, rtol=0, atol=PIXEL / min(spec.std))
    assert np.array_equal(found.valid.numpy(), expected.valid)


@bounded
@given(
    shapes=st.lists(st.tuples(*[st.integers(1, 120)] * 2), min_size=1, max_size=4), seed=st.integers(0, 1000)
)
def test_maps_brought_back_together_are_those_brought_back_one_by_one(shapes, seed):
    planes = [plane_of(np.zeros(shape, np.uint8)) for shape in shapes for _ in range(2)]
    fits = SlicePreprocessor(SPEC).prepare_many(planes).fits
    maps = np.random.default_rng(seed).random((len(planes), SPEC.size, SPEC.size), np.float32)
    found = DevicePreprocessor(SPEC, CPU).map_back_many(torch.from_numpy(maps), fits)
    for one, expected in zip(found, SlicePreprocessor(SPEC).map_back_many(maps, fits), strict=True):
        np.testing.assert_allclose(one.numpy(), expected, rtol=0, atol=1e-6)


def test_a_window_without_width_is_black():
    planes = [plane_of(np.full((9, 12), 7, np.uint16), "MR")] * 2
    found = DevicePreprocessor(SPEC, CPU).prepare_many(planes)
    np.testing.assert_array_equal(found.images.numpy(), SlicePreprocessor(SPEC).prepare_many(planes).images)
    assert found.windows.tolist() == [[7, 7]] * 2


def test_many_and_large_slices_take_turns(monkeypatch):
    planes = [plane_of(np.random.default_rng(k).integers(0, 900, (20, 20)), "MR") for k in range(5)]
    whole = DevicePreprocessor(SPEC, CPU).prepare_many(planes)
    monkeypatch.setattr("MedAnomalyCLIPLib.device_preprocess.PIXELS_AT_ONCE", 2 * 400)
    parts = DevicePreprocessor(SPEC, CPU).prepare_many(planes)
    torch.testing.assert_close(parts.images, whole.images, rtol=0, atol=0)


@bounded
@given(count=st.integers(1, 300), percent=st.floats(0, 100), seed=st.integers(0, 1000))
def test_percentiles_are_those_of_numpy(count, percent, seed):
    values = np.random.default_rng(seed).integers(0, 50, (3, count)).astype(np.float32)
    found = percentile(torch.from_numpy(values), percent)
    np.testing.assert_allclose(
        found.numpy(), np.percentile(values, [percent], axis=1)[0], rtol=1e-12, atol=1e-12
    )


@pytest.fixture
def detector(tiny_bundle):
    return SliceDetector.load(tiny_bundle.folder, device="cpu")


def as_on_a_gpu(detector, bundle):
    """The way of a GPU, two batches under way, on the CPU."""
    network = detector.network
    network.preprocessor = DevicePreprocessor(bundle.manifest.preprocess, CPU)
    network.under_way = 2
    return SliceDetector(bundle, network)


def slices(count=7):
    voxels = np.zeros((count, 40, 30), np.uint16)
    voxels[:, 4:-4, 4:-4] = np.random.default_rng(0).integers(500, 3000, (count, 32, 22))
    voxels[3] = 0
    return Volume(voxels, np.diag([-1.0, -1.5, 4.0, 1.0]), modality="MR")


def test_results_by_the_way_of_a_gpu_are_the_same_and_in_order(tiny_bundle, detector):
    planes = list(cut_slices(slices(), 2, range(7)))
    planes.insert(2, plane_of(np.random.default_rng(1).integers(0, 255, (33, 21, 3), dtype=np.uint8)))
    planes[6].valid[:4] = False
    expected = list(detector.detect_many(planes))
    found = list(as_on_a_gpu(detector, tiny_bundle).detect_many(planes, batch_size=3))
    assert [result.plane for result in found] == planes
    assert [result.is_empty for result in found].count(True) == 1
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.map, other.map, rtol=0, atol=1e-4)
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.window == pytest.approx(other.window)
        assert one.timings.keys() == other.timings.keys()


def test_the_next_batch_is_begun_before_the_last_ones_results_are_waited_for(
    tiny_bundle, detector, monkeypatch
):
    done = []
    by_gpu = as_on_a_gpu(detector, tiny_bundle)
    begin, finish = by_gpu._begin, by_gpu._finish
    monkeypatch.setattr(by_gpu, "_begin", lambda batch, *rest: done.append("begin") or begin(batch, *rest))
    monkeypatch.setattr(by_gpu, "_finish", lambda *rest: done.append("finish") or finish(*rest))
    assert len(list(detect_slices(by_gpu, slices()))) == 7
    assert done == ["begin", "finish"]
    done.clear()
    assert len(list(by_gpu.detect_many(cut_slices(slices(), 2, range(7)), batch_size=3))) == 7
    assert done == ["begin", "begin", "finish", "begin", "finish", "finish"]


def test_very_large_slices_come_in_smaller_batches(detector, monkeypatch):
    seen = []
    run = type(detector.network).__call__
    monkeypatch.setattr(
        type(detector.network),
        "__call__",
        lambda self, *given: seen.append(len(given[0])) or run(self, *given),
    )
    monkeypatch.setattr("MedAnomalyCLIPLib.detection._PIXELS_AT_ONCE", 3 * 40 * 30)
    assert len(list(detect_slices(detector, slices()))) == 7
    assert seen == [3, 3, 1]


# Memory


class SmallMemory(torch.nn.Module):
    """A network that finds room for so many images at once."""

    def __init__(self, network, most):
        super().__init__()
        self.network, self.most, self.tried = network, most, []

    def forward(self, images, *others):
        self.tried.append(len(images))
        if len(images) > self.most:
            raise torch.cuda.OutOfMemoryError("a fake's memory is full")
        return self.network(images, *others)


def test_a_batch_that_does_not_fit_is_halved_for_good_and_told_once(detector, caplog):
    expected = list(detect_slices(detector, slices()))
    network = detector.network
    network.module = SmallMemory(network.module, 2)
    with caplog.at_level(logging.WARNING):
        found = list(detect_slices(detector, slices()))
        again = list(detect_slices(detector, slices()))
    assert network.module.tried[:3] == [7, 3, 1]
    assert set(network.module.tried[3:]) == {1}
    assert network.batch_size == 1
    assert len(caplog.records) == 1
    assert "7 slices" in caplog.text
    for results in (found, again):
        for one, other in zip(results, expected, strict=True):
            np.testing.assert_allclose(one.map, other.map, rtol=0, atol=1e-5)


def test_a_slice_that_does_not_fit_by_itself_is_told_in_words(detector):
    detector.network.module = SmallMemory(detector.network.module, 0)
    with pytest.raises(DeviceMemoryExhausted, match="single slice"):
        list(detect_slices(detector, slices()))


def test_memory_that_does_not_hold_the_slices_themselves_is_told_in_words(monkeypatch):
    def full(*_given, **_options):
        raise torch.cuda.OutOfMemoryError("a fake's memory is full")

    preprocessor = DevicePreprocessor(SPEC, CPU)
    planes = [plane_of(np.zeros((9, 9), np.uint8))]
    fits = preprocessor.prepare_many(planes).fits
    monkeypatch.setattr("MedAnomalyCLIPLib.device_preprocess.resized", full)
    monkeypatch.setattr(torch.nn.functional, "interpolate", full)
    with pytest.raises(DeviceMemoryExhausted):
        preprocessor.prepare_many(planes)
    with pytest.raises(DeviceMemoryExhausted):
        preprocessor.map_back_many(torch.zeros(1, 48, 48), fits)


@pytest.fixture
def memory(monkeypatch):
    """A GPU's memory in bytes: free to all, kept and used by PyTorch, and what each image takes."""
    state = {"free": 0, "kept": 0, "used": 0, "image": GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state["kept"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["used"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["used"] + 4 * state["image"])
    return state


@pytest.mark.parametrize(
    ("free", "kept", "used", "expected"),
    [(80, 0, 0, 48), (200, 0, 0, 128), (10, 8, 2, 8), (12, 0, 0, 7), (1, 0, 0, 1), (0, 0, 0, 1)],
)
def test_the_batch_is_what_free_memory_holds(memory, free, kept, used, expected):
    """70 % of what is free, less a GiB, in eights where there are more; a GiB for each image."""
    memory.update(free=free * GIB, kept=kept * GIB, used=used * GIB)
    assert cuda.choose_batch_size(GPU, lambda count: None) == expected


def test_a_gpu_that_cannot_be_tried_gets_single_slices(memory):
    def full(_count):
        raise torch.cuda.OutOfMemoryError("a fake's memory is full")

    assert cuda.choose_batch_size(GPU, full) == 1


# Precision


def test_settings_of_the_process_are_put_back():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), cuda.kernels(tf32=True):
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise KeyError
    with cuda.kernels(tf32=False):
        assert not torch.backends.cudnn.allow_tf32
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("kind", ["linear", "two_heads"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_tower_of_16_bits_says_nearly_the_same(make_bundle, tiny_manifest, kind, precision):
    spec = replace(tiny_manifest.detector, adapter=AdapterSpec(kind))
    bundle = make_bundle(detector=spec)
    whole, lowered = (
        SliceDetector(
            bundle,
            TorchNetwork(bundle.build(), bundle.manifest.preprocess, CPU, precision=getattr(torch, wanted)),
        )
        for wanted in ("float32", precision)
    )
    assert lowered.network.module.tower.tower.visual.proj.dtype == getattr(torch, precision)
    assert (whole.provenance.precision, lowered.provenance.precision) == ("float32", precision)
    for one, other in zip(detect_slices(lowered, slices()), detect_slices(whole, slices()), strict=True):
        assert np.ptp(other.map) > 0.05 or other.is_empty
        np.testing.assert_allclose(one.map, other.map, rtol=0, atol=0.05)
        assert one.score == pytest.approx(other.score, abs=0.05)


def test_a_lowered_tower_has_float32_around_it_and_16_bits_within(tiny_tower):
    seen = []

    def inject(layer, tokens):
        seen.append(tokens.dtype)
        return 2 * tokens

    tower = create_vision_tower(tiny_tower)
    images = torch.randn(2, 3, 64, 64)
    expected = tower(images, inject)
    within = []
    lowered = LoweredTower(tower, torch.bfloat16)
    for block in tower.visual.transformer.resblocks:
        block.register_forward_hook(lambda _block, given, found: within.extend((given[0].dtype, found.dtype)))
    found = lowered(images, inject)
    assert set(seen) == {torch.float32}
    assert set(within) == {torch.bfloat16}
    assert {t.dtype for t in (*found.patches, *found.classes, found.pooled)} == {torch.float32}
    for one, other in zip(found.patches, expected.patches, strict=True):
        assert (one - other).norm() < 0.03 * other.norm()


def test_openais_activation_in_one_step_is_the_same(tiny_tower):
    tower = create_vision_tower(replace(tiny_tower, activation="quick_gelu"))
    images = torch.randn(2, 3, 64, 64)
    expected = tower(images).pooled
    fold_quick_gelu(tower)
    assert isinstance(tower.visual.transformer.resblocks[0].mlp.gelu, torch.nn.SiLU)
    torch.testing.assert_close(tower(images).pooled, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_attention_takes_pytorchs_fused_way(tiny_tower, precision):
    tower = create_vision_tower(tiny_tower)
    tower = tower if precision == torch.float32 else LoweredTower(tower, precision)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        tower(torch.randn(1, 3, 64, 64))
    called = {event.key: event.count for event in profile.key_averages()}
    assert called.get("aten::_native_multi_head_attention") == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_agrees_with_the_cpu():
    expected = list(detect_slices(SliceDetector.load(device="cpu", precision="float32"), slices()))
    for precision, limit in (("float32", 2e-3), ("auto", 5e-2)):
        by_gpu = SliceDetector.load(device="cuda", precision=precision)
        for one, other in zip(detect_slices(by_gpu, slices()), expected, strict=True):
            np.testing.assert_allclose(one.map, other.map, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "float8"}, "one of auto, float32"),
        ({"precision": "bfloat16", "runtime": "onnx"}, "takes --runtime torch"),
    ],
)
def test_what_cannot_be_computed_in_is_refused(tiny_bundle, options, words):
    with pytest.raises(InvalidRequest, match=words):
        SliceDetector.load(tiny_bundle.folder, device="cpu", **options)


def test_the_command_line_hands_the_precision_on(tmp_path):
    asked = []

    def load(bundle, device, **options):
        asked.append(options)
        raise InvalidRequest("enough")

    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "slice.png")
    command = ["detect", str(tmp_path / "slice.png"), "--output", str(tmp_path / "out")]
    assert main([*command, "--precision", "bfloat16"], load=load) == 2
    assert main(command, load=load) == 2
    assert asked == [{"runtime": "auto", "precision": "bfloat16"}, {}]


def test_windows_of_one_rule_are_found_on_the_device():
    """No slice of a plain volume takes the way of the host, whatever its window."""
    for rule in (WindowRule("full"), WindowRule("percentile", 1.0, 99.0), WindowRule("range", 0.0, 9.0)):
        spec = replace(SPEC, windows={"default": WindowRule("full"), "CT": rule})
        preprocessor = DevicePreprocessor(spec, CPU)
        preprocessor.prepare = None  # type: ignore[assignment]
        planes = [plane_of(np.arange(99, dtype=np.int16).reshape(9, 11), "CT", "HU")] * 2
        assert torch.isfinite(preprocessor.prepare_many(planes).images).all()
