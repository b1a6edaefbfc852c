"""The worker thread: which detector it holds, when it loads and when it lets go."""

from __future__ import annotations

import re
import threading
import weakref
from concurrent.futures import CancelledError

import pytest

from MedAnomalyCLIPLib import runtime
from MedAnomalyCLIPLib.runtime import DetectorWorker, available_devices, device_title, select_device


class Echo:
    """A detector whose result is the plane and what it was called with.

    Attributes:
        batches: planes that it was given together.
    """

    def __init__(self, name):
        self.name = name
        self.batches = []

    def detect_many(self, planes, *, threshold=None, window=None, prompt=None, batch_size=8):
        assert batch_size == len(planes)
        self.batches.append(list(planes))
        for plane in planes:
            yield self.detect(plane, threshold=threshold, window=window, prompt=prompt)

    def detect(self, plane, *, threshold=None, window=None, prompt=None):
        return self.name, plane, threshold, threading.current_thread()


@pytest.fixture
def worker():
    worker = DetectorWorker()
    yield worker
    worker.close()


def test_a_detector_is_loaded_once_and_on_the_thread_that_runs_it(worker):
    loads = []

    def load():
        loads.append(threading.current_thread())
        return Echo("one")

    results = [worker.submit("one", load, plane, 0.5).result(timeout=10) for plane in "ab"]
    assert [result[:3] for result in results] == [("one", "a", 0.5), ("one", "b", 0.5)]
    assert {loads[0]} == {result[3] for result in results} != {threading.main_thread()}
    assert len(loads) == 1


def test_the_detector_before_is_let_go_before_the_next_is_loaded(worker):
    first = Echo("one")
    alive = weakref.ref(first)
    held = [first]
    del first
    worker.submit("one", held.pop, "a", None).result(timeout=10)
    assert alive() is not None
    seen = []

    def load():
        seen.append(alive())
        return Echo("two")

    assert worker.submit("two", load, "a", None).result(timeout=10)[0] == "two"
    assert seen == [None]


def test_a_detector_that_failed_to_load_is_tried_again(worker):
    def fail():
        raise OSError("the disk is not there")

    with pytest.raises(OSError, match="disk"):
        worker.submit("one", fail, "a", None).result(timeout=10)
    assert worker.submit("one", lambda: Echo("one"), "a", None).result(timeout=10)[0] == "one"


def test_a_closed_worker_and_its_detector_are_let_go():
    worker = DetectorWorker()
    alive = None

    def load():
        nonlocal alive
        detector = Echo("one")
        alive = weakref.ref(detector)
        return detector

    worker.submit("one", load, "a", None).result(timeout=10)
    worker.close()
    del worker
    assert alive() is None


def test_a_window_reaches_the_detector(worker):
    class Recorder(Echo):
        def detect(self, plane, *, threshold=None, window=None, prompt=None):
            return window

    assert worker.submit("one", lambda: Recorder("one"), "a", None, (1.0, 2.0)).result(10) == (1.0, 2.0)


def test_other_work_uses_the_detector_that_is_held(worker):
    loads = []

    def load():
        loads.append(1)
        return Echo("one")

    worker.submit("one", load, "a", None).result(timeout=10)
    assert worker.use("one", load, lambda detector: detector.name).result(timeout=10) == "one"
    assert loads == [1]


def test_work_without_a_detector_runs_on_the_same_thread(worker):
    thread = worker.submit("one", lambda: Echo("one"), "a", None).result(timeout=10)[3]
    assert worker.call(threading.current_thread).result(timeout=10) is thread


def test_devices_on_offer_can_be_selected_and_have_a_title():
    devices = available_devices()
    assert devices[0] == "cpu"
    for name in devices:
        assert str(select_device(name)) == name
        assert device_title(name)
    assert re.fullmatch(r"CPU, \d+ threads?", device_title("cpu"))


# Planes together


@pytest.fixture
def together(worker):
    """Submits while the thread is busy, to a detector that it knows as quick; futures in their order."""

    def submit(detector, *requests):
        worker.submit("one", lambda: detector, "first", None).result(timeout=10)
        worker.submit("one", lambda: detector, "second", None).result(timeout=10)
        gate = threading.Event()
        worker.call(lambda: gate.wait(10))
        futures = [worker.submit("one", lambda: detector, *request) for request in requests]
        gate.set()
        return futures

    return submit


def test_planes_that_wait_go_through_together_and_come_back_in_order(together):
    detector = Echo("one")
    results = [future.result(timeout=10) for future in together(detector, *((p, 0.5) for p in "abcdefghijk"))]
    assert [result[1] for result in results] == list("abcdefghijk")
    assert detector.batches[2:] == [list("abcdefgh"), list("ijk")]


def test_planes_of_other_wishes_go_apart(together):
    detector = Echo("one")
    requests = (("a", 0.5), ("b", 0.5), ("c", 0.6), ("d", 0.5), ("e", 0.5, (0, 1)))
    results = [future.result(timeout=10) for future in together(detector, *requests)]
    assert [result[1:3] for result in results] == [request[:2] for request in requests]
    assert detector.batches[2:] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_plane_that_cannot_be_detected_on_takes_none_with_it(together):
    class Picky(Echo):
        def detect(self, plane, **options):
            if plane == "c":
                raise OSError("the disk is not there")
            return super().detect(plane, **options)

    futures = together(Picky("one"), *((plane, 0.5) for plane in "abcde"))
    with pytest.raises(OSError, match="disk"):
        futures[2].result(timeout=10)
    assert [f.result(timeout=10)[1] for f in futures if f is not futures[2]] == list("abde")


def test_a_plane_that_was_cancelled_while_it_waited_is_not_detected_on(worker):
    detector, gate = Echo("one"), threading.Event()
    worker.call(lambda: gate.wait(10))
    futures = [worker.submit("one", lambda: detector, plane, None) for plane in "abc"]
    assert futures[1].cancel()
    gate.set()
    assert futures[2].result(timeout=10)[1] == "c"
    assert [plane for batch in detector.batches for plane in batch] == ["a", "c"]


def test_a_slow_detector_does_not_keep_anyone_waiting_for_a_batch(worker, monkeypatch):
    now = iter(range(1000))  # a second for each batch
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(now))
    detector = Echo("one")
    for future in [worker.submit("one", lambda: detector, plane, None) for plane in "abcde"]:
        future.result(timeout=10)
    assert detector.batches == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_planes_that_wait_go_with_their_worker(worker):
    begun, gate = threading.Event(), threading.Event()
    worker.call(lambda: begun.set() or gate.wait(10))
    begun.wait(10)
    waiting = worker.submit("one", lambda: Echo("one"), "a", None)
    worker.close()
    gate.set()
    with pytest.raises(CancelledError):
        waiting.result(timeout=10)


# Long work in steps


def counting(end, seen=None):
    """Yields 1 to `end` and returns the thread; tells what became of it."""
    try:
        yield from range(1, end + 1)
        return threading.current_thread()
    finally:
        if seen is not None:
            seen.append("closed")


def test_work_is_done_on_the_thread_and_returns_what_it_made(worker):
    told = []
    thread = worker.work(counting(3), told.append).result(timeout=10)
    assert told == [1, 2, 3]
    assert thread is worker.submit("one", lambda: Echo("one"), "a", None).result(timeout=10)[3]


def test_a_plane_comes_between_two_steps(worker):
    begun, gate = threading.Event(), threading.Event()
    order = []

    def steps():
        begun.set()
        gate.wait(10)
        yield "first"
        order.append("second")
        yield "second"

    work = worker.work(steps())
    begun.wait(10)
    plane = worker.submit("one", lambda: order.append("plane") or Echo("one"), "a", None)
    gate.set()
    work.result(timeout=10)
    plane.result(timeout=10)
    assert order == ["plane", "second"]


def test_work_that_fails_says_why_and_the_thread_goes_on(worker):
    def steps():
        yield 1
        raise OSError("the disk is not there")

    with pytest.raises(OSError, match="disk"):
        worker.work(steps()).result(timeout=10)
    assert worker.work(counting(1)).result(timeout=10)


def test_cancelled_work_is_closed_after_the_step_it_is_at(worker):
    begun, gate, seen = threading.Event(), threading.Event(), []

    def wait(number):
        begun.set()
        gate.wait(10)

    work = worker.work(counting(1000, seen), wait)
    begun.wait(10)
    assert work.cancel()
    gate.set()
    worker.work(counting(1)).result(timeout=10)  # comes after the turn that closes the other
    assert seen == ["closed"]
    assert work.cancelled()


def test_work_goes_with_its_worker():
    worker, begun, gate, seen = DetectorWorker(), threading.Event(), threading.Event(), []

    def wait(number):
        begun.set()
        gate.wait(10)

    works = [worker.work(counting(1000, seen), wait), worker.work(counting(1000))]
    begun.wait(10)
    worker.close()
    gate.set()
    for work in works:
        with pytest.raises(CancelledError):
            work.result(timeout=10)
    assert seen == ["closed"]
    with pytest.raises(CancelledError):
        worker.work(counting(3)).result(timeout=10)
