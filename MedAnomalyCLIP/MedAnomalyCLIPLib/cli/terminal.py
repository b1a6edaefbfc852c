"""What every command shares at the terminal: exit codes, progress, Ctrl-C, errors, and JSON for programs."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import MedAnomalyCLIPError, SeriesAmbiguous

EXIT_DONE, EXIT_BUG, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
exit codes:
  0    done
  1    a fault in the program; please report what was printed
  2    something the user can mend; with several inputs, the others were still done
  130  stopped with Ctrl-C; the slices finished by then are written

Research use only. A candidate, not a diagnosis.
"""


@contextmanager
def stop_on_interrupt(unit: str = "slice") -> Iterator[Callable[[], bool]]:
    """Lets the first Ctrl-C finish the slice, or other unit, in progress; the second one stops at once."""
    stop = threading.Event()

    def on_interrupt(_signal: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print(f"\nStopping after this {unit}; Ctrl-C again stops at once.", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def stages(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each thing that is done, one after the other."""
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            for earlier in bars.values():
                earlier.close()
            bars[stage] = tqdm(desc=stage, total=total, leave=False, disable=True if quiet else None)
        bars[stage].update(done - bars[stage].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def failure(path: Path | None, error: MedAnomalyCLIPError) -> dict[str, Any]:
    """The error as data; also told to the user."""
    if path is not None:
        complain(error, path.name)
    return {
        "name": path.name if path else None,
        "error": type(error).__name__,
        "message": str(error),
        "choices": list(error.choices) if isinstance(error, SeriesAmbiguous) else [],
    }


def complain(error: MedAnomalyCLIPError, name: str = "") -> None:
    prefix = f"{name}: " if name not in str(error) else ""
    print(f"medanomalyclip: {prefix}{error}", file=sys.stderr)
    if isinstance(error, SeriesAmbiguous):
        for choice in error.choices:
            print(f"  {choice}", file=sys.stderr)


def print_json(content: dict[str, Any]) -> None:
    from ..result import RESEARCH_USE_ONLY

    print(json.dumps({"notice": RESEARCH_USE_ONLY, **content}, indent=2, ensure_ascii=False))
