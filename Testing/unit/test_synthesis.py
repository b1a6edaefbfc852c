"""Anomaly synthesis: distribution against the published code's, labels, randomness, bounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, find_objects

from MedAnomalyCLIPLib.errors import InvalidRequest
from MedAnomalyCLIPLib.synthesis import (
    AnomalySynthesizer,
    CutPaste,
    GaussIntensityChange,
    SourceDeformation,
    SynthesisConfig,
    foreground,
    poisson_blend,
    sample_generator,
)
from MedAnomalyCLIPLib.synthesis.cutpaste import changed_region
from MedAnomalyCLIPLib.synthesis.deformation import deformed_coordinates, source_radius
from MedAnomalyCLIPLib.synthesis.shapes import Shape, convex_shape, perlin_shape
from MedAnomalyCLIPLib.synthesis.synthesizer import place
from MedAnomalyCLIPLib.synthesis.tasks import Site

SIDE = 224
DRAWS = 600
PUBLISHED_DRAWS = 2000
FACTS = json.loads((Path(__file__).parents[1] / "data" / "mediclip_synthesis.json").read_text())["facts"]
KINDS = ("cut_paste", "gauss_intensity", "source_deformation")

FLAT = np.full((SIDE, SIDE), 128 / 255, np.float32)
BRIGHT_SUPPORT = (np.full((SIDE, SIDE), 200 / 255, np.float32),)
GRADIENT = ((40 + 170 * np.add.outer(np.arange(SIDE), np.arange(SIDE)) / (2 * SIDE - 2)) / 255).astype(
    np.float32
)


def noise_image(seed: int = 0, dims: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    return np.random.default_rng(seed).random(dims, dtype=np.float32)


def disc(dims: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: dims[0], : dims[1]]
    return np.hypot(rows - centre[0], columns - centre[1]) <= radius


def assert_same_distribution(values: list[float], published: dict[str, float]) -> None:
    """Mean, and share of values below each published quantile, agree within 4 standard errors."""
    values = np.array(values)
    size = 1 / len(values) + 1 / PUBLISHED_DRAWS
    assert values.mean() == pytest.approx(published["mean"], abs=4 * published["std"] * np.sqrt(size))
    for level in (5, 25, 50, 75, 95):
        quantile, share = published[f"q{level:02}"], level / 100
        margin = 4 * np.sqrt(share * (1 - share) * size)
        # Published quantiles are rounded to five digits, and sides are whole pixels, so values tie with them.
        assert np.mean(values < quantile - 1e-5) <= share + margin, f"too many below {level} %"
        assert np.mean(values <= quantile + 1e-5) >= share - margin, f"too few below {level} %"


# --- distribution, against the published code ---------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn_shapes() -> dict[str, list[Shape]]:
    rng = np.random.default_rng(11)
    convex = [convex_shape((SIDE, SIDE), (0.2, 0.6), rng) for _ in range(2 * DRAWS)]
    return {
        "perlin_small": [perlin_shape((SIDE, SIDE), (0.1, 0.6), rng) for _ in range(DRAWS)],
        "perlin_large": [perlin_shape((SIDE, SIDE), (0.3, 0.8), rng) for _ in range(DRAWS)],
        "ellipse": [shape for shape in convex if shape.ellipse],
        "rectangle": [shape for shape in convex if not shape.ellipse],
    }


@pytest.mark.parametrize("family", ["perlin_small", "perlin_large", "ellipse", "rectangle"])
@pytest.mark.parametrize("quantity", ["height", "width", "coverage"])
def test_shapes_have_the_published_sizes(drawn_shapes, family, quantity):
    measure = {
        "height": lambda mask: mask.shape[0] / SIDE,
        "width": lambda mask: mask.shape[1] / SIDE,
        "coverage": np.mean,
    }[quantity]
    assert_same_distribution([measure(shape.mask) for shape in drawn_shapes[family]], FACTS[family][quantity])


@pytest.fixture(scope="module")
def drawn_anomalies() -> dict[str, list[dict[str, float]]]:
    synthesizer = AnomalySynthesizer()
    images = {"cut_paste": FLAT, "gauss_intensity": FLAT, "source_deformation": GRADIENT}
    drawn: dict[str, list[dict[str, float]]] = {}
    for kind, image in images.items():
        # The published dataset casts to 8 bits: by truncation after the intensity change, rounded otherwise.
        cast = np.floor if kind == "gauss_intensity" else np.rint
        before = np.rint(255 * image)
        drawn[kind] = []
        for index in range(DRAWS):
            sample = synthesizer.paint(kind, image, None, sample_generator(5, 0, index), BRIGHT_SUPPORT)
            change = (cast(255 * sample.image.astype(float) + 1e-4) - before)[sample.mask]
            rows, columns = find_objects(sample.mask.astype(int))[0]
            drawn[kind].append(
                {
                    "area": float(sample.mask.mean()),
                    "mask_height": (rows.stop - rows.start) / SIDE,
                    "mask_width": (columns.stop - columns.start) / SIDE,
                    "change": float(np.abs(change).mean()),
                    "largest_change": float(change.max()),
                    "applications": sample.applications,
                }
            )
    return drawn


@pytest.mark.parametrize(
    ("kind", "quantity"), [(kind, quantity) for kind in KINDS for quantity in FACTS[kind]]
)
def test_anomalies_have_the_published_extent_and_strength(drawn_anomalies, kind, quantity):
    assert_same_distribution([draw[quantity] for draw in drawn_anomalies[kind]], FACTS[kind][quantity])


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_lesion_is_painted_half_of_the_time(drawn_anomalies, kind):
    twice = np.mean([draw["applications"] == 2 for draw in drawn_anomalies[kind]])
    assert twice == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(DRAWS))


def test_deformation_exponents_are_drawn_as_published():
    rng = np.random.default_rng(1)
    exponents = [SourceDeformation().draw_exponent(rng) for _ in range(DRAWS)]
    assert_same_distribution(exponents, FACTS["draws_source_deformation"]["alpha"])
    assert min(exponents) >= np.sqrt(2)
    assert max(exponents) < 4


def test_texture_amplitudes_are_drawn_as_published():
    rng = np.random.default_rng(2)
    textures = [GaussIntensityChange().draw_texture((48, 48), 1.0, rng) for _ in range(DRAWS)]
    extremes = np.array(
        [texture[np.unravel_index(np.abs(texture).argmax(), (48, 48))] for texture in textures]
    )
    assert_same_distribution(np.abs(extremes), FACTS["draws_gauss_intensity"]["amplitude"])
    assert np.mean(extremes > 0) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(DRAWS))


def correlation(texture: np.ndarray, lag: int) -> float:
    """Of pixels `lag` columns apart; white noise blurred with sigma has exp(-lag^2 / (4 sigma^2))."""
    return float(np.corrcoef(texture[:, lag:].ravel(), texture[:, :-lag].ravel())[0, 1])


def test_textures_are_blurred_by_four_or_seven_pixels_with_equal_odds():
    rng = np.random.default_rng(6)
    textures = [GaussIntensityChange().draw_texture((96, 96), 1.0, rng) for _ in range(300)]
    fine, coarse = np.exp(-16 / (4 * 4**2)), np.exp(-16 / (4 * 7**2))
    found = np.array([correlation(texture, 4) for texture in textures])
    is_fine = found < (fine + coarse) / 2
    assert is_fine.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(300))
    assert np.median(found[is_fine]) == pytest.approx(fine, abs=0.02)
    assert np.median(found[~is_fine]) == pytest.approx(coarse, abs=0.02)


def test_textures_of_larger_images_are_coarser_in_proportion():
    rng = np.random.default_rng(7)
    task = GaussIntensityChange(texture_blur=(4.0,))
    found = np.median([correlation(task.draw_texture((192, 192), 2.0, rng), 8) for _ in range(20)])
    assert found == pytest.approx(np.exp(-16 / (4 * 4**2)), abs=0.02)


def test_patches_are_turned_and_scaled_as_published():
    rng = np.random.default_rng(3)
    boxes = [perlin_shape((SIDE, SIDE), (0.1, 0.6), rng).mask.shape for _ in range(DRAWS)]
    matrices = [CutPaste().draw_transform(box, (SIDE, SIDE), rng).matrix for box in boxes]
    facts = FACTS["draws_cut_paste"]
    assert_same_distribution([np.sqrt(np.linalg.det(m)) for m in matrices], facts["scale"])
    assert_same_distribution([np.arctan2(m[1, 0], m[0, 0]) for m in matrices], facts["rotation"])


def test_lesions_lie_anywhere_when_no_foreground_is_given():
    rng = np.random.default_rng(4)
    mask = np.ones((60, 90), bool)
    corners = np.array([place(mask, (SIDE, SIDE), None, 0.5, rng) for _ in range(4000)])
    for axis, room in ((0, SIDE - 60), (1, SIDE - 90)):
        counts = np.bincount(corners[:, axis] * 8 // (room + 1), minlength=8)
        expected = np.bincount(np.arange(room + 1) * 8 // (room + 1)) * len(corners) / (room + 1)
        assert np.all(np.abs(counts - expected) < 4.5 * np.sqrt(expected))


# --- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_outside_the_mask_are_those_of_the_image(kind):
    image = noise_image()
    for index in range(12):
        sample = AnomalySynthesizer().paint(
            kind, image, None, sample_generator(0, 0, index), (noise_image(1),)
        )
        np.testing.assert_array_equal(sample.image[~sample.mask], image[~sample.mask])


@pytest.mark.parametrize("blend", ["hard", "poisson"])
def test_what_cut_paste_changed_is_labelled_abnormal(blend):
    synthesizer = AnomalySynthesizer(SynthesisConfig(cut_paste=CutPaste(blend=blend), second_application=0))
    for index in range(12):
        sample = synthesizer.paint(
            "cut_paste", GRADIENT, None, sample_generator(0, 0, index), (noise_image(),)
        )
        visible = np.abs(sample.image - GRADIENT) > 1 / 255
        assert visible.any()
        assert not np.any(visible & ~sample.mask)


def test_a_paste_one_grey_level_brighter_is_labelled_fully_abnormal():
    # Published: 1 - exp(-1 / (2 * 0.2**2)) = 0.999996, which the training code's cast to integers makes 0.
    before = np.full((20, 20), 128 / 255, np.float32)
    mask = disc((20, 20), (10, 10), 6)
    label = changed_region(before, before + mask.astype(np.float32) / 255, mask)
    np.testing.assert_array_equal(label, mask)


def test_a_paste_one_grey_level_darker_is_labelled_like_a_brighter_one():
    # Published: the difference of 8-bit images wraps around, so -1 counts as 255.
    before = np.full((20, 20), 128 / 255, np.float32)
    mask = disc((20, 20), (10, 10), 6)
    step = mask.astype(np.float32) / 255
    np.testing.assert_array_equal(
        changed_region(before, before - step, mask), changed_region(before, before + step, mask)
    )


def test_unchanged_holes_in_a_paste_are_labelled_and_unchanged_rims_are_not():
    mask = disc((60, 60), (30, 30), 25)
    changed = disc((60, 60), (30, 30), 18) & ~disc((60, 60), (30, 30), 8)
    before = np.zeros((60, 60), np.float32)
    label = changed_region(before, before + changed, mask)
    assert label[30, 30]
    assert not label[mask & ~binary_dilation(disc((60, 60), (30, 30), 18), iterations=2)].any()


@pytest.mark.parametrize(("kind", "support"), [("source_deformation", ()), ("cut_paste", (FLAT,))])
def test_a_lesion_that_cannot_be_seen_is_not_called_one(kind, support):
    sample = AnomalySynthesizer().paint(kind, FLAT, None, np.random.default_rng(0), support)
    assert (sample.kind, sample.applications, bool(sample.mask.any())) == ("identity", 0, False)


def test_identity_returns_the_image_with_an_empty_mask():
    image = noise_image()
    sample = AnomalySynthesizer().paint("identity", image, None, np.random.default_rng(0))
    np.testing.assert_array_equal(sample.image, image)
    assert not sample.mask.any()


# --- single operations --------------------------------------------------------------------------------------


def test_a_hard_paste_holds_only_the_supports_grey_levels():
    for index in range(20):
        sample = AnomalySynthesizer().paint(
            "cut_paste", FLAT, None, sample_generator(0, 0, index), BRIGHT_SUPPORT
        )
        np.testing.assert_allclose(sample.image[sample.mask], 200 / 255, atol=1e-6)


def test_a_patch_is_the_support_turned_and_scaled_as_drawn():
    ramp = (np.add.outer(np.arange(SIDE), 2 * np.arange(SIDE)) / (3 * SIDE)).astype(np.float32)
    task = CutPaste()
    site = Site(np.zeros_like(FLAT), Shape(np.ones((50, 70), bool)), (20, 30))
    painted = task.paint(site, (ramp,), np.random.default_rng(8))
    rng = np.random.default_rng(8)
    rng.integers(1)
    transform = task.draw_transform((50, 70), ramp.shape, rng)
    pixel = np.array([31, 12])
    row, column = transform.matrix @ pixel + transform.offset
    assert painted.patch[tuple(pixel)] == pytest.approx((row + 2 * column) / (3 * SIDE), abs=1e-4)


def test_patches_stay_inside_the_support():
    rng = np.random.default_rng(9)
    for _ in range(300):
        box = tuple(int(side) for side in rng.integers(22, 134, size=2))
        transform = CutPaste().draw_transform(box, (SIDE, SIDE), rng)
        corners = transform.matrix @ [[0, 0, box[0] - 1, box[0] - 1], [0, box[1] - 1, 0, box[1] - 1]]
        corners += transform.offset[:, None]
        assert corners.min() >= 0
        assert corners.max() <= SIDE - 1


def test_poisson_blending_keeps_the_sources_laplacian_inside_the_mask():
    target, source = noise_image(1, (40, 50)), noise_image(2, (40, 50))
    mask = disc((40, 50), (20, 25), 13)
    blended = poisson_blend(target, source, mask).astype(float)

    def laplacian(image):
        return sum(np.roll(image, step, axis) for step in (1, -1) for axis in (0, 1)) - 4 * image

    np.testing.assert_allclose(laplacian(blended)[mask], laplacian(source.astype(float))[mask], atol=2e-6)
    np.testing.assert_array_equal(blended[~mask], target[~mask])


def test_pasting_the_target_shifted_by_a_constant_leaves_no_seam():
    target = noise_image(3, (40, 50))
    blended = poisson_blend(target, target + 0.3, disc((40, 50), (20, 25), 13))
    np.testing.assert_allclose(blended, target, atol=1e-6)


def test_poisson_blending_works_where_the_mask_leaves_the_array():
    target = noise_image(4, (40, 50))
    blended = poisson_blend(target, target - 0.2, disc((40, 50), (0, 0), 15))
    np.testing.assert_allclose(blended, target, atol=1e-6)


def test_poisson_blending_refuses_a_mask_without_a_rim():
    with pytest.raises(ValueError, match="whole target"):
        poisson_blend(np.zeros((8, 8)), np.ones((8, 8)), np.ones((8, 8), bool))


def test_source_radius_has_the_published_values():
    r = np.array([0.0, 2.0, 4.0, 6.0, 8.0, 10.0])
    published = [0.0, 0.1788854381999832, 1.0119288512538813, 2.78854800926934, 5.7243340223994625, 10.0]
    np.testing.assert_allclose(source_radius(r, np.full(6, 10.0), 2.5), published, rtol=1e-9)


@pytest.mark.parametrize("ellipse", [True, False])
def test_edge_distance_agrees_with_walking_to_the_edge(ellipse):
    rng = np.random.default_rng(21)
    shape = next(
        s for s in iter(lambda: convex_shape((SIDE, SIDE), (0.2, 0.6), rng), None) if s.ellipse == ellipse
    )
    centre = (np.array(shape.mask.shape) - 1) / 2
    inside = np.argwhere(shape.mask)
    for _ in range(25):
        origin = inside[rng.integers(len(inside))].astype(float)
        angle = rng.uniform(0, 2 * np.pi)
        direction = np.array([np.sin(angle), np.cos(angle)])
        steps = np.arange(0, 2 * SIDE, 0.01)
        plain = np.linalg.solve(shape.matrix, (origin - centre)[:, None] + direction[:, None] * steps)
        plain = plain / shape.half_sides[:, None]
        outside = (np.sum(plain**2, axis=0) if ellipse else np.abs(plain).max(axis=0)) > 1
        walked = steps[np.argmax(outside)]
        assert shape.edge_distance(origin, direction[:, None])[0] == pytest.approx(walked, abs=0.011)


def test_deformed_pixels_take_their_values_from_nearer_the_centre_on_the_same_ray():
    rng = np.random.default_rng(22)
    shape = convex_shape((SIDE, SIDE), (0.2, 0.6), rng)
    pixels = np.stack(np.nonzero(shape.mask)).astype(float)
    centre = pixels[:, 100]
    offsets = pixels - centre[:, None]
    sources = deformed_coordinates(shape, pixels, centre, 2.0) - centre[:, None]
    assert np.all(np.linalg.norm(sources, axis=0) <= np.linalg.norm(offsets, axis=0) + 1e-9)
    np.testing.assert_allclose(offsets[0] * sources[1], offsets[1] * sources[0], atol=1e-8)
    assert np.all(np.sum(offsets * sources, axis=0) >= 0)


def test_deformation_moves_a_linear_gradient_by_its_own_coordinates():
    rng = np.random.default_rng(23)
    task = SourceDeformation()
    shape = task.draw_shape((SIDE, SIDE), task.size, rng)
    site = Site(
        (np.arange(SIDE, dtype=np.float32)[:, None] + np.zeros(SIDE, np.float32)) / SIDE, shape, (40, 50)
    )
    painted = task.paint(site, (), np.random.default_rng(24))
    rng = np.random.default_rng(24)
    pixels = np.stack(np.nonzero(shape.mask)).astype(float)
    centre = pixels[:, rng.integers(pixels.shape[1])]
    sources = deformed_coordinates(shape, pixels, centre, task.draw_exponent(rng))
    # Splines mirrored at the box's edge bend a ramp there, so the outermost pixels are left out.
    inner = np.all((sources > 4) & (sources < np.array(shape.mask.shape)[:, None] - 5), axis=0)
    np.testing.assert_allclose(painted.patch[shape.mask][inner], (sources[0, inner] + 40) / SIDE, atol=2e-4)


def test_deformation_brings_no_new_grey_levels_to_a_step():
    step = np.where(np.arange(SIDE) < SIDE // 2, 0.25, 0.75).astype(np.float32)[None, :].repeat(SIDE, 0)
    for index in range(20):
        sample = AnomalySynthesizer().paint("source_deformation", step, None, sample_generator(0, 0, index))
        assert sample.image.min() >= 0.25
        assert sample.image.max() <= 0.75


# --- randomness ---------------------------------------------------------------------------------------------


def painted_at(seed: int, epoch: int, index: int) -> np.ndarray:
    image = noise_image()
    config = SynthesisConfig(identity_share=0)
    return AnomalySynthesizer(config)(image, None, sample_generator(seed, epoch, index), (image,)).image


def test_one_seed_gives_one_anomaly():
    np.testing.assert_array_equal(painted_at(7, 2, 3), painted_at(7, 2, 3))


@pytest.mark.parametrize("other", [(8, 2, 3), (7, 3, 3), (7, 2, 4), (7, 3, 2)])
def test_another_seed_epoch_or_sample_gives_another_anomaly(other):
    # Published: generators copied into the workers replay the same stream in every epoch and worker.
    assert not np.array_equal(painted_at(7, 2, 3), painted_at(*other))


def test_streams_do_not_collide_over_a_whole_training_run():
    first = {
        int(sample_generator(1, epoch, index).integers(2**63)) for epoch in range(20) for index in range(64)
    }
    assert len(first) == 20 * 64


def test_the_global_random_state_plays_no_part():
    np.random.seed(0)  # noqa: NPY002
    before = painted_at(7, 0, 0)
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(before, painted_at(7, 0, 0))


def test_kinds_are_chosen_by_their_shares():
    config = SynthesisConfig(
        cut_paste=CutPaste(share=3),
        gauss_intensity=GaussIntensityChange(share=1),
        source_deformation=SourceDeformation(share=0),
        identity_share=0,
    )
    image = noise_image(dims=(48, 48))
    synthesizer = AnomalySynthesizer(config)
    kinds = [synthesizer(image, None, sample_generator(0, 0, i), (image,)).kind for i in range(400)]
    assert set(kinds) == {"cut_paste", "gauss_intensity"}
    assert kinds.count("cut_paste") / 400 == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 400))


# --- the body -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gauss_intensity", "source_deformation"])
def test_at_least_half_of_every_lesion_lies_on_the_foreground(kind):
    body = disc((SIDE, SIDE), (90, 130), 55)
    synthesizer = AnomalySynthesizer(SynthesisConfig(second_application=0))
    for index in range(40):
        mask = synthesizer.paint(kind, noise_image(), body, sample_generator(0, 0, index)).mask
        assert (mask & body).sum() >= 0.5 * mask.sum() > 0


def test_a_body_smaller_than_the_smallest_lesion_still_gets_one():
    body = disc((SIDE, SIDE), (60, 60), 12)
    mask = AnomalySynthesizer().paint("gauss_intensity", noise_image(), body, np.random.default_rng(0)).mask
    assert (mask & body).sum() >= 0.5 * mask.sum() > 0


def test_an_image_without_foreground_is_left_as_it_is():
    body = np.zeros((SIDE, SIDE), bool)
    sample = AnomalySynthesizer().paint("gauss_intensity", noise_image(), body, np.random.default_rng(0))
    assert sample.kind == "identity"


def test_foreground_is_the_body_with_its_dark_inside_and_without_labels():
    body = disc((SIDE, SIDE), (110, 115), 80)
    image = np.where(body, 0.6, 0.02) * noise_image() ** 0.3
    image[disc((SIDE, SIDE), (120, 100), 20)] = 0.0
    image[8:16, 8:30] = 1.0
    found = foreground(image.astype(np.float32))
    assert (found & body).sum() / (found | body).sum() > 0.93
    assert found[120, 100]
    assert not found[12, 20]


def test_foreground_is_the_whole_frame_when_the_picture_fills_it():
    assert foreground(0.3 + 0.5 * noise_image()).all()


def test_foreground_of_a_flat_image_is_the_whole_frame():
    assert foreground(np.zeros((64, 64), np.float32)).all()


# --- what goes in and out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(224, 224), (32, 32), (120, 300), (300, 97)])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_keep_size_type_and_range(kind, dims):
    image = noise_image(dims=dims).astype(np.float64)
    before = image.copy()
    config = SynthesisConfig(cut_paste=CutPaste(blend="either"), second_application=1)
    for index in range(6):
        sample = AnomalySynthesizer(config).paint(
            kind, image, None, sample_generator(0, 0, index), (noise_image(1, (200, 150)),)
        )
        assert (sample.image.shape, sample.image.dtype) == (dims, np.float32)
        assert (sample.mask.shape, sample.mask.dtype) == (dims, bool)
        assert sample.image.min() >= 0
        assert sample.image.max() <= 1
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((224, 224, 3), np.float32),
        np.zeros((20, 224), np.float32),
        np.full((224, 224), 2.0),
        np.full((224, 224), np.nan),
        np.zeros((224, 224), np.uint8),
    ],
    ids=["colour", "too small", "above 1", "not a number", "8 bits"],
)
def test_an_unusable_image_is_refused(image):
    with pytest.raises(InvalidRequest):
        AnomalySynthesizer()(image, None, np.random.default_rng(0))


def test_a_foreground_of_another_size_is_refused():
    with pytest.raises(InvalidRequest, match="one size"):
        AnomalySynthesizer()(FLAT, np.ones((10, 10), bool), np.random.default_rng(0))


def test_configuration_survives_json():
    config = SynthesisConfig(
        cut_paste=CutPaste(blend="poisson", size=(0.05, 0.3)), identity_share=0, foreground_overlap=0.9
    )
    assert SynthesisConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"identity": 1}, "'identity'"),
        ({"cut_paste": {"blending": "hard"}}, "'blending'"),
        ({"cut_paste": {"blend": "soft"}}, "'soft'"),
        ({"cut_paste": {"share": -1}}, "share"),
        ({"cut_paste": {"share": "often"}}, "synthesis.cut_paste"),
        ({"cut_paste": 0.25}, "synthesis.cut_paste"),
        ({"source_deformation": {"size": [0.6, 0.2]}}, "size"),
        ({"gauss_intensity": {"texture_blur": []}}, "texture_blur"),
        ({"second_application": 1.5}, "second_application"),
    ],
)
def test_a_bad_setting_is_refused_by_name(data, named):
    with pytest.raises(InvalidRequest, match=named):
        SynthesisConfig.from_dict(data)


def test_a_configuration_without_any_task_is_refused():
    with pytest.raises(InvalidRequest, match="all shares"):
        SynthesisConfig(CutPaste(share=0), GaussIntensityChange(share=0), SourceDeformation(share=0), 0)
