"""The evaluation report: whole or not there, honest, and without a word that tells whose images they are."""

from __future__ import annotations

import base64
import csv
import errno
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from images import write_volume
from PIL import Image

from MedAnomalyCLIPLib.bundle import Bundle, save_bundle
from MedAnomalyCLIPLib.datasets import ImageRecord, read_volumes
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.errors import BundleInvalid, Cancelled, DatasetInvalid, InvalidRequest, OutputFailed
from MedAnomalyCLIPLib.evaluation.charts import line_chart, thinned
from MedAnomalyCLIPLib.evaluation.contact_sheet import OperatingPoint, choose_examples, contact_sheet
from MedAnomalyCLIPLib.evaluation.image_sets import detect_records
from MedAnomalyCLIPLib.evaluation.report import evaluate
from MedAnomalyCLIPLib.result import RESEARCH_USE_ONLY

PATIENT = "INVENTED_PATIENCE"
FILES = ["figures.csv", "images.csv", "report.html", "report.json"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Two sets of 12 pictures named after a patient; one has masks, the other clusters."""
    folder = tmp_path_factory.mktemp(PATIENT)
    rng = np.random.default_rng(0)
    made = []
    for number in range(24):
        pixels = rng.integers(0, 120, (30, 40)).astype(np.uint8)
        abnormal, name = number % 2 == 1, "ab"[number // 12]
        mask = None
        if abnormal:
            pixels[5:12, 8 : 12 + number] = 250
            lesion = np.zeros(pixels.shape, np.uint8)
            lesion[5:12, 8 : 12 + number] = 255
            mask = folder / f"{PATIENT}_{number}_mask.png"
            Image.fromarray(lesion).save(mask)
        path = folder / f"{PATIENT}_{number}.png"
        Image.fromarray(pixels).save(path)
        cluster = "" if name == "a" else f"{PATIENT}_{number // 2}"
        mask = mask if name == "a" else None
        made.append(ImageRecord(path, mask, name, "test", abnormal, "MR", "brain", "", "", "", cluster))
    return made


@pytest.fixture
def report(records, tiny_bundle, tmp_path):
    evaluate(tiny_bundle.folder, records, tmp_path / "report", device="cpu", draws=50)
    return tmp_path / "report"


def content(folder):
    return json.loads((folder / "report.json").read_text())


def rows(folder, name):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_report_is_one_folder_with_page_tables_and_numbers(report):
    assert sorted(p.name for p in report.iterdir()) == FILES == sorted(content(report)["files"])
    assert [entry["name"] for entry in content(report)["sets"]] == ["a", "b", "all sets together"]


def test_tables_and_json_tell_the_same(report):
    told = {
        (entry["name"], row["level"], row["ranker"], name): value
        for entry in content(report)["sets"]
        for row in entry["rows"]
        for name, value in row["figures"].items()
    }
    table = rows(report, "figures.csv")
    assert {(r["set"], r["level"], r["ranker"], r["figure"]): float(r["value"]) for r in table} == told
    assert ("a", "pixel", "detector", "pro") in told
    assert ("b", "pixel", "detector", "pro") not in told


def test_every_image_has_a_line_with_its_outcome_and_the_outcomes_add_up(report):
    lines = rows(report, "images.csv")
    assert [int(line["number"]) for line in lines] == list(range(1, 25))
    together = content(report)["sets"][-1]["at_image_threshold"]
    assert sum(together.values()) == 24
    for outcome, count in together.items():
        assert sum(line["outcome"] == outcome for line in lines) == count


def test_nothing_tells_whose_images_they_are(report):
    for file in report.iterdir():
        assert PATIENT not in file.read_text(encoding="utf-8")


def test_names_of_files_are_told_when_asked_for(records, tiny_bundle, tmp_path):
    evaluate(tiny_bundle.folder, records, tmp_path / "r", device="cpu", draws=0, names=True)
    assert rows(tmp_path / "r", "images.csv")[3]["name"] == f"{PATIENT}_3.png"
    assert PATIENT not in (tmp_path / "r/report.html").read_text()


def test_every_file_says_that_it_is_for_research(report):
    for file in report.iterdir():
        assert RESEARCH_USE_ONLY in file.read_text(encoding="utf-8")


def test_the_page_needs_no_other_file_and_is_well_formed(report):
    page = (report / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)
    open_tags = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    Tags().feed(page)
    assert not open_tags
    sheet = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)', page)[1])))
    assert sheet.width > 1000


def test_a_figure_that_a_trivial_feature_reaches_is_marked(report):
    """Random weights against lesions that are simply bright."""
    page = (report / "report.html").read_text(encoding="utf-8")
    assert 'class="weak"' in page
    assert "<small>brightness</small>" in page


def test_training_images_among_those_measured_are_told(records, tiny_bundle, tmp_path):
    mixed = [replace(r, split="train") if r.set == "b" else r for r in records]
    evaluate(tiny_bundle.folder, mixed, tmp_path / "r", device="cpu", draws=0)
    assert "training images of b are among those measured" in (tmp_path / "r/report.html").read_text()


def test_intervals_hold_their_values_and_repeat_with_the_seed(records, tiny_bundle, tmp_path):
    for name in ("one", "two"):
        evaluate(tiny_bundle.folder, records, tmp_path / name, device="cpu", draws=40, seed=3)
    one, two = (content(tmp_path / name)["sets"] for name in ("one", "two"))
    assert one == two
    detector = one[0]["rows"][0]
    low, high = detector["intervals"]["auroc"]
    assert low <= detector["figures"]["auroc"] <= high
    assert low < high


def test_several_detectors_give_mean_and_spread(records, tiny_bundle, tmp_path, tiny_manifest):
    network = tiny_bundle.build()
    network.text_bank.copy_(network.text_bank.flip(0))
    other = save_bundle(tmp_path / "other", tiny_manifest, network, "")
    bundles = [tiny_bundle.folder, other.folder]
    told = evaluate(bundles, records, tmp_path / "r", device="cpu", draws=0)
    lines = [
        float(line["value"])
        for line in rows(tmp_path / "r", "figures.csv")
        if (line["set"], line["level"], line["ranker"], line["figure"]) == ("a", "image", "detector", "auroc")
    ]
    spread = next(e for e in told["over_draws"] if (e["set"], e["level"]) == ("a", "image"))["figures"]
    assert spread["auroc"] == pytest.approx([np.mean(lines), np.std(lines, ddof=1)])
    assert len(told["detectors"]) == 2
    assert f"± {spread['auroc'][1]:.2f}" in (tmp_path / "r/report.html").read_text()


def test_slices_of_a_volume_are_evaluated_like_pictures(tiny_bundle, tmp_path):
    voxels = np.random.default_rng(0).normal(100, 20, (6, 40, 30)).astype(np.int16)
    labels = np.zeros(voxels.shape, np.uint8)
    labels[3:5, 4:8, 10:15] = 1
    (tmp_path / "data/case").mkdir(parents=True)
    write_volume(tmp_path / "data/case/T1.nii.gz", voxels)
    write_volume(tmp_path / "data/case/seg.nii.gz", labels)
    records = read_volumes(tmp_path / "data", modality="MR", split="test")
    told = evaluate(tiny_bundle.folder, records, tmp_path / "r", device="cpu", draws=30)
    assert {r["level"] for r in told["sets"][0]["rows"]} == {"image", "pixel"}
    assert not told["sets"][0]["rows"][0]["intervals"]  # one patient
    assert [r["slice"] for r in rows(tmp_path / "r", "images.csv")] == list("012345")


class TestWhatGoesWrong:
    def test_bad_images_are_told_before_a_detector_is_loaded(self, records, tmp_path):
        def load(bundle, device):
            raise AssertionError("loaded too early")

        with pytest.raises(DatasetInvalid, match="no normal images"):
            evaluate(None, [r for r in records if r.abnormal or r.set == "b"], tmp_path / "r", load=load)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("label", [None, True, False])
    def test_images_of_one_kind_cannot_be_told_apart(self, tmp_path, label):
        record = ImageRecord(Path("a.png"), None, "a", "pool", label, "MR", "", "", "")
        with pytest.raises(InvalidRequest, match="label"):
            evaluate(None, [record], tmp_path / "r")

    def test_a_run_that_is_stopped_leaves_nothing(self, records, tiny_bundle, tmp_path):
        seen = []
        with pytest.raises(Cancelled):
            evaluate(
                tiny_bundle.folder,
                records,
                tmp_path / "new/r",
                device="cpu",
                on_progress=lambda stage, done, total: seen.append(stage),
                is_cancelled=lambda: "detect" in seen,
            )
        assert list((tmp_path / "new").iterdir()) == []
        assert seen.count("check") == 24

    def test_measuring_can_be_stopped_too(self, records, tiny_bundle, tmp_path):
        seen = []
        with pytest.raises(Cancelled, match="1 of 3 sets"):
            evaluate(
                tiny_bundle.folder,
                records,
                tmp_path / "r",
                device="cpu",
                draws=0,
                on_progress=lambda stage, done, total: seen.append(stage),
                is_cancelled=lambda: "measure" in seen,
            )

    def test_a_full_disk_is_told_and_the_old_report_stays(
        self, report, records, tiny_bundle, monkeypatch, tmp_path
    ):
        before = (report / "report.json").read_text()

        def no_space(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", no_space)
        with pytest.raises(OutputFailed, match=r"report could not be written: No space"):
            evaluate(tiny_bundle.folder, records, report, device="cpu", draws=0, overwrite=True)
        assert (report / "report.json").read_text() == before
        assert not list(tmp_path.glob(".report*"))

    def test_a_report_is_replaced_only_when_asked(self, report, records, tiny_bundle):
        with pytest.raises(OutputFailed, match="already"):
            evaluate(tiny_bundle.folder, records, report, device="cpu")
        evaluate(tiny_bundle.folder, records, report, device="cpu", draws=0, overwrite=True)
        assert content(report)["bootstrap"]["draws"] == 0

    def test_files_of_somebody_else_are_never_replaced(self, report, records, tiny_bundle):
        (report / "thesis.docx").touch()
        with pytest.raises(OutputFailed, match=r"thesis\.docx"):
            evaluate(tiny_bundle.folder, records, report, device="cpu", overwrite=True)

    def test_a_folder_without_a_detector_is_refused(self, records, tmp_path):
        with pytest.raises(BundleInvalid):
            evaluate(tmp_path, records, tmp_path / "r", device="cpu")
        assert not (tmp_path / "r").exists()


class TestContactSheet:
    def test_examples_are_the_most_extreme_and_sets_take_turns(self, records, tiny_bundle):
        results = detect_records(SliceDetector.load(tiny_bundle.folder, device="cpu"), records)
        middle = float(np.median([result.score for result in results]))
        chosen = choose_examples(records, results, OperatingPoint(middle, ""), 4)
        for outcome, abnormal, called in (("hit", True, True), ("false alarm", False, True)):
            members = [
                i
                for i, r in enumerate(records)
                if r.abnormal is abnormal and (results[i].score >= middle) is called
            ]
            assert set(chosen[outcome]) <= set(members)
            assert chosen[outcome][0] == max(members, key=lambda i: results[i].score)
            if {records[i].set for i in members} == {"a", "b"}:
                assert {records[i].set for i in chosen[outcome][:2]} == {"a", "b"}
        assert all(records[i].abnormal and results[i].score < middle for i in chosen["miss"])

    def test_the_true_outline_is_drawn_on_the_image(self, records, tiny_bundle):
        results = detect_records(SliceDetector.load(tiny_bundle.folder, device="cpu"), records)
        everything = contact_sheet(records, results, OperatingPoint(0.0, "for this test"))
        pixels = np.asarray(everything)
        assert (pixels == 255).all(axis=2).sum() > 100

    def test_the_true_outline_can_be_told_from_a_lesion_as_white_as_itself(self, records, tiny_bundle):
        """Along a row of the sheet through the lesion of its only image."""
        one = records[11:12]
        results = detect_records(SliceDetector.load(tiny_bundle.folder, device="cpu"), one)
        sheet = np.asarray(contact_sheet(one, results, OperatingPoint(0.0, "for this test")))
        first_row, enlarged, above = 35, 150 / 40, (150 - 30 * 150 / 40) / 2
        row = sheet[round(first_row + above + 8.5 * enlarged), 10:160, 0]
        white = np.flatnonzero(row == 255)
        assert (row[white[0] : white[-1]] < 30).any()

    def test_long_names_of_sets_do_not_run_into_the_next_image(self, records, tiny_bundle):
        results = detect_records(SliceDetector.load(tiny_bundle.folder, device="cpu"), records)
        named = [replace(record, set=f"{record.set} with a long name" * 5) for record in records]
        sheet = np.asarray(contact_sheet(named, results, OperatingPoint(0.0, "for this test")))
        caption, gap = slice(185, 205), slice(10 + 2 * 150 + 4, 20 + 2 * 150 + 4)
        assert (sheet[caption, : gap.start] > 100).any()
        assert (sheet[caption, gap] < 30).all()

    def test_a_detector_that_calls_nothing_has_no_hits(self, records, tiny_bundle):
        results = detect_records(SliceDetector.load(tiny_bundle.folder, device="cpu"), records)
        point = OperatingPoint(1.1, "for this test")
        chosen = choose_examples(records, results, point, 4)
        assert (chosen["hit"], chosen["false alarm"]) == ([], [])
        assert contact_sheet(records, results, point).height > 200


def test_thinned_curves_keep_their_ends_and_their_shape():
    x = np.linspace(0, 1, 10_000)
    few_x, few_y = thinned((x, np.sqrt(x)))
    assert len(few_x) <= 202
    assert (few_x[0], few_x[-1]) == (0, 1)
    assert np.abs(np.interp(x, few_x, few_y) - np.sqrt(x)).max() < 0.01


@pytest.mark.parametrize(("end", "numbers"), [(1.0, "0.0 0.2 0.4 0.6 0.8 1.0"), (0.3, "0.0 0.1 0.2 0.3")])
def test_axes_are_marked_at_round_numbers(end, numbers):
    drawn = ElementTree.fromstring(line_chart("t", "x", "y", {}, x_end=end))
    assert [e.text for e in drawn.iter() if e.get("y") == "272"] == numbers.split()


def test_the_page_fits_a_narrow_screen_and_a_dark_one(report):
    """Wide parts scroll by themselves, and no colour of the text is fixed."""
    page = (report / "report.html").read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width' in page
    assert page.count("<table>") == page.count('<div class="scroll"><table>') == 2
    assert '<div class="scroll"><img ' in page
    assert "prefers-color-scheme: dark" in page
    assert 'stroke="currentColor"' in page


def test_names_of_sets_cannot_break_a_chart():
    drawn = line_chart("t", "x", "y", {"<b>&": ("#000", (np.array([0, 1]), np.array([0, 1])))})
    titles = [e.text for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("title")]
    assert "<b>&" in titles


def test_a_bundle_with_an_image_threshold_is_judged_by_it(records, tiny_bundle, tiny_manifest, tmp_path):
    manifest = replace(tiny_manifest, image_threshold=0.25)
    bundle: Bundle = save_bundle(tmp_path / "with", manifest, tiny_bundle.build(), "")
    told = evaluate(bundle.folder, records, tmp_path / "r", device="cpu", draws=0)
    assert told["image_threshold"] == {"score": 0.25, "origin": "the detector's own threshold"}
