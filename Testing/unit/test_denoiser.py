"""The denoiser: its schedule is the formula's, its steps undo noise, it learns, and it rides in a bundle."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from MedAnomalyCLIPLib.bundle import Bundle, default_bundle_path, save_bundle
from MedAnomalyCLIPLib.clip.towers import TappedTokens
from MedAnomalyCLIPLib.configuration import from_mapping, to_mapping
from MedAnomalyCLIPLib.detectors.denoiser import Denoiser, NoiseSchedule, grid_positions
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.detectors.presets import PRESETS
from MedAnomalyCLIPLib.detectors.specification import (
    AdapterSpec,
    DenoiserSpec,
    DetectorSpec,
    TextSpec,
    VisualPromptSpec,
)
from MedAnomalyCLIPLib.detectors.text import HybridText
from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest

GRID, WIDTH, EMBED = (4, 4), 24, 16
SMALL = DenoiserSpec(width=16)
TEXT = F.normalize(torch.randn(2, EMBED, generator=torch.Generator().manual_seed(1)), dim=-1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_tokens(images=4, taps=2, seed=0, noise=0.0):
    """Tokens with channels of different mean and spread, all near a space of three dimensions."""
    g = seeded(seed)
    directions = torch.randn(3, WIDTH, generator=seeded(99)) * torch.linspace(0.5, 4, WIDTH)
    clean = [torch.randn(images, 16, 3, generator=g) @ directions + torch.arange(WIDTH) for _ in range(taps)]
    pooled = torch.randn(images, EMBED, generator=g)
    patches = tuple(c + noise * c.std((0, 1)) * torch.randn(c.shape, generator=g) for c in clean)
    return TappedTokens(patches, tuple(c[:, 0] for c in clean), pooled, GRID)


def denoiser_for(spec=SMALL, taps=2, *, shaken=False):
    torch.manual_seed(0)
    denoiser = Denoiser(spec, taps, WIDTH, EMBED)
    denoiser.fit_statistics([some_tokens()])
    if shaken:  # as after training: nothing is zero any more
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return denoiser


def test_linear_schedule_is_the_product_of_its_betas():
    schedule = NoiseSchedule("linear", 1000)
    kept = 1.0
    for level in range(1, 1001):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * (level - 1) / 999)
        if level in (1, 100, 500, 1000):
            assert float(schedule.signal[level]) == pytest.approx(math.sqrt(kept), rel=1e-5)
            assert float(schedule.noise[level]) == pytest.approx(math.sqrt(1 - kept), rel=1e-5)


def test_cosine_schedule_follows_the_squared_cosine():
    schedule = NoiseSchedule("cosine", 1000)
    for level in (1, 100, 500, 900):
        angle, first = ((x / 1000 + 0.008) / 1.008 * math.pi / 2 for x in (level, 0))
        kept = math.cos(angle) ** 2 / math.cos(first) ** 2
        assert float(schedule.signal[level]) == pytest.approx(math.sqrt(kept), rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("levels", [1, 10, 1000])
def test_schedules_start_clean_and_only_ever_add_noise(kind, levels):
    schedule = NoiseSchedule(kind, levels)
    assert (float(schedule.signal[0]), float(schedule.noise[0])) == (1, 0)
    assert bool((schedule.signal.diff() < 0).all()) and float(schedule.signal[-1]) > 0
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(levels + 1))


def test_fewer_levels_lead_to_about_the_same_noise():
    """Betas are scaled with the number of levels, so a share of the levels means the same."""
    coarse, fine = NoiseSchedule("linear", 100), NoiseSchedule("linear", 1000)
    torch.testing.assert_close(coarse.noise[10], fine.noise[100], atol=0.02, rtol=0)


@pytest.mark.parametrize("path", [[400, 0], [400, 300, 120, 5, 0]])
def test_steps_with_the_true_noise_give_the_clean_tokens_back(path):
    schedule = NoiseSchedule("cosine", 1000)
    clean, noise = torch.randn(2, 3, 16, 8, generator=seeded())
    x = schedule.noised(clean, noise, torch.full((3,), path[0]))
    for level, lower in itertools.pairwise(path):
        x = schedule.step(x, noise, level, lower)
        torch.testing.assert_close(
            x, schedule.noised(clean, noise, torch.full((3,), lower)), atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(x, clean, atol=1e-5, rtol=1e-5)


def test_steps_lead_evenly_from_the_start_level_to_clean():
    assert denoiser_for(replace(SMALL, steps=4, start=100)).path == [100, 75, 50, 25, 0]
    assert denoiser_for(replace(SMALL, steps=3, start=3)).path == [3, 2, 1, 0]


def test_without_steps_tokens_are_the_very_same():
    tokens = some_tokens()
    assert denoiser_for(replace(SMALL, steps=0), shaken=True)(tokens, TEXT) is tokens


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_untrained_denoiser_changes_nothing_but_the_rounding(schedule):
    tokens = some_tokens()
    denoised = denoiser_for(replace(SMALL, schedule=schedule))(tokens, TEXT)
    for before, after in zip(tokens.patches, denoised.patches, strict=True):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)


def test_the_loss_of_an_untrained_denoiser_is_the_power_of_the_noise(no_gradients):
    assert float(denoiser_for().loss(some_tokens(64), TEXT, seeded())) == pytest.approx(1, abs=0.02)


def test_means_and_spreads_are_those_of_all_tokens_however_they_are_batched():
    denoiser, tokens = denoiser_for(), some_tokens(6, seed=5)
    halves = [
        tokens._replace(patches=tuple(p[part] for p in tokens.patches)) for part in (slice(2), slice(2, 6))
    ]
    denoiser.fit_statistics(halves)
    for tap, own in enumerate(tokens.patches):
        flat = own.flatten(0, 1)
        torch.testing.assert_close(denoiser.mean[tap], flat.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(denoiser.spread[tap], flat.std(0, correction=0), atol=1e-5, rtol=1e-5)


def test_a_channel_that_never_changes_does_no_harm():
    tokens = some_tokens()
    for own in tokens.patches:
        own[..., 3] = 7.0
    denoiser = denoiser_for(shaken=True)
    denoiser.fit_statistics([tokens])
    assert all(bool(p.isfinite().all()) for p in denoiser(tokens, TEXT).patches)


def test_no_tokens_give_no_statistics():
    with pytest.raises(InvalidRequest, match="at least one image"):
        denoiser_for().fit_statistics([])


def test_all_random_numbers_come_from_the_generator_handed_in():
    denoiser, tokens = denoiser_for(shaken=True), some_tokens()
    torch.manual_seed(1)
    one = denoiser.loss(tokens, TEXT, seeded(3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(denoiser.loss(tokens, TEXT, seeded(3)), one)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(denoiser.loss(tokens, TEXT, seeded(4)), one)
    assert torch.equal(denoiser(tokens, TEXT).patches[0], denoiser(tokens, TEXT).patches[0])


def test_images_of_a_batch_are_denoised_each_for_itself():
    denoiser, tokens = denoiser_for(shaken=True), some_tokens()
    text = F.normalize(torch.randn(4, 2, EMBED, generator=seeded()), dim=-1)
    together = denoiser(tokens, text).patches[1][2:3]
    alone = denoiser(
        tokens._replace(patches=tuple(p[2:3] for p in tokens.patches), pooled=tokens.pooled[2:3]), text[2:3]
    ).patches[1]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)


def test_noise_is_judged_by_both_texts_and_their_order_and_by_the_image(no_gradients):
    denoiser, tokens = denoiser_for(shaken=True), some_tokens()
    first = denoiser(tokens, TEXT).patches[0]
    other_text = torch.stack([TEXT[0], -TEXT[1]])
    for seen, text in (
        (tokens, TEXT.flip(0)),
        (tokens, other_text),
        (tokens._replace(pooled=tokens.pooled.flip(0)), TEXT),
    ):
        assert float((denoiser(seen, text).patches[0] - first).abs().max()) > 1e-3


def test_noise_is_judged_by_place(no_gradients):
    """The same token everywhere is denoised in another way here than there, away from the rim too."""
    denoiser, tokens = denoiser_for(shaken=True), some_tokens()
    seen = denoiser(tokens._replace(patches=tuple(p[:, :1].repeat(1, 16, 1) for p in tokens.patches)), TEXT)
    assert float((seen.patches[0][:, 5] - seen.patches[0][:, 6]).abs().max()) > 1e-3


def test_a_token_sees_its_neighbours_and_no_farther_than_its_blocks_reach():
    denoiser = Denoiser(replace(SMALL, steps=1, blocks=1), 1, WIDTH, EMBED)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=seeded())
    tokens = some_tokens(1, 1)
    moved = tokens.patches[0].clone()
    moved[:, 0] += 1.0
    change = denoiser(tokens, TEXT).patches[0] - denoiser(tokens._replace(patches=(moved,)), TEXT).patches[0]
    touched = (change.abs().amax((0, 2)) > 1e-6).reshape(GRID)
    assert bool(touched[:2, :2].all()) and int(touched.sum()) == 4


def test_positions_of_all_patches_differ():
    positions = grid_positions((5, 7), 16, torch.device("cpu"))
    assert positions.shape == (35, 16)
    assert float(torch.pdist(positions).min()) > 0.1
    torch.testing.assert_close(positions[8, :8], positions[13, :8])  # one row
    torch.testing.assert_close(positions[8, 8:], positions[15, 8:])  # one column


def test_the_denoising_loss_teaches_the_denoiser_alone():
    tokens, text = some_tokens(), TEXT.clone().requires_grad_()
    watched = [*tokens.patches, tokens.pooled]
    for value in watched:
        value.requires_grad_()
    denoiser = denoiser_for(shaken=True)
    denoiser.loss(tokens, text, seeded()).backward()
    assert text.grad is None and all(value.grad is None for value in watched)
    assert all(bool(p.grad.abs().sum() > 0) for p in denoiser.predictors[1].up.parameters())


@pytest.fixture(scope="module")
def trained():
    """A denoiser fitted to a few tokens, and the losses on the way."""
    denoiser = denoiser_for(replace(SMALL, start=300))
    tokens = some_tokens(16)
    denoiser.fit_statistics([tokens])
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    g, losses = seeded(), []
    for _ in range(300):
        loss = denoiser.loss(tokens, TEXT, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return denoiser, losses


def test_training_lowers_the_loss(trained):
    _, losses = trained
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_denoised_tokens_lie_closer_to_the_clean_ones_than_noised_ones_do(trained):
    denoiser, _ = trained
    level = denoiser.schedule
    spread = float(level.noise[denoiser.start] / level.signal[denoiser.start])
    clean, noisy = some_tokens(32, seed=7), some_tokens(32, seed=7)
    g = seeded(8)
    noisy = noisy._replace(
        patches=tuple(
            c + spread * own * torch.randn(c.shape, generator=g)
            for c, own in zip(clean.patches, denoiser.spread, strict=True)
        )
    )
    with torch.no_grad():
        denoised = denoiser(noisy, TEXT)
    for tap, own in enumerate(denoiser.spread):
        before, after = (
            float(((t.patches[tap] - clean.patches[tap]) / own).square().mean()) for t in (noisy, denoised)
        )
        assert before == pytest.approx(spread**2, rel=0.1)
        assert after < 0.5 * before


@pytest.fixture
def spec(tiny_tower):
    return DetectorSpec(tiny_tower, denoiser=DenoiserSpec(width=16))


def hybrid(spec):
    text = TextSpec("hybrid", deep_depth=2, deep_length=2, templates=1, name="brain")
    return replace(spec, text=text, visual_prompts=VisualPromptSpec(2, 2), image_score="class_and_clusters")


def shaken_detector(spec):
    """A detector whose denoiser does something."""
    torch.manual_seed(0)
    detector = AnomalyDetector(spec).eval()
    detector.text_bank.copy_(F.normalize(torch.randn(2, 32), dim=-1))
    for predict in detector.denoiser.predictors:
        torch.nn.init.normal_(predict.up.weight, std=0.3)
    return detector


IMAGES, VALID = torch.randn(2, 3, 64, 64, generator=seeded()), torch.ones(2, 64, 64, dtype=torch.bool)


@pytest.mark.parametrize("kind", ["stored", "hybrid"])
def test_a_detector_without_steps_is_the_detector_without_a_denoiser(spec, kind, no_gradients):
    spec = hybrid(spec) if kind == "hybrid" else spec
    detector = shaken_detector(spec)
    plain = AnomalyDetector(replace(spec, denoiser=None)).eval()
    left = plain.load_state_dict(detector.state_dict(), strict=False)
    assert all(key.startswith("denoiser.") for key in left.unexpected_keys) and not left.missing_keys
    expected = plain(IMAGES, VALID)
    assert not torch.allclose(detector(IMAGES, VALID).map, expected.map, atol=1e-4)

    stepless = AnomalyDetector(replace(spec, denoiser=replace(spec.denoiser, steps=0))).eval()
    stepless.load_state_dict(detector.state_dict())
    assert torch.equal(stepless(IMAGES, VALID).map, expected.map)
    assert torch.equal(stepless(IMAGES, VALID).score, expected.score)


def test_a_detector_denoises_what_its_adapters_see_and_keeps_what_the_tower_gave(spec, no_gradients):
    detector = shaken_detector(spec)
    seen = detector.align(IMAGES)
    given = detector.tower(IMAGES)
    denoised = detector.denoiser(given, detector.text_bank)
    for tap, adapter in enumerate(detector.adapters):
        assert torch.equal(seen.tokens.patches[tap], given.patches[tap])
        torch.testing.assert_close(seen.segmentation.patches[tap], adapter(denoised.patches[tap]))
        torch.testing.assert_close(seen.segmentation.classes[tap], adapter(given.classes[tap]))


def test_text_of_an_image_is_made_once_and_reaches_the_denoiser(spec, monkeypatch, no_gradients):
    detector = shaken_detector(hybrid(spec))
    made, exact = [], HybridText.forward
    monkeypatch.setattr(HybridText, "forward", lambda self, x: made.append(exact(self, x)) or made[-1])
    reached, denoise = [], Denoiser.forward
    monkeypatch.setattr(
        Denoiser, "forward", lambda self, tokens, text: reached.append(text) or denoise(self, tokens, text)
    )
    detector(IMAGES, VALID)
    assert len(made) == len(reached) == 1
    assert torch.equal(reached[0], made[0])


def test_text_handed_in_reaches_the_denoiser_and_the_map(spec, no_gradients):
    detector = shaken_detector(spec)
    text = F.normalize(torch.randn(2, 32, generator=seeded(5)), dim=-1)
    seen = detector.align(IMAGES, text=text)
    expected = detector.map_tokens(detector.tower(IMAGES), text)
    detector.text_bank.copy_(text)
    torch.testing.assert_close(detector.map_features(seen, detector.text_features(seen)), expected)
    torch.testing.assert_close(detector(IMAGES, VALID).map, expected)


def test_tokens_alone_do_not_do_where_images_take_part_in_their_text(spec):
    detector = shaken_detector(hybrid(spec))
    with pytest.raises(InvalidRequest, match="beside their tokens"):
        detector.align_tokens(detector.tower(IMAGES))


def test_the_map_teaches_adapters_and_prompts_and_leaves_the_denoiser_to_its_own_loss(spec):
    detector = shaken_detector(hybrid(spec))
    aligned = detector.align(IMAGES)
    text = detector.text_features(aligned)
    detector.map_features(aligned, text).square().mean().backward()
    for part in (detector.adapters[0].linear, detector.text.prompts, detector.visual_prompts):
        assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in part.parameters())
    assert all(p.grad is None for p in detector.denoiser.parameters())


def test_the_detectors_denoising_loss_is_its_denoisers(spec):
    detector = shaken_detector(spec)
    tokens = detector.align(IMAGES).tokens
    detector.fit_token_statistics([tokens])
    loss = detector.denoising_loss(tokens, detector.text_bank, seeded(2))
    assert loss.shape == ()
    assert torch.equal(loss, detector.denoiser.loss(tokens, detector.text_bank, seeded(2)))
    loss.backward()
    assert all(p.grad is None for p in (*detector.tower.parameters(), *detector.adapters.parameters()))


def test_a_detector_without_a_denoiser_has_nothing_to_teach_it(spec):
    detector = AnomalyDetector(replace(spec, denoiser=None))
    tokens = detector.tower(IMAGES)
    with pytest.raises(InvalidRequest, match="no denoiser"):
        detector.denoising_loss(tokens, detector.text_bank, seeded())
    with pytest.raises(InvalidRequest, match="no denoiser"):
        detector.fit_token_statistics([tokens])


def test_a_bundle_brings_the_denoiser_back(tmp_path, tiny_manifest, spec, no_gradients):
    detector = shaken_detector(spec)
    detector.fit_token_statistics([detector.tower(IMAGES)])
    save_bundle(tmp_path / "d", replace(tiny_manifest, detector=spec), detector, "# d\n")
    bundle = Bundle.load(tmp_path / "d")
    assert bundle.manifest.detector == spec
    again = bundle.build()
    torch.testing.assert_close(again(IMAGES, VALID).map, detector(IMAGES, VALID).map, atol=2e-3, rtol=0)
    assert torch.equal(again.denoiser.schedule.noise, detector.denoiser.schedule.noise)


def test_a_bundle_may_be_built_with_fewer_steps(tmp_path, tiny_manifest, spec, no_gradients):
    """Steps are a number in bundle.json: no weight depends on them."""
    save_bundle(tmp_path / "d", replace(tiny_manifest, detector=spec), shaken_detector(spec), "# d\n")
    path = tmp_path / "d" / "bundle.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["detector"]["denoiser"]["steps"] = 0
    path.write_text(json.dumps(data), encoding="utf-8")
    assert Bundle.load(tmp_path / "d").build().denoiser.path == [0]


def test_a_bundle_from_before_denoisers_has_none():
    written = json.loads((default_bundle_path() / "bundle.json").read_text(encoding="utf-8"))["detector"]
    del written["denoiser"]
    assert from_mapping(DetectorSpec, written, "bundle.json").denoiser is None


def test_the_preset_of_the_abstract_is_its_base_with_a_denoiser():
    ours, base = PRESETS["diffusionclip_denoising"], PRESETS["adaclip"]
    assert replace(ours.detector, denoiser=None) == base.detector
    assert ours.detector.denoiser == DenoiserSpec()
    assert from_mapping(DetectorSpec, to_mapping(ours.detector), "detector") == ours.detector


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"steps": 101},
        {"start": 0},
        {"start": 1001},
        {"schedule": "square"},
        {"width": 18},
        {"blocks": 0},
    ],
)
def test_denoisers_that_mean_nothing_are_refused(change):
    with pytest.raises(BundleInvalid):
        replace(DenoiserSpec(), **change)


def test_adapters_in_the_stream_leave_a_denoiser_no_place(spec):
    with pytest.raises(BundleInvalid, match="no place"):
        replace(spec, adapter=AdapterSpec("two_heads"))
