"""Losses: what padding may not change, finite where probabilities are sure, and a weight that moves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from golden import CLOSE, golden

from MedAnomalyCLIPLib.training.losses import (
    OverlapWeight,
    dice_loss,
    focal_loss,
    image_loss,
    map_loss,
    mean_overlap,
)


@pytest.fixture(scope="module")
def published():
    return golden("diffusionclip_loss")


@pytest.fixture
def maps():
    """Probabilities and masks of three images, the last of them without a lesion."""
    g = torch.Generator().manual_seed(0)
    masks = torch.zeros(3, 12, 12)
    masks[0, 2:6, 3:8] = masks[1, 7:, :4] = 1
    return torch.rand(3, 12, 12, generator=g), masks


@pytest.mark.parametrize("loss", [focal_loss, dice_loss, map_loss])
def test_where_all_pixels_are_valid_losses_are_those_without_validity(maps, loss):
    everywhere = torch.ones(3, 12, 12, dtype=torch.bool)
    torch.testing.assert_close(loss(*maps, valid=everywhere), loss(*maps))


@pytest.mark.parametrize("loss", [focal_loss, dice_loss, map_loss])
def test_padding_changes_no_loss_and_gets_no_gradient(maps, loss):
    probability, mask = (torch.nn.functional.pad(m, (0, 0, 3, 3), value=0.9) for m in maps)
    valid = torch.zeros(3, 18, 12, dtype=torch.bool)
    valid[:, 3:15] = True
    probability.requires_grad_()
    padded = loss(probability, mask, valid=valid)
    torch.testing.assert_close(padded, loss(*maps))
    padded.backward()
    assert not probability.grad[~valid].any()
    assert probability.grad[valid].any()


def test_a_batch_without_valid_pixels_costs_nothing_in_the_focal_loss(maps):
    assert float(focal_loss(*maps, valid=torch.zeros(3, 12, 12, dtype=torch.bool))) == 0


def test_focal_loss_takes_a_weight_for_each_pixel(maps):
    torch.testing.assert_close(focal_loss(*maps, weight=lambda right: 0 * right + 3), 3 * focal_loss(*maps))
    valid = maps[0] > 0.2
    weighed = map_loss(*maps, valid=valid, weight=lambda right: 0 * right + 3)
    expected = 3 * focal_loss(*maps, valid=valid) + dice_loss(*maps, valid=valid)
    torch.testing.assert_close(weighed, expected)


@pytest.mark.parametrize(("probability", "label"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_image_loss_and_its_gradient_are_finite_where_a_detector_is_sure(probability, label):
    value = torch.tensor([probability], requires_grad=True)
    loss = image_loss(value, torch.tensor([label]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(value.grad.item())
    assert (loss.item() > 10) == (probability != label)
    assert value.grad.item() * (0.5 - label) > 0  # towards the label, even so


def test_image_loss_is_the_cross_entropy_in_between():
    p, y = torch.tensor([0.2, 0.9]), torch.tensor([0, 1])
    expected = -(math.log(0.8) + math.log(0.9)) / 2
    assert float(image_loss(p, y)) == pytest.approx(expected, rel=1e-5)


def at(level):
    weight = OverlapWeight()
    weight.mean.fill_(level)
    return weight


def test_weights_are_the_published_ones(published):
    for level, expected in zip(published["slide/mu"], published["slide/weight"], strict=True):
        torch.testing.assert_close(at(float(level))(published["slide/pt"]), expected, **CLOSE)


def test_the_mean_moves_as_published(published):
    weight = OverlapWeight()
    for overlap, expected in zip(
        published["slide/iou_inputs"], published["slide/mu_after_step"], strict=True
    ):
        weight.move(overlap)
        torch.testing.assert_close(weight.mean, expected, **CLOSE)


def test_at_the_constant_overlap_of_the_published_code_the_first_step_decides(published):
    weight = OverlapWeight()
    weight.move(0.5)
    assert float(weight.mean) == pytest.approx(0.5002, abs=1e-4)
    assert torch.equal(published["slide/iou_inputs"][:5], torch.full((5,), 0.5))


def test_weighted_losses_are_the_published_ones(published):
    probability, mask = published["slide/probabilities"][:, 1], published["slide/target"][:, 0]
    weight = OverlapWeight()
    first = focal_loss(probability, mask, weight=weight)
    torch.testing.assert_close(first, published["slide/loss_eval_initial"], **CLOSE)
    for overlap, expected in zip(
        published["slide/iou_inputs"], published["slide/loss_per_step"], strict=True
    ):
        weight.move(overlap)
        torch.testing.assert_close(focal_loss(probability, mask, weight=weight), expected, **CLOSE)


def test_overlap_is_counted_by_hand_on_valid_pixels_of_images_with_a_lesion():
    mask = torch.zeros(3, 1, 6)
    mask[0, 0, :3] = mask[1, 0, 4:] = 1
    probability = torch.tensor(
        [[[0.9, 0.5, 0.1, 0.8, 0.2, 0.2]], [[0.1, 0.1, 0.1, 0.1, 0.1, 0.7]], [[0.9] * 6]]
    )
    assert float(mean_overlap(probability, mask)) == pytest.approx((2 / 4 + 1 / 2) / 2)
    valid = torch.ones(3, 1, 6, dtype=torch.bool)
    valid[:, :, 3:5] = False  # takes the false alarm from the first image, the miss from the second
    assert float(mean_overlap(probability, mask, valid)) == pytest.approx((2 / 3 + 1) / 2)
    assert mean_overlap(probability[2:], mask[2:]) is None
    assert float(mean_overlap(probability, mask.bool())) == pytest.approx(0.5)


def test_a_measured_overlap_moves_the_mean_and_so_the_weight(maps):
    _, masks = maps
    good, bad = OverlapWeight(), OverlapWeight()
    for _ in range(3):
        good.observe(0.9 * masks, masks)
        bad.observe(0.9 * (1 - masks), masks)
    assert float(good.mean) == pytest.approx(1)
    assert float(bad.mean) < 1e-3
    medium = torch.full((1, 2, 2), 0.5)
    assert float(good(medium)[0, 0, 0]) == 1
    assert float(bad(medium)[0, 0, 0]) == pytest.approx(math.exp(0.5))


def test_batches_without_lesions_move_nothing(maps):
    weight = OverlapWeight()
    weight.observe(maps[0][2:], maps[1][2:])
    assert (float(weight.mean), int(weight.updates)) == (1, 0)


def test_later_batches_move_the_mean_less():
    weight, moved = OverlapWeight(), []
    for overlap in itertools.islice(itertools.cycle((0.0, 1.0)), 4000):
        before = float(weight.mean)
        weight.move(overlap)
        moved.append(abs(float(weight.mean) - before))
    assert min(moved[:10]) > 0.9
    assert max(moved[-10:]) < 0.2


def test_a_weight_comes_back_as_it_was_saved():
    weight, again = OverlapWeight(), OverlapWeight()
    for overlap in (0.3, 0.6, 0.4):
        weight.move(overlap)
    again.load_state_dict(weight.state_dict())
    weight.move(0.7)
    again.move(0.7)
    assert torch.equal(weight.mean, again.mean)
    assert int(again.updates) == 4
