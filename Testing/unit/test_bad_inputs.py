"""Bad, odd and hostile inputs: each gives one typed error that names the file, or the right answer."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image

from MedAnomalyCLIPLib.errors import (
    GeometryRefused,
    InvalidRequest,
    MedAnomalyCLIPError,
    SeriesAmbiguous,
    UnreadableImage,
    UnsupportedImage,
)
from MedAnomalyCLIPLib.volume import list_contents, read_volume
from unit.images import deeply_nested_dicom, dicom_dataset, ramp, write_dicom, write_nifti, write_volume

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
VOLUME_FILES = ("v.nii", "v.nii.gz", "v.nrrd", "v.mha")
PICTURES = ("p.png", "p.jpg", "p.tif", "p.bmp")


def make(path: Path, voxels: np.ndarray) -> Path:
    """Save one slice of voxels in the format that the name asks for."""
    if path.name in VOLUME_FILES:
        return write_volume(path, voxels)
    if path.name in PICTURES:
        Image.fromarray(voxels[0]).save(path)
        return path
    return write_dicom(path, voxels[0])


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def nrrd(path: Path, sizes: str) -> Path:
    dimension = len(sizes.split())
    header = (
        f"NRRD0004\ntype: short\ndimension: {dimension}\nsizes: {sizes}\nencoding: raw\nendian: little\n\n"
    )
    path.write_text(header)
    return path


# Nothing, or not an image


def a_missing_file(folder: Path) -> Path:
    return folder / "gone.dcm"


def an_empty_file(folder: Path) -> Path:
    (folder / "empty.nii.gz").touch()
    return folder / "empty.nii.gz"


def a_text_called_nifti(folder: Path) -> Path:
    (folder / "text.nii.gz").write_text("Dear colleague, please find enclosed")
    return folder / "text.nii.gz"


def a_zipped_text_called_nifti(folder: Path) -> Path:
    (folder / "text.nii.gz").write_bytes(gzip.compress(b"Dear colleague" * 100))
    return folder / "text.nii.gz"


def a_text_called_dicom(folder: Path) -> Path:
    (folder / "text.dcm").write_text("0008,0016")
    return folder / "text.dcm"


def zeros_called_dicom(folder: Path) -> Path:
    (folder / "zeros.dcm").write_bytes(bytes(5000))
    return folder / "zeros.dcm"


def an_empty_folder(folder: Path) -> Path:
    (folder / "study").mkdir()
    return folder / "study"


def a_folder_of_pictures(folder: Path) -> Path:
    (folder / "study").mkdir()
    make(folder / "study" / "p.png", ramp(dtype=np.uint8))
    return folder / "study"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (a_missing_file, "gone.dcm does not exist"),
        (an_empty_file, "empty.nii.gz is empty"),
        (a_text_called_nifti, "text.nii.gz is no image"),
        (a_zipped_text_called_nifti, "text.nii.gz is no image"),
        (a_text_called_dicom, "text.dcm is no image"),
        (zeros_called_dicom, "zeros.dcm is no image"),
        (an_empty_folder, "study holds no DICOM files"),
        (a_folder_of_pictures, "study holds no DICOM files; give .* p.png"),
        (a_pipe, "pipe is neither a file nor a folder"),
    ],
)
@pytest.mark.parametrize("look", [read_volume, list_contents])
def test_what_is_no_image_is_told_so(tmp_path, build, message, look):
    with pytest.raises(UnreadableImage, match=message):
        look(build(tmp_path))


@pytest.mark.parametrize("renamed", ["p.dcm", "p.nii.gz", "p"])
def test_a_picture_under_another_name_is_still_that_picture(tmp_path, renamed):
    pixels = ramp(dtype=np.uint8)
    path = make(tmp_path / "p.png", pixels).rename(tmp_path / renamed)
    np.testing.assert_array_equal(read_volume(path).voxels, pixels)


@pytest.mark.parametrize("ending", [".nii", ""])
def test_a_compressed_nifti_under_another_name_asks_to_be_renamed(tmp_path, ending):
    path = make(tmp_path / "v.nii.gz", ramp()).rename(tmp_path / f"v{ending}")
    with pytest.raises(UnreadableImage, match=r"ends in \.nii\.gz"):
        read_volume(path)


def test_a_folder_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDANOMALYCLIP_LIMITS", "folder_files=3")
    for index in range(4):
        (tmp_path / f"{index}").touch()
    with pytest.raises(InvalidRequest, match="more than 3 files"):
        read_volume(tmp_path)


# Cut short and damaged


@pytest.mark.parametrize("name", [*VOLUME_FILES, *PICTURES, "d.dcm"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_a_file_that_is_cut_short_is_refused_by_name(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64), dtype=np.uint8)
    path = cut(make(tmp_path / name, noise), share)
    with pytest.raises(MedAnomalyCLIPError, match=name):
        read_volume(path)


@pytest.mark.parametrize("name", ["v.nii.gz", "v.nrrd", "v.mha"])
def test_damaged_compressed_voxels_are_never_shown(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 4096, (4, 64, 64), dtype=np.int16)
    path = write_volume(tmp_path / name, noise, compressed=True)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(byte ^ 0x5A for byte in content[middle : middle + 40])
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=name):
        read_volume(path)


def test_a_header_without_its_data_file_is_refused(tmp_path):
    path = write_volume(tmp_path / "v.mhd", ramp(3))
    (tmp_path / "v.raw").unlink()
    with pytest.raises(UnreadableImage, match="data in a file beside it"):
        read_volume(path)


def test_one_slice_of_a_series_that_is_cut_short_is_named(tmp_path):
    for k in range(3):
        write_dicom(
            tmp_path / f"slice{k}", ramp()[0], SeriesInstanceUID="1.2.3", ImagePositionPatient=[0, 0, k]
        )
    cut(tmp_path / "slice1", 0.98)
    with pytest.raises(UnreadableImage, match=r"slice1.*damaged, or cut short"):
        read_volume(tmp_path)


def test_sequences_nested_without_end_do_not_bring_it_down(tmp_path):
    path = tmp_path / "deep.dcm"
    path.write_bytes(deeply_nested_dicom(5000))
    with pytest.raises(MedAnomalyCLIPError, match=r"deep\.dcm"):
        read_volume(path)


def test_messages_hold_neither_paths_nor_header_values(tmp_path):
    path = write_dicom(tmp_path / "d.dcm", ramp()[0])
    path.write_bytes(path.read_bytes().replace(b"1.0\\1.0 ", b"Invented"))
    with pytest.raises(UnreadableImage) as caught:
        read_volume(path)
    assert "Invented" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


# Headers that claim nonsense


@pytest.mark.parametrize(
    ("elements", "error"),
    [
        ({"Rows": 65535, "Columns": 65535, "NumberOfFrames": 1000}, UnsupportedImage),
        ({"Rows": 65535, "Columns": 3000}, UnreadableImage),
        ({"Rows": 0}, UnsupportedImage),
        ({"NumberOfFrames": 3}, UnreadableImage),
        ({"NumberOfFrames": -2}, MedAnomalyCLIPError),
        ({"BitsAllocated": 13}, UnreadableImage),
        ({"BitsStored": 40}, UnreadableImage),
        ({"SamplesPerPixel": 2}, UnreadableImage),
        ({"SamplesPerPixel": 3}, UnreadableImage),
        ({"PhotometricInterpretation": "HSV"}, MedAnomalyCLIPError),
        ({"PhotometricInterpretation": "RGB"}, MedAnomalyCLIPError),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, UnreadableImage),
        ({"PixelData": b""}, MedAnomalyCLIPError),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, UnreadableImage),
        ({"PixelSpacing": [-1, 1]}, GeometryRefused),
        ({"PixelSpacing": [0, 0]}, GeometryRefused),
        ({"ImageOrientationPatient": [0] * 6}, GeometryRefused),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, GeometryRefused),
        ({"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]}, GeometryRefused),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, GeometryRefused),
        ({"TotalPixelMatrixColumns": 90000}, GeometryRefused),
        ({"Modality": "SEG"}, UnsupportedImage),
    ],
    ids=str,
)
def test_a_dicom_header_of_nonsense_is_refused_by_name(tmp_path, elements, error):
    path = write_dicom(tmp_path / "odd.dcm", ramp()[0], **elements)
    with pytest.raises(error, match=r"odd\.dcm"):
        read_volume(path)


@pytest.mark.parametrize("value", [b"nan ", b"inf "])
def test_a_dicom_position_that_is_no_number_is_refused(tmp_path, value):
    path = write_dicom(tmp_path / "odd.dcm", ramp()[0], ImagePositionPatient=[7.25, 0, 0])
    content = path.read_bytes()
    assert b"7.25" in content
    path.write_bytes(content.replace(b"7.25", value))
    with pytest.raises(MedAnomalyCLIPError, match=r"odd\.dcm"):
        read_volume(path)


def test_a_dicom_file_without_pixels_is_refused(tmp_path):
    dataset = dicom_dataset(ramp()[0])
    del dataset.PixelData
    dataset.save_as(tmp_path / "bare.dcm", enforce_file_format=True)
    with pytest.raises(UnsupportedImage, match=r"bare\.dcm holds no pixels"):
        read_volume(tmp_path / "bare.dcm")


def a_huge_nifti(folder: Path) -> Path:
    return write_nifti(folder / "odd.nii", ramp(), sizes=(32000, 32000, 32000), sform=np.eye(4))


def a_huge_nrrd(folder: Path) -> Path:
    return nrrd(folder / "odd.nrrd", "90000 90000 90000")


def a_nrrd_of_no_slices(folder: Path) -> Path:
    return nrrd(folder / "odd.nrrd", "4 4 0")


def a_time_series(folder: Path) -> Path:
    return write_nifti(folder / "odd.nii", ramp(4), dimensions=4, sizes=(5, 4, 2, 2), sform=np.eye(4))


def complex_numbers(folder: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(ramp(2) + 1j), str(folder / "odd.nrrd"))
    return folder / "odd.nrrd"


def a_displacement_field(folder: Path) -> Path:
    field = sitk.GetImageFromArray(np.zeros((2, 4, 5, 3), np.float32), isVector=True)
    sitk.WriteImage(field, str(folder / "odd.nrrd"))
    return folder / "odd.nrrd"


def an_analyze_image(folder: Path) -> Path:
    path = write_nifti(folder / "odd.hdr", ramp())
    content = bytearray(path.read_bytes())
    content[344:348] = bytes(4)
    path.write_bytes(content)
    return path


def a_nifti_of_version_2(folder: Path) -> Path:
    path = folder / "odd.nii"
    path.write_bytes(struct.pack("<i", 540) + b"n+2\0\r\n\x1a\n" + bytes(600))
    return path


def pages_of_two_sizes(folder: Path) -> Path:
    small, large = (Image.fromarray(np.zeros(shape, np.uint8)) for shape in ((4, 5), (8, 10)))
    large.save(folder / "odd.tif", save_all=True, append_images=[small])
    return folder / "odd.tif"


def a_picture_that_unpacks_to_gigabytes(folder: Path) -> Path:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    (folder / "odd.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    return folder / "odd.png"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (a_huge_nifti, UnsupportedImage, "claims 32,768,000,000,000 voxels"),
        (a_huge_nrrd, UnsupportedImage, "voxels"),
        (a_nrrd_of_no_slices, UnreadableImage, "NRRD"),
        (a_time_series, UnsupportedImage, "4 dimensions"),
        (complex_numbers, UnsupportedImage, "complex"),
        (a_displacement_field, UnsupportedImage, "3 values per voxel"),
        (an_analyze_image, UnsupportedImage, "Analyze"),
        (a_nifti_of_version_2, UnsupportedImage, "version 2"),
        (a_picture_that_unpacks_to_gigabytes, UnsupportedImage, "pixels"),
    ],
)
@pytest.mark.parametrize("look", [read_volume, list_contents])
def test_an_image_that_is_not_taken_is_refused_from_its_header(tmp_path, build, error, message, look):
    with pytest.raises(error, match=rf"odd\..*{message}"):
        look(build(tmp_path))


def test_pages_of_different_sizes_are_no_volume(tmp_path):
    with pytest.raises(UnsupportedImage, match="2 pages of different sizes"):
        read_volume(pages_of_two_sizes(tmp_path))


SHEARED = np.array([[1, 0, 0, 0], [0, 1, 0.4, 0], [0, 0, 1, 0]])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"sform": SHEARED}, "sheared"),
        ({"sform": np.diag([2.0, 2, 2, 1])}, "contradicts itself"),
        ({"sform": np.full((3, 4), np.nan)}, "not a number"),
        ({"sform": np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]), "dimensions": 2}, "not axial"),
    ],
    ids=["sheared", "two spacings", "nan", "flat and coronal"],
)
def test_a_nifti_whose_place_cannot_be_trusted_is_refused(tmp_path, header, message):
    path = write_nifti(tmp_path / "odd.nii", ramp(1 if "dimensions" in header else 3), **header)
    with pytest.raises(GeometryRefused, match=rf"odd\.nii.*{message}"):
        read_volume(path)


def test_the_limit_on_size_is_held_against_the_header_and_not_the_data(tmp_path, monkeypatch):
    path = make(tmp_path / "d.dcm", ramp())
    monkeypatch.setenv("MEDANOMALYCLIP_LIMITS", "image_voxels=19")
    with pytest.raises(UnsupportedImage, match="claims 20 voxels"):
        read_volume(path)


# Odd but right


@pytest.mark.parametrize("name", [*VOLUME_FILES, *PICTURES, "d.dcm"])
def test_an_image_of_one_pixel_is_read(tmp_path, name):
    volume = read_volume(make(tmp_path / name, np.full((1, 1, 1), 77, np.uint8)))
    assert volume.size == (1, 1, 1)
    assert volume.voxels.item() == 77


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in (*VOLUME_FILES, "d.dcm") for dtype in (np.int16, np.uint16)),
        ("p.png", np.uint16),
        ("p.tif", np.uint16),
    ],
)
def test_extremes_of_16_bits_come_back_as_they_were(tmp_path, name, dtype):
    limits = np.iinfo(dtype)
    voxels = np.array([[[limits.min, limits.max]]], dtype)
    np.testing.assert_array_equal(read_volume(make(tmp_path / name, voxels)).voxels, voxels)


@pytest.mark.parametrize("name", VOLUME_FILES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_volume_without_a_finite_voxel_is_refused(tmp_path, name, value):
    path = make(tmp_path / name, np.full((2, 3, 4), value, np.float32))
    with pytest.raises(UnsupportedImage, match="no finite value"):
        read_volume(path)


def test_a_constant_image_is_read(tmp_path):
    assert np.ptp(read_volume(make(tmp_path / "d.dcm", np.zeros((1, 4, 5), np.int16))).voxels) == 0


def test_a_folder_of_mixed_series_and_modalities_has_to_be_chosen_from(tmp_path):
    for index, modality in enumerate(("CT", "MR", "PT")):
        write_dicom(tmp_path / f"{index}", ramp()[0], Modality=modality)
    with pytest.raises(SeriesAmbiguous) as caught:
        read_volume(tmp_path)
    assert len(caught.value.choices) == 3


# Everything that pydicom ships, and everything that chance makes of small files


def refused(path: Path, look: Callable[[Path], object]) -> str | None:
    """The message with which a file was refused, None when it was read; anything else is raised."""
    try:
        look(path)
    except MedAnomalyCLIPError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "path", sorted(p for p in BUNDLED.iterdir() if p.is_file()), ids=lambda path: path.name
)
@pytest.mark.parametrize("look", [read_volume, list_contents])
def test_a_file_of_pydicoms_own_collection_is_read_or_refused(path, look):
    refusal = refused(path, look)
    assert refusal is None or path.name in refusal


@pytest.mark.parametrize("folder", ["CT2", "CR1", "MR1"])
def test_folders_of_pydicoms_own_collection_are_listed(folder):
    (place,) = (BUNDLED / "dicomdirtests").glob(f"*/{folder}")
    assert all(summary.size[:2] == (16, 16) for summary in list_contents(place))


def damage(content: bytes, generator: np.random.Generator) -> bytes:
    """Flip some bytes, mostly in the header, and perhaps cut the end off."""
    changed = bytearray(content)
    reach = len(changed) if generator.random() < 0.3 else min(600, len(changed))
    for position in generator.integers(0, reach, generator.integers(1, 12)):
        changed[position] = generator.integers(0, 256)
    if generator.random() < 0.3:
        del changed[generator.integers(1, len(changed)) :]
    return bytes(changed)


def seeds() -> dict[str, Callable[[Path], Path]]:
    return {
        name: lambda path: make(path, ramp(1, 8, 8, np.uint8)) for name in (*VOLUME_FILES, *PICTURES, "d.dcm")
    }


@pytest.mark.parametrize("name", list(seeds()))
def test_damage_by_chance_never_gets_past_the_error_family(tmp_path, name):
    generator = np.random.default_rng(sum(map(ord, name)))
    path = seeds()[name](tmp_path / name)
    content = path.read_bytes()
    for _ in range(60):
        path.write_bytes(damage(content, generator))
        refusal = refused(path, read_volume)
        assert refusal is None or name in refusal
