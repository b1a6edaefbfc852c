"""The worker thread: which detector it holds, when it loads and when it lets go."""

from __future__ import annotations

import re
import threading
import weakref

import pytest

from MedAnomalyCLIPLib.runtime import DetectorWorker, available_devices, device_title, select_device


class Echo:
    """A detector whose result is the plane and what it was called with."""

    def __init__(self, name):
        self.name = name

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
