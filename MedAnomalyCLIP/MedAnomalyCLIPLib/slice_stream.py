"""Slices through a worker, one result after the other, while the caller stays free.

Planes are cut and results taken by the caller's thread; only the detector runs elsewhere. Some slices wait
at the worker, so that it never waits for the caller and can take several together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from .errors import MedAnomalyCLIPError
from .geometry import SlicePlane
from .result import AnomalyResult
from .runtime import MOST_AT_ONCE

_AHEAD = 2 * MOST_AT_ONCE  # a batch that is detected, a batch that waits
_CUT_AT_ONCE = 2  # so that no step takes long; one more than was taken, until there are enough


@dataclass(frozen=True)
class SliceOutcome:
    """What became of one slice: a result, or the reason why there is none.

    Attributes:
        index: position along the axis, from 0.
        result, error: one of them is None.
    """

    index: int
    result: AnomalyResult | None = None
    error: MedAnomalyCLIPError | None = None


class SliceStream:
    """The slices of one run.

    Attributes:
        total: number of slices to do.
        taken: number of outcomes taken so far.
    """

    def __init__(
        self,
        indices: Sequence[int],
        cut: Callable[[int], SlicePlane],
        submit: Callable[[SlicePlane], Future[AnomalyResult]],
    ) -> None:
        """Send the first slices on their way.

        Args:
            indices: slices in the order in which they are to be done.
            cut: makes the plane of a slice; called on this thread, for one slice after the other.
            submit: hands a plane to the worker.
        """
        self.total = len(indices)
        self.taken = 0
        self._waiting = deque(indices)
        self._cut, self._submit = cut, submit
        self._sent: deque[tuple[int, Future[AnomalyResult]]] = deque()
        self._fill()

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to take."""
        return not self._sent

    @property
    def ready(self) -> bool:
        """Whether `take` returns at once."""
        return bool(self._sent) and self._sent[0][1].done()

    def take(self) -> SliceOutcome:
        """The next outcome, waited for; an error that is no `MedAnomalyCLIPError` is a bug and is raised."""
        index, future = self._sent.popleft()
        result, error = None, None
        try:
            result = future.result()
        except MedAnomalyCLIPError as reason:
            error = reason
        except BaseException:
            self.cancel()
            raise
        self.taken += 1
        self._fill()
        return SliceOutcome(index, result, error)

    def cancel(self) -> None:
        """Do no more slices. One that the worker has begun is finished there, and then forgotten."""
        self._waiting.clear()
        for _, future in self._sent:
            future.cancel()
        self._sent.clear()

    def _fill(self) -> None:
        for _ in range(min(_CUT_AT_ONCE, _AHEAD - len(self._sent), len(self._waiting))):
            index = self._waiting.popleft()
            try:
                future = self._submit(self._cut(index))
            except MedAnomalyCLIPError as error:
                future = Future()
                future.set_exception(error)
            self._sent.append((index, future))
