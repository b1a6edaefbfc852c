"""How much of a slice shows something."""

from __future__ import annotations

import numpy as np
import pytest

from MedAnomalyCLIPLib.background import LEAST_ANATOMY, Background
from MedAnomalyCLIPLib.geometry import cut_slice
from MedAnomalyCLIPLib.volume import Volume


def ball(air, tissue, noise, dtype=np.float32, side=60):
    """A ball of tissue in air; share of each slice that it covers."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, side),) * 3, indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.8**2
    voxels = np.where(inside, tissue, air) + np.random.default_rng(0).normal(0, noise, inside.shape)
    return voxels.astype(dtype), inside.mean(axis=(1, 2))


@pytest.mark.parametrize(
    ("air", "tissue", "noise", "units"),
    [(0, 500, 10, ""), (-1000, 40, 15, "HU"), (0, -1.5, 0.05, ""), (255, 90, 4, "")],
)
def test_the_share_is_that_of_the_body_whatever_air_looks_like(air, tissue, noise, units):
    voxels, expected = ball(air, tissue, noise)
    volume = Volume(voxels, np.eye(4), units=units)
    background = Background.of(volume)
    shares = [background.anatomy_share(cut_slice(volume, 2, k)) for k in range(60)]
    np.testing.assert_allclose(shares, expected, atol=0.01)
    assert (np.array(shares) < LEAST_ANATOMY).sum() > 10


def test_what_a_scanner_did_not_measure_counts_as_air():
    voxels, expected = ball(-1000, 40, 0)
    voxels[:, :4] = -3024
    volume = Volume(voxels, np.eye(4), units="HU")
    assert Background.of(volume).anatomy_share(cut_slice(volume, 2, 30)) == pytest.approx(expected[30])


def test_colour_counts_as_grey_does():
    voxels, expected = ball(20, 150, 3, np.uint8)
    volume = Volume(np.repeat(voxels[..., None], 3, axis=3), np.eye(4))
    assert Background.of(volume).anatomy_share(cut_slice(volume, 2, 30)) == pytest.approx(
        expected[30], abs=0.01
    )


def test_an_image_of_one_value_or_of_none_shows_nothing():
    for value in (7.0, np.nan):
        volume = Volume(np.full((3, 20, 20), value, np.float32), np.eye(4))
        assert Background.of(volume).anatomy_share(cut_slice(volume, 2, 1)) == 0


def test_a_picture_that_is_filled_to_its_edges_shows_something():
    picture = np.random.default_rng(0).integers(30, 220, (1, 80, 80), np.uint8)
    volume = Volume(picture, np.eye(4), spacing_known=False)
    assert Background.of(volume).anatomy_share(cut_slice(volume, 2, 0)) > 0.5
