"""What a training says of itself, also after an interruption."""

from __future__ import annotations

import csv
import math
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from MedAnomalyCLIPLib.errors import OutputFailed
from MedAnomalyCLIPLib.training.log import TrainingLog

STEPS = 12


def terms(step):
    """The terms of a step, the same whichever run comes to it."""
    return {"loss": 1 / step, "focal": 0.25 / step}


def tell(folder, steps):
    """Part of a run that validates after each fourth step."""
    with TrainingLog(folder, STEPS, quiet=True) as log:
        for step in steps:
            log.step(step, terms(step), epoch=step // 5)
            if step % 4 == 0:
                log.figures(step, {"image_auroc": step / STEPS})


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def events(folder, tag):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_terms_of_each_step_are_rows_of_a_table(tmp_path):
    tell(tmp_path / "run", range(1, STEPS + 1))
    told = rows(tmp_path / "run" / "log.csv")
    assert list(told[0]) == ["step", "epoch", "loss", "focal"]
    assert [int(row["step"]) for row in told] == list(range(1, STEPS + 1))
    assert [float(row["loss"]) for row in told] == pytest.approx(
        [1 / s for s in range(1, STEPS + 1)], rel=1e-5
    )
    assert [row["epoch"] for row in told] == [str(s // 5) for s in range(1, STEPS + 1)]


def test_figures_of_validations_are_a_table_of_their_own(tmp_path):
    tell(tmp_path, range(1, STEPS + 1))
    assert rows(tmp_path / "validation.csv") == [
        {"step": str(step), "image_auroc": f"{step / STEPS:.6g}"} for step in (4, 8, 12)
    ]


def test_a_run_without_epochs_has_no_column_for_them(tmp_path):
    with TrainingLog(tmp_path, 1, quiet=True) as log:
        log.step(1, {"loss": 0.5})
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,0.5\n"


@pytest.mark.parametrize("checkpoint", [3, 4, 6, 8])
def test_after_an_interruption_files_are_those_of_an_uninterrupted_run(tmp_path, checkpoint, monkeypatch):
    """The first run came further than its last checkpoint, from which the second goes on."""
    # Event files of one second and one process are read in the order of their numbers as text, 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    tell(tmp_path / "whole", range(1, STEPS + 1))
    tell(tmp_path / "parts", range(1, 10))
    tell(tmp_path / "parts", range(checkpoint + 1, STEPS + 1))
    for name in ("log.csv", "validation.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for tag in ("loss/loss", "loss/focal", "validation/image_auroc"):
        assert events(tmp_path / "parts", tag) == events(tmp_path / "whole", tag)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_that_starts_anew_forgets_the_one_before(tmp_path):
    tell(tmp_path, range(1, STEPS + 1))
    with TrainingLog(tmp_path, STEPS, quiet=True) as log:
        log.step(1, {"other": 2.0})
    assert rows(tmp_path / "log.csv") == [{"step": "1", "other": "2"}]
    assert not (tmp_path / "validation.csv").exists()


def test_a_validation_told_before_any_step_keeps_the_losses_of_that_step(tmp_path):
    tell(tmp_path, range(1, STEPS + 1))
    with TrainingLog(tmp_path, STEPS, quiet=True) as log:
        log.figures(8, {"image_auroc": 0.1})
    assert rows(tmp_path / "log.csv")[-1]["step"] == "8"
    assert [row["image_auroc"] for row in rows(tmp_path / "validation.csv")] == ["0.333333", "0.1"]


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path):
    tell(tmp_path, range(1, 6))
    with (tmp_path / "log.csv").open("a") as file:
        file.write("6,1,0.1")
    tell(tmp_path, range(7, 8))
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == ["1", "2", "3", "4", "5", "7"]


def test_rows_are_on_disk_as_soon_as_they_are_told(tmp_path):
    with TrainingLog(tmp_path, STEPS, quiet=True) as log:
        log.step(1, terms(1))
        assert len(rows(tmp_path / "log.csv")) == 1


def test_a_run_that_is_finished_leaves_its_log_alone(tmp_path):
    tell(tmp_path, range(1, STEPS + 1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with TrainingLog(tmp_path, STEPS, quiet=True):
        pass
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_numbers_that_are_none_are_told_as_such(tmp_path):
    with TrainingLog(tmp_path, 1, quiet=True) as log:
        log.step(1, {"loss": math.nan})
    assert rows(tmp_path / "log.csv")[0]["loss"] == "nan"


def test_terms_cannot_change_their_names_within_a_run(tmp_path):
    tell(tmp_path, range(1, 5))
    with (
        TrainingLog(tmp_path, STEPS, quiet=True) as log,
        pytest.raises(OutputFailed, match=r"focal.*, not .*dice"),
    ):
        log.step(5, {"loss": 0.1, "dice": 0.2}, epoch=1)


def test_a_file_that_is_no_log_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text("name,age\nsomebody,7\n")
    with (
        TrainingLog(tmp_path, 1, quiet=True) as log,
        pytest.raises(OutputFailed, match=r"log\.csv is no log"),
    ):
        log.step(1, {"loss": 0.5})


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputFailed, match="run could not be written"), TrainingLog(tmp_path / "run", 1):
        pass


def test_without_tensorboard_the_tables_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with TrainingLog(tmp_path, 1, quiet=True) as log:
        assert not log.tensorboard
        log.step(1, {"loss": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_with_tensorboard_the_log_says_so(tmp_path):
    assert TrainingLog(tmp_path, 1).tensorboard


@pytest.mark.parametrize(
    ("quiet", "watched", "shown"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_the_bar_shows_terms_to_those_who_watch(tmp_path, monkeypatch, capsys, quiet, watched, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched, raising=False)
    with TrainingLog(tmp_path, 2, title="adapters", quiet=quiet) as log:
        log.step(1, {"loss": 0.125})
        log.step(2, {"loss": 0.0625})
    said = capsys.readouterr().err
    assert ("adapters" in said and "loss=0.0625" in said) == shown
    assert bool(said) == shown


def test_a_validation_that_is_told_again_keeps_the_header_of_its_table(tmp_path):
    for _ in range(2):  # the second run was killed behind its first validation, and goes on with it
        with TrainingLog(tmp_path, 4, quiet=True) as log:
            log.figures(2, {"auroc": 0.5})
    assert (tmp_path / "validation.csv").read_text() == "step,auroc\n2,0.5\n"
