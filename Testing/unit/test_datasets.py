"""Sets of images: every layout gives the same kind of records, faults are told at once, divisions repeat."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from images import write_volume
from PIL import Image

from MedAnomalyCLIPLib.datasets import (
    ImageRecord,
    check_records,
    cross_task,
    draw_shots,
    few_shot,
    leave_one_out,
    lesion_mask,
    modality_family,
    planes_of,
    read_dataset,
    read_manifest,
    read_shot_list,
)
from MedAnomalyCLIPLib.errors import Cancelled, DatasetInvalid, InvalidRequest
from MedAnomalyCLIPLib.training.image_set import pack


def paint(path, seed=0, size=(12, 16), mask=False):
    """A small picture that differs from those of other seeds, or a mask with a lesion in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, size).astype(np.uint8)
    if mask:
        pixels = np.zeros(size, np.uint8)
        pixels[2:5, 3:9] = 255
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def bmad(tmp_path):
    """Two sets; each with normal and abnormal images in each split, masks in one of them only."""
    for s, name in enumerate(("Brain", "Chest")):
        for p, split in enumerate(("train", "valid", "test")):
            for k in range(4):
                seed = 100 * s + 10 * p + k
                place = tmp_path / f"{name}_AD" / split
                paint(place / "good" / "img" / f"n{seed}.png", seed)
                paint(place / "Ungood" / "img" / f"a{seed}.png", 1000 + seed)
                if name == "Brain":
                    paint(place / "Ungood" / "anomaly_mask" / f"a{seed}.png", mask=True)
    return tmp_path


class TestLayouts:
    def test_bmad_folders_tell_set_split_label_and_mask(self, bmad):
        records = read_dataset(bmad, modality="MR")
        assert len(records) == 2 * 3 * 8
        brain = [r for r in records if r.set == "Brain" and r.split == "test" and r.abnormal]
        assert [r.path.name for r in brain] == ["a20.png", "a21.png", "a22.png", "a23.png"]
        assert brain[0].mask == bmad / "Brain_AD/test/Ungood/anomaly_mask/a20.png"
        assert not [r for r in records if r.set == "Chest" and r.mask]
        assert {r.modality for r in records} == {"MR"}

    def test_one_set_of_bmad_can_be_read_by_itself(self, bmad):
        assert {r.set for r in read_dataset(bmad / "Brain_AD")} == {"Brain"}

    def test_a_mask_may_have_another_ending_than_its_image(self, tmp_path):
        paint(tmp_path / "X_AD/test/Ungood/img/one.jpeg")
        mask = paint(tmp_path / "X_AD/test/Ungood/anomaly_mask/one.png", mask=True)
        assert read_dataset(tmp_path)[0].mask == mask

    def test_abnormal_images_that_nobody_outlined_have_no_mask(self, bmad):
        paint(bmad / "Brain_AD/test/Ungood_nomask/img/b.png", 77)
        record = next(r for r in read_dataset(bmad) if r.path.name == "b.png")
        assert record.abnormal
        assert record.mask is None

    def test_hidden_files_are_no_images(self, bmad):
        (bmad / "Brain_AD/test/good/img/._n20.png").write_bytes(b"Mac OS X")
        assert len(read_dataset(bmad / "Brain_AD")) == 24

    def test_mvtec_folders_tell_the_kind_of_anomaly(self, tmp_path):
        paint(tmp_path / "liver/train/good/0.png", 0)
        paint(tmp_path / "liver/test/good/1.png", 1)
        paint(tmp_path / "liver/test/cyst/2.png", 2)
        mask = paint(tmp_path / "liver/ground_truth/cyst/2_mask.png", mask=True)
        records = {r.path.name: r for r in read_dataset(tmp_path)}
        assert [records[f"{n}.png"].abnormal for n in range(3)] == [False, False, True]
        assert (records["2.png"].mask, records["2.png"].findings) == (mask, "cyst")
        assert records["0.png"].split == "train"

    def test_json_lines_of_mediclip_are_read_with_their_folder_of_images(self, tmp_path):
        rows = [
            {"filename": "test/normal/1.jpg", "label": 0, "label_name": "normal", "clsname": "busi"},
            {"filename": "test/abnormal/2.jpg", "label": 1, "clsname": "busi", "mask": "test/true/2.jpg"},
        ]
        (tmp_path / "busi/samples").mkdir(parents=True)
        (tmp_path / "busi/images").mkdir()
        (tmp_path / "busi/samples/test.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
        normal, abnormal = read_dataset(tmp_path / "busi")
        assert (normal.abnormal, abnormal.abnormal) == (False, True)
        assert abnormal.mask == tmp_path / "busi/images/test/true/2.jpg"
        assert (abnormal.set, abnormal.split) == ("busi", "test")

    def test_a_class_name_that_is_a_label_does_not_divide_the_set(self, tmp_path):
        rows = [{"filename": f"{k}.png", "label": k, "clsname": ("good", "defective")[k]} for k in (0, 1)]
        (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert {r.set for r in read_dataset(tmp_path / "all.jsonl")} == {tmp_path.name}

    @pytest.mark.parametrize(
        ("line", "said"),
        [("{", "not JSON"), ('{"label": 1}', "filename"), ('{"filename": "a", "label": 2}', "0 or 1")],
    )
    def test_a_bad_json_line_is_named_by_its_number(self, tmp_path, line, said):
        (tmp_path / "test.json").write_text('{"filename": "a.png", "label": 0}\n' + line)
        with pytest.raises(DatasetInvalid, match=rf"test\.json, line 2.*{said}"):
            read_dataset(tmp_path / "test.json")

    def test_a_folder_in_no_layout_is_refused_with_those_that_are_known(self, tmp_path):
        with pytest.raises(DatasetInvalid, match=r"manifest\.csv"):
            read_dataset(tmp_path)


class TestVolumes:
    @pytest.fixture
    def cases(self, tmp_path):
        """One case folder: five slices, the first one blank, a lesion in slice 3."""
        voxels = np.random.default_rng(0).normal(100, 20, (5, 20, 24)).astype(np.int16)
        voxels[0] = 0
        labels = np.zeros(voxels.shape, np.uint8)
        labels[3, 4:8, 10:15] = 2
        (tmp_path / "case1").mkdir()
        write_volume(tmp_path / "case1/FLAIR.nii.gz", voxels)
        write_volume(tmp_path / "case1/seg.nii.gz", labels)
        return tmp_path

    def test_slices_become_records_that_know_their_place(self, cases):
        records = read_dataset(cases, modality="MR")
        assert [r.slice_at for r in records] == [(2, 1), (2, 2), (2, 3), (2, 4)]
        assert [r.abnormal for r in records] == [False, False, True, False]
        assert {r.cluster for r in records} == {"case1"}

    @pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 1, 0, -1, 0, 0, 0, 0, 1)])
    def test_the_mask_lies_on_the_pixels_of_the_plane(self, cases, axes):
        """The lesion is painted bright into the volume, so that the plane itself tells where it is."""
        labels = np.zeros((5, 20, 24), np.uint8)
        labels[3, 4:8, 10:15] = 1
        voxels = np.random.default_rng(0).normal(100, 20, labels.shape) + 5000.0 * labels
        write_volume(cases / "case1/FLAIR.nii.gz", voxels.astype(np.int16), direction=axes)
        write_volume(cases / "case1/seg.nii.gz", labels, direction=axes)
        record = next(r for r in read_dataset(cases) if r.abnormal)
        plane = next(planes_of([record]))
        assert np.array_equal(lesion_mask(record, plane), plane.pixels > 2000)

    def test_a_volume_that_was_written_anew_is_read_anew(self, cases):
        records = read_dataset(cases)
        before = next(planes_of(records)).pixels
        write_volume(cases / "case1/FLAIR.nii.gz", np.full((5, 20, 24), 7, np.int32))
        assert not np.array_equal(next(planes_of(records)).pixels, before)

    def test_a_volume_without_segmentation_is_named(self, cases):
        write_volume(cases / "lonely.nrrd", np.ones((2, 3, 4), np.int16))
        with pytest.raises(DatasetInvalid, match=r"lonely\.nrrd"):
            read_dataset(cases)

    def test_a_segmentation_of_another_size_is_named(self, cases):
        write_volume(cases / "case1/seg.nii.gz", np.ones((2, 3, 4), np.uint8))
        with pytest.raises(DatasetInvalid, match=r"seg\.nii\.gz has 4 x 3 x 2"):
            read_dataset(cases)

    def test_volumes_and_labels_may_lie_in_folders_of_their_own(self, tmp_path):
        for name in ("imagesTr", "labelsTr"):
            (tmp_path / name).mkdir()
        voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
        write_volume(tmp_path / "imagesTr/liver_01_0000.nii.gz", voxels)
        write_volume(tmp_path / "labelsTr/liver_01.nii.gz", (voxels > 20).astype(np.uint8))
        records = read_dataset(tmp_path)
        assert [(r.cluster, r.abnormal) for r in records] == [("liver_01", False), ("liver_01", True)]

    def test_slices_can_be_packed_for_training(self, cases, tmp_path):
        records = read_dataset(cases)
        assert pack(records, tmp_path / "packed.npy", 32).shape == (4, 3, 32, 32)


class TestManifest:
    ROW: ClassVar = {"image": "a.png", "label": "1", "modality": "CT", "body_part": "chest"}

    def write(self, folder, *rows):
        with (folder / "manifest.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return folder / "manifest.csv"

    def test_tells_label_mask_cluster_and_split(self, tmp_path):
        row = {**self.ROW, "mask": "m.png", "cluster": "p1", "split": "test"}
        record, other = read_manifest(self.write(tmp_path, row, {**row, "mask": "", "label": "normal"}))
        assert (record.abnormal, record.mask, record.cluster) == (True, tmp_path / "m.png", "p1")
        assert (other.abnormal, other.mask, other.split) == (False, None, "test")

    def test_without_a_column_is_refused_by_its_name(self, tmp_path):
        (tmp_path / "manifest.csv").write_text("image,label\na.png,1\n")
        with pytest.raises(DatasetInvalid, match="body_part, modality"):
            read_manifest(tmp_path / "manifest.csv")

    @pytest.mark.parametrize(("key", "word"), [("label", "sick"), ("split", "testing"), ("image", "")])
    def test_a_word_that_is_not_understood_is_named_with_its_line(self, tmp_path, key, word):
        rows = ({**self.ROW, "split": "test"}, {**self.ROW, "split": "test", key: word})
        with pytest.raises(DatasetInvalid, match=f"line 3.*{key}"):
            read_manifest(self.write(tmp_path, *rows))

    @pytest.mark.parametrize(
        ("words", "family"),
        [
            ("MR FLAIR", "MR"),
            ("MRI", "MR"),
            ("CT (soft window -160..240 HU)", "CT"),
            ("US", "US"),
            ("X-ray", "XR"),
            ("colour fundus photograph", "fundus"),
            ("light microscopy (blood smear)", "microscopy"),
            ("electron microscopy", "microscopy"),
        ],
    )
    def test_modalities_are_recognised_in_the_words_of_sources(self, words, family):
        assert modality_family(words) == family


def kinds(report, *, fatal=True):
    return {problem.kind: problem.places for problem in report.problems if problem.fatal is fatal}


class TestChecking:
    def test_a_sound_set_has_no_problems_and_is_counted(self, bmad):
        report = check_records(read_dataset(bmad / "Brain_AD"))
        assert report.usable
        assert not report.problems
        assert [(c.split, c.normal, c.abnormal, c.masks) for c in report.counts] == [
            ("train", 4, 4, 4),
            ("valid", 4, 4, 4),
            ("test", 4, 4, 4),
        ]
        report.require()

    def test_all_faults_are_told_in_one_error_by_file(self, bmad):
        test = bmad / "Brain_AD/test"
        (test / "Ungood/anomaly_mask/a20.png").unlink()
        paint(test / "Ungood/anomaly_mask/a21.png", size=(5, 6), mask=True)
        Image.fromarray(np.zeros((12, 16), np.uint8)).save(test / "Ungood/anomaly_mask/a22.png")
        whole = (test / "good/img/n20.png").read_bytes()
        (test / "good/img/n20.png").write_bytes(whole[: len(whole) // 2])
        report = check_records(read_dataset(bmad / "Brain_AD"))
        assert set(kinds(report)) == {
            "mask missing",
            "mask of another size than its image",
            "mask of an abnormal image is empty",
            "image cannot be read",
        }
        with pytest.raises(DatasetInvalid) as caught:
            report.require()
        for said in ("anomaly_mask/a20.png", "a21.png: 6 x 5, not 16 x 12", "a22.png", "good/img/n20.png"):
            assert said in str(caught.value)

    def test_a_missing_image_is_named(self, bmad):
        records = read_dataset(bmad)
        records[3].path.unlink()
        assert kinds(check_records(records))["image missing"] == ("Brain_AD/train/good/img/n3.png",)

    def test_an_image_that_no_file_can_be_called_is_missing(self, bmad):
        record, *others = read_dataset(bmad)
        nameless = replace(record, path=record.path.with_name("x" * 5000))
        masked = replace(others[0], mask=record.path.with_name("y" * 5000), abnormal=True)
        found = kinds(check_records([nameless, masked, *others[1:]]))
        assert found["image missing"][0].endswith("xxx")
        assert found["mask missing"][0].endswith("yyy")

    @pytest.mark.parametrize("missing", ["good", "Ungood"])
    def test_a_test_split_with_one_class_is_no_test(self, bmad, missing):
        records = [r for r in read_dataset(bmad / "Brain_AD") if missing not in r.path.parts]
        word = {"good": "normal", "Ungood": "abnormal"}[missing]
        assert kinds(check_records(records))[f"no {word} images"] == ("Brain, test",)

    def test_a_test_image_among_those_to_learn_from_is_found_by_content(self, bmad):
        train, test = (bmad / f"Brain_AD/{split}/good/img" for split in ("train", "test"))
        (test / "renamed.png").write_bytes((train / "n1.png").read_bytes())
        report = check_records(read_dataset(bmad / "Brain_AD"))
        assert kinds(report)["the same image in the test split and outside it"] == (
            "train/good/img/n1.png = test/good/img/renamed.png",
        )

    def test_copies_within_a_split_are_a_note(self, bmad):
        train = bmad / "Brain_AD/train/good/img"
        (train / "again.png").write_bytes((train / "n1.png").read_bytes())
        report = check_records(read_dataset(bmad / "Brain_AD"))
        assert report.usable
        assert "the same image more than once" in kinds(report, fatal=False)

    def test_one_image_under_two_labels_is_an_error(self, bmad):
        place = bmad / "Chest_AD/train"
        (place / "Ungood/img/x.png").write_bytes((place / "good/img/n100.png").read_bytes())
        assert "the same image under two labels" in kinds(check_records(read_dataset(bmad)))

    def test_a_patient_on_both_sides_of_the_test_is_named(self, bmad):
        records = read_dataset(bmad / "Brain_AD")
        records = [replace(r, cluster="p7") if r.path.name in ("n0.png", "n20.png") else r for r in records]
        found = kinds(check_records(records))["one patient or cluster in the test split and outside it"]
        assert found == ("p7",)

    def test_a_normal_image_with_a_lesion_mask_is_an_error(self, bmad):
        records = read_dataset(bmad / "Brain_AD")
        records = [replace(r, abnormal=False) if r.path.name == "a20.png" else r for r in records]
        assert "image is labelled normal but its mask is not empty" in kinds(check_records(records))

    def test_an_empty_list_is_no_set(self):
        assert not check_records([]).usable

    def test_checking_tells_how_far_it_is_and_can_be_stopped(self, bmad):
        seen = []
        with pytest.raises(Cancelled, match="2 of 24"):
            check_records(
                read_dataset(bmad / "Brain_AD"),
                on_progress=lambda done, total: seen.append((done, total)),
                is_cancelled=lambda: len(seen) == 2,
            )
        assert seen == [(1, 24), (2, 24)]


class TestProtocols:
    def valid(self, records, name="Brain"):
        return [r for r in records if r.set == name and r.split == "valid"]

    def test_a_draw_depends_on_the_seed_alone(self, bmad):
        pool = self.valid(read_dataset(bmad))
        shuffled = random.Random(3).sample(pool, len(pool))
        assert draw_shots(pool, 3, 2, seed=5) == draw_shots(shuffled, 3, 2, seed=5)
        assert len({draw_shots(pool, 2, seed=seed).normal for seed in range(20)}) > 3

    def test_a_smaller_draw_is_the_beginning_of_a_larger_one(self, bmad):
        pool = self.valid(read_dataset(bmad))
        assert draw_shots(pool, 4, seed=1).normal[:2] == draw_shots(pool, 2, seed=1).normal

    def test_more_shots_than_the_pool_holds_are_refused_with_both_numbers(self, bmad):
        with pytest.raises(DatasetInvalid, match=r"9 normal.*Brain holds 4"):
            draw_shots(self.valid(read_dataset(bmad)), 9, seed=0)
        for count in (-1, 0):
            with pytest.raises(InvalidRequest):
                draw_shots([], count, seed=0)

    def test_published_shot_lists_are_followed(self, bmad, tmp_path):
        (tmp_path / "2-shot.txt").write_text("a-0: a10.png a12.png\nn-0: n13.png n11.png")
        shots = read_shot_list(tmp_path / "2-shot.txt", self.valid(read_dataset(bmad)))
        assert [r.path.name for r in shots.normal] == ["n13.png", "n11.png"]
        assert [r.path.name for r in shots.abnormal] == ["a10.png", "a12.png"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [("n-0: nobody.png", "nobody.png"), ("n-1: n10.png", "draw 0"), ("n10.png", "line 1")],
    )
    def test_a_shot_list_that_does_not_fit_is_refused_by_name(self, bmad, tmp_path, text, said):
        (tmp_path / "2-shot.txt").write_text(text)
        with pytest.raises(DatasetInvalid, match=rf"2-shot\.txt.*{said}"):
            read_shot_list(tmp_path / "2-shot.txt", self.valid(read_dataset(bmad)))

    def test_few_shot_chooses_with_what_is_left_of_the_validation_images(self, bmad):
        records = read_dataset(bmad)
        shots = draw_shots(self.valid(records), 2, 1, seed=0)
        fold = few_shot(records, shots)
        assert fold.training == shots.records
        assert len(fold.validation) == 8 - 3
        assert not set(fold.validation) & set(fold.training)
        assert {(r.set, r.split) for r in fold.test} == {("Brain", "test")}

    def test_leaving_one_out_learns_from_all_the_others(self, bmad):
        folds = leave_one_out(read_dataset(bmad))
        assert [f.name for f in folds] == ["without Brain", "without Chest"]
        for fold, left in zip(folds, ("Brain", "Chest"), strict=True):
            assert left not in {r.set for r in (*fold.training, *fold.validation)}
            assert {r.set for r in fold.test} == {left}
            assert {r.split for r in fold.training} == {"train"}

    def test_one_set_alone_cannot_be_left_out(self, bmad):
        with pytest.raises(DatasetInvalid, match="Brain"):
            leave_one_out(read_dataset(bmad / "Brain_AD"))

    def test_transfer_scores_on_the_other_sets(self, bmad):
        records = read_dataset(bmad)
        (fold,) = cross_task(records, draw_shots(self.valid(records), 2, seed=0))
        assert fold.name == "Brain to Chest"
        assert {r.set for r in fold.test} == {"Chest"}
        assert {r.set for r in fold.validation} == {"Brain"}

    def test_shots_taken_from_the_test_split_are_refused(self, bmad):
        records = read_dataset(bmad)
        test = [r for r in records if r.set == "Brain" and r.split == "test"]
        with pytest.raises(DatasetInvalid, match="among those"):
            few_shot(records, draw_shots(test, 2, seed=0))

    def test_a_patient_on_both_sides_is_refused(self, tmp_path):
        one = ImageRecord(tmp_path / "a.png", None, "s", "valid", False, "", "", "", "", cluster="p")
        other = replace(one, path=tmp_path / "b.png", split="test")
        with pytest.raises(DatasetInvalid, match=r"b\.png"):
            few_shot([one, other], draw_shots([one], 1, seed=0))
