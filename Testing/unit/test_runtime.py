"""The worker thread: which detector it holds, when it loads and when it lets go."""

from __future__ import annotations

import threading
import weakref

import pytest

from MedAnomalyCLIPLib.runtime import DetectorWorker, missing_packages


class Echo:
    """A detector whose result is the plane and what it was called with."""

    def __init__(self, name):
        self.name = name

    def detect(self, plane, *, threshold=None):
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


def test_missing_packages_are_told_as_the_requirements_name_them(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("numpy>=1.26\n\nno-such-package[extra]>=2\nscikit-image\n")
    assert missing_packages(path) == ["no-such-package[extra]>=2"]
