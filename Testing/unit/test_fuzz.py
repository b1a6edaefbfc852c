"""A few hundred mutants of all that is read, each a right answer or a typed error; many more by `fuzz`."""

from __future__ import annotations

import sys
import time

import pytest

pytest.importorskip("resource", reason="this system sets no limits for processes")

from fuzz import runner
from fuzz.runner import fuzz, run_mutant
from fuzz.targets import Target, targets
from MedAnomalyCLIPLib.errors import UnreadableImage

COUNTS = {"bundles": 12, "graphs": 12, "pictures": 25, "weights": 25, "checkpoints": 25}
SECONDS = 6.0  # after which no further mutant is begun


@pytest.mark.parametrize("name", sorted(targets()))
def test_mutants_are_read_or_refused(name):
    tally = fuzz(name, COUNTS.get(name, 40), seed=0, budget=SECONDS)
    assert not tally.findings, "\n".join(
        f"python -m fuzz --target {name} --seed 0 --only {finding.index}: {finding.kind} {finding.detail}"
        for finding in tally.findings
    )
    assert tally.count
    refusals = {"UnreadableImage", "BundleInvalid", "DatasetInvalid", "InvalidRequest", "NotDicom"}
    assert refusals & set(tally.outcomes)


class Broken(Target):
    """A reader with the fault that a test gives it."""

    name = "broken"
    seconds = 1.0
    memory = 1 << 28

    def prepare(self, folder):
        pass

    def mutant(self, folder, rng):
        return folder / "none"

    def look(self, path, output):
        self.fault(path, output)

    def fault(self, path, output):
        raise NotImplementedError


def wrote(path, output):
    (output.parent / "escaped").write_text("")


def wrote_where_it_may(path, output):
    (output / "result").write_text("")


def refused(path, output):
    raise UnreadableImage("no image")


def told(path, output):
    raise UnreadableImage(f"{path} is no image")


def stray(path, output):
    raise KeyError("x")


def too_much(path, output):
    raise MemoryError


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (wrote_where_it_may, ("done", "read")),
        (refused, ("done", "UnreadableImage")),
        (wrote, ("found", "wrote")),
        (told, ("found", "tells")),
        (stray, ("found", "KeyError")),
        (too_much, ("found", "memory")),
    ],
)
def test_each_fault_is_found(fault, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(Broken, "fault", staticmethod(fault))
    assert run_mutant(Broken(), tmp_path, 0, 0)[:2] == outcome


CHILD = """
import sys
from fuzz import runner, targets
sys.path.insert(0, {folder!r})
from broken_reader import Reader
targets.targets = runner.targets = lambda: {{"broken": Reader()}}
runner.child(*sys.argv[1:2], *map(int, sys.argv[2:5]), float(sys.argv[5]))
"""
READER = """
import ctypes, time
from fuzz.targets import Target

class Reader(Target):
    name, seconds, memory = "broken", 1.0, 1 << 28

    def prepare(self, folder):
        pass

    def mutant(self, folder, rng):
        self.turn = getattr(self, "turn", -1) + 1
        return folder

    def look(self, path, output):
        from MedAnomalyCLIPLib.errors import UnreadableImage
        kind = {kind!r}
        if self.turn == 1 and kind == "crash":
            ctypes.string_at(0)
        if self.turn == 1 and kind == "hang":
            time.sleep(60)
        if self.turn == 1 and kind == "memory":
            bytearray(1 << 30)
"""


@pytest.mark.parametrize("kind", ["crash", "hang", "memory"])
def test_a_process_that_is_lost_is_told_by_its_mutant_and_the_others_are_run(kind, tmp_path, monkeypatch):
    (tmp_path / "broken_reader.py").write_text(READER.format(kind=kind))
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(folder=str(tmp_path)))
    monkeypatch.setattr(runner, "CHILD", [sys.executable, str(script)])
    monkeypatch.setattr(runner, "targets", lambda: {"broken": Broken()})
    started = time.monotonic()
    tally = fuzz("broken", 3, seed=0)
    assert [(f.index, f.kind.partition("(")[0]) for f in tally.findings][:1] == [(1, kind)]
    assert tally.count == 3
    assert time.monotonic() - started < 30
