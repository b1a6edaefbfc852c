"""Runs mutants in processes with a memory limit and an alarm, and counts what came of each.

A mutant that brings its process down is known by the number that was begun and not ended; the next process
goes on behind it. `python -m fuzz --target NAME --seed S --only I` makes the same mutant again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .targets import SECRET, Target, targets

TESTING = Path(__file__).parents[1]
CHILD = [sys.executable, "-m", "fuzz.child"]
# So far below the defaults that whatever keeps to the limits stays within the memory of a test.
LIMITS = "image_voxels=16000000, unpacked_bytes=32000000, text_bytes=4000000, weights_bytes=64000000"
_START = 300.0  # seconds for a process to start; some load torch and a detector, on a machine that is busy
_GRACE = 30.0  # for one to end by itself after its alarm
_LINE = 400


@dataclass
class Finding:
    """A mutant whose outcome is neither a right answer nor a typed error."""

    index: int
    kind: str
    detail: str


@dataclass
class Tally:
    """What came of the mutants of one target.

    Attributes:
        outcomes: "read", or the name of the typed error, to how often.
        findings: everything else.
        seconds: wall time.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.outcomes.values()) + len(self.findings)


def fuzz(name: str, count: int, seed: int, *, first: int = 0, budget: float | None = None) -> Tally:
    """Run mutants `first` to `first + count` of a target.

    Args:
        name: of the target.
        count: how many mutants.
        seed: of the generator; mutant `index` depends on it and on `index` alone.
        first: number of the first one.
        budget: seconds after which no further mutant is begun.
    """
    started = time.monotonic()
    tally = Tally()
    position, end = first, first + count
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:  # of ours, since processes may be lost
        while position < end and (budget is None or time.monotonic() - started < budget):
            left = None if budget is None else budget - (time.monotonic() - started)
            position = _one_process(name, seed, position, end, left, tally, place)
    tally.seconds = time.monotonic() - started
    return tally


def _one_process(
    name: str, seed: int, first: int, end: int, budget: float | None, tally: Tally, place: str
) -> int:
    """Run one process until it ends or dies; returns the first mutant that is still to be done."""
    command = [*CHILD, name, str(seed), str(first), str(end), str(budget or 0)]
    environment = {
        **os.environ,
        "MEDANOMALYCLIP_LIMITS": LIMITS,
        "TMPDIR": place,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "PYTHONPATH": os.pathsep.join([str(TESTING), str(TESTING.parent / "MedAnomalyCLIP")]),
    }
    seconds = targets()[name].seconds
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        begun, done, hung = None, first, False
        for line in _lines(process, seconds + _GRACE):
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "begin":
                begun = int(rest)
            elif word in ("done", "found"):
                _, kind, detail = (*rest.split(" ", 2), "")[:3]
                if word == "done":
                    tally.outcomes[kind] += 1
                else:
                    tally.findings.append(Finding(int(begun or 0), kind, detail))
                done, begun = (begun or 0) + 1, None
            elif word == "timeout":
                hung = True
                process.kill()
        code = process.wait()
        if begun is None and code == 0:
            return done if done > first or budget else end
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if begun is None:
        raise RuntimeError(f"The process of {name} ended with {code} between mutants:\n{said[-2000:]}")
    kind = "hang" if hung or "Timeout (" in said else f"crash({code})"
    tally.findings.append(Finding(begun, kind, _where(said)))
    return begun + 1


def _lines(process: subprocess.Popen[str], patience: float) -> Iterator[str]:
    """What a process prints; "timeout" when it says nothing for too long once it has begun."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wait = _START
    while True:
        try:
            line = lines.get(timeout=wait)
        except queue.Empty:
            yield "timeout"
            return
        if line is None:
            return
        wait = patience
        yield line


def _where(said: str) -> str:
    """The innermost frames that faulthandler printed, on one line."""
    frames = [line.strip() for line in said.splitlines() if line.strip().startswith("File ")]
    return " < ".join(frames[:4]) or " ".join(said.split())[-_LINE:]


def child(name: str, seed: int, first: int, end: int, budget: float) -> None:
    """Run mutants in this process, one line on stdout before and after each."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no message of ours
    faulthandler.enable()
    target = targets()[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        root = Path(place)
        (root / "seeds").mkdir()
        target.prepare(root / "seeds")
        _limit_memory(target.memory)
        watch = _WriteWatch(root)
        started = time.monotonic()
        for index in range(first, end):
            if budget and time.monotonic() - started > budget:
                break
            out.write(f"begin {index}\n")
            word, kind, detail = run_mutant(target, root, seed, index, watch, target.seconds)
            out.write(f"{word} {index} {kind} {detail}"[:_LINE].replace("\n", " ") + "\n")


def run_mutant(
    target: Target,
    root: Path,
    seed: int,
    index: int,
    watch: _WriteWatch | None = None,
    seconds: float | None = None,
) -> tuple[str, str, str]:
    """("done", outcome, "") or ("found", kind of finding, detail); ends the process after so many seconds."""
    from MedAnomalyCLIPLib.errors import MedAnomalyCLIPError

    folder, output = root / f"of {SECRET}", root / "output"
    for place in (folder, output):
        _remove(place)
        place.mkdir()
    path = target.mutant(folder, np.random.default_rng([seed, index]))
    before = _listing(root)
    with watch.watching(output) if watch else contextlib.nullcontext(), _answer_within(seconds):
        try:
            target.look(path, output)
            word, kind, detail = "done", "read", ""
        except MedAnomalyCLIPError as error:
            word, kind, detail = "done", type(error).__name__, ""
            if isinstance(error.__cause__, MemoryError):
                word, kind, detail = "found", "memory", str(error)
            elif not target.names_files and (SECRET in str(error) or str(root) in str(error)):
                word, kind, detail = "found", "tells", str(error)
        except MemoryError as error:
            word, kind, detail = "found", "memory", _frames(error)
        except Exception as error:
            word, kind, detail = "found", type(error).__name__, f"{error} {_frames(error)}"
    if watch and watch.wrote:
        return "found", "wrote", ", ".join(watch.wrote)
    if _listing(root) != before:
        return "found", "wrote", "files outside of the output folder changed"
    return word, kind, detail


@contextlib.contextmanager
def _answer_within(seconds: float | None) -> Iterator[None]:
    """An alarm for the product alone: to make a mutant, a bomb above all, takes its own time."""
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        if seconds is not None:
            faulthandler.cancel_dump_traceback_later()


def _frames(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))


def _limit_memory(beyond: int) -> None:
    """Refuse this process more address space than it has now and `beyond` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + beyond
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _listing(root: Path) -> set[tuple[str, int]]:
    """Everything below a folder but the output, with sizes."""
    found = set()
    for place, folders, names in os.walk(root):
        if Path(place) == root:
            folders[:] = [name for name in folders if name not in ("output", "seeds")]
        for name in (*folders, *names):
            path = os.path.join(place, name)  # noqa: PTH118 - names that pathlib would tidy
            with contextlib.suppress(OSError):
                found.add((path, os.lstat(path).st_size))
    return found


def _remove(place: Path) -> None:
    if place.is_dir():
        place.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)


class _WriteWatch:
    """Notices, through Python's audit events, whatever is opened for writing, made, moved or removed."""

    _EVENTS = (
        "open",
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "os.truncate",
    )

    def __init__(self, root: Path) -> None:
        self.wrote: list[str] = []
        self._output: Path | None = None
        sys.addaudithook(self._heard)

    @contextlib.contextmanager
    def watching(self, output: Path) -> Iterator[None]:
        self.wrote = []
        self._output = output
        try:
            yield
        finally:
            self._output = None

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        output = self._output
        if output is None or event not in self._EVENTS:
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        if event == "open":
            flags = arguments[2] or 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
        name = os.path.realpath(os.fsdecode(path))
        harmless = name.startswith("/dev/") or "__pycache__" in name
        if not harmless and not name.startswith(f"{output}{os.sep}") and name != str(output):
            self.wrote.append(f"{event} {name}")
