"""What a batch knows of its series: which there are, under which number, and what became of each.

It is kept in the output folder, which one batch holds at a time: `manifest.json` for the whole, a
`manifest.json` in the folder of each study, and `journal.jsonl` with what happened since these were written.
A line of the journal costs the same for the first series as for the hundred-thousandth, so that a run that
is killed at any moment loses nothing that was done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .batch_series import DONE, FAILED, PRESENT, STOPPED, BatchSettings, Outcome
from .batch_source import SeriesInput
from .errors import InvalidRequest, OutputFailed
from .export import MANIFEST as RESULT
from .output_folder import clear_remains, held, writing
from .result import RESEARCH_USE_ONLY

MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.jsonl", "run.lock"
SCHEMA_VERSION = 2
# Failures that say nothing against the series: the same command takes these again by itself.
_NOT_ITS_OWN = ("OutputFailed", "WorkerUnfit", "ArchiveFailed")
_SAVE_SECONDS, _SHARE_OF_TIME = 5.0, 0.02

Record = dict[str, Any]


@contextmanager
def batch_folder(output: Path) -> Iterator[None]:
    """Hold an output folder, made if need be, against every other batch.

    Raises:
        OutputFailed: another batch holds it, it holds something else, or cannot be written.
    """
    with writing(output):
        ours = {MANIFEST, JOURNAL, LOCK, f".{MANIFEST}.partial"}
        present = {path.name for path in output.iterdir()} if output.exists() else set()
        if present - ours and not present & {MANIFEST, JOURNAL}:
            raise OutputFailed(f"{output.name} holds other files; use another --output")
        output.mkdir(parents=True, exist_ok=True)
    in_use = f"Another batch is writing to {output.name}; wait for it or end it, or use another --output"
    with held(output / LOCK, in_use):
        yield


class Records:
    """The series of one output folder, which the caller holds.

    Attributes:
        manifest: the content of `manifest.json`; its "inputs" has a record for each series: "number", "key",
            "study" and "study_key", "state", "folder", and what else the outcome tells.
    """

    def __init__(self, output: Path, settings: BatchSettings) -> None:
        """Go on with an earlier batch, or begin one.

        Raises:
            InvalidRequest: the earlier batch had other settings.
            OutputFailed: its manifest cannot be read, or nothing can be written.
        """
        self._output = output
        chosen = json.loads(json.dumps(asdict(settings)))  # tuples become lists, as in a file
        fresh = {"schema_version": SCHEMA_VERSION, "notice": RESEARCH_USE_ONLY, "settings": chosen}
        self.manifest = _read(output) or {**fresh, "detector": None, "inputs": []}
        if self.manifest["settings"] != chosen:
            raise InvalidRequest(
                f"{output.name} was made with other settings; repeat them, or use another --output"
            )
        records = self.manifest["inputs"]
        self._records: dict[str, Record] = {record["key"]: record for record in records}
        self._studies: dict[str, list[Record]] = {}
        for record in records:
            self._studies.setdefault(record["study_key"], []).append(record)
        self._last = max((record["number"] for record in records), default=0)
        self._last_study = max((record["study"] for record in records), default=0)
        self._changed: set[str] = set()
        self._untold: list[str] = []  # lines that did not fit onto a full disk
        self._due = time.monotonic() + _SAVE_SECONDS
        if (output / JOURNAL).exists():
            self._changed.update(self._studies)
            self.save()

    def of(self, item: SeriesInput) -> Record:
        """The record of a series; its number is written down before any work begins under it."""
        if item.key not in self._records:
            study = self._studies.setdefault(item.study, [])
            self._last += 1
            self._last_study += not study
            record = {
                "number": self._last,
                "key": item.key,
                "study": study[0]["study"] if study else self._last_study,
                "study_key": item.study,
                "state": "",
                "folder": None,
            }
            study.append(record)
            self._records[item.key] = record
            self.manifest["inputs"].append(record)
            self._note(record)
        return self._records[item.key]

    def folder_of(self, record: Record) -> Path:
        """Where the results of a series go: a folder of its own in that of its study."""
        return self._output / f"{record['study']:04d}" / f"{record['number']:04d}"

    def wants(self, record: Record, *, retry: bool = False) -> bool:
        """Whether it is still to be done.

        Args:
            record: of the series.
            retry: whether to do it again if it failed for a reason of its own.
        """
        if record["state"] == DONE:
            return not (self._output / record["folder"] / RESULT).is_file()
        if record["state"] == PRESENT:
            return False
        return record["state"] != FAILED or retry or record.get("error") in _NOT_ITS_OWN

    def done(self) -> list[Record]:
        """Those whose results are there."""
        return [r for r in self.manifest["inputs"] if r["state"] == DONE and not self.wants(r)]

    def check_detector(self, detector: dict[str, str]) -> None:
        """Take the detector for this batch, or compare it with the one that it was made with."""
        if self.manifest["detector"] not in (None, detector):
            earlier = self.manifest["detector"]["name"]
            raise InvalidRequest(
                f"{self._output.name} was made with another detector, {earlier}; use it, or another --output"
            )
        self.manifest["detector"] = detector
        self.save()

    def take(self, record: Record, outcome: Outcome) -> None:
        """Write down what became of a series."""
        for key in ("error", "reason", "modality", "slices", "highest"):
            record.pop(key, None)
        folder = self.folder_of(record)
        if outcome["state"] == FAILED:
            clear_remains(folder)  # of a worker that was killed, and will not come back to it
        written = outcome["state"] != FAILED and (folder / RESULT).is_file()
        record.update(outcome, folder=folder.relative_to(self._output).as_posix() if written else None)
        self._note(record)

    def save(self, *, ended: bool = False) -> None:
        """Write all manifests; each is whole at every moment, and the journal begins anew.

        Args:
            ended: whether the whole source was gone through.

        Raises:
            OutputFailed: they cannot be written.
        """
        started = time.monotonic()
        self.manifest["complete"] = ended and not any(map(self.wants, self.manifest["inputs"]))
        _write_manifest(self._output, self.manifest)
        for study in sorted(self._changed):
            self._save_study(self._studies[study])
        with writing(self._output / JOURNAL):
            (self._output / JOURNAL).unlink(missing_ok=True)
        self._changed.clear()
        self._untold.clear()
        now = time.monotonic()
        self._due = now + max(_SAVE_SECONDS, (now - started) / _SHARE_OF_TIME)

    def _save_study(self, records: list[Record]) -> None:
        head = {key: self.manifest[key] for key in ("schema_version", "notice", "settings", "detector")}
        first = records[0]
        told = {**head, "study": first["study"], "study_key": first["study_key"], "series": records}
        folder = self._output / f"{first['study']:04d}"
        _write_manifest(folder, told)

    def _note(self, record: Record) -> None:
        self._changed.add(record["study_key"])
        self._untold.append(json.dumps(record, ensure_ascii=False, allow_nan=False))
        try:
            with (self._output / JOURNAL).open("a", encoding="utf-8") as journal:
                # Begins a line too: what was cut off by a full disk stays a line of its own.
                journal.write("\n" + "\n".join(self._untold) + "\n")
            self._untold.clear()
            if time.monotonic() >= self._due:
                self.save()
        except (OSError, OutputFailed):
            # The series after it may still fit; at the end, `save` says what is wrong.
            self._due = time.monotonic() + _SAVE_SECONDS


def read_records(output: Path | str) -> dict[str, Record]:
    """The records of an earlier call by their key; none if there was no such call.

    Raises:
        OutputFailed: the manifest cannot be read.
    """
    manifest = _read(Path(output)) or {"inputs": []}
    return {record["key"]: record for record in manifest["inputs"]}


def _read(output: Path) -> dict[str, Any] | None:
    """The manifest with what the journal tells beyond it; None when there is neither."""
    path = output / MANIFEST
    try:
        if not path.exists():
            return None
        manifest = json.loads(path.read_text(encoding="utf-8"))
        records = {record["key"]: record for record in manifest["inputs"]}
        for record in _journal(output):
            records[record["key"]] = record
        if not all(record.keys() >= {"number", "study", "study_key", "state"} for record in records.values()):
            raise ValueError("records of another version")
        manifest["inputs"] = sorted(records.values(), key=lambda record: record["number"])
        return {**manifest, "settings": manifest["settings"], "detector": manifest["detector"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputFailed(f"{MANIFEST} in {output.name} cannot be read; use another --output") from error


def _journal(output: Path) -> Iterator[Record]:
    path = output / JOURNAL
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in filter(str.strip, lines):
                try:
                    record = json.loads(line)
                except ValueError:  # a kill or a full disk cut it off
                    continue
                yield record


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    records = manifest["inputs"] if "inputs" in manifest else manifest["series"]
    manifest["updated"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest["counts"] = {
        state: sum(record["state"] == state for record in records)
        for state in (DONE, PRESENT, FAILED, STOPPED)
    }
    path = folder / MANIFEST
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{MANIFEST}.partial")
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(path)
