"""Work on the detector's thread whose outcome comes back to the panel, on the main thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import qt

_POLL_INTERVAL_MS = 50

Outcome = Callable[[Any, Exception | None], None]


class BackgroundCall:
    """At most one piece of work at a time, which the panel neither waits for nor forgets."""

    def __init__(self) -> None:
        self._future: Future | None = None
        self._on_done: Outcome | None = None
        self._timer = qt.QTimer()
        self._timer.interval = _POLL_INTERVAL_MS
        self._timer.connect("timeout()", self._look)

    @property
    def running(self) -> bool:
        return self._future is not None

    def start(self, future: Future, on_done: Outcome) -> None:
        """Wait for a future without blocking; what was waited for before is dropped.

        Args:
            future: the work, on its way.
            on_done: called on the main thread with the answer and None, or with None and the exception.
        """
        self.stop()
        self._future, self._on_done = future, on_done
        self._timer.start()

    def stop(self) -> None:
        """Drop the work; its outcome reaches nobody."""
        self._timer.stop()
        if self._future is not None:
            self._future.cancel()
        self._future = self._on_done = None

    def _look(self) -> None:
        future, on_done = self._future, self._on_done
        if future is None or on_done is None or not future.done():
            return
        self._timer.stop()
        self._future = self._on_done = None
        try:
            answer = future.result()
        except CancelledError:  # the worker was closed
            return
        except Exception as error:  # handed on, not hidden
            on_done(None, error)
            return
        on_done(answer, None)
