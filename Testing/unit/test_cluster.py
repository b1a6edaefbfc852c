"""Batches on worker processes: real ones, killed with SIGKILL; the configuration of SLURM's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import SimpleITK

pytest.importorskip("distributed")

import worker_detectors
from distributed.system import MEMORY_LIMIT

from endurance import LONG, resident_bytes
from MedAnomalyCLIPLib import cluster_start
from MedAnomalyCLIPLib.batch import InProcess, run_batch
from MedAnomalyCLIPLib.batch_series import DONE, FAILED, STOPPED
from MedAnomalyCLIPLib.batch_source import search
from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.cluster import LOST, WorkerDetector, Workers
from MedAnomalyCLIPLib.cluster_start import (
    SlurmJob,
    existing_scheduler,
    local_workers,
    slurm_options,
    slurm_workers,
    threads_of_each,
)
from MedAnomalyCLIPLib.errors import BundleInvalid, ClusterFailed, InvalidRequest
from MedAnomalyCLIPLib.runtime import usable_cores

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def write_series(folder, count, *, depth=2, poison=()):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        voxels = np.zeros((depth, 6, 7), np.int16)
        voxels[:, 2, 3] = worker_detectors.POISON if number in poison else 300 + number
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(folder / f"{number:03d}.nii.gz"))
    return folder


@pytest.fixture(scope="module")
def client():
    with local_workers(2) as client:
        yield client


@pytest.fixture
def notes(tmp_path):
    """Where detectors note the processes that they were loaded in."""
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


def on(client, notes, load=worker_detectors.load):
    return Workers(client, WorkerDetector(load, notes, "cpu"))


def states(manifest):
    return [record["state"] for record in manifest["inputs"]]


def without_times(content):
    """A manifest or result without what differs from run to run."""
    left_out = ("updated", "created", "seconds", "software")
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in left_out}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def test_workers_come_to_what_one_process_comes_to(client, notes, tmp_path):
    studies = write_series(tmp_path / "studies", 7)
    (studies / "damaged.nii").write_bytes((studies / "000.nii.gz").read_bytes()[:40])
    many = run_batch(search([studies]), tmp_path / "many", on(client, notes))
    one = run_batch(search([studies]), tmp_path / "one", InProcess(lambda: worker_detectors.load(notes, "")))
    assert without_times(many) == without_times(one)
    assert (tmp_path / "many/slices.csv").read_bytes() == (tmp_path / "one/slices.csv").read_bytes()
    for record in (record for record in one["inputs"] if record["state"] == DONE):
        paths = [tmp_path / out / record["folder"] / "result.json" for out in ("one", "many")]
        here, there = (without_times(json.loads(path.read_text())) for path in paths)
        assert here == there


def test_each_worker_loads_its_detector_once(client, notes, tmp_path):
    studies = write_series(tmp_path / "studies", 12)
    assert run_batch(search([studies]), tmp_path / "out", on(client, notes))["complete"]
    assert len(list(notes.iterdir())) == 2


def test_workers_killed_in_the_middle_lose_nothing(client, notes, tmp_path):
    studies = write_series(tmp_path / "studies", 10, depth=3)
    killed = []

    def kill(settled, *_told):
        if settled in (2, 5):
            pid = next(iter(client.run(os.getpid).values()))
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    engine = on(client, notes, worker_detectors.load_slow)
    manifest = run_batch(search([studies]), tmp_path / "out", engine, on_series=kill)
    assert len(killed) == 2
    assert states(manifest) == [DONE] * 10
    assert manifest["complete"]
    assert len((tmp_path / "out" / "slices.csv").read_text().splitlines()) == 1 + 10 * 3
    assert not [path.name for path in (tmp_path / "out").rglob(".*")]


def test_a_series_that_kills_every_worker_fails_alone(client, notes, tmp_path):
    studies = write_series(tmp_path / "studies", 8, poison=(1,))
    manifest = run_batch(search([studies]), tmp_path / "out", on(client, notes))
    assert states(manifest) == [DONE, FAILED, *[DONE] * 6]
    assert manifest["inputs"][1]["error"] == LOST
    assert "ended 3 times" in manifest["inputs"][1]["reason"]
    assert manifest["complete"]
    assert not [path.name for path in (tmp_path / "out").rglob(".*")]


def test_a_stopped_batch_keeps_what_is_done_and_goes_on(client, notes, tmp_path):
    studies = write_series(tmp_path / "studies", 6, depth=4)
    stop = threading.Event()
    engine = on(client, notes, worker_detectors.load_slow)
    first = run_batch(
        search([studies]), tmp_path / "out", engine, on_series=lambda *_: stop.set(), is_stopped=stop.is_set
    )
    assert 1 <= first["counts"]["done"] < 6
    assert not first["complete"]
    assert set(states(first)) <= {DONE, STOPPED}
    began = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    done = [record["folder"] for record in first["inputs"] if record["state"] == DONE]
    second = run_batch(search([studies]), tmp_path / "out", engine)
    assert states(second) == [DONE] * 6
    for folder in done:
        path = tmp_path / "out" / folder / "result.json"
        assert path.stat().st_mtime_ns == began[path]


@pytest.mark.timeout(0 if LONG else 300)
def test_many_series_with_workers_killed_now_and_then(notes, tmp_path):
    count = 1000 if LONG else 60
    studies = write_series(tmp_path / "studies", count, poison=(count // 3,))
    kills = range(count // 10, count, count // 5)
    seen, killed = [], []

    with local_workers(2) as client:

        def watch(settled, *_told):
            seen.append((resident_bytes(), len(client.futures)))
            if settled in kills and (alive := client.run(os.getpid, on_error="ignore")):
                killed.append(next(iter(alive.values())))
                os.kill(killed[-1], signal.SIGKILL)

        started = time.monotonic()
        manifest = run_batch(search([studies]), tmp_path / "out", on(client, notes), on_series=watch)
        seconds = time.monotonic() - started
    assert manifest["counts"] == {"done": count - 1, "present": 0, "failed": 1, "stopped": 0}
    assert manifest["inputs"][count // 3]["error"] == LOST
    assert manifest["complete"]
    assert killed
    assert len((tmp_path / "out" / "slices.csv").read_text().splitlines()) == 1 + (count - 1) * 2
    assert not [path.name for path in (tmp_path / "out").rglob(".*")]
    assert max(out for _, out in seen) <= 5
    grown = seen[-1][0] - seen[count // 10][0]
    assert grown < 32 * 2**20
    if LONG:
        lost = f"{len(killed)} workers killed, one series that kills every worker"
        print(f"\n{count} series of 2 slices, {lost}: {manifest['counts']}")
        print(f"{seconds:.0f} s, memory of the process that leads {grown / 2**20:+.1f} MiB")


def test_a_detector_that_no_worker_can_load_ends_the_batch(client, notes, tmp_path):
    studies = write_series(tmp_path / "studies", 2)
    with pytest.raises(BundleInvalid, match="damaged"):
        run_batch(search([studies]), tmp_path / "out", on(client, notes, worker_detectors.load_none))


def test_a_worker_that_cannot_load_the_detector_is_let_go_and_fails_nothing(notes, tmp_path):
    studies = write_series(tmp_path / "studies", 6)
    with local_workers(2) as client:
        engine = on(client, notes, worker_detectors.load_once)
        manifest = run_batch(search([studies]), tmp_path / "out", engine)
        assert len(client.nthreads()) == 1
    assert states(manifest) == [DONE] * 6


def test_a_worker_that_is_gone_for_good_is_replaced(monkeypatch):
    monkeypatch.setattr(cluster_start, "_REPLACE_SECONDS", 0.5)
    monkeypatch.setitem(cluster_start._CONFIGURATION, "distributed.deploy.lost-worker-timeout", "1s")
    with local_workers(1) as client:
        (first,) = client.nthreads()
        client.retire_workers([first], close_workers=True, remove=True)
        client.wait_for_workers(1, timeout=120)
        (second,) = client.nthreads()
    assert second != first


def test_no_name_gets_into_what_dask_may_log(client, notes, tmp_path):
    from distributed.protocol import serialize  # noqa: F401

    studies = write_series(tmp_path / "DOE_JANE_1970", 1)
    (item,) = search([studies])
    assert "DOE" not in repr(item)
    engine = on(client, notes)
    run_batch(search([studies]), tmp_path / "out", engine)
    logs = json.dumps([client.get_worker_logs(), client.get_scheduler_logs()], default=str)
    assert "DOE" not in logs


def test_a_scheduler_that_runs_is_used_by_the_command(notes, tmp_path, capsys):
    from distributed import LocalCluster

    studies = write_series(tmp_path / "studies", 3)
    words = ["batch", studies, "--output", tmp_path / "out", "--model", notes, "--device", "cpu"]
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as cluster:
        words += ["--scheduler", cluster.scheduler_address]
        assert main([*map(str, words)], load=worker_detectors.load) == EXIT_DONE
        assert main([*map(str, words)], load=worker_detectors.load) == EXIT_DONE
    printed = capsys.readouterr()
    assert printed.out.count("3 done, 0 failed, 0 stopped") == 2
    assert "Progress of all workers: http://127.0.0.1" in printed.err
    assert len(list(notes.iterdir())) == 1


def test_workers_share_memory_and_their_progress_is_told_to_this_computer_alone(client):
    known = client.scheduler_info(n_workers=-1)["workers"].values()
    assert {worker["nthreads"] for worker in known} == {1}
    assert 0 < sum(worker["memory_limit"] for worker in known) <= MEMORY_LIMIT
    link = urlsplit(client.dashboard_link)
    assert link.hostname == "127.0.0.1"
    with urllib.request.urlopen(client.dashboard_link, timeout=60) as answer:
        assert answer.status == 200 and b"Bokeh" in answer.read()
    if sys.platform == "linux":  # where this is an address of this computer, too
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", link.port), timeout=3).close()


def test_a_scheduler_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(cluster_start, "_ANSWER_SECONDS", 0.5)
    with (
        pytest.raises(ClusterFailed, match="No Dask scheduler answers"),
        existing_scheduler("tcp://127.0.0.1:1"),
    ):
        pass


# The command, in a process of its own


def command(studies, out, notes, *words):
    """`batch` in a process group of its own, as a terminal starts it, with a slow detector."""
    arguments = ["batch", studies, "--output", out, "--model", notes, "--device", "cpu", *words]
    code = (
        "import sys, worker_detectors; from MedAnomalyCLIPLib.cli import main;"
        "sys.exit(main(sys.argv[1:], load=worker_detectors.load_slow))"
    )
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(group):
    """Whether all processes of a group come to their end, the last of them a moment after the first."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_ctrl_c_in_a_terminal_ends_all_workers_and_keeps_what_is_done(notes, tmp_path):
    studies = write_series(tmp_path / "studies", 40, depth=3)
    running = command(studies, tmp_path / "out", notes, "--workers", 1)
    lines = [running.stdout.readline() for _ in range(2)]
    os.killpg(running.pid, signal.SIGINT)  # a terminal sends it to every process
    _, err = running.communicate(timeout=100)
    assert running.returncode == EXIT_INTERRUPTED, err
    assert "Traceback" not in err, err
    assert "Stopping after this slice" in err
    assert all("done" in line for line in lines)
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["counts"]["done"] >= 2
    assert told["counts"]["done"] < 20
    assert not told["complete"]
    assert not [path.name for path in (tmp_path / "out").rglob("*") if path.name.endswith(".partial")]
    assert ended(running.pid)


def test_the_command_killed_in_the_middle_goes_on(notes, tmp_path):
    studies = write_series(tmp_path / "studies", 5, depth=2)
    running = command(studies, tmp_path / "out", notes, "--workers", 1)
    assert "done" in running.stdout.readline()
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=60)
    again = command(studies, tmp_path / "out", notes)
    out, err = again.communicate(timeout=100)
    assert again.returncode == EXIT_DONE, err
    assert 0 < out.count("  done  ") < 5
    assert "5 done, 0 failed, 0 stopped" in out
    assert not [path.name for path in (tmp_path / "out").rglob(".*")]


def test_options_that_do_not_go_together_are_told(tmp_path, capsys):
    for words in (["--scheduler", "tcp://x:1", "--workers", "2"], ["--slurm"], ["--slurm", "colour=red"]):
        assert main(["batch", str(tmp_path), "--output", str(tmp_path / "o"), *words]) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert "leave out --workers" in told
    assert "--workers N" in told
    assert "'colour=red'" in told


def test_dask_that_is_missing_is_told_with_what_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    studies = write_series(tmp_path / "studies", 1)
    words = ["batch", str(studies), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == EXIT_USER_ERROR
    assert "pip install '.[cluster]'" in capsys.readouterr().err


def test_cores_are_shared_out_once():
    assert threads_of_each(1) == usable_cores()
    assert threads_of_each(10 * usable_cores()) == 1


# SLURM: how its cluster is configured; no SLURM takes part


class FakeCluster:
    def __init__(self, **options):
        self.options, self.count, self.closed = options, 0, False
        self.called = []
        self.loop = SimpleNamespace(add_callback=self.called.append)
        FakeCluster.made = self

    def scale(self, count):
        self.count = count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


def test_jobs_are_asked_for_and_let_go(monkeypatch):
    import distributed

    class FakeClient(FakeCluster):
        def __init__(self, cluster):
            self.cluster = cluster

    monkeypatch.setattr(distributed, "Client", FakeClient)
    job = SlurmJob.parse(["queue=gpu", "gpus=1", "cores=8", "memory=24GB", "walltime=1-02:00:00"])
    with slurm_workers(job, 20, cluster_class=FakeCluster) as client:
        assert client.cluster.count == 20
    assert FakeCluster.made.closed
    assert [call.__name__ for call in FakeCluster.made.called] == ["start", "stop"]
    options = FakeCluster.made.options
    assert options == slurm_options(job)
    assert options["security"] is True
    assert options["scheduler_options"] == {"dashboard_address": "127.0.0.1:0"}


def test_the_job_script_asks_for_what_was_said(tmp_path, monkeypatch):
    jobqueue = pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("HOME", str(tmp_path))
    job = SlurmJob(cores=8, memory="24GB", walltime="02:00:00", gpus=1, queue="gpu", account="radiology")
    with jobqueue.SLURMCluster(**slurm_options(job)) as cluster:
        script = cluster.job_script()
    for line in ("-p gpu", "-A radiology", "--cpus-per-task=8", "-t 02:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {line}\n" in script
    assert "--nthreads 1 " in script
    assert "--lifetime 6900s" in script
    assert "--resources GPU=1" in script
    assert "export OMP_NUM_THREADS=8" in script
    assert "tls://" in script


@pytest.mark.parametrize(
    "words", [["cores=0"], ["gpus=2"], ["gpus=x"], ["walltime=4h"], ["walltime=00:05:00"], ["queue"], ["x=1"]]
)
def test_jobs_that_make_no_sense_are_refused(words):
    with pytest.raises(InvalidRequest):
        SlurmJob.parse(words)


def test_a_gpu_is_asked_for_where_workers_have_one(client):
    class WithGpu:
        def scheduler_info(self, n_workers):
            return {"workers": {"a": {"nthreads": 1, "resources": {"GPU": 1}}, "b": {"nthreads": 1}}}

    detector = WorkerDetector(worker_detectors.load)
    assert Workers(WithGpu(), detector)._needs() == {"GPU": 1}
    assert Workers(client, detector)._needs() is None
