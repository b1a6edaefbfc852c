"""TorchScript archives give up their tensors, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from dataclasses import replace

import pytest
import torch

from MedAnomalyCLIPLib.clip.torchscript import is_torchscript, read_torchscript
from MedAnomalyCLIPLib.clip.towers import create_clip, load_clip, resize_positions
from MedAnomalyCLIPLib.clip.weights import read_weights
from MedAnomalyCLIPLib.errors import BundleInvalid, UnreadableImage

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory, tiny_tower):
    """A CLIP in half precision and its archive, with the numbers that OpenAI's hold beside weights."""
    torch.manual_seed(0)
    clip = create_clip(tiny_tower).half()
    for name in ("input_resolution", "context_length", "vocab_size"):
        clip.__dict__.pop(name, None)
        clip.register_buffer(name, torch.tensor(1))
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.jit.script(clip).save(path)
    return clip, path


def rewritten(path, place, changes):
    """The archive with other contents in some of its files."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(place, "w") as target:
        for name in source.namelist():
            target.writestr(name, changes.get(name.partition("/")[2], source.read(name)))
    return place


def test_every_tensor_is_read_as_torch_reads_it(scripted):
    _, path = scripted
    expected = torch.jit.load(path).state_dict()
    found = read_torchscript(path)
    assert expected.keys() <= found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_clip_of_openais_kind_is_loaded_in_float32(scripted, tiny_tower):
    clip, path = scripted
    loaded = load_clip(tiny_tower, path).state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert all(torch.equal(value, clip.state_dict()[key].float()) for key, value in loaded.items())


def test_positions_for_a_larger_input_are_not_rounded_to_the_files_precision(scripted, tiny_tower):
    clip, path = scripted
    larger = load_clip(replace(tiny_tower, image_size=128), path)
    expected = resize_positions(clip.visual.positional_embedding.float(), (8, 8))
    assert torch.equal(larger.visual.positional_embedding, expected)


def test_archive_of_another_model_is_refused_with_all_that_does_not_fit(tmp_path, tiny_tower):
    torch.jit.script(torch.nn.Linear(3, 2)).save(tmp_path / "linear.pt")
    with pytest.raises(BundleInvalid, match=r"(?s)linear\.pt do not fit.*Missing key.*Unexpected key.*bias"):
        load_clip(tiny_tower, tmp_path / "linear.pt")


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_an_archive_is_refused_and_not_run(scripted, tmp_path, protocol):
    description = pickle.dumps({"visual.proj": Bomb(tmp_path / "ran")}, protocol)
    path = rewritten(scripted[1], tmp_path / "bomb.pt", {"data.pkl": description})
    assert is_torchscript(path)
    with pytest.raises(UnreadableImage, match=r"bomb\.pt was not read: it (asks for|holds the pickle)"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", r"builtins\.eval"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n.", r"_rebuild_parameter"),
        (b"\x80\x02cos\nsystem\n.", r"os\.system"),
        (b"(ios\nsystem\n.", "INST"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "more memory"),
        (b"\x80\x02X\x03\x00\x00\x00abcQ.", "damaged"),
        (
            b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.",
            "no tensor",
        ),
        (b"\x80\x02c__torch__\nM\n)\x81K\x01b.", "no dictionary"),
        (b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "contains itself"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
    ],
)
def test_other_descriptions_than_of_tensors_are_refused(scripted, tmp_path, description, message):
    path = rewritten(scripted[1], tmp_path / "odd.pt", {"data.pkl": description})
    with pytest.raises(UnreadableImage, match=message):
        read_weights(path)


def test_tensor_that_is_cut_short_is_refused(scripted, tmp_path):
    path = rewritten(scripted[1], tmp_path / "short.pt", {"data/0": b"1234"})
    with pytest.raises(UnreadableImage, match="storage 0 has 4 bytes"):
        read_weights(path)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "message"),
    [
        (0, (100,), (1,), "more values than are stored"),
        (0, (10**12,), (0,), "more values than are stored"),
        (2, (4,), (1,), "damaged"),
        (0, (2,), (-1,), "damaged"),
    ],
)
def test_tensor_that_is_more_than_its_storage_is_refused(scripted, tmp_path, offset, size, stride, message):
    class Beyond:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Storage) else None

    with (tmp_path / "data.pkl").open("wb") as file:
        Pickler(file, 2).dump(Beyond())
    changes = {"data.pkl": (tmp_path / "data.pkl").read_bytes(), "data/0": bytes(16)}
    path = rewritten(scripted[1], tmp_path / "beyond.pt", changes)
    with pytest.raises(UnreadableImage, match=message):
        read_weights(path)


def test_compressed_archive_is_refused_since_it_may_unfold_without_end(scripted, tmp_path):
    with (
        zipfile.ZipFile(scripted[1]) as source,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(UnreadableImage, match="compressed"):
        read_weights(tmp_path / "small.pt")


@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive")
def test_files_with_wrong_bytes_are_read_or_refused_and_nothing_else(tmp_path):
    torch.jit.script(torch.nn.Linear(3, 2)).save(tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            read_weights(tmp_path / "damaged.pt")
        except UnreadableImage:
            refused += 1
    assert refused > 100


def test_archive_cut_short_is_refused(scripted, tmp_path):
    (tmp_path / "cut.pt").write_bytes(scripted[1].read_bytes()[:-2000])
    with pytest.raises(UnreadableImage, match=r"cut\.pt"):
        read_weights(tmp_path / "cut.pt")
