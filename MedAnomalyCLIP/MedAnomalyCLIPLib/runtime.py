"""What a detector needs in order to run: its packages, a device, a thread of its own."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DependencyMissing, InvalidRequest

if TYPE_CHECKING:
    import torch

    from .detection import SliceDetector
    from .geometry import SlicePlane
    from .result import AnomalyResult

T = TypeVar("T")
Y = TypeVar("Y")

# How packages are called when imported, where that differs from their name.
_IMPORT_NAMES = {"open_clip_torch": "open_clip", "scikit-image": "skimage"}


def missing_packages(requirements: Path) -> list[str]:
    """Lines of a requirements file whose package cannot be imported; nothing is imported to find out."""
    lines = [line.strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and importlib.util.find_spec(_import_name(line)) is None]


def _import_name(requirement: str) -> str:
    name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
    return _IMPORT_NAMES.get(name, name)


def select_device(name: str = "auto") -> torch.device:
    """The device to run on.

    Args:
        name: "auto" for CUDA, else Apple's GPU, else the CPU; or a device as torch names it, e.g. "cuda:1".

    Raises:
        DependencyMissing: torch is not installed.
        InvalidRequest: the device does not exist here.
    """
    try:
        import torch
    except ImportError as error:
        raise DependencyMissing(
            "PyTorch is not installed. In Slicer, install the PyTorch extension; elsewhere: pip install torch"
        ) from error
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidRequest(f"Device {name!r} cannot be used here; choose auto, cpu, cuda or mps") from error
    return device


class DetectorWorker:
    """One thread that loads detectors and runs them, so that its caller never waits.

    A detector is kept until another one is asked for, and let go before that one is loaded: two may not fit
    into the memory of a device.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="MedAnomalyCLIP")
        self._held: tuple[Any, SliceDetector] | None = None  # touched by the thread only

    def submit(
        self, key: object, load: Callable[[], SliceDetector], plane: SlicePlane, threshold: float | None
    ) -> Future[AnomalyResult]:
        """Detect on a plane, after the planes submitted before it.

        Args:
            key: which detector; the one held serves while the key stays equal.
            load: makes the detector, on the thread.
            plane, threshold: as for `SliceDetector.detect`.
        """
        return self._pool.submit(self._run, key, load, plane, threshold)

    def work(self, steps: Generator[Y, Any, T], on_step: Callable[[Y], None] | None = None) -> Future[T]:
        """Do long work on the thread, step by step; planes that are submitted meanwhile come in between.

        Args:
            steps: the work; closed on the thread when the future is cancelled, or left with the worker.
            on_step: called on the thread with what each step yields.

        Returns:
            A future of what the work returns. It can be cancelled as long as it is not done.
        """
        future: Future[T] = Future()
        self._submit_turn(steps, on_step, future)
        return future

    def _submit_turn(self, steps: Any, on_step: Any, future: Future) -> None:
        try:
            turn = self._pool.submit(_turn, steps, on_step, future)
        except RuntimeError:  # the worker was closed
            _abandon(steps, future)
            return
        turn.add_done_callback(lambda done: self._after_turn(done, steps, on_step, future))

    def _after_turn(self, turn: Future, steps: Any, on_step: Any, future: Future) -> None:
        if turn.cancelled():  # dropped by `close` before it began
            _abandon(steps, future)
        elif turn.result():
            self._submit_turn(steps, on_step, future)

    def close(self) -> None:
        """Take no more planes and drop those that wait. The detector goes with the worker itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(
        self, key: object, load: Callable[[], SliceDetector], plane: SlicePlane, threshold: float | None
    ) -> AnomalyResult:
        if self._held is None or self._held[0] != key:
            self._held = None
            self._held = key, load()
        return self._held[1].detect(plane, threshold=threshold)


def _turn(steps: Generator[Y, Any, T], on_step: Callable[[Y], None] | None, future: Future[T]) -> bool:
    """One step of some work; whether there are more. Its end goes to the future, whatever it is."""
    if future.cancelled():
        _abandon(steps, future)
        return False
    try:
        yielded = next(steps)
        if on_step is not None:
            on_step(yielded)
    except StopIteration as end:
        _settle(future.set_result, end.value)
    except BaseException as error:
        steps.close()
        _settle(future.set_exception, error)
    else:
        return True
    return False


def _settle(settle: Callable[[Any], None], value: Any) -> None:
    """Give a future its end, unless it was cancelled a moment ago."""
    with suppress(InvalidStateError):
        settle(value)


def _abandon(steps: Generator[Any, Any, Any], future: Future) -> None:
    steps.close()
    future.cancel()
