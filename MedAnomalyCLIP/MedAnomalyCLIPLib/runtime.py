"""What a detector needs in order to run: its packages, a device, a thread of its own."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InvalidRequest, needs_full

if TYPE_CHECKING:
    import torch

    from .detection import SliceDetector
    from .geometry import SlicePlane
    from .prompt import Prompt
    from .result import AnomalyResult

AUTO, TORCH, ONNX = "auto", "torch", "onnx"
RUNTIMES = (AUTO, TORCH, ONNX)
"""What may run a detector's network, see `networks.load_network`."""
FLOAT32, BFLOAT16, FLOAT16, INT8 = "float32", "bfloat16", "float16", "int8"
PRECISIONS = (AUTO, FLOAT32, BFLOAT16, FLOAT16, INT8)
"""What its large products may be computed in, likewise."""
TORCH_PRECISIONS = (AUTO, FLOAT32, BFLOAT16, FLOAT16)
"""Of these, what PyTorch computes in, see `select_precision`."""

_BFLOAT16_OF_CPUS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # as torch calls them

Window = tuple[float, float]
Answer = TypeVar("Answer")
Step = TypeVar("Step")

MOST_AT_ONCE = 8
"""Planes that a worker takes through the network together, if as many wait."""
_SECONDS_AT_ONCE = 0.25  # for so long at most: progress and Cancel wait for the end of a batch


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
        raise needs_full("A detector without a graph for ONNX Runtime, or on a GPU, needs", error) from error
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


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """What PyTorch computes large products in.

    Args:
        name: "float32", "bfloat16", "float16"; or "auto" for bfloat16 on CUDA devices that have it, float16
            on others, float32 elsewhere.
        device: where.

    Raises:
        InvalidRequest: there is no such precision, or the device has no instructions for bfloat16, so that it
            would take longer than float32.
    """
    import torch

    if name not in TORCH_PRECISIONS:
        raise InvalidRequest(f"There is no precision {name!r}; choose one of {', '.join(TORCH_PRECISIONS)}")
    if name == AUTO:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if _has_bfloat16(device) else torch.float16
    if name == BFLOAT16 and not _has_bfloat16(device):
        raise InvalidRequest(
            f"Device {device} has no instructions for bfloat16 that PyTorch knows of; leave --precision away"
        )
    return getattr(torch, name)


def _has_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of PyTorch do not tell.
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(found.get(instructions, False) for instructions in _BFLOAT16_OF_CPUS)


def available_devices() -> tuple[str, ...]:
    """Names of this computer's devices, beside "auto"; imports torch, if it is there, which takes seconds."""
    try:
        import torch
    except ImportError:
        return ("cpu",)
    cuda = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return ("cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else []))


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_threads() -> int:
    """How many threads compute on the CPU: what OMP_NUM_THREADS says, as in PyTorch, or one for each core."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    return usable_cores()


def limit_threads(count: int) -> None:
    """Let this process compute with so many threads from now on, before its first detector is loaded."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:  # which has read that already
        sys.modules["torch"].set_num_threads(count)


def gpu_count(device: str = "auto") -> int:
    """How many CUDA devices this computer offers to whoever asks for a device by this name."""
    if device not in ("auto", "cuda"):
        return int(device.startswith("cuda"))
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def device_title(device: str, runtime: str = "", precision: str = FLOAT32) -> str:
    """A device and what runs there, as a reader knows them.

    For example "CPU, 4 threads, PyTorch 2.13.0", or "CPU, 1 thread, ONNX Runtime 1.32.0, int8".
    """
    kind, title = device.partition(":")[0], "Apple GPU (mps)"
    if kind == "cuda":
        import torch

        title = f"{torch.cuda.get_device_name(device)} ({device})"
    elif kind != "mps":
        threads = cpu_threads()
        title = f"CPU, {threads} threads" if threads > 1 else "CPU, 1 thread"
    return ", ".join([title, *([runtime] if runtime else []), *([precision] if precision != FLOAT32 else [])])


@dataclass(eq=False)
class _WaitingPlane:
    """A plane on its way to the detector; those with equal wishes may go through the network together."""

    plane: SlicePlane
    wishes: tuple[object, float | None, Window | None, Prompt | None]
    load: Callable[[], SliceDetector]
    future: Future[AnomalyResult] = field(default_factory=Future)


class DetectorWorker:
    """One thread that loads detectors and runs them, so that its caller never waits.

    A detector is kept until another one is asked for, and let go before that one is loaded: two may not fit
    into the memory of a device. Planes that wait for the same go through the network together, as many as
    take a quarter of a second: a GPU does several in the time of one, and a slow processor none the later.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="MedAnomalyCLIP")
        self._planes: deque[_WaitingPlane] = deque()
        # Touched by the thread only.
        self._held: tuple[Any, SliceDetector] | None = None
        self._at_once = 1

    def submit(
        self,
        key: object,
        load: Callable[[], SliceDetector],
        plane: SlicePlane,
        threshold: float | None,
        window: Window | None = None,
        prompt: Prompt | None = None,
    ) -> Future[AnomalyResult]:
        """Detect on a plane, after the planes submitted before it.

        Args:
            key: which detector; the one held serves while the key stays equal.
            load: makes the detector, on the thread.
            plane, threshold, window, prompt: as for `SliceDetector.detect`.
        """
        waiting = _WaitingPlane(plane, (key, threshold, window, prompt), load)
        self._planes.append(waiting)
        self._pool.submit(self._detect_waiting)  # finds nothing when an earlier batch took the plane along
        return waiting.future

    def use(
        self, key: object, load: Callable[[], SliceDetector], work: Callable[[SliceDetector], Answer]
    ) -> Future[Answer]:
        """Do anything else with a detector; arguments as for `submit`."""
        return self._pool.submit(self._use, key, load, work)

    def call(self, work: Callable[[], Answer]) -> Future[Answer]:
        """Do on the thread what needs no detector but takes a while, after what was submitted before it."""
        return self._pool.submit(work)

    def work(
        self, steps: Generator[Step, Any, Answer], on_step: Callable[[Step], None] | None = None
    ) -> Future[Answer]:
        """Do long work on the thread, step by step; planes that are submitted meanwhile come in between.

        Args:
            steps: the work; closed on the thread when the future is cancelled, or left with the worker.
            on_step: called on the thread with what each step yields.

        Returns:
            A future of what the work returns. It can be cancelled as long as it is not done.
        """
        future: Future[Answer] = Future()
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
        with suppress(IndexError):
            while True:
                self._planes.popleft().future.cancel()

    def _detect_waiting(self) -> None:
        batch = self._next_batch()
        if batch:
            begun = time.perf_counter()
            self._detect(batch)
            each = (time.perf_counter() - begun) / len(batch)
            self._at_once = min(max(int(_SECONDS_AT_ONCE / max(each, 1e-6)), 1), MOST_AT_ONCE)

    def _next_batch(self) -> list[_WaitingPlane]:
        """The plane that waited longest, and those behind it that can go with it; none if there is none."""
        batch: list[_WaitingPlane] = []
        with suppress(IndexError):  # no more wait
            while len(batch) < self._at_once:
                if batch and self._planes[0].wishes != batch[0].wishes:
                    break
                waiting = self._planes.popleft()
                if waiting.future.set_running_or_notify_cancel():
                    batch.append(waiting)
        return batch

    def _detect(self, batch: Sequence[_WaitingPlane]) -> None:
        """Give the futures of a batch their results; where one cannot be detected on, the others alone."""
        key, threshold, window, prompt = batch[0].wishes

        def detect(detector: SliceDetector) -> None:
            results = detector.detect_many(
                [waiting.plane for waiting in batch],
                threshold=threshold,
                window=window,
                prompt=prompt,
                batch_size=len(batch),
            )
            for waiting, result in zip(batch, results, strict=True):
                waiting.future.set_result(result)

        try:
            self._use(key, batch[0].load, detect)
        except BaseException as error:
            if len(batch) == 1:
                _settle(batch[0].future.set_exception, error)
                return
            for waiting in batch:
                if not waiting.future.done():
                    self._detect([waiting])

    def _use(
        self, key: object, load: Callable[[], SliceDetector], work: Callable[[SliceDetector], Answer]
    ) -> Answer:
        if self._held is None or self._held[0] != key:
            self._held = None
            self._at_once = 1
            self._held = key, load()
        return work(self._held[1])


def _turn(
    steps: Generator[Step, Any, Answer], on_step: Callable[[Step], None] | None, future: Future[Answer]
) -> bool:
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
