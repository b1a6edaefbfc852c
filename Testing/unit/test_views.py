"""The few-shot views: MVFA's published ones."""

from __future__ import annotations

import pytest
import torch
from golden import CLOSE, golden

from MedAnomalyCLIPLib.training.views import VIEW_COUNT, few_shot_views, placements

SIZE = 48


@pytest.fixture(scope="module")
def arrays():
    return golden("mvfa_augment")


@pytest.fixture(scope="module")
def views(arrays):
    everywhere = torch.ones(SIZE, SIZE, dtype=torch.bool)
    return few_shot_views(arrays["in/image[1]"], arrays["in/mask[1, 0]"], everywhere)


def test_views_of_an_image_are_the_published_ones_in_their_order(arrays, views):
    stored = arrays["out/augmented_image[1::2, :, ::3, ::3]"]
    assert len(stored) == VIEW_COUNT
    torch.testing.assert_close(views[0][..., ::3, ::3], stored, **CLOSE)


def test_masks_move_like_the_image_and_are_interpolated_like_it_as_published(arrays):
    moved = placements(arrays["in/mask[1, 0]"][None])[:, 0]
    torch.testing.assert_close(moved, arrays["out/augmented_mask[1::2, 0]"], **CLOSE)


def test_a_pixel_belongs_to_the_mask_where_more_than_half_of_it_does(arrays, views):
    assert torch.equal(views[1], arrays["out/augmented_mask[1::2, 0]"] > 0.5)


def test_an_image_without_padding_has_none_in_its_views_either(views):
    assert views[2].dtype == torch.bool
    assert views[2].all()


def test_padding_moves_with_the_image():
    """What shows the image is white here, so every view must be valid where it is bright."""
    valid = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    valid[9:40] = True
    images, _, moved = few_shot_views(valid.float()[None], torch.zeros(SIZE, SIZE), valid)
    assert torch.equal(moved, images[:, 0] > 0.5)
    assert len({tuple(view.flatten().tolist()) for view in moved}) > 5


def test_images_keep_their_own_type_and_values_between_their_extremes(arrays, views):
    image = arrays["in/image[1]"]
    assert views[0].dtype == image.dtype
    assert torch.equal(views[0][0], image)
    assert views[0].min() >= image.min()
    assert views[0].max() <= image.max()
