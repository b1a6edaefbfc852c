"""CLIP towers: the same numbers as open_clip's own, tapped where asked."""

from __future__ import annotations

import gzip
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from MedAnomalyCLIPLib.clip.importing import import_open_clip
from MedAnomalyCLIPLib.clip.prompts import CoOpPrompts, vectors_at
from MedAnomalyCLIPLib.clip.specification import TowerSpec
from MedAnomalyCLIPLib.clip.text import encode_embeddings
from MedAnomalyCLIPLib.clip.tokenizer import REDUCED_MERGES, create_tokenizer
from MedAnomalyCLIPLib.clip.towers import (
    TappedClipViT,
    create_clip,
    create_vision_tower,
    load_clip,
    patch_grid,
    resize_positions,
)
from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest, UnreadableImage


@pytest.fixture
def clip(tiny_tower):
    torch.manual_seed(1)
    return create_clip(tiny_tower)


def test_pooled_output_equals_open_clips_own_forward(clip):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(TappedClipViT(clip.visual, (2, 4))(images).pooled, clip.encode_image(images))


def test_taps_equal_open_clips_own_intermediates(clip):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs = clip.visual.forward_intermediates(images, indices=[1, 3], output_fmt="NLC")
        ours = TappedClipViT(clip.visual, (2, 4))(images)
    for mine, other in zip(ours.patches, theirs["image_intermediates"], strict=True):
        torch.testing.assert_close(mine, other)


def test_grid_counts_rows_first(clip):
    images = torch.zeros(1, 3, 64, 64)
    images[:, :, :16, 48:] = 5.0  # the first row's last patch
    tower = TappedClipViT(clip.visual, (1,))
    with torch.no_grad():
        change = (tower(images).patches[0] - tower(torch.zeros_like(images)).patches[0]).norm(dim=-1)
    assert tower(images).grid == (4, 4)
    assert int(change.argmax()) == 3


def test_injection_reaches_its_own_tap_and_the_layers_after(clip):
    images = torch.randn(1, 3, 64, 64)
    tower = TappedClipViT(clip.visual, (1, 2, 3))
    with torch.no_grad():
        plain = tower(images)
        injected = tower(images, inject=lambda layer, tokens: tokens * 2 if layer == 2 else tokens)
    assert torch.equal(plain.patches[0], injected.patches[0])
    torch.testing.assert_close(plain.patches[1] * 2, injected.patches[1])
    assert not torch.allclose(plain.patches[2], injected.patches[2])


def test_quick_gelu_is_what_openai_defined(tiny_tower):
    quick = create_vision_tower(replace(tiny_tower, activation="quick_gelu"))
    x = torch.linspace(-3, 3, 7)
    activation = quick.visual.transformer.resblocks[0].mlp.gelu
    torch.testing.assert_close(activation(x), x * torch.sigmoid(1.702 * x))


def test_vision_tower_alone_takes_the_weights_of_a_whole_clip(clip, tiny_tower):
    tower = create_vision_tower(tiny_tower)
    tower.visual.load_state_dict(clip.visual.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(tower(images).pooled, clip.encode_image(images))


def test_weights_of_another_input_size_keep_their_corners(clip, tiny_tower, tmp_path):
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    larger = load_clip(replace(tiny_tower, image_size=128), tmp_path / "clip.safetensors")
    assert larger.visual.grid_size == (8, 8)
    assert torch.equal(larger.visual.positional_embedding[0], clip.visual.positional_embedding[0])


def test_resized_positions_of_a_linear_ramp_stay_a_linear_ramp_inside():
    ramp = torch.arange(16.0).repeat_interleave(16)[:, None]
    grid = resize_positions(torch.cat([torch.zeros(1, 1), ramp]), (32, 32))[1:].reshape(32, 32)
    expected = (torch.arange(32) + 0.5) / 2 - 0.5
    torch.testing.assert_close(grid[4:-4, 5], expected[4:-4], atol=1e-4, rtol=0)


def test_saved_weights_load_into_the_same_numbers(clip, tiny_tower, tmp_path):
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    loaded = load_clip(tiny_tower, tmp_path / "clip.safetensors")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in clip.state_dict().items())


def test_a_pickle_with_code_is_refused(tiny_tower, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"visual.proj": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UnreadableImage, match=r"bomb\.pt"):
        load_clip(tiny_tower, tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_named_weights_are_not_fetched_unasked():
    with pytest.raises(InvalidRequest, match="allow the download"):
        load_clip(TowerSpec("ViT-B-32", 224, (12,)), "openai")


def test_unknown_model_is_named():
    with pytest.raises(BundleInvalid, match="no-such-model"):
        create_clip(TowerSpec("no-such-model", 224, (1,)))


def test_tap_beyond_the_last_layer_is_refused(tiny_tower):
    with pytest.raises(BundleInvalid, match="4 layers"):
        create_vision_tower(replace(tiny_tower, taps=(2, 5)))


@pytest.mark.parametrize("taps", [(), (0, 1), (3, 2), (2, 2)])
def test_taps_must_be_ascending_layer_numbers(tiny_tower, taps):
    with pytest.raises(BundleInvalid, match="ascending"):
        replace(tiny_tower, taps=taps)


def test_compact_architecture_has_a_14_by_14_grid_and_fewer_than_8_million_parameters():
    spec = TowerSpec("MedAnomalyCLIP-S16", 224, (2, 4, 6, 8), conv_stem=(32, 64, 128, 256))
    tower = create_vision_tower(spec)
    with torch.no_grad():
        assert tower(torch.zeros(1, 3, 224, 224)).grid == patch_grid(spec) == (14, 14)
    assert sum(p.numel() for p in tower.parameters()) < 8e6


def test_reduced_merges_are_the_first_of_open_clips_own():
    from open_clip.tokenizer import default_bpe

    ours = gzip.decompress(REDUCED_MERGES.read_bytes()).decode().split("\n")
    assert ours == gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[: len(ours)]


def test_reduced_tokenizer_writes_any_phrase_within_its_vocabulary(tiny_tower):
    tokens = create_tokenizer(tiny_tower)(["Ödem, 3 mm; peritumoural oedema?", ""])
    assert tokens.shape == (2, 40)
    assert int(tokens.max()) == 4609  # the end token has the highest id, which encode_text relies on


def test_encoding_embeddings_equals_encoding_their_tokens(clip, tiny_tower):
    tokens = create_tokenizer(tiny_tower)(["normal", "with a lesion"])
    with torch.no_grad():
        torch.testing.assert_close(
            encode_embeddings(clip, clip.token_embedding(tokens), tokens), clip.encode_text(tokens)
        )


def test_prompts_are_two_unit_vectors_that_their_context_moves(clip, tiny_tower):
    prompts = CoOpPrompts(tiny_tower, clip)
    bank = prompts(clip)
    torch.testing.assert_close(bank.norm(dim=-1), torch.ones(2))
    bank.sum().backward()
    assert prompts.normal.shape == (10, 8, 32)
    assert prompts.abnormal.shape == (11, 8, 32)
    for vectors in (prompts.normal, prompts.abnormal):
        assert float(vectors.grad.abs().amin(dim=(1, 2)).max()) > 0


def test_each_phrase_follows_its_learnable_vectors(clip, tiny_tower):
    prompts = CoOpPrompts(tiny_tower, clip, ["clear"], ["lesion"], length=3)
    alone = create_tokenizer(tiny_tower)(["clear."])[0]
    start, words = alone[0], alone[1 : int(alone.argmax()) + 1]
    assert prompts.token_ids[0, 0] == start
    assert torch.equal(prompts.token_ids[0, 4 : 4 + len(words)], words)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("before", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("around", [0, 1, 4, 5, 2, 3, 6, 7, 8]),
        ("after", [0, 4, 5, 1, 2, 3, 6, 7, 8]),
    ],
)
def test_vectors_stand_where_they_are_told_beside_a_phrase_of_two_tokens(position, expected):
    assert vectors_at(position, 3, 2, 9) == expected


def test_each_tower_has_the_activation_it_is_told(tiny_tower):
    mixed = create_clip(replace(tiny_tower, text_activation="quick_gelu"))
    x = torch.linspace(-3, 3, 7)
    assert torch.equal(mixed.visual.transformer.resblocks[0].mlp.gelu(x), torch.nn.functional.gelu(x))
    for block in mixed.transformer.resblocks:
        torch.testing.assert_close(block.mlp.gelu(x), x * torch.sigmoid(1.702 * x))


def test_without_attention_no_patch_hears_of_another(tiny_tower):
    tower = create_vision_tower(replace(tiny_tower, attention=False))
    images = torch.randn(1, 3, 64, 64)
    other = images.clone()
    other[:, :, :16, :16] = 0  # the first patch
    with torch.no_grad():
        change = (tower(images).patches[-1] - tower(other).patches[-1]).abs().amax(-1)[0]
    assert float(change[0]) > 0
    assert float(change[1:].max()) == 0


def test_open_clip_imports_beside_a_torchvision_without_operators():
    """In a process of its own, where torchvision's compiled library fails as a mismatched one does."""
    code = (
        "import sys, torch\n"
        "sys.path.insert(0, 'MedAnomalyCLIP')\n"
        "real = torch.ops.load_library\n"
        "def fail(path):\n"
        "    if 'torchvision' in str(path): raise OSError('built for another torch')\n"
        "    return real(path)\n"
        "torch.ops.load_library = fail\n"
        "from MedAnomalyCLIPLib.clip.importing import import_open_clip\n"
        "assert 'ViT-B-32' in import_open_clip().list_models()\n"
        "import torchvision.transforms\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_open_clip_is_repeatable():
    assert import_open_clip() is import_open_clip()
