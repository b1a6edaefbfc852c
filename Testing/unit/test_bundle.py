"""Bundles: written whole, read back equal, refused when anything about them is off."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from MedAnomalyCLIPLib.bundle import (
    MANIFEST,
    TEXT_TOWER,
    WEIGHTS,
    Bundle,
    NormalReference,
    default_bundle_path,
    file_sha256,
    save_bundle,
)
from MedAnomalyCLIPLib.clip.towers import create_clip, text_side
from MedAnomalyCLIPLib.errors import BundleInvalid, OutputFailed


def rewrite(bundle, change):
    """Change the manifest's JSON in place."""
    path = bundle.folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def replace_weights(bundle, tensors):
    """Put other weights in place, with size and hash to match."""
    save_file(tensors, bundle.folder / WEIGHTS)
    file = bundle.folder / WEIGHTS
    rewrite(bundle, lambda d: d.update(weights_bytes=file.stat().st_size, weights_sha256=file_sha256(file)))


def test_manifest_comes_back_as_it_was_written(tiny_bundle):
    assert Bundle.load(tiny_bundle.folder).manifest == tiny_bundle.manifest


def test_weights_come_back_within_half_precision(tiny_bundle):
    once = tiny_bundle.build().state_dict()
    stored = load_file(tiny_bundle.folder / WEIGHTS)
    assert all(torch.equal(once[key], value.to(once[key].dtype)) for key, value in stored.items())


def test_bundle_holds_no_text_tower(tiny_bundle):
    keys = load_file(tiny_bundle.folder / WEIGHTS).keys()
    assert "text_bank" in keys
    assert not [key for key in keys if "token_embedding" in key]


def test_both_towers_of_a_clip_come_back_from_a_bundle(tiny_bundle, tiny_manifest, tmp_path):
    clip = create_clip(tiny_manifest.detector.tower)
    detector = tiny_bundle.build()
    bundle = save_bundle(tmp_path / "both", tiny_manifest, detector, "", text_side(clip))
    again = Bundle.load(bundle.folder).build_clip().state_dict()
    expected = text_side(clip) | {f"visual.{k}": v for k, v in detector.tower.visual.state_dict().items()}
    assert again.keys() == expected.keys()
    assert all(torch.allclose(again[key], value, rtol=1e-3, atol=1e-4) for key, value in expected.items())


def test_a_bundle_without_a_text_tower_says_so_when_a_clip_is_asked_for(tiny_bundle):
    with pytest.raises(BundleInvalid, match="without the text tower"):
        tiny_bundle.build_clip()


def test_an_altered_text_tower_is_noticed(tiny_bundle, tiny_manifest, tmp_path):
    clip = create_clip(tiny_manifest.detector.tower)
    folder = save_bundle(tmp_path / "both", tiny_manifest, tiny_bundle.build(), "", text_side(clip)).folder
    (folder / TEXT_TOWER).unlink()
    with pytest.raises(BundleInvalid, match=TEXT_TOWER):
        Bundle.load(folder)


def test_the_bundled_detector_brings_a_whole_clip():
    clip = Bundle.load(default_bundle_path()).build_clip()
    assert clip.visual.output_dim == clip.text_projection.shape[1]


def test_saving_again_replaces_the_folder_whole(tiny_bundle, tiny_manifest):
    (tiny_bundle.folder / "stray").write_text("")
    save_bundle(tiny_bundle.folder, tiny_manifest, tiny_bundle.build(), "# again\n")
    assert sorted(p.name for p in tiny_bundle.folder.iterdir()) == ["MODEL_CARD.md", MANIFEST, WEIGHTS]
    assert [p.name for p in tiny_bundle.folder.parent.iterdir()] == ["tiny"]


def test_one_altered_byte_is_noticed(tiny_bundle):
    file = tiny_bundle.folder / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleInvalid, match="altered"):
        Bundle.load(tiny_bundle.folder)


def test_truncated_weights_are_noticed(tiny_bundle):
    file = tiny_bundle.folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BundleInvalid, match="incomplete"):
        Bundle.load(tiny_bundle.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d.pop("threshold"), "threshold"),
        (lambda d: d.update(threshold=2), "threshold"),
        (lambda d: d.update(threshold="high"), "threshold"),
        (lambda d: d.update(format=99), "format 99"),
        (lambda d: d["detector"].update(scale=-1), "scale"),
        (lambda d: d["detector"]["tower"].update(taps=[2, "4"]), "taps"),
        (lambda d: d["detector"]["tower"].update(image_size=32), "32"),
        (lambda d: d["preprocess"].update(size=0), "size"),
        (lambda d: d["reference"].update(scores=[0.3, 0.1]), "ascending"),
        (lambda d: d["reference"].update(scores=[]), "empty"),
    ],
)
def test_a_manifest_that_is_off_is_refused_by_name(tiny_bundle, change, message):
    rewrite(tiny_bundle, change)
    with pytest.raises(BundleInvalid, match=message):
        Bundle.load(tiny_bundle.folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100_000])
def test_json_that_is_no_manifest_is_refused(tiny_bundle, content):
    (tiny_bundle.folder / MANIFEST).write_text(content)
    with pytest.raises(BundleInvalid, match=r"bundle\.json"):
        Bundle.load(tiny_bundle.folder)


def test_missing_files_are_named(tiny_bundle):
    (tiny_bundle.folder / WEIGHTS).unlink()
    with pytest.raises(BundleInvalid, match=WEIGHTS):
        Bundle.load(tiny_bundle.folder)
    shutil.rmtree(tiny_bundle.folder)
    with pytest.raises(BundleInvalid, match=MANIFEST):
        Bundle.load(tiny_bundle.folder)


def test_a_tensor_of_another_shape_is_refused(tiny_bundle):
    tensors = load_file(tiny_bundle.folder / WEIGHTS)
    tensors["text_bank"] = torch.zeros(3, 32)
    replace_weights(tiny_bundle, tensors)
    with pytest.raises(BundleInvalid, match="text_bank"):
        Bundle.load(tiny_bundle.folder).build()


def test_an_unexpected_tensor_is_refused(tiny_bundle):
    replace_weights(tiny_bundle, {**load_file(tiny_bundle.folder / WEIGHTS), "extra": torch.zeros(1)})
    with pytest.raises(BundleInvalid, match="extra"):
        Bundle.load(tiny_bundle.folder).build()


def test_a_tensor_of_another_kind_is_refused(tiny_bundle):
    tensors = load_file(tiny_bundle.folder / WEIGHTS)
    replace_weights(tiny_bundle, {**tensors, "text_bank": tensors["text_bank"].to(torch.int64)})
    with pytest.raises(BundleInvalid, match="text_bank"):
        Bundle.load(tiny_bundle.folder).build()


def test_weights_that_are_no_safetensors_are_refused(tiny_bundle):
    file = tiny_bundle.folder / WEIGHTS
    torch.save({"text_bank": torch.zeros(2, 32)}, file)
    rewrite(
        tiny_bundle, lambda d: d.update(weights_bytes=file.stat().st_size, weights_sha256=file_sha256(file))
    )
    with pytest.raises(BundleInvalid, match="cannot be read"):
        Bundle.load(tiny_bundle.folder).build()


def test_an_unwritable_place_is_named(tiny_bundle, tiny_manifest, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed, match="mine"):
        save_bundle(tmp_path / "file" / "mine", tiny_manifest, tiny_bundle.build(), "")


def test_a_bundle_that_cannot_be_written_leaves_the_old_one_and_no_remains(
    tiny_bundle, tiny_manifest, monkeypatch
):
    detector, before = tiny_bundle.build(), (tiny_bundle.folder / MANIFEST).read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputFailed, match="No space left"):
        save_bundle(tiny_bundle.folder, tiny_manifest, detector, "")
    assert (tiny_bundle.folder / MANIFEST).read_bytes() == before
    assert [path.name for path in tiny_bundle.folder.parent.iterdir()] == ["tiny"]


def test_percentile_counts_the_reference_below():
    reference = NormalReference("", (0.1, 0.2, 0.3, 0.4))
    assert reference.percentile(0.35) == 75
    assert reference.percentile(0.0) == 0
    assert reference.percentile(0.9) == 100
    assert reference.percentile(0.2) == 37.5
