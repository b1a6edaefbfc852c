"""A batch on many processes or computers: one Dask task for each series.

Every worker process holds one detector and does one series at a time. Tasks are handed out as workers
become free, so neither the scheduler nor this process ever holds more of them than a few for each worker;
what travels is where a series lies and, back, a few numbers. Images and results go between the workers and
the file system.

A worker that dies takes the series it had with it; they are done again. One that is lost twice is done
with nothing beside it, so that it is sure to be what ends its worker, and given up when it is lost once more.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batch_series import STOPPED, Outcome, SeriesTask, detect_series, failed, identity
from .errors import Cancelled, ClusterFailed, MedAnomalyCLIPError

if TYPE_CHECKING:
    from distributed import Client, Future

    from .detection import SliceDetector

MOST_LOSSES = 3
_POLL_SECONDS = 0.2
_RECOUNT_SECONDS = 1.0
_AHEAD = 0.5  # tasks that wait at the scheduler, for each that a worker is at

LOST, UNFIT = "WorkerLost", "WorkerUnfit"


@dataclass(frozen=True)
class WorkerDetector:
    """How each worker makes its detector.

    Attributes:
        load: makes it from a bundle and a device; has to travel by pickle.
        bundle: folder of the detector, as workers see it; None for the bundled one.
        device: as for `runtime.select_device`. Where a worker sees several GPUs and none was named, it takes
            the one that goes with its number.
        threads: for a worker's own arithmetic; None to leave them as they are.
    """

    load: Callable[[Path | str | None, str], SliceDetector]
    bundle: Path | None = None
    device: str = "auto"
    threads: int | None = None


# In a worker's process

_busy = threading.Lock()  # a worker of somebody else's cluster may have several threads, a detector has one
_held: dict[WorkerDetector, SliceDetector] = {}
_stopped: set[str] = set()


def _detector(wanted: WorkerDetector) -> SliceDetector:
    if wanted not in _held:
        import torch

        _held.clear()
        if wanted.threads is not None:
            torch.set_num_threads(wanted.threads)
        _held[wanted] = wanted.load(wanted.bundle, _own_device(wanted.device))
    return _held[wanted]


def _own_device(device: str) -> str:
    from distributed import get_worker

    from .runtime import gpu_count

    number = get_worker().name
    gpus = gpu_count(device)
    return f"cuda:{number % gpus}" if gpus > 1 and isinstance(number, int) else device


def _identify(wanted: WorkerDetector) -> dict[str, str]:
    with _busy:
        return identity(_detector(wanted))


def _do(run: str, task: SeriesTask, wanted: WorkerDetector, expected: dict[str, str]) -> Outcome:
    with _busy:
        if run in _stopped:
            return {"state": STOPPED}
        try:
            detector = _detector(wanted)
        except MedAnomalyCLIPError as error:
            return _unfit(str(error))
        if identity(detector) != expected:
            return _unfit("it has another detector under the same name")
        return detect_series(task, detector, is_stopped=lambda: run in _stopped)


def _unfit(reason: str) -> Outcome:
    from distributed import get_worker

    return {"unfit": get_worker().address, "reason": reason}


async def _stop(run: str) -> None:  # Dask waits for the answers of what is no coroutine
    _stopped.add(run)


# In the process of the command


class Workers:
    """Does series on the workers of a Dask scheduler; an engine for `batch.run_batch`."""

    def __init__(self, client: Client, detector: WorkerDetector) -> None:
        """Take a connection that stays open as long as the batch runs.

        Args:
            client: see `cluster_start`.
            detector: how each worker makes its own.
        """
        self._client, self._detector = client, detector
        self._identity: dict[str, str] = {}

    def identify(self, is_stopped: Callable[[], bool]) -> dict[str, str]:
        """As of the first worker that is there; waits for it."""
        if not self._identity:
            future = self._client.submit(_identify, self._detector, resources=self._needs(), pure=False)
            while not future.done():
                if is_stopped():
                    raise Cancelled("Stopped before a worker was there")
                time.sleep(_POLL_SECONDS)
            try:
                self._identity = future.result()
            except MedAnomalyCLIPError:
                raise
            except Exception as error:
                raise ClusterFailed(
                    f"The first worker could not load the detector: {type(error).__name__}: {error}. It needs"
                    " the same version of medanomalyclip, and the detector's folder under the same path"
                ) from error
        return self._identity

    def run(
        self, tasks: Iterator[SeriesTask], is_stopped: Callable[[], bool]
    ) -> Iterator[tuple[SeriesTask, Outcome]]:
        """Do tasks on all workers; they come back in any order.

        Raises:
            ClusterFailed: the scheduler is gone, or no worker can load the detector.
        """
        flight = _Flight(tasks)
        run = uuid.uuid4().hex
        told_to_stop = 0.0
        while True:
            stopped = is_stopped()
            if stopped and time.monotonic() - told_to_stop > _RECOUNT_SECONDS:
                told_to_stop = time.monotonic()
                # Again and again: a worker that was started anew has not heard of it.
                self._client.run(_stop, run, wait=False, on_error="ignore")
            if not stopped:
                while (attempt := flight.next(self._room())) is not None:
                    flight.add(attempt, self._submit(run, attempt))
            if not flight.flying:
                return
            with suppress(queue.Empty):
                attempt, future = flight.landed(_POLL_SECONDS)
                outcome = self._outcome(attempt, future, stopped)
                if outcome is None:
                    flight.again(attempt)
                else:
                    yield attempt.task, outcome

    def _submit(self, run: str, attempt: _Attempt) -> Future:
        return self._client.submit(
            _do,
            run,
            attempt.task,
            self._detector,
            self._identity,
            key=f"series-{attempt.task.item.key}-{run[:8]}-{attempt.losses}",
            resources=self._needs(),
            pure=False,
        )

    def _outcome(self, attempt: _Attempt, future: Future, stopped: bool) -> Outcome | None:
        """What became of a series; None if it is to be done again."""
        from distributed import KilledWorker

        kind = LOST
        if future.status == "finished":
            outcome = future.result()
            if "unfit" not in outcome:
                return outcome
            reason = f"A worker could not do it: {outcome['reason']}"
            self._retire(outcome["unfit"], reason)
            kind = UNFIT
        elif future.status == "error":
            error = future.exception()
            if not isinstance(error, KilledWorker):
                return failed("Fault", f"A fault in the program: {type(error).__name__} on a worker")
            reason = (
                f"The process that opened it ended {MOST_LOSSES} times: too little memory for it, a damaged"
                " file, or the computer was taken away"
            )
        else:
            raise ClusterFailed(
                "The Dask scheduler was lost. What was done is kept, and the same command goes on"
            )
        attempt.losses += 1
        if stopped:
            return {"state": STOPPED}
        return failed(kind, reason) if attempt.losses >= MOST_LOSSES else None

    def _retire(self, address: str, reason: str) -> None:
        """Let a worker that cannot load the detector fail no further series."""
        with suppress(ValueError, KeyError):
            self._client.retire_workers([address], close_workers=True, remove=True)
        if not self._client.nthreads():
            raise ClusterFailed(f"{reason}. No other worker is left; the same command goes on")

    def _needs(self) -> dict[str, float] | None:
        """A GPU for each series, where workers say that they have one."""
        self._recount()
        return {"GPU": 1} if self._gpus else None

    def _room(self) -> int:
        """How many tasks may be out: one for each worker's thread, and some that wait."""
        self._recount()
        return self._slots + math.ceil(self._slots * _AHEAD)

    _counted, _slots, _gpus = -math.inf, 1, False

    def _recount(self) -> None:
        if time.monotonic() - self._counted > _RECOUNT_SECONDS:
            workers: Any = self._client.scheduler_info(n_workers=-1)["workers"].values()
            self._slots = max(1, sum(worker["nthreads"] for worker in workers))
            self._gpus = any(worker.get("resources", {}).get("GPU") for worker in workers)
            self._counted = time.monotonic()


@dataclass(eq=False)
class _Attempt:
    """A series, and how often it was lost with its worker."""

    task: SeriesTask
    losses: int = 0


@dataclass(eq=False)
class _Flight:
    """Which series are out, which come next, and which come last, with nothing beside them."""

    tasks: Iterator[SeriesTask]
    flying: dict[Future, _Attempt] = field(default_factory=dict)
    _ended: queue.Queue[Future] = field(default_factory=queue.Queue)
    _lost: deque[_Attempt] = field(default_factory=deque)
    _suspects: deque[_Attempt] = field(default_factory=deque)

    def next(self, room: int) -> _Attempt | None:
        """What to hand out now; None when nothing should be.

        Args:
            room: how many may be out.
        """
        if len(self.flying) >= room:
            return None
        if self._lost:
            return self._lost.popleft()
        task = next(self.tasks, None)
        if task is not None:
            return _Attempt(task)
        return self._suspects.popleft() if self._suspects and not self.flying else None

    def add(self, attempt: _Attempt, future: Future) -> None:
        self.flying[future] = attempt
        future.add_done_callback(self._ended.put)

    def landed(self, seconds: float) -> tuple[_Attempt, Future]:
        """One that has come to its end; raises `queue.Empty` if none does for some seconds."""
        future = self._ended.get(timeout=seconds)
        return self.flying.pop(future), future

    def again(self, attempt: _Attempt) -> None:
        """Do it again: at once after its first loss, at the end and alone after its second."""
        (self._lost if attempt.losses < MOST_LOSSES - 1 else self._suspects).append(attempt)
