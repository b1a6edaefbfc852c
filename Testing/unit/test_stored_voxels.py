"""NRRD and MetaImage read without ITK: the voxels and places that ITK finds, and nothing from elsewhere."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from MedAnomalyCLIPLib.errors import MedAnomalyCLIPError, UnreadableImage, UnsupportedImage
from MedAnomalyCLIPLib.volume import RAS_FROM_LPS, read_volume
from unit.images import ramp, write_volume

TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")


def as_itk_has_it(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, and 4x4 ijk_to_ras."""
    image = sitk.ReadImage(str(path))
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    matrix[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), RAS_FROM_LPS @ matrix


@settings(max_examples=60, deadline=None)
@given(
    ending=st.sampled_from(["nrrd", "nhdr", "mha", "mhd"]),
    kind=st.sampled_from(TYPES),
    compressed=st.booleans(),
    seed=st.integers(0, 2**31),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
)
def test_files_are_read_as_itk_reads_them(tmp_path_factory, ending, kind, compressed, seed, shape):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("files") / f"v.{ending}"
    direction = Rotation.random(rng=seed).as_matrix() * (1, 1, rng.choice([-1, 1]))
    write_volume(
        path,
        (rng.random(shape) * 100).astype(kind),
        spacing=rng.uniform(0.2, 4, 3),
        origin=rng.uniform(-200, 200, 3),
        direction=direction.ravel(),
        compressed=compressed,
    )
    volume = read_volume(path)
    voxels, matrix = as_itk_has_it(path)
    np.testing.assert_array_equal(volume.voxels, voxels)
    assert volume.voxels.dtype == voxels.dtype
    np.testing.assert_allclose(volume.ijk_to_ras, matrix, atol=1e-4)


def nrrd(folder: Path, fields: str, data: bytes, name: str = "v.nrrd") -> Path:
    path = folder / name
    basic = "NRRD0004\ntype: short\ndimension: 3\nsizes: 5 4 2\n"
    path.write_bytes(f"{basic}{fields}\n\n".encode() + data)
    return path


RAMP = ramp(2)
LITTLE, BIG = RAMP.astype("<i2").tobytes(), RAMP.astype(">i2").tobytes()
TEXT = " ".join(map(str, RAMP.ravel())).encode()


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ("encoding: raw\nendian: big\nspace: RAS\nspace directions: (1,0,0) (0,2,0) (0,0,3)", BIG),
        ("encoding: raw\nendian: little\nspace: left-anterior-superior\n"
         "space directions: (1,0,0) (0,2,0) (0,0.5,3)\nspace origin: (4,5,6)", LITTLE),
        ("encoding: raw\nendian: little\nbyte skip: 7", b"skipped" + LITTLE),
        ("encoding: raw\nendian: little\nbyte skip: -1", b"whatever" + LITTLE),
        ("encoding: ascii\nspacings: 0.5 0.75 2", TEXT),
        ("encoding: gz\nendian: little\n# a comment\nkey:=value\nspacings: 1 nan 2\naxis mins: 3 4 5",
         gzip.compress(LITTLE, mtime=0)),
        ("encoding: gzip\nendian: little",
         gzip.compress(LITTLE[:30], mtime=0) + gzip.compress(LITTLE[30:], mtime=0)),
    ],
)  # fmt: skip
def test_nrrd_files_of_many_kinds_hold_the_same_voxels_in_the_same_place_as_itk_finds(fields, data, tmp_path):
    path = nrrd(tmp_path, fields, data)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, RAMP)
    if "gzip" not in fields:  # ITK reads the first member only
        np.testing.assert_allclose(volume.ijk_to_ras, as_itk_has_it(path)[1], atol=1e-9)


META = "ObjectType = Image\nNDims = 3\nDimSize = 5 4 2\nElementType = MET_SHORT\n"


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ("ElementByteOrderMSB = True\nElementSpacing = 1 2 3\n", BIG),
        ("Offset = 3 4 5\nTransformMatrix = 0 1 0 1 0 0 0 0 -1\nElementSpacing = 1 2 3\n", LITTLE),
        ("BinaryData = False\n", TEXT),
        ("CompressedData = True\n", zlib.compress(LITTLE)),
        ("HeaderSize = -1\n", b"whatever" + LITTLE),
    ],
)
def test_metaimages_of_many_kinds_hold_the_same_voxels_in_the_same_place_as_itk_finds(fields, data, tmp_path):
    path = tmp_path / "v.mha"
    path.write_bytes(f"{META}{fields}ElementDataFile = LOCAL\n".encode() + data)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, RAMP)
    if fields.startswith(("Offset", "Element", "Compressed")):  # ITK itself reads no text
        np.testing.assert_allclose(volume.ijk_to_ras, as_itk_has_it(path)[1], atol=1e-9)


def test_data_may_lie_in_a_file_for_each_slice(tmp_path):
    for number in range(2):
        (tmp_path / f"s{number:03d}.raw").write_bytes(RAMP[number].astype("<i2").tobytes())
    fields = "encoding: raw\nendian: little\ndata file: "
    for names in ("s%03d.raw 0 1 1", "LIST\ns000.raw\ns001.raw"):
        np.testing.assert_array_equal(read_volume(nrrd(tmp_path, fields + names, b"", "v.nhdr")).voxels, RAMP)
    for names in ("s%03d.raw 0 1 1", "LIST\ns000.raw\ns001.raw"):
        (tmp_path / "v.mhd").write_text(f"{META}ElementDataFile = {names}\n")
        np.testing.assert_array_equal(read_volume(tmp_path / "v.mhd").voxels, RAMP)


@pytest.mark.parametrize(
    "name", ["../secret.raw", "{root}/secret.raw", "link.raw", "pipe", "sub/../../secret.raw"]
)
def test_data_outside_of_the_headers_folder_is_not_read(name, tmp_path):
    import os

    (tmp_path / "secret.raw").write_bytes(LITTLE)
    folder = tmp_path / "study"
    (folder / "sub").mkdir(parents=True)
    (folder / "link.raw").symlink_to(tmp_path / "secret.raw")
    os.mkfifo(folder / "pipe")
    name = name.format(root=tmp_path)
    path = nrrd(folder, f"encoding: raw\nendian: little\ndata file: {name}", b"", "v.nhdr")
    with pytest.raises(UnreadableImage, match=r"own folder|not there"):
        read_volume(path)
    (folder / "v.mhd").write_text(f"{META}ElementDataFile = {name}\n")
    with pytest.raises(UnreadableImage, match=r"own folder|not there"):
        read_volume(folder / "v.mhd")


@pytest.mark.parametrize("name", ["v.nrrd", "v.mha", "v.nii", "v.nii.gz"])
def test_a_short_file_that_claims_much_is_refused_before_memory_is_taken(name, tmp_path):
    import resource

    path = write_volume(tmp_path / name, ramp(2, 300, 300), compressed=name != "v.nii")
    content = path.read_bytes()
    plain = gzip.decompress(content) if name.endswith("gz") else content
    for old, new in (
        (b"sizes: 300 300 2", b"sizes: 900 900 2500"),
        (b"DimSize = 300 300 2", b"DimSize = 900 900 2500"),
        (np.array([3, 300, 300, 2], "<i2").tobytes(), np.array([3, 900, 900, 2500], "<i2").tobytes()),
    ):
        plain = plain.replace(old, new)
    path.write_bytes(gzip.compress(plain) if name.endswith("gz") else plain)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableImage, match="cut short"):
        read_volume(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB, of 4 GB claimed


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ("encoding: hex", UnsupportedImage),
        ("encoding: raw\nline skip: 2", UnsupportedImage),
        ("encoding: raw\ntype: short", UnreadableImage),
        ("encoding: raw\nspace directions: (1,0,0) (0,1,0)", UnreadableImage),
        ("encoding: raw\nspace directions: (nan,0,0) (0,1,0) (0,0,1)", UnreadableImage),
        ("encoding: raw\nspace directions: (1,0,0) (0,1,0) (1,1,0)", MedAnomalyCLIPError),
        ("encoding: raw\nendian: middle", UnreadableImage),
        ("encoding: raw\nkinds: domain domain", UnreadableImage),
        ("encoding: raw\nbyte skip: 99999999999", UnreadableImage),
    ],
)
def test_headers_that_make_no_sense_are_refused_by_the_files_name(fields, error, tmp_path):
    with pytest.raises(error, match=r"v\.nrrd"):
        read_volume(nrrd(tmp_path, fields, LITTLE))
