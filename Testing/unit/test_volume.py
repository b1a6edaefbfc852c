"""Volume files and pictures: what is read, where it lies, and what is said about it beforehand."""

from __future__ import annotations

import contextlib
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from MedAnomalyCLIPLib.errors import GeometryRefused, InvalidRequest, UnreadableImage, UnsupportedImage
from MedAnomalyCLIPLib.volume import Volume, list_contents, read_volume
from unit.images import PATIENT_NAME, ramp, write_dicom, write_nifti, write_volume

TILTED = sitk.VersorTransform((0.3, 0.5, 0.2), 0.7).GetMatrix()
PICTURE = np.diag([-1.0, -1.0, 1.0, 1.0])


# Volume


def test_micrometre_voxels_are_a_volume():
    assert Volume(ramp(), np.diag([1e-4, 1e-4, 1e-4, 1.0])).spacing == pytest.approx((1e-4,) * 3)


@pytest.mark.parametrize(
    "matrix",
    [np.diag([1.0, 1.0, 0.0, 1.0]), np.diag([1.0, np.nan, 1.0, 1.0]), np.eye(4)[:3], np.eye(4)[::-1]],
    ids=["flat", "not a number", "three rows", "last row wrong"],
)
def test_a_position_that_is_no_invertible_4x4_matrix_is_refused(matrix):
    with pytest.raises(GeometryRefused):
        Volume(ramp(), matrix)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 2), (2, 0, 4)])
def test_voxels_that_are_no_volume_are_refused(shape):
    with pytest.raises(UnsupportedImage):
        Volume(np.zeros(shape), np.eye(4))


def test_the_matrix_of_a_volume_cannot_be_changed_afterwards():
    matrix = np.eye(4)
    volume = Volume(ramp(), matrix)
    matrix[0, 3] = 5
    with pytest.raises(ValueError, match="read-only"):
        volume.ijk_to_ras[0, 3] = 5
    assert volume.ijk_to_ras[0, 3] == 0


# Volume files


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.nrrd", "v.nhdr", "v.mha", "v.mhd"])
def test_voxels_and_every_corner_are_where_simpleitk_puts_them(tmp_path, name):
    voxels = ramp(3, 4, 5)
    path = write_volume(
        tmp_path / name, voxels, spacing=(0.7, 0.9, 2.5), origin=(-12, 34, 56), direction=TILTED
    )
    image = sitk.ReadImage(str(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, voxels)
    assert volume.voxels.dtype == voxels.dtype
    for corner in np.ndindex(2, 2, 2):
        index = [int(bit * (size - 1)) for bit, size in zip(corner, volume.size, strict=True)]
        x, y, z = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((volume.ijk_to_ras @ [*index, 1])[:3], (-x, -y, z), atol=1e-4)


def test_an_nrrd_in_ras_keeps_its_numbers(tmp_path):
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 5 4 3\nencoding: raw\nendian: little\n"
        "space: right-anterior-superior\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (7,8,9)\n\n"
    )
    path = tmp_path / "v.nrrd"
    path.write_bytes(header.encode() + ramp(3, 4, 5).tobytes())
    expected = [[2, 0, 0, 7], [0, 3, 0, 8], [0, 0, 4, 9], [0, 0, 0, 1]]
    np.testing.assert_allclose(read_volume(path).ijk_to_ras, expected)


def test_an_nrrd_without_a_spacing_says_that_it_is_unknown(tmp_path):
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 5 4 3\nencoding: raw\nendian: little\n\n"
    path = tmp_path / "v.nrrd"
    path.write_bytes(header.encode() + ramp(3, 4, 5).tobytes())
    assert not read_volume(path).spacing_known


@pytest.mark.parametrize("name", ["v.nii", "v.nrrd", "v.mha"])
def test_a_flat_file_is_one_slice(tmp_path, name):
    path = tmp_path / name
    image = sitk.GetImageFromArray(ramp()[0])
    image.SetSpacing((0.5, 0.25))
    image.SetOrigin((3, 4))
    sitk.WriteImage(image, str(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, ramp())
    np.testing.assert_allclose(volume.ijk_to_ras @ [0, 0, 0, 1], (-3, -4, 0, 1))
    assert volume.spacing == pytest.approx((0.5, 0.25, 1))


def test_a_flat_nifti_keeps_the_height_that_itk_drops(tmp_path):
    sform = np.array([[2.0, 0, 0, 1], [0, 3, 0, 2], [0, 0, 4, 77]])
    path = write_nifti(tmp_path / "v.nii", ramp(), sform=sform, pixdim=(2, 3, 4), dimensions=2)
    np.testing.assert_allclose(read_volume(path).ijk_to_ras[:3], sform)


def test_a_fourth_dimension_of_one_is_left_out(tmp_path):
    path = tmp_path / "v.nrrd"
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(ramp(3, 4, 5))]), str(path))
    np.testing.assert_array_equal(read_volume(path).voxels, ramp(3, 4, 5))


def test_micrometres_in_a_nifti_header_become_millimetres(tmp_path):
    sform = np.diag([200.0, 200.0, 200.0, 1.0])
    path = write_nifti(tmp_path / "v.nii", ramp(), sform=sform, pixdim=(200,) * 3, units=3)
    assert read_volume(path).spacing == pytest.approx((0.2, 0.2, 0.2))


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.nrrd", "v.mha"])
def test_single_voxels_may_be_nan(tmp_path, name):
    voxels = ramp(2, 4, 5, np.float32)
    voxels[0, 0, 0] = np.nan
    read = read_volume(write_volume(tmp_path / name, voxels)).voxels
    assert np.isnan(read).sum() == 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_nifti_slope_and_intercept_are_applied(tmp_path, order):
    path = write_nifti(tmp_path / "v.nii", ramp(), slope=0.5, intercept=-3, order=order)
    np.testing.assert_array_equal(read_volume(path).voxels, ramp() * 0.5 - 3)


def test_rgb_in_8_bits_is_colour(tmp_path):
    path = tmp_path / "v.nrrd"
    colour = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(path))
    np.testing.assert_array_equal(read_volume(path).voxels, colour)


@pytest.mark.parametrize("name", ["scan.img", "scan", "scan.nrrd"])
def test_content_counts_and_not_the_name(tmp_path, name):
    path = write_volume(tmp_path / "v.mha", ramp(3))
    renamed = Path(shutil.move(path, tmp_path / name))
    np.testing.assert_array_equal(read_volume(renamed).voxels, ramp(3))


# Pictures


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_a_grey_picture_is_one_slice_as_stored(tmp_path, ending):
    pixels = ramp(dtype=np.uint8)[0] * 12
    volume = read_volume(save(tmp_path / f"p.{ending}", pixels))
    np.testing.assert_array_equal(volume.voxels, pixels[None])
    np.testing.assert_array_equal(volume.ijk_to_ras, PICTURE)
    assert not volume.spacing_known


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_are_kept(tmp_path, ending):
    pixels = np.array([[0, 1], [256, 65535]], dtype=np.uint16)
    volume = read_volume(save(tmp_path / f"p.{ending}", pixels))
    assert volume.voxels.dtype == np.uint16
    np.testing.assert_array_equal(volume.voxels[0], pixels)


@pytest.mark.parametrize(
    "pixels",
    [
        np.array([[-32768, 32767]], np.int16),
        np.array([[0, 2**32 - 1]], np.uint32),
        np.array([[-(2**31), 2**31 - 1]], np.int32),
        np.array([[-128, 127]], np.int8),
        np.array([[-1.5, 2.5]], np.float32),
        np.array([[-1.5, 2.5]], np.float64),
    ],
    ids=lambda pixels: str(pixels.dtype),
)
def test_scientific_tiffs_keep_their_values(tmp_path, pixels):
    path = tmp_path / "p.tif"
    tifffile.imwrite(path, pixels)
    voxels = read_volume(path).voxels
    np.testing.assert_array_equal(voxels[0], pixels)
    assert voxels.dtype == pixels.dtype


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_white_is_zero_is_turned_round(tmp_path, dtype):
    path = tmp_path / "p.tif"
    tifffile.imwrite(path, np.array([[0, 3]], dtype), photometric="miniswhite")
    highest = np.iinfo(dtype).max
    np.testing.assert_array_equal(read_volume(path).voxels[0], [[highest, highest - 3]])


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tiff_that_says_to_hold_gigabytes_takes_no_more_memory_than_there_is(tmp_path, compression):
    path = tmp_path / "p.tif"
    tifffile.imwrite(path, ramp(dtype=np.float64)[0], compression=compression)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["StripByteCounts"].overwrite(2**31 - 1)
    tracemalloc.start()
    try:
        with contextlib.suppress(UnreadableImage):
            read_volume(path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 2**25


def test_pages_of_a_tiff_are_slices(tmp_path):
    path = tmp_path / "p.tif"
    pages = ramp(3, 4, 5, np.uint8)
    tifffile.imwrite(path, pages, photometric="minisblack")
    np.testing.assert_array_equal(read_volume(path).voxels, pages)


def test_colour_stays_colour(tmp_path):
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(read_volume(save(tmp_path / "p.png", pixels)).voxels, pixels[None])


def test_colour_with_equal_channels_is_grey(tmp_path):
    grey = ramp(dtype=np.uint8)[0]
    volume = read_volume(save(tmp_path / "p.png", np.stack([grey] * 3, axis=-1)))
    np.testing.assert_array_equal(volume.voxels, grey[None])


def test_what_is_transparent_is_black(tmp_path):
    pixels = np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], np.uint8)
    voxels = read_volume(save(tmp_path / "p.png", pixels)).voxels
    np.testing.assert_array_equal(voxels[0, 0], [[200, 100, 50], [0, 0, 0]])


def test_a_palette_picture_gets_its_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "p.png").voxels[0, 0], [[255, 0, 0], [0, 0, 255]])


def test_a_bitmap_of_one_bit_is_black_and_white(tmp_path):
    path = save(tmp_path / "p.png", np.array([[False, True]]))
    np.testing.assert_array_equal(read_volume(path).voxels[0], [[0, 255]])


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_a_photo_taken_sideways_is_turned_upright(tmp_path, ending):
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 8:] = 255  # bright on the right of the sensor; orientation 6 has that at the bottom
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / f"p.{ending}", pixels, exif=exif)
    (slab,) = read_volume(path).voxels
    assert slab.shape == (16, 8)
    assert slab[:8].mean() < 10
    assert slab[8:].mean() > 245
    assert list_contents(path)[0].size == (8, 16, 1)


def test_only_the_first_picture_of_an_animation_is_read(tmp_path):
    first, second = (Image.fromarray(np.full((4, 5), value, np.uint8)) for value in (10, 20))
    first.save(tmp_path / "p.png", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_volume(tmp_path / "p.png").voxels, np.full((1, 4, 5), 10))


# Modality and units


def test_the_callers_modality_counts_where_the_file_has_none(tmp_path):
    path = write_volume(tmp_path / "v.nii", ramp(3))
    assert read_volume(path).modality == ""
    assert read_volume(path, modality="mr").modality == "MR"


def test_the_callers_modality_stands_above_the_header(tmp_path):
    path = write_dicom(tmp_path / "d.dcm", ramp()[0] - 1000)
    volume = read_volume(path, modality="MR")
    assert (volume.modality, volume.units) == ("MR", "")


@pytest.mark.parametrize(("lowest", "units"), [(-200, "HU"), (-199, "")])
def test_ct_numbers_are_hounsfield_when_they_reach_below_fat(tmp_path, lowest, units):
    voxels = np.maximum(ramp(2) * 50 - 1000, lowest)
    assert read_volume(write_volume(tmp_path / "v.nii", voxels), modality="CT").units == units


def test_a_common_word_for_a_modality_is_understood(tmp_path):
    assert read_volume(write_volume(tmp_path / "v.nii", ramp(3)), modality="MRI").modality == "MR"


def test_a_modality_that_is_no_code_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="CT, MR"):
        read_volume(write_volume(tmp_path / "v.nii", ramp(3)), modality="some scan")


def test_a_series_of_a_single_file_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="single file"):
        read_volume(write_volume(tmp_path / "v.nii", ramp(3)), series="3")


# What would be read


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.nrrd", "v.mha", "p.png", "p.tif", "d"])
def test_the_summary_agrees_with_what_is_read(tmp_path, name):
    path = tmp_path / name
    if name.startswith("v"):
        write_volume(path, ramp(3, 4, 5), spacing=(0.5, 0.75, 2))
    elif name == "d":
        write_dicom(path, ramp(1, 4, 5)[0])
    else:
        save(path, ramp(1, 4, 5, np.uint8)[0])
    volume = read_volume(path)
    (summary,) = list_contents(path)
    assert summary.size == volume.size
    assert summary.spacing == pytest.approx(volume.spacing)
    assert summary.modality == volume.modality
    assert summary.spacing_known == volume.spacing_known
    assert summary.slices == volume.size[2]


def test_a_summary_is_json_and_a_line(tmp_path):
    (summary,) = list_contents(write_volume(tmp_path / "v.nii", ramp(3, 4, 5), spacing=(0.5, 0.75, 2)))
    assert json.loads(json.dumps(summary.as_dict()))["size"] == [5, 4, 3]
    assert summary.describe() == "NIfTI volume, modality unknown, 5 x 4 x 3 voxels, 0.5 x 0.75 x 2 mm"


def test_nothing_that_is_said_about_a_file_names_the_patient_or_its_folder(tmp_path):
    folder = tmp_path / "Invented_Patience"
    folder.mkdir()
    path = write_dicom(folder / "d.dcm", ramp()[0])
    said = (
        f"{list_contents(path)[0].as_dict()} {list_contents(path)[0].describe()} {read_volume(path).source}"
    )
    assert PATIENT_NAME.split("^")[0] not in said
    assert str(tmp_path) not in said
