"""No code in data, no network unasked: every door that reads a file of ours, and everything that is run."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from safetensors.torch import load_file, save_file

from MedAnomalyCLIPLib.bundle import MANIFEST, TEXT_TOWER, WEIGHTS, Bundle, file_sha256
from MedAnomalyCLIPLib.bundle_list import list_bundles
from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.clip.weights import flattened, read_weights
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.errors import BundleInvalid, MedAnomalyCLIPError, UnreadableImage
from MedAnomalyCLIPLib.limits import VARIABLE, limits
from MedAnomalyCLIPLib.training.checkpoint import load_checkpoint
from MedAnomalyCLIPLib.volume import read_volume

# Code in data


class Runs:
    """Makes a folder when it is unpickled by whoever runs what a pickle says."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def zipped(path: Path, content: object) -> None:
    torch.save(content, path)


def older(path: Path, content: object) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content))


def named_to_fit(bundle: Bundle, name: str) -> None:
    """Size and hash of an altered file, as whoever altered it would state them."""
    path = bundle.folder / MANIFEST
    file = bundle.folder / name
    part = "weights" if name == WEIGHTS else "text"
    told = {f"{part}_bytes": file.stat().st_size, f"{part}_sha256": file_sha256(file)}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))


def as_weights(path: Path, bundle: Bundle) -> None:
    read_weights(path)


def as_checkpoint(path: Path, bundle: Bundle) -> None:
    load_checkpoint(path, {"m": torch.nn.Linear(2, 2)}, None)


def as_bundle(path: Path, bundle: Bundle) -> None:
    (bundle.folder / WEIGHTS).write_bytes(path.read_bytes())
    named_to_fit(bundle, WEIGHTS)
    SliceDetector.load(bundle.folder, device="cpu")


def as_text_tower(path: Path, bundle: Bundle) -> None:
    (bundle.folder / TEXT_TOWER).write_bytes(path.read_bytes())
    named_to_fit(bundle, TEXT_TOWER)
    Bundle.load(bundle.folder).build_clip()


def as_manifest(path: Path, bundle: Bundle) -> None:
    (bundle.folder / MANIFEST).write_bytes(path.read_bytes())
    list_bundles(bundle.folder.parent)
    Bundle.load(bundle.folder)


def as_image(path: Path, bundle: Bundle) -> None:
    read_volume(path)


def as_clip_to_train_on(path: Path, bundle: Bundle) -> None:
    from MedAnomalyCLIPLib.clip.towers import load_clip

    load_clip(bundle.manifest.detector.tower, path)


DOORS = (as_weights, as_checkpoint, as_bundle, as_text_tower, as_manifest, as_image, as_clip_to_train_on)


@pytest.mark.parametrize("write", [zipped, older, plain])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("door", DOORS)
def test_code_in_a_file_is_refused_at_every_door_and_never_run(door, suffix, write, tiny_bundle, tmp_path):
    path = tmp_path / f"evil{suffix}"
    write(path, {"state_dict": {"a": torch.zeros(2)}, "hook": Runs(tmp_path / "ran")})
    with pytest.raises(MedAnomalyCLIPError):
        door(path, tiny_bundle)
    assert not (tmp_path / "ran").exists()


def test_the_code_would_have_run_where_pickles_are_trusted(tmp_path):
    plain(tmp_path / "evil", Runs(tmp_path / "ran"))
    pickle.loads((tmp_path / "evil").read_bytes())
    assert (tmp_path / "ran").exists()


def test_arrays_of_objects_are_not_loaded(tmp_path):
    from MedAnomalyCLIPLib.training.image_set import np as library_numpy

    np.save(tmp_path / "evil.npy", np.array([Runs(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        library_numpy.load(tmp_path / "evil.npy")
    assert not (tmp_path / "ran").exists()


def test_the_command_refuses_it_too(tmp_path, capsys):
    zipped(tmp_path / "evil.pth", {"hook": Runs(tmp_path / "ran")})
    words = ["convert", "mediclip", tmp_path / "evil.pth", "--clip", tmp_path / "evil.pth"]
    assert main([*map(str, words), "--output", str(tmp_path / "out")]) == EXIT_USER_ERROR
    assert "nothing of it was run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_dictionaries_that_hold_themselves_are_refused(tmp_path):
    ring: dict[str, object] = {}
    ring["again"] = ring
    doubled: dict[str, object] = {"x": 1}
    for _ in range(60):
        doubled = {"a": doubled, "b": doubled}
    for name, content in {"ring.pth": ring, "doubled.pth": doubled}.items():
        zipped(tmp_path / name, content)
        with pytest.raises(UnreadableImage, match="in each other"):
            flattened(read_weights(tmp_path / name))


def test_a_compressed_archive_of_weights_is_refused_before_it_is_unpacked(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(1 << 24))
    with pytest.raises(UnreadableImage, match="is compressed"):
        read_weights(tmp_path / "bomb.pth")


# What a bundle may hold


def altered(bundle: Bundle, change) -> Bundle:
    state = load_file(bundle.folder / WEIGHTS)
    change(state)
    save_file(state, bundle.folder / WEIGHTS)
    named_to_fit(bundle, WEIGHTS)
    return Bundle.load(bundle.folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update({"../../escaped": torch.zeros(1)}),
        lambda s: s.update({"text_bank": torch.zeros(3, 32)}),
        lambda s: s.update({"text_bank": torch.zeros(2, 32, dtype=torch.int64)}),
        lambda s: s.update({"text_bank": torch.zeros(0)}),
        lambda s: s.pop("text_bank"),
    ],
    ids=["unexpected key", "shape", "type", "empty", "missing"],
)
def test_a_bundle_with_other_weights_than_it_describes_is_refused(change, tiny_bundle):
    with pytest.raises(BundleInvalid, match="do not fit"):
        altered(tiny_bundle, change).build()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("tower", "image_size", 10**6),
        (None, "memory", {"rows": 10**12}),
        (None, "denoiser", {"blocks": 10**9, "width": 8}),
        (None, "visual_prompts", {"depth": 10**9}),
        (None, "smoothing", 1e9),
        ("text", "length", 10**9),
    ],
)
def test_a_bundle_that_describes_a_network_without_end_is_refused_at_once(part, key, value, tiny_bundle):
    path = tiny_bundle.folder / MANIFEST
    data = json.loads(path.read_text())
    (data["detector"] if part is None else data["detector"][part])[key] = value
    if key == "image_size":
        data["preprocess"]["size"] = value
    path.write_text(json.dumps(data))
    with pytest.raises(BundleInvalid, match="more than"):
        Bundle.load(tiny_bundle.folder).build()


def test_a_large_network_over_small_weights_takes_no_memory(tiny_bundle):
    resource = pytest.importorskip("resource")
    path = tiny_bundle.folder / MANIFEST
    data = json.loads(path.read_text())
    data["detector"]["memory"] = {"rows": 9 * 10**7}  # 23 GB
    path.write_text(json.dumps(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleInvalid, match="do not fit"):
        Bundle.load(tiny_bundle.folder).build()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST, "MODEL_CARD.md"])
def test_a_pipe_in_a_bundle_does_not_keep_anybody_waiting(name, tiny_bundle):
    (tiny_bundle.folder / name).unlink()
    os.mkfifo(tiny_bundle.folder / name)
    if name == "MODEL_CARD.md":
        assert Bundle.load(tiny_bundle.folder).card == ""
    else:
        with pytest.raises(BundleInvalid):
            Bundle.load(tiny_bundle.folder)


# Limits


def test_limits_are_moved_in_one_place(monkeypatch):
    before = limits()
    monkeypatch.setenv(VARIABLE, "image_voxels=4e9, folder_files = 7")
    assert (limits().image_voxels, limits().folder_files) == (4 * 10**9, 7)
    assert limits().text_bytes == before.text_bytes


@pytest.mark.parametrize("text", ["image_voxels=many", "image_voxels", "voxels=3", "image_voxels=-1", "x"])
def test_limits_that_mean_nothing_are_refused_by_name(text, monkeypatch):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(MedAnomalyCLIPError, match=VARIABLE):
        limits()


# No network


def test_a_forbidden_network_is_noticed(no_network):
    import urllib.request

    with pytest.raises(AssertionError, match="asked for"):
        urllib.request.urlopen("http://127.0.0.1:9/")
    with pytest.raises(AssertionError, match="asked for"):
        socket.create_connection(("127.0.0.1", 9))
    assert len(no_network) >= 2
    no_network.clear()


@pytest.mark.usefixtures("no_network")
class TestNothingIsAskedOfTheNetwork:
    """Each command as a user gives it."""

    def test_info_and_detect(self, tmp_path):
        image = get_testdata_file("CT_small.dcm")
        assert main(["info", image]) == EXIT_DONE
        assert main(["detect", image, "--output", str(tmp_path), "--device", "cpu"]) == EXIT_DONE

    def test_evaluate(self, tiny_bundle, dataset, tmp_path):
        words = ["evaluate", dataset, "--model", tiny_bundle.folder, "--output", tmp_path / "report"]
        assert main([*map(str, words), "--draws", "0", "--device", "cpu"]) == EXIT_DONE

    def test_train_from_support_images(self, clip_folder, dataset, tmp_path):
        words = ["train", "--support", dataset / "heads_AD/train/good/img", "--output", tmp_path / "run"]
        change = f"start={json.dumps(str(clip_folder))}"
        assert main([*map(str, words), "--set", change, "--device", "cpu", "--quiet"]) == EXIT_DONE

    def test_train_a_recipe(self, clip_folder, dataset, tmp_path):
        words = ["train", "mediclip", "--data", dataset, "--clip", clip_folder, "--output", tmp_path / "run"]
        changes = ["--set", "data.normal=4", "--set", "optimisation.epochs=1", "--sets", "heads"]
        assert main([*map(str, words), *changes, "--device", "cpu", "--quiet"]) == EXIT_DONE

    def test_weights_that_would_have_to_be_fetched_are_asked_for_first(self, dataset, tmp_path, capsys):
        words = ["train", "mediclip", "--data", dataset, "--clip", "openai", "--output", tmp_path / "run"]
        assert main([*map(str, words), "--set", "data.normal=4", "--device", "cpu"]) == EXIT_USER_ERROR
        assert "allow the download" in capsys.readouterr().err


def test_importing_the_library_opens_no_socket():
    code = (
        "import socket\n"
        "def forbidden(*a, **k): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = forbidden\n"
        "import MedAnomalyCLIPLib.detection, MedAnomalyCLIPLib.export, MedAnomalyCLIPLib.cli\n"
        "from MedAnomalyCLIPLib.clip.importing import import_open_clip; import_open_clip()\n"
    )
    library = Path(__file__).parents[2] / "MedAnomalyCLIP"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(library)}, check=False
    )
    assert done.returncode == 0


def test_a_picture_is_written_without_what_the_original_said(tiny_bundle, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("Patient", "Invented^Patience")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", pnginfo=told)
    words = ["detect", tmp_path / "a.png", "--model", tiny_bundle.folder, "--output", tmp_path / "out"]
    assert main([*map(str, words), "--device", "cpu"]) == EXIT_DONE
    (picture,) = (tmp_path / "out" / "a").glob("*.png")
    assert list(Image.open(picture).text) == ["Comment"]
