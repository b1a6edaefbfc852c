"""Memory of normal patches: exact search, what is kept, and scales learned from the support set alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from MedAnomalyCLIPLib.bundle import save_bundle
from MedAnomalyCLIPLib.detectors import memory
from MedAnomalyCLIPLib.detectors.adapters import TwoHeadAdapter
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.detectors.fusion import RangeFusion
from MedAnomalyCLIPLib.detectors.memory import MemoryBank, coreset, nearest_distance
from MedAnomalyCLIPLib.detectors.specification import AdapterSpec, DetectorSpec, MemorySpec
from MedAnomalyCLIPLib.detectors.support import SupportSet, remember
from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest


def unit(*shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))), dim=-1)


def test_search_in_pieces_finds_what_a_search_of_all_pairs_finds(monkeypatch):
    queries, rows = unit(2, 10, 6), unit(50, 6)
    slow = torch.stack([torch.stack([(1 - rows @ q).min() for q in image]) for image in queries])
    monkeypatch.setattr(memory, "ROWS_AT_ONCE", 7)
    torch.testing.assert_close(nearest_distance(3 * queries, rows), slow, atol=1e-6, rtol=0)


def test_half_precision_halves_the_memory_and_moves_distances_by_less_than_a_thousandth():
    features, queries = [unit(200, 32)], [unit(1, 40, 32)]
    whole, half = MemoryBank(1, 200, 32), MemoryBank(1, 200, 32, torch.float16)
    whole.fill(features)
    half.fill(features)
    assert half.rows.nbytes * 2 == whole.rows.nbytes
    torch.testing.assert_close(half(queries)[0], whole(queries)[0], atol=1e-3, rtol=0)


def test_coreset_takes_one_of_each_cluster():
    centres = torch.eye(5)
    features = F.normalize(centres.repeat(20, 1) + 0.01 * torch.randn(100, 5), dim=-1)
    assert set((coreset(features, 5) % 5).tolist()) == set(range(5))


@pytest.mark.parametrize("candidates", [1, 7, 1000])
def test_coreset_is_the_greedy_one_however_many_candidates_it_looks_at(candidates, monkeypatch):
    torch.manual_seed(0)
    features = F.normalize(torch.randn(300, 5, dtype=torch.float64), dim=-1)
    chosen = [(1 - features @ F.normalize(features.mean(0), dim=0)).argmax()]
    while len(chosen) < 200:
        chosen.append((1 - features @ features[torch.stack(chosen)].T).amin(1).argmax())
    monkeypatch.setattr("MedAnomalyCLIPLib.detectors.memory._CANDIDATES", candidates)
    assert coreset(features, 200).tolist() == torch.stack(chosen).tolist()


def test_a_memory_larger_than_what_there_is_is_refused():
    with pytest.raises(InvalidRequest, match="10 rows, but the normal images give 4"):
        MemoryBank(1, 10, 6).fill([unit(4, 6)])


def test_fusion_stays_between_0_and_1_beyond_its_ranges():
    fusion = RangeFusion(0.5)
    fusion.learn(torch.tensor([0.2, 0.4]), torch.tensor([1.0, 2.0]))
    text, distance = torch.tensor([0.0, 0.3, 9.0]), torch.tensor([0.5, 1.5, 9.0])
    torch.testing.assert_close(fusion(text, distance), torch.tensor([0.0, 0.5, 1.0]))


def test_two_heads_mix_into_the_stream_as_their_formula_says():
    adapter, x = TwoHeadAdapter(8, 5, 0.1), torch.randn(2, 7, 8)
    with torch.no_grad():
        taken = adapter(x)
        seg = F.leaky_relu(x @ adapter.segmentation.down.weight.T)
        back = F.leaky_relu(seg @ adapter.segmentation.up.weight.T)
        det = F.leaky_relu(x @ adapter.detection.down.weight.T)
        back_too = F.leaky_relu(det @ adapter.detection.up.weight.T)
    torch.testing.assert_close(taken.segmentation, seg)
    torch.testing.assert_close(taken.detection, det)
    torch.testing.assert_close(taken.stream, 0.8 * x + 0.1 * back + 0.1 * back_too)


@pytest.fixture
def detector(tiny_tower):
    torch.manual_seed(5)
    spec = DetectorSpec(tiny_tower, adapter=AdapterSpec("two_heads"), memory=MemorySpec(rows=48))
    detector = AnomalyDetector(spec).eval()
    detector.text_bank.copy_(unit(2, 32))
    return detector


@pytest.fixture
def normal():
    return SupportSet(torch.randn(3, 3, 64, 64), torch.ones(3, 64, 64, dtype=torch.bool))


def test_an_image_of_the_support_set_is_no_distance_from_the_memory(detector, normal):
    remember(detector, normal)
    with torch.no_grad():
        seen = detector.align(normal.images)
    assert float(torch.stack(detector.memory(seen.segmentation.patches)).abs().max()) < 1e-5


def test_ranges_are_not_learned_from_an_image_that_finds_itself(detector, normal):
    remember(detector, normal)
    low, high = detector.map_fusion.ranges[1].tolist()
    assert 0.001 < low < high


def test_other_views_of_an_image_do_not_count_as_other_images(detector, normal):
    turned = SupportSet(
        torch.cat([normal.images, normal.images]),
        torch.cat([normal.valid, normal.valid]),
        originals=(0, 1, 2, 0, 1, 2),
    )
    remember(detector, normal)
    alone = detector.map_fusion.ranges.clone()
    remember(detector, turned)  # the copies are left out with their originals
    torch.testing.assert_close(detector.map_fusion.ranges, alone)
    with pytest.raises(InvalidRequest, match="two different normal images"):
        remember(detector, turned._replace(originals=(0,) * 6))


def test_abnormal_images_set_the_upper_ends(detector, normal):
    alike = normal._replace(images=normal.images[:1] + 0.01 * torch.randn(3, 3, 64, 64))
    odd = SupportSet(torch.randn(2, 3, 64, 64), torch.ones(2, 64, 64, dtype=torch.bool))
    remember(detector, alike, odd)
    with torch.no_grad():
        seen = detector.align(odd.images)
        farthest = detector.distance_map(detector.memory(seen.segmentation.patches), seen.grid).max()
    torch.testing.assert_close(detector.map_fusion.ranges[1, 1], farthest)


def test_an_image_gets_the_same_result_whatever_it_is_tested_with(detector, normal):
    remember(detector, normal)
    images, valid = torch.randn(4, 3, 64, 64), torch.ones(4, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(
            detector(images, valid).map[:1], detector(images[:1], valid[:1]).map, atol=1e-5, rtol=0
        )


def test_class_tokens_are_kept_only_where_asked_for(detector, normal):
    with pytest.raises(InvalidRequest, match="51 rows, but the normal images give 48"):
        remember(replaced_memory(detector, MemorySpec(rows=51)), normal)
    remember(replaced_memory(detector, MemorySpec(rows=51, class_token=True)), normal)


def replaced_memory(detector, memory):
    return AnomalyDetector(replace(detector.spec, memory=memory)).eval()


def test_a_detector_without_memory_cannot_remember(detector, normal):
    with pytest.raises(InvalidRequest, match="no memory"):
        remember(replaced_memory(detector, None), normal)


def test_a_bundle_keeps_memory_and_ranges(detector, normal, tiny_manifest, tmp_path):
    detector = replaced_memory(detector, MemorySpec(rows=20, precision="float16"))
    remember(detector, normal)
    spec = replace(tiny_manifest, detector=detector.spec)
    again = save_bundle(tmp_path / "few", spec, detector, "").build()
    assert torch.equal(again.memory.rows, detector.memory.rows)
    torch.testing.assert_close(again.map_fusion.ranges, detector.map_fusion.ranges, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        (AdapterSpec, {"kind": "quadratic"}),
        (AdapterSpec, {"residual": 0.6}),
        (MemorySpec, {"rows": 0}),
        (MemorySpec, {"rows": 5, "precision": "int4"}),
    ],
)
def test_parts_refuse_values_that_mean_nothing(part, values):
    with pytest.raises(BundleInvalid):
        part(**values)
