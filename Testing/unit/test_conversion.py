"""Published checkpoints become bundles that detect as the published detector does, or are refused by name."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import DATA, everywhere, golden, golden_clip, method_weights, tiny_spec, whole_golden
from PIL import Image
from safetensors.torch import load_file, save_file

from MedAnomalyCLIPLib import __version__
from MedAnomalyCLIPLib.bundle import Bundle
from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.clip.importing import import_open_clip
from MedAnomalyCLIPLib.clip.towers import clip_with_state, create_clip
from MedAnomalyCLIPLib.conversion import convert
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.detectors.presets import CONVERTIBLE, PRESETS
from MedAnomalyCLIPLib.detectors.published import NAMES, load_published
from MedAnomalyCLIPLib.detectors.support import SupportSet, remember
from MedAnomalyCLIPLib.downloads import PLACE, downloads_folder
from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest, OutputFailed, UnreadableImage
from MedAnomalyCLIPLib.geometry import cut_slice
from MedAnomalyCLIPLib.preprocess import SlicePreprocessor
from MedAnomalyCLIPLib.training.views import few_shot_views
from MedAnomalyCLIPLib.volume import read_volume

WIDTH, EMBEDDING, TEXT_WIDTH, TAPS = 64, 32, 32, (2, 4)
NAMED = ("mvfa_zero_shot", "mvfa_few_shot", "mvfa_few_shot_labels", "adaclip", "diffusionclip")
REMEMBERING = ("mvfa_few_shot", "mvfa_few_shot_labels")

pytestmark = pytest.mark.usefixtures("no_gradients", "tiny_presets")


@pytest.fixture
def tiny_presets(monkeypatch, tiny_tower):
    """Every published system on a small tower, its other numbers as published."""
    for name, preset in PRESETS.items():
        spec = preset.detector
        fused = spec.feature_fusion and replace(spec.feature_fusion, channels=(6, 8))
        tower = replace(spec.tower, model=tiny_tower.model, image_size=80, taps=TAPS)
        clusters = replace(spec.clusters, count=3)
        small = replace(spec, tower=tower, feature_fusion=fused, clusters=clusters)
        monkeypatch.setitem(PRESETS, name, replace(preset, detector=small))


def numbers(*shape):
    """Random numbers that half precision holds exactly, as a bundle does."""
    return (0.2 * torch.randn(*shape)).half().float()


def linear(name, inputs, outputs, *, convolution=False):
    shape = (outputs, inputs, 1, 1) if convolution else (outputs, inputs)
    return {f"{name}.weight": numbers(*shape), f"{name}.bias": numbers(outputs)}


def two_heads():
    state = {}
    for i in range(len(TAPS)):
        state[f"{i}.fc1.0.weight"] = numbers(EMBEDDING, WIDTH)
        state[f"{i}.fc2.0.weight"] = numbers(WIDTH, EMBEDDING)
    return state


def prompt_learner():
    return {
        "ctx_pos": numbers(1, 1, 12, TEXT_WIDTH),
        "ctx_neg": numbers(1, 1, 12, TEXT_WIDTH),
        **{f"compound_prompts_text.{i}": numbers(4, TEXT_WIDTH) for i in range(8)},
        **linear("compound_prompt_projections.0", TEXT_WIDTH, 896),
        "token_prefix_pos": numbers(1, 1, 1, TEXT_WIDTH),
        "tokenized_prompts_pos": torch.zeros(1, 1, 40, dtype=torch.int32),
    }


def adaclip_learner():
    state = {
        **linear("cls_token_layer.head.0", EMBEDDING, EMBEDDING),
        **{f"text_prompter.static_prompts.{i}": numbers(5, TEXT_WIDTH) for i in range(4)},
        **{f"visual_prompter.static_prompts.{i}": numbers(5, WIDTH) for i in range(4)},
    }
    for i in range(len(TAPS)):
        state |= linear(f"patch_token_layer.head.{i}", WIDTH, EMBEDDING)
    for i in range(5):
        state |= linear(f"dynamic_visual_prompt_generator.head.{i}", EMBEDDING, WIDTH)
        state |= linear(f"dynamic_text_prompt_generator.head.{i}", EMBEDDING, TEXT_WIDTH)
    return {f"clip_model.{name}": value for name, value in state.items()}


def fusion_learner():
    state = {}
    for i, channels in enumerate((6, 8)):
        state |= linear(f"sd_token_adapters.{i}.proj", channels, WIDTH, convolution=True)
        state |= linear(f"sd_fusion_blocks.{i}.gate.0", 2 * WIDTH, WIDTH)
        state |= linear(f"sd_fusion_blocks.{i}.gate.2", WIDTH, WIDTH)
        for norm in (f"sd_token_adapters.{i}.norm", f"sd_fusion_blocks.{i}.out_norm"):
            state |= {f"{norm}.weight": numbers(WIDTH), f"{norm}.bias": numbers(WIDTH)}
    return {f"clip_model.{name}": value for name, value in state.items()}


def published_content(system):
    """What the authors' code hands to `torch.save`."""
    torch.manual_seed(1)
    if system.startswith("mvfa"):
        return {"seg_adapters": two_heads(), "det_adapters": two_heads()}
    if system == "medvmad":
        return {"prompt_learner": prompt_learner(), "seg_adapters": two_heads(), "det_adapters": two_heads()}
    if system.startswith("mediclip"):
        adapter = {}
        for i in range(len(TAPS)):
            adapter |= linear(f"{i}_adapter.0", WIDTH, EMBEDDING, convolution=True)
        prompts = {
            "ctx.normal_end": numbers(10, 8, TEXT_WIDTH),
            "ctx.abnormal_end": numbers(11, 8, TEXT_WIDTH),
        }
        return {"adapter_state_dict": adapter, "prompt_state_dict": prompts}
    return adaclip_learner() | (fusion_learner() if system == "diffusionclip" else {})


def flat(content, name=""):
    if not isinstance(content, dict):
        return {name: content}
    return {
        key: value
        for part in content
        for key, value in flat(content[part], f"{name}.{part}".strip(".")).items()
    }


@pytest.fixture
def clip_file(tmp_path, tiny_tower) -> Path:
    """A CLIP at the input size it was trained at, in half precision as OpenAI's are."""
    torch.manual_seed(2)
    state = create_clip(tiny_tower).state_dict()
    save_file({k: v.half().contiguous() for k, v in state.items()}, tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


@pytest.fixture
def picture(tmp_path) -> Path:
    return write_picture(tmp_path / "picture.png", 7)


def write_picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:90, :70]
    waves = np.random.default_rng(seed).uniform(0.05, 0.3, 2)
    pixels = 120 + 60 * np.sin(waves[0] * rows) + 60 * np.cos(waves[1] * columns)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def support(tmp_path) -> Path:
    """Three normal images and one abnormal, and test images that cannot be read."""
    folder = tmp_path / "support"
    lines = ["image,modality,body_part,label,split"]
    for i, (label, split) in enumerate(
        [("normal", "train")] * 3 + [("abnormal", "valid"), ("normal", "test"), ("abnormal", "test")]
    ):
        if split == "test":
            (folder / f"{i}.png").write_bytes(b"must not be read")
        else:
            write_picture(folder / f"{i}.png", i)
        lines.append(f"{i}.png,MR,brain,{label},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def checkpoint_of(system, tmp_path, change=lambda content: content):
    path = tmp_path / f"{system}.pth"
    torch.save(change(published_content(system)), path)
    return path


@pytest.fixture
def converted(tmp_path, clip_file, support):
    """Converts a system, from what `change` makes of its checkpoint."""

    def run(system, change=lambda content: content, **options):
        path = checkpoint_of(system, tmp_path, change)
        words = {"shows": "Brain"} if system in NAMED else {}
        words |= {"support": support} if system in REMEMBERING else {}
        return convert(system, [path], clip_file, tmp_path / "out", **(words | options))

    return run


def plane_of(path):
    return cut_slice(read_volume(path), 2, 0)


def rounded(detector):
    """The same detector with numbers in half precision, as a bundle stores them."""
    state = detector.state_dict()
    detector.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in state.items()})
    return detector


def published_detector(system, spec, clip_file):
    """Published weights put into a detector without any file."""
    detector = AnomalyDetector(spec).eval()
    clip = clip_with_state(spec.tower, {k: v.float() for k, v in load_file(clip_file).items()}, "clip")
    load_published(detector, system, flat(published_content(system)), clip)
    return detector


def remember_support(detector, preprocessor, folder):
    prepared = [preprocessor.prepare(plane_of(folder / f"{i}.png")) for i in range(4)]
    views = [few_shot_views(p.tensor, torch.zeros_like(p.valid), p.valid) for p in prepared[:3]]
    images, valid = torch.cat([v[0] for v in views]), torch.cat([v[2] for v in views])
    lesion = SupportSet(prepared[3].tensor[None], prepared[3].valid[None])
    remember(detector, SupportSet(images, valid, tuple(i for i in range(3) for _ in range(11))), lesion)


def test_every_system_with_published_weights_can_be_converted():
    assert set(CONVERTIBLE) == set(NAMES)


@pytest.mark.parametrize("system", [name for name in CONVERTIBLE if name != "diffusionclip"])
def test_bundle_detects_as_the_published_weights_do(system, converted, clip_file, picture, support):
    bundle = converted(system).bundle
    preprocessor = SlicePreprocessor(bundle.manifest.preprocess)
    expected = published_detector(system, bundle.manifest.detector, clip_file)
    if system in REMEMBERING:
        remember_support(expected, preprocessor, support)
    plane = plane_of(picture)
    prepared = preprocessor.prepare(plane)
    maps, scores, _ = rounded(expected)(prepared.tensor[None], prepared.valid[None])
    result = SliceDetector.load(bundle.folder, device="cpu").detect(plane)
    np.testing.assert_allclose(result.map, preprocessor.map_back(maps[0], prepared.fit), atol=2e-5)
    assert result.score == pytest.approx(float(scores), abs=2e-5)
    assert float(maps.std()) > 1e-4


def test_system_that_needs_more_than_images_says_so_and_runs_when_it_is_handed_in(
    converted, clip_file, picture
):
    done = converted("diffusionclip")
    assert "cannot detect alone" in done.notes[0]
    assert done.notes[0] in done.bundle.card
    with pytest.raises(InvalidRequest, match="2 feature maps beside its images"):
        SliceDetector.load(done.bundle.folder, device="cpu").detect(plane_of(picture))
    prepared = SlicePreprocessor(done.bundle.manifest.preprocess).prepare(plane_of(picture))
    inputs = prepared.tensor[None], prepared.valid[None], [torch.randn(1, 6, 8, 8), torch.randn(1, 8, 4, 4)]
    expected = rounded(published_detector("diffusionclip", done.bundle.manifest.detector, clip_file))(*inputs)
    found = Bundle.load(done.bundle.folder).build()(*inputs)
    torch.testing.assert_close(found.map, expected.map, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.score, expected.score, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("system", "key", "transposed"),
    [
        ("mvfa_zero_shot", "out/text_features", True),
        ("mediclip", "out/text_features", True),
        ("medvmad", "out/text_features", False),
    ],
)
def test_text_features_in_a_bundle_are_the_published_ones(
    system, key, transposed, monkeypatch, tmp_path, tiny_tower
):
    """From numbers that the authors' code made, through a checkpoint as it saves one, to the disk."""
    arrays, name = golden(system.partition("_")[0]), f"golden-{system.partition('_')[0]}"
    spec = golden_spec(system, name)
    monkeypatch.setitem(PRESETS, system, replace(PRESETS[system], detector=spec))
    state = golden_clip(arrays, spec).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "clip.safetensors")
    torch.save(nested(method_weights(arrays)), tmp_path / "weights.pth")
    words = {"shows": "Brain"} if system in NAMED else {}
    bundle = convert(
        system, [tmp_path / "weights.pth"], tmp_path / "clip.safetensors", tmp_path / "out", **words
    ).bundle
    expected = arrays[key].T if transposed else arrays[key]
    torch.testing.assert_close(bundle.build().text_bank, expected, atol=3e-4, rtol=0)


def golden_spec(system, model):
    """The preset on the tiny model of the golden numbers, at the input size of that model."""
    tiny_spec(system, model.removeprefix("golden-"), 1, (1,))  # open_clip knows the model from now on
    size = json.loads((DATA / "architectures" / f"{model}.json").read_text())["vision_cfg"]["image_size"]
    spec, taps = PRESETS[system].detector, (6, 12, 18, 24)
    if system == "mediclip":
        taps = (12, 18, 24)
    if system == "medvmad":
        spec = replace(spec, text=replace(spec.text, length=6, deep_depth=3, deep_length=3))
    return replace(spec, tower=replace(spec.tower, model=model, image_size=size, taps=taps))


@pytest.mark.parametrize(
    ("system", "images", "maps", "taps", "size", "atol"),
    [
        ("mvfa_zero_shot", "in/image_test", "out/zero_map_sum", 4, 120, 4e-3),
        ("mediclip", "in/image", "out/anomaly_map", 1, 112, 1e-4),
    ],
)
def test_at_full_depth_a_bundle_gives_the_published_maps(
    system, images, maps, taps, size, atol, monkeypatch, tmp_path
):
    """The authors' code adds MVFA's taps, which a bundle averages; half precision is what moves the rest."""
    name = system.partition("_")[0]
    arrays = whole_golden(name)
    spec = golden_spec(system, f"golden-{name}")
    spec = replace(spec, tower=replace(spec.tower, image_size=size))
    monkeypatch.setitem(PRESETS, system, replace(PRESETS[system], detector=spec))
    state = golden_clip(arrays, spec).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "clip.safetensors")
    torch.save(nested(method_weights(arrays)), tmp_path / "weights.pth")
    words = {"shows": "Brain"} if system in NAMED else {}
    bundle = convert(
        system, [tmp_path / "weights.pth"], tmp_path / "clip.safetensors", tmp_path / "out", **words
    ).bundle
    found = bundle.build()(arrays[images], everywhere(len(arrays[images]), size)).map
    published = arrays[maps] if arrays[maps].ndim == 3 else arrays[maps][:, 1]
    torch.testing.assert_close(taps * found, published, atol=atol, rtol=0)


def nested(weights):
    """Weights as a checkpoint holds them: a dictionary for each module, the prompt learner's among them."""
    content = {}
    for name, value in weights.items():
        module, _, rest = name.rpartition("/")
        content.setdefault(module or "prompt_learner", {})[rest] = value
    return content


def left_behind(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "out")))


def without(*names):
    def change(content):
        for name in names:
            module, _, key = name.partition("/")
            del (content[module] if key else content)[key or module]
        return content

    return change


def test_every_weight_that_is_missing_is_named_and_nothing_is_written(converted, tmp_path):
    change = without("seg_adapters/0.fc1.0.weight", "det_adapters/1.fc2.0.weight")
    message = (
        r"adapters\.0\.segmentation\.down\.weight is missing; adapters\.1\.detection\.up\.weight is missing"
    )
    with pytest.raises(BundleInvalid, match=message):
        converted("mvfa_zero_shot", change)
    assert left_behind(tmp_path) == []


def test_every_weight_that_is_unknown_is_named(converted, tmp_path):
    extra = {"seg_mlp": {"weight": torch.ones(1)}, "det_adapters2": {"bias": torch.ones(1)}}
    with pytest.raises(BundleInvalid, match=r"det_adapters2\.bias, seg_mlp\.weight"):
        converted("mvfa_zero_shot", lambda content: content | extra)
    assert left_behind(tmp_path) == []


def test_every_weight_of_another_shape_is_named_with_both_shapes(converted):
    def change(content):
        content["adapter_state_dict"]["0_adapter.0.bias"] = torch.zeros(5)
        content["prompt_state_dict"]["ctx.normal_end"] = torch.zeros(9, 8, TEXT_WIDTH)
        return content

    message = r"linear\.bias is \(5,\), not \(32,\); prompts\.normal is \(9, 8, 32\), not \(10, 8, 32\)"
    with pytest.raises(BundleInvalid, match=message):
        converted("mediclip", change)


@pytest.mark.parametrize(
    ("asked", "given", "likely"),
    [
        ("mediclip", "mvfa_zero_shot", "mvfa_zero_shot, mvfa_few_shot, mvfa_few_shot_labels"),
        ("medvmad", "mvfa_zero_shot", "mvfa_zero_shot"),
        ("mvfa_zero_shot", "medvmad", "medvmad"),
        ("diffusionclip", "adaclip", "adaclip"),
        ("adaclip", "diffusionclip", "diffusionclip"),
    ],
)
def test_weights_of_another_system_are_refused_and_told_by_their_names(converted, asked, given, likely):
    with pytest.raises(BundleInvalid, match=f"By their names they are of {likely}"):
        converted(asked, lambda _: published_content(given))


def test_what_is_not_needed_is_told(converted):
    done = converted("medvmad", lambda content: content | {"epoch": 15})
    assert done.unused == (
        "prompt_learner.compound_prompt_projections.0.bias",
        "prompt_learner.compound_prompt_projections.0.weight",
        "prompt_learner.token_prefix_pos",
        "prompt_learner.tokenized_prompts_pos",
        "epoch",
    )
    assert done.used == len(flat(published_content("medvmad"))) - 4
    assert all(f"`{name}`" in done.bundle.card for name in done.unused)


def test_first_static_text_prompt_of_adaclip_is_known_to_be_read_by_nobody(converted):
    assert converted("adaclip").unused == ("clip_model.text_prompter.static_prompts.0",)


def test_weights_may_come_in_several_files(tmp_path, clip_file):
    content = published_content("mvfa_zero_shot")
    paths = [tmp_path / f"{name}.pth" for name in content]
    for (name, part), path in zip(content.items(), paths, strict=True):
        torch.save({name: part}, path)
    done = convert("mvfa_zero_shot", paths, clip_file, tmp_path / "out", shows="Brain")
    assert done.used == 8
    with pytest.raises(
        BundleInvalid, match=r"seg_adapters\.pth holds what another file holds too: seg_adapters\.0"
    ):
        convert("mvfa_zero_shot", [paths[0], *paths], clip_file, tmp_path / "out2", shows="Brain")


def test_weight_that_is_there_under_two_names_is_refused(converted):
    def change(content):
        return content | {"ctx_pos": content["prompt_learner"]["ctx_pos"]}

    with pytest.raises(BundleInvalid, match=r"one place: ctx_pos, prompt_learner\.ctx_pos"):
        converted("medvmad", change)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_are_no_numbers_or_do_not_fit_a_bundle_are_named(converted, value):
    def change(content):
        content["det_adapters"]["1.fc1.0.weight"][3, 4] = value
        return content

    with pytest.raises(BundleInvalid, match=r"half precision: det_adapters\.1\.fc1\.0\.weight$"):
        converted("mvfa_zero_shot", change)


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, clip_file, zipped):
    content = published_content("mvfa_zero_shot") | {"hook": Bomb(tmp_path / "ran")}
    torch.save(content, tmp_path / "bomb.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnreadableImage, match=r"bomb\.pth .* asks for \w+\.mkdir, .* nothing of it was run"):
        convert("mvfa_zero_shot", [tmp_path / "bomb.pth"], clip_file, tmp_path / "out", shows="Brain")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 cut"])
def test_file_that_holds_no_weights_is_refused(tmp_path, clip_file, content):
    (tmp_path / "odd.pth").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"odd\.pth"):
        convert("mediclip", [tmp_path / "odd.pth"], clip_file, tmp_path / "out")
    with pytest.raises(UnreadableImage, match=r"none\.pth does not exist"):
        convert("mediclip", [tmp_path / "none.pth"], clip_file, tmp_path / "out")


def test_checkpoint_without_names_is_refused(tmp_path, clip_file):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UnreadableImage, match="holds a list"):
        convert("mediclip", [tmp_path / "list.pth"], clip_file, tmp_path / "out")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(BundleInvalid, match=r"no weights in empty\.pth"):
        convert("mediclip", [tmp_path / "empty.pth"], clip_file, tmp_path / "out")


def test_clip_that_was_trained_at_another_input_size_is_refused(converted, tiny_tower, clip_file):
    state = create_clip(replace(tiny_tower, image_size=128)).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, clip_file)
    with pytest.raises(BundleInvalid, match="positions for 64 patches, not the 16 of tiny-test-clip"):
        converted("mediclip")


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        ("mvfa_zero_shot", {"shows": ""}, "--object Brain"),
        ("adaclip", {"shows": ""}, "--object Brain"),
        ("mediclip", {"shows": "Brain"}, "leave --object away"),
        ("mvfa_few_shot", {"support": None}, "with --support"),
        ("mediclip", {"support": Path("x")}, "leave --support away"),
        ("diffusionclip_denoising", {}, "no published weights of 'diffusionclip_denoising', but of mvfa"),
    ],
)
def test_what_a_system_needs_or_has_no_use_for_is_told(system, options, message, tmp_path, clip_file):
    words = ({"shows": "Brain"} if system in NAMED else {}) | options
    with pytest.raises(InvalidRequest, match=message):
        convert(system, [tmp_path / "not there"], clip_file, tmp_path / "out", **words)


def test_support_needs_two_normal_images(converted, support):
    lines = (support / "manifest.csv").read_text().splitlines()
    (support / "manifest.csv").write_text("\n".join([*lines[:2], *lines[4:]]) + "\n")
    with pytest.raises(InvalidRequest, match="1 normal images beside those of its test split; give 2 to 64"):
        converted("mvfa_few_shot")


def test_memory_has_every_patch_of_eleven_views(converted):
    memory = converted("mvfa_few_shot").bundle.manifest.detector.memory
    assert memory.rows == 3 * 11 * (5 * 5 + 1)


def test_threshold_may_be_said_and_is_not_called_calibrated(converted):
    bundle = converted("mediclip", threshold=0.7).bundle
    assert bundle.manifest.threshold == 0.7
    assert (bundle.manifest.reference, bundle.manifest.image_threshold, bundle.manifest.quality) == (
        None,
    ) * 3
    assert "no threshold was calibrated: the pixel threshold 0.7 is a starting" in " ".join(
        bundle.card.split()
    )


def test_card_tells_what_it_was_made_from_and_by_what(converted, tmp_path):
    bundle = converted("mediclip").bundle
    sha256 = hashlib.sha256((tmp_path / "mediclip.pth").read_bytes()).hexdigest()
    assert f"`mediclip.pth`, SHA-256 `{sha256}`" in bundle.card
    assert f"MedAnomalyCLIP {__version__}" in bundle.card
    assert "research use only" in bundle.card.lower()
    assert "medanomalyclip evaluate" in bundle.card
    assert "cnulab/MediCLIP" in bundle.manifest.licence


def test_what_is_there_is_replaced_on_request_only_and_never_what_is_no_detector(converted, tmp_path):
    converted("mediclip")
    with pytest.raises(OutputFailed, match="out exists already; use --overwrite"):
        converted("mediclip")
    assert converted("mediclip", threshold=0.6, overwrite=True).bundle.manifest.threshold == 0.6
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputFailed, match=r"notes\.txt, which is no part of a detector"):
        converted("mediclip", overwrite=True)
    assert Bundle.load(tmp_path / "out").manifest.threshold == 0.6


def test_failed_conversion_leaves_the_earlier_bundle(converted, tmp_path):
    converted("mediclip")
    with pytest.raises(BundleInvalid):
        converted("mediclip", without("prompt_state_dict"), overwrite=True)
    assert left_behind(tmp_path) == ["out"]
    assert Bundle.load(tmp_path / "out").build()


def test_command_converts_and_the_detector_detects(tmp_path, clip_file, picture, capsys):
    words = ["convert", "medvmad", checkpoint_of("medvmad", tmp_path), "--clip", clip_file]
    assert main([*map(str, words), "--output", str(tmp_path / "out")]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "18 weights used" in printed
    assert "prompt_learner.token_prefix_pos" in printed
    assert "no threshold calibrated; see `medanomalyclip evaluate`" in printed
    words = ["detect", picture, "--model", tmp_path / "out", "--output", tmp_path / "results"]
    assert main([*map(str, words), "--device", "cpu"]) == EXIT_DONE
    assert (tmp_path / "results" / "picture" / "map.nii.gz").is_file()


def test_command_speaks_json(tmp_path, clip_file, capsys):
    path = checkpoint_of("mvfa_zero_shot", tmp_path)
    words = ["convert", "mvfa_zero_shot", path, "--clip", clip_file, "--object", "Brain", "--json"]
    assert main([*map(str, words), "--output", str(tmp_path / "out")]) == EXIT_DONE
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["used"], told["unused"]) == ("mvfa_zero_shot Brain", 8, [])
    assert [source["name"] for source in told["sources"]] == ["mvfa_zero_shot.pth", "clip.safetensors"]


def test_command_tells_what_does_not_fit(tmp_path, clip_file, capsys):
    path = checkpoint_of("mediclip", tmp_path, without("prompt_state_dict"))
    words = ["convert", "mediclip", path, "--clip", clip_file, "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == EXIT_USER_ERROR
    assert "prompts.abnormal is missing; prompts.normal is missing" in capsys.readouterr().err


def test_nothing_is_fetched_unless_allowed(tmp_path, capsys):
    path = checkpoint_of("mediclip", tmp_path)
    words = ["convert", "mediclip", str(path), "--clip", "openai", "--output", str(tmp_path / "out")]
    assert main(words) == EXIT_USER_ERROR
    assert "allow the download explicitly" in capsys.readouterr().err


@pytest.fixture
def network(monkeypatch, tmp_path_factory):
    """What open_clip is asked to fetch, and where to, and fails to."""
    asked = []

    def fetch(config, cache_dir):
        asked.append((config, cache_dir))
        raise OSError("no network in tests")

    monkeypatch.setenv(PLACE, str(tmp_path_factory.mktemp("downloads")))

    open_clip = import_open_clip()
    monkeypatch.setattr(open_clip, "download_pretrained", fetch)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: {"hf_hub": f"somebody/{tag}/"})
    return asked


def test_source_and_size_are_told_before_anything_is_fetched(tmp_path, network, capsys):
    path = checkpoint_of("mediclip", tmp_path)
    words = ["convert", "mediclip", str(path), "--clip", "openai", "--download"]
    assert main([*words, "--output", str(tmp_path / "out")]) == EXIT_USER_ERROR
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("may fetch openai weights of tiny-test-clip, about 2 MB, from ")
    assert first.endswith("somebody/openai")
    assert "could not be fetched: no network in tests" in rest[-1]
    assert network == [({"hf_hub": "somebody/openai/"}, str(downloads_folder()))]
    assert left_behind(tmp_path) == []
