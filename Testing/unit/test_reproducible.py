"""The bundled detector gives the maps that were stored of it, alone and in batches, time and again."""

from __future__ import annotations

import numpy as np
import pytest

from MedAnomalyCLIPLib.bundle import default_bundle_path, read_manifest
from reference_maps import IMAGES, STEP, reference_maps, stored_maps

ACROSS_BATCHES = 2e-5
"""Largest difference between maps of one machine; sums are taken in another order."""
ACROSS_MACHINES = 2e-3 + STEP
"""Largest difference to the stored maps: float32 on another CPU, another release of torch."""


@pytest.fixture(scope="module")
def alone():
    return reference_maps(batch_size=1)


def test_the_stored_maps_are_those_of_the_detector_that_ships():
    told, _, _ = stored_maps()
    assert told["sha256"] == read_manifest(default_bundle_path()).weights_sha256, (
        "the bundled detector was replaced: python Testing/reference_maps.py --write"
    )


@pytest.mark.parametrize("name", IMAGES)
def test_maps_and_scores_are_the_stored_ones(name, alone):
    (_, maps, scores), (_, stored, before) = alone, stored_maps()
    assert np.ptp(stored[name]) > 0.05, "a map without contrast proves nothing"
    np.testing.assert_allclose(maps[name], stored[name], rtol=0, atol=ACROSS_MACHINES)
    assert scores[name] == pytest.approx(before[name], abs=ACROSS_MACHINES)


def test_the_same_run_gives_the_same_map_to_the_last_bit(alone):
    _, maps, scores = reference_maps(batch_size=1)
    assert scores == alone[2]
    assert all(np.array_equal(maps[name], alone[1][name]) for name in IMAGES)


@pytest.mark.parametrize("batch_size", [2, 3, 6])
def test_batches_of_any_size_give_the_same_maps(batch_size, alone):
    _, maps, scores = reference_maps(batch_size)
    for name in IMAGES:
        np.testing.assert_allclose(maps[name], alone[1][name], rtol=0, atol=ACROSS_BATCHES)
        assert scores[name] == pytest.approx(alone[2][name], abs=ACROSS_BATCHES)
