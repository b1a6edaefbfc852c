"""DICOM: pixel values, one file or many, order and place of slices, and the choice between series."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.pixels import get_decoder
from pydicom.uid import RLELossless, generate_uid

from MedAnomalyCLIPLib.errors import (
    DependencyMissing,
    GeometryRefused,
    SeriesAmbiguous,
    UnreadableImage,
    UnsupportedImage,
)
from MedAnomalyCLIPLib.volume import list_contents, read_volume
from unit.images import (
    AXIAL,
    CORONAL,
    PATIENT_ID,
    PATIENT_NAME,
    RAS_FROM_LPS,
    SERIES_DESCRIPTION,
    dicom_dataset,
    ramp,
    write_dicom,
    write_dicom_series,
    write_enhanced,
)


def bundled(name: str) -> Path:
    """A file that lies in pydicom's own wheel."""
    path = get_testdata_file(name, download=False)
    assert path is not None
    return Path(path)


def stack(slices: int, step: float = 2.0) -> list[tuple[float, float, float]]:
    return [(-10.0, -20.0, 30.0 + step * k) for k in range(slices)]


# Values


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8, np.int8])
def test_stored_values_without_a_rescale_are_kept_in_their_type(tmp_path, dtype):
    limits = np.iinfo(dtype)
    pixels = np.array([[limits.min, 0], [1, limits.max]], dtype)
    voxels = read_volume(write_dicom(tmp_path / "d", pixels)).voxels
    assert voxels.dtype == dtype
    np.testing.assert_array_equal(voxels[0], pixels)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_a_whole_intercept_never_wraps_round(tmp_path, dtype):
    limits = np.iinfo(dtype)
    pixels = np.array([[limits.min, limits.max]], dtype)
    path = write_dicom(tmp_path / "d", pixels, RescaleSlope=1, RescaleIntercept=-1024)
    voxels = read_volume(path).voxels
    assert voxels.dtype.kind == "i"
    np.testing.assert_array_equal(voxels[0], pixels.astype(int) - 1024)


def test_a_slope_gives_real_numbers(tmp_path):
    path = write_dicom(tmp_path / "d", ramp()[0], RescaleSlope=0.5, RescaleIntercept=-3)
    voxels = read_volume(path).voxels
    assert voxels.dtype == np.float32
    np.testing.assert_array_equal(voxels[0], ramp()[0] * 0.5 - 3)


def test_slices_with_slopes_of_their_own_are_rescaled_one_by_one(tmp_path):
    for k, slope in enumerate((1, 2.5)):
        write_dicom(
            tmp_path / f"{k}",
            ramp()[0],
            SeriesInstanceUID="1.2.3",
            ImagePositionPatient=[0, 0, 2 * k],
            RescaleSlope=slope,
            RescaleIntercept=0,
        )
    np.testing.assert_array_equal(read_volume(tmp_path).voxels, [ramp()[0], ramp()[0] * 2.5])


def test_unused_bits_are_no_part_of_a_value(tmp_path):
    pixels = np.array([[0xF005, 0x0FFF]], np.uint16)  # 12 bits stored, rubbish (an overlay) above them
    voxels = read_volume(write_dicom(tmp_path / "d", pixels, BitsStored=12, HighBit=11)).voxels
    np.testing.assert_array_equal(voxels[0], [[5, 4095]])


@pytest.mark.parametrize(
    ("pixels", "stored_bits", "expected"),
    [
        (np.array([[0, 1, 4095]], np.uint16), 12, [[4095, 4094, 0]]),
        (np.array([[0, 255]], np.uint8), 8, [[255, 0]]),
        (np.array([[-2048, 2047]], np.int16), 12, [[2047, -2048]]),
    ],
)
def test_monochrome1_is_turned_round_within_its_stored_bits(tmp_path, pixels, stored_bits, expected):
    path = write_dicom(
        tmp_path / "d",
        pixels,
        PhotometricInterpretation="MONOCHROME1",
        BitsStored=stored_bits,
        HighBit=stored_bits - 1,
    )
    np.testing.assert_array_equal(read_volume(path).voxels[0], expected)


def test_a_dense_spot_is_bright_in_monochrome1_and_in_monochrome2(tmp_path):
    dense_is_high = np.array([[10, 200]], np.uint8)
    films = {"MONOCHROME2": dense_is_high, "MONOCHROME1": 255 - dense_is_high}
    read = [
        read_volume(
            write_dicom(
                tmp_path / kind, pixels, PhotometricInterpretation=kind, RescaleSlope=2, RescaleIntercept=7
            )
        ).voxels
        for kind, pixels in films.items()
    ]
    np.testing.assert_array_equal(read[0], read[1])


def test_a_modality_table_is_looked_up(tmp_path):
    dataset = dicom_dataset(np.array([[0, 1, 2, 3]], np.uint8))
    table = pydicom.Dataset()
    table.LUTDescriptor = [4, 0, 16]
    table.ModalityLUTType = "US"
    table.LUTData = [1000, 10, 20, 65535]
    dataset.ModalityLUTSequence = [table]
    for element in table:
        if element.keyword in ("LUTDescriptor", "LUTData"):
            element.VR = "US"
    dataset.save_as(tmp_path / "d", enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(tmp_path / "d").voxels[0], [[1000, 10, 20, 65535]])


@pytest.mark.parametrize(
    ("elements", "units"),
    [
        ({"RescaleType": "HU", "RescaleSlope": 1, "RescaleIntercept": 0}, "HU"),
        ({"RescaleSlope": 1, "RescaleIntercept": -1024}, "HU"),
        ({"RescaleType": "US", "RescaleSlope": 1, "RescaleIntercept": 0}, ""),
        ({"RescaleType": "HU", "RescaleSlope": 1, "RescaleIntercept": 0, "Modality": "MR"}, ""),
    ],
)
def test_hounsfield_units_are_recognised(tmp_path, elements, units):
    assert read_volume(write_dicom(tmp_path / "d", ramp()[0], **elements)).units == units


def test_what_pydicom_decodes_is_what_is_read():
    path = bundled("CT_small.dcm")
    dataset = pydicom.dcmread(path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels[0], dataset.pixel_array + int(dataset.RescaleIntercept))
    assert volume.modality == "CT"
    assert volume.voxels.dtype == np.int16


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_padded.dcm",
    ],
)
def test_transfer_syntaxes_of_one_image_give_the_same_voxels(name):
    pytest.importorskip("pylibjpeg")
    plain, coded = (read_volume(bundled(n)) for n in ("MR_small.dcm", name))
    np.testing.assert_array_equal(coded.voxels, plain.voxels)
    assert coded.voxels.dtype == plain.voxels.dtype
    assert coded.voxels.dtype.isnative


def test_a_missing_decoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(get_decoder(RLELossless), "_available", {})
    with pytest.raises(DependencyMissing, match="pip install pylibjpeg"):
        read_volume(bundled("MR_small_RLE.dcm"))


def test_a_video_is_refused_by_the_name_of_its_compression(tmp_path):
    dataset = dicom_dataset(ramp(dtype=np.uint8)[0])
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"  # MPEG-4
    dataset.PixelData = pydicom.encaps.encapsulate([b"film"])
    dataset.save_as(tmp_path / "d", enforce_file_format=True)
    with pytest.raises(UnsupportedImage, match="MPEG-4"):
        read_volume(tmp_path / "d")


# Colour


def test_colour_is_rgb(tmp_path):
    colour = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(read_volume(write_dicom(tmp_path / "d", colour)).voxels[0], colour)


@pytest.mark.parametrize(
    ("name", "rgb"),
    [
        ("SC_ybr_full_422_uncompressed.dcm", (254, 0, 0)),
        ("SC_rgb_rle_16bit.dcm", (255, 0, 0)),
        ("SC_rgb_rle_32bit.dcm", (255, 0, 0)),
        ("SC_rgb_rle_2frame.dcm", (255, 0, 0)),
    ],
)
def test_every_way_of_storing_red_is_red(name, rgb):
    voxels = read_volume(bundled(name)).voxels
    assert voxels.dtype == np.uint8
    np.testing.assert_array_equal(voxels[0, 5, 50], rgb)


@pytest.mark.parametrize(
    ("entry_bits", "entry", "shown"), [(16, 0x80FF, 0x80), (16, 255, 255), (8, 255, 255)]
)
def test_a_palette_becomes_colour_in_8_bits(tmp_path, entry_bits, entry, shown):
    tables = {}
    for channel, values in (("Red", (entry, 0)), ("Green", (0, 0)), ("Blue", (0, entry))):
        tables[f"{channel}PaletteColorLookupTableDescriptor"] = [2, 0, entry_bits]
        words = np.array(values, "<u2" if entry_bits == 16 else "u1")
        tables[f"{channel}PaletteColorLookupTableData"] = words.tobytes()
    path = write_dicom(
        tmp_path / "d", np.array([[0, 1]], np.uint8), PhotometricInterpretation="PALETTE COLOR", **tables
    )
    np.testing.assert_array_equal(read_volume(path).voxels[0, 0], [[shown, 0, 0], [0, 0, shown]])


# Place of one file


def test_a_slice_lies_where_its_header_says(tmp_path):
    path = write_dicom(
        tmp_path / "d",
        ramp()[0],
        ImageOrientationPatient=list(CORONAL),
        ImagePositionPatient=[-10, 20, 30],
        PixelSpacing=[0.5, 0.25],
        SliceThickness=3,
    )
    columns = np.array([[0.25, 0, 0, -10], [0, 0, 3, 20], [0, -0.5, 0, 30], [0, 0, 0, 1]])
    np.testing.assert_allclose(read_volume(path).ijk_to_ras, RAS_FROM_LPS @ columns)


def test_directions_written_with_few_digits_do_not_change_the_spacing(tmp_path):
    path = write_dicom(tmp_path / "d", ramp()[0], ImageOrientationPatient=[0.866, 0.5, 0, 0, 0, -0.9999])
    assert read_volume(path).spacing == pytest.approx((1, 1, 2), abs=1e-12)


@pytest.mark.parametrize(
    ("elements", "spacing", "known"),
    [
        ({"PixelSpacing": [0.4, 0.2]}, (0.2, 0.4), True),
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.15, 0.15]}, (0.15, 0.15), True),
        ({"PixelSpacing": None}, (1, 1), False),
        ({"PixelSpacing": None, "PixelAspectRatio": [6, 5]}, (1, 1.2), False),
    ],
)
def test_an_image_without_a_position_lies_as_a_picture_does(tmp_path, elements, spacing, known):
    path = write_dicom(
        tmp_path / "d", ramp()[0], ImagePositionPatient=None, ImageOrientationPatient=None, **elements
    )
    volume = read_volume(path)
    np.testing.assert_allclose(volume.ijk_to_ras, np.diag([-spacing[0], -spacing[1], 2, 1]))
    assert volume.spacing_known is known


def test_the_spacing_of_ultrasound_comes_from_its_regions():
    volume = read_volume(bundled("examples_ybr_color.dcm"))
    region = pydicom.dcmread(bundled("examples_ybr_color.dcm")).SequenceOfUltrasoundRegions[0]
    assert volume.spacing[:2] == pytest.approx((region.PhysicalDeltaX * 10, region.PhysicalDeltaY * 10))
    assert volume.spacing_known
    assert volume.size == (320, 240, 30)


def test_frames_of_a_classic_multi_frame_image_follow_the_normal(tmp_path):
    path = write_dicom(tmp_path / "d", ramp(3), SpacingBetweenSlices=2.5, ImagePositionPatient=[1, 2, 3])
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, ramp(3))
    np.testing.assert_allclose(volume.ijk_to_ras @ [0, 0, 2, 1], (-1, -2, 8, 1))


def test_a_negative_spacing_stacks_frames_against_the_normal(tmp_path):
    path = write_dicom(tmp_path / "d", ramp(3), SpacingBetweenSlices=-2.5, ImagePositionPatient=[1, 2, 3])
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, ramp(3)[::-1])
    np.testing.assert_allclose(volume.ijk_to_ras @ [0, 0, 2, 1], (-1, -2, 3, 1))


def test_nuclear_medicine_states_its_place_with_its_detector(tmp_path):
    dataset = dicom_dataset(
        ramp(2),
        Modality="NM",
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        SpacingBetweenSlices=4,
    )
    detector = pydicom.Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [1, 2, 3], list(CORONAL)
    dataset.DetectorInformationSequence = [detector]
    dataset.save_as(tmp_path / "d", enforce_file_format=True)
    np.testing.assert_allclose(read_volume(tmp_path / "d").ijk_to_ras @ [0, 0, 1, 1], (-1, -6, 3, 1))


def test_a_file_without_preamble_or_ending_is_read(tmp_path):
    dataset = dicom_dataset(ramp()[0])
    dataset.file_meta = pydicom.FileMetaDataset()
    path = tmp_path / "scan"
    dataset.save_as(path, implicit_vr=True, little_endian=True)
    assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(read_volume(path).voxels, ramp())


# Enhanced multi-frame


def test_frames_of_an_enhanced_image_are_sorted_by_their_own_positions(tmp_path):
    positions = stack(4)
    shuffled = [2, 0, 3, 1]
    path = write_enhanced(
        tmp_path / "d", ramp(4)[shuffled], [positions[k] for k in shuffled], spacing=(0.5, 0.25)
    )
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, ramp(4))
    assert volume.spacing == pytest.approx((0.25, 0.5, 2))
    np.testing.assert_allclose(volume.ijk_to_ras @ [0, 0, 3, 1], (10, 20, 36, 1))


def test_frames_of_an_enhanced_image_have_rescales_of_their_own(tmp_path):
    path = write_enhanced(tmp_path / "d", ramp(2), stack(2), rescales=[(1, -1000), (2, 5)])
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, [ramp(2)[0] - 1000.0, ramp(2)[1] * 2.0 + 5])
    assert volume.units == "HU"


@pytest.mark.parametrize(
    ("positions", "orientations", "message"),
    [
        ([*stack(2), (-10, -20, 40)], None, "unevenly"),
        ([*stack(2), (-10, -20, 32)], None, "3 slices at 2 places"),
        (stack(3), [AXIAL, AXIAL, CORONAL], "different directions"),
    ],
    ids=["missing frame", "two time points", "two orientations"],
)
def test_frames_that_make_no_regular_grid_are_refused(tmp_path, positions, orientations, message):
    path = write_enhanced(tmp_path / "d", ramp(3), positions, orientations=orientations)
    with pytest.raises(GeometryRefused, match=message):
        read_volume(path)


# Series


def test_slices_are_ordered_by_position_and_not_by_name_or_number(tmp_path):
    write_dicom_series(tmp_path, ramp(5), stack(5))
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.voxels, ramp(5))
    np.testing.assert_allclose(volume.ijk_to_ras @ [0, 0, 4, 1], (10, 20, 38, 1))


def test_a_series_lies_where_simpleitk_puts_it(tmp_path):
    rows = np.array([0.8, 0.6, 0.0, 0.36, -0.48, 0.8])
    normal = np.cross(rows[:3], rows[3:])
    positions = [np.array([5.0, -7, 9]) + 1.7 * k * normal for k in range(4)]
    write_dicom_series(
        tmp_path, ramp(4), positions, ImageOrientationPatient=list(rows), PixelSpacing=[0.5, 0.75]
    )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.voxels, sitk.GetArrayFromImage(image))
    for corner in np.ndindex(2, 2, 2):
        index = [int(bit * (size - 1)) for bit, size in zip(corner, volume.size, strict=True)]
        x, y, z = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((volume.ijk_to_ras @ [*index, 1])[:3], (-x, -y, z), atol=1e-3)


def test_a_tilted_gantry_keeps_its_true_slice_step(tmp_path):
    positions = [(0.0, 1.5 * k, 4.0 * k) for k in range(4)]
    write_dicom_series(tmp_path, ramp(4), positions)
    np.testing.assert_allclose(read_volume(tmp_path).ijk_to_ras[:3, 2], (0, -1.5, 4))


def test_rounded_positions_are_still_a_regular_grid(tmp_path):
    write_dicom_series(tmp_path, ramp(9), [(0, 0, round(0.625 * k, 2)) for k in range(9)])
    assert read_volume(tmp_path).spacing[2] == pytest.approx(0.625, abs=0.01)


def test_a_missing_slice_is_refused_and_told(tmp_path):
    positions = stack(6)
    write_dicom_series(tmp_path, ramp(5), [*positions[:2], *positions[3:]])
    with pytest.raises(GeometryRefused, match=r"4 mm between slices 2 and 3 of 5.* 2 mm is usual"):
        read_volume(tmp_path)


def test_a_slice_shifted_sideways_is_refused(tmp_path):
    positions = [*stack(2), (-9.0, -20.0, 34.0), *stack(5)[3:]]
    write_dicom_series(tmp_path, ramp(5), positions)
    with pytest.raises(GeometryRefused, match="beside"):
        read_volume(tmp_path)


def test_two_images_at_one_place_are_refused(tmp_path):
    write_dicom_series(tmp_path, ramp(4), [*stack(3), stack(3)[1]])
    with pytest.raises(GeometryRefused, match="4 slices at 3 places"):
        read_volume(tmp_path)


def test_a_copied_file_counts_once(tmp_path):
    paths = write_dicom_series(tmp_path, ramp(3), stack(3))
    shutil.copy(paths[1], tmp_path / "copy of a slice")
    np.testing.assert_array_equal(read_volume(tmp_path).voxels, ramp(3))


def test_time_points_of_one_series_are_offered_one_by_one(tmp_path):
    for time in (1, 2):
        write_dicom_series(
            tmp_path / str(time),
            ramp(3) + 100 * time,
            stack(3),
            SeriesInstanceUID="1.2.3",
            TemporalPositionIdentifier=time,
        )
    early, late = list_contents(tmp_path)
    assert early.slices == late.slices == 3
    np.testing.assert_array_equal(read_volume(tmp_path, series=late.identifier).voxels, ramp(3) + 200)


@pytest.mark.parametrize(
    "other",
    [
        {"ImageOrientationPatient": list(CORONAL)},
        {"PixelSpacing": [2, 2]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
    ],
    ids=["direction", "spacing", "scout"],
)
def test_what_cannot_be_one_volume_is_split(tmp_path, other):
    uid = generate_uid()
    write_dicom_series(tmp_path / "a", ramp(3), stack(3), SeriesInstanceUID=uid)
    write_dicom(tmp_path / "scout", ramp()[0], SeriesInstanceUID=uid, **other)
    assert sorted(summary.slices for summary in list_contents(tmp_path)) == [1, 3]


def test_images_without_a_position_stand_alone(tmp_path):
    for view in range(2):
        write_dicom(
            tmp_path / f"{view}",
            ramp()[0] + view,
            SeriesInstanceUID="1.2.3",
            ImagePositionPatient=None,
            ImageOrientationPatient=None,
            InstanceNumber=view + 1,
        )
    _, second = list_contents(tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path, series=second.identifier).voxels, ramp() + 1)


def test_other_files_in_the_folder_are_passed_over(tmp_path):
    write_dicom_series(tmp_path / "deeper" / "down", ramp(3), stack(3))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".DS_Store").write_bytes(bytes(100))
    write_dicom(tmp_path / "dose", ramp()[0], Modality="RTDOSE")
    shutil.copy(bundled("reportsi.dcm"), tmp_path)
    assert read_volume(tmp_path).size == (5, 4, 3)


# Choice


@pytest.fixture
def two_series(tmp_path) -> Path:
    write_dicom_series(tmp_path / "a", ramp(3), stack(3), SeriesNumber=2, SeriesInstanceUID="1.2.3")
    write_dicom_series(tmp_path / "b", ramp(2) + 7, stack(2), SeriesNumber=10, SeriesInstanceUID="1.2.4")
    return tmp_path


def test_several_series_have_to_be_chosen_from(two_series):
    with pytest.raises(SeriesAmbiguous, match=r"2 series.*--series") as caught:
        read_volume(two_series)
    identifiers = [summary.identifier for summary in list_contents(two_series)]
    assert [choice.split()[0] for choice in caught.value.choices] == identifiers
    assert [re.fullmatch(r"(\d+)-[0-9a-f]{6}", identifier)[1] for identifier in identifiers] == ["2", "10"]


def test_each_identifier_reads_its_own_series(two_series):
    for summary in list_contents(two_series):
        assert read_volume(two_series, series=summary.identifier).size == summary.size


@pytest.mark.parametrize("series", ["10", "1.2.4"])
def test_a_series_number_or_uid_does_as_well(two_series, series):
    np.testing.assert_array_equal(read_volume(two_series, series=series).voxels, ramp(2) + 7)


def test_an_identifier_stays_the_same_when_the_folder_grows(two_series):
    before = [summary.identifier for summary in list_contents(two_series)]
    write_dicom_series(two_series / "c", ramp(2), stack(2), SeriesNumber=1)
    assert [summary.identifier for summary in list_contents(two_series)][1:] == before


def test_an_unknown_series_lists_those_there_are(two_series):
    with pytest.raises(SeriesAmbiguous, match="no series '5'") as caught:
        read_volume(two_series, series="5")
    assert len(caught.value.choices) == 2


def test_a_number_that_several_series_share_is_not_enough(tmp_path):
    for part in "ab":
        write_dicom_series(tmp_path / part, ramp(2), stack(2))
    with pytest.raises(SeriesAmbiguous, match="2 series called '3'"):
        read_volume(tmp_path, series="3")


def test_choices_tell_nothing_about_the_patient(two_series):
    with pytest.raises(SeriesAmbiguous) as caught:
        read_volume(two_series)
    told = " ".join([str(caught.value), *caught.value.choices, str(list_contents(two_series))])
    for secret in (PATIENT_NAME, PATIENT_ID, SERIES_DESCRIPTION, "1.2.3", "Invented", str(two_series.parent)):
        assert secret not in told


def test_a_summary_tells_why_a_series_cannot_be_read(tmp_path):
    write_dicom_series(tmp_path, ramp(3), [*stack(2), (-10, -20, 50)])
    (summary,) = list_contents(tmp_path)
    assert "unevenly" in summary.problem
    assert summary.problem in summary.describe()


def test_listing_reads_no_pixels(tmp_path):
    path = write_dicom(tmp_path / "d", ramp()[0])
    path.write_bytes(path.read_bytes()[:-30])
    assert list_contents(path)[0].size == (5, 4, 1)
    with pytest.raises(UnreadableImage):
        read_volume(path)
