"""Three ways to workers: processes of this computer, jobs of SLURM, or a Dask scheduler that runs already.

Each is a context that gives a connected Dask client. Traffic of those that are started here is encrypted with
keys made for the one run: whoever can talk to a scheduler can run code as its user.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ClusterFailed, DependencyMissing, InvalidRequest
from .runtime import usable_cores

if TYPE_CHECKING:
    from distributed import Client

_LOOPBACK = "127.0.0.1:0"
_CONFIGURATION = {
    # One loss is told at once; `cluster` itself does lost series again.
    "distributed.scheduler.allowed-failures": 0,
    # What waits, waits at the scheduler: it is not lost with the worker that it would be waiting at.
    "distributed.scheduler.worker-saturation": 1.0,
    # Workers keep nothing that could be put on disk; at the limit, the series at hand is ended.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    # A worker that died is started anew, which takes a while on a busy computer.
    "distributed.deploy.lost-worker-timeout": "2 minutes",
}
_REPLACE_SECONDS = 15
_ANSWER_SECONDS = 10
_THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


def threads_of_each(workers: int) -> int:
    """Threads for each of some workers on this computer, so that together they use its cores once."""
    return max(1, usable_cores() // workers)


@contextmanager
def local_workers(count: int, *, gpus: int = 0) -> Iterator[Client]:
    """Processes of this computer, reachable from it alone, each with an even share of cores and memory.

    Args:
        count: how many.
        gpus: that they share; each worker then counts as one that has a GPU.

    Raises:
        DependencyMissing: Dask is not installed.
        ClusterFailed: they cannot be started.
    """
    dask, distributed = _dask()
    from distributed.system import MEMORY_LIMIT

    threads = str(threads_of_each(count))
    environment = dict.fromkeys(_THREAD_VARIABLES, threads)
    configuration = {**_CONFIGURATION, "distributed.nanny.pre-spawn-environ": environment}
    with ExitStack() as opened:
        with _starting():
            opened.enter_context(dask.config.set(configuration))
            cluster = distributed.LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address=_LOOPBACK,
                memory_limit=MEMORY_LIMIT // count,
                resources={"GPU": 1} if gpus else None,
                security=True,
                silence_logs=logging.ERROR,
            )
            opened.enter_context(cluster)
            opened.enter_context(_kept(cluster, count))
            client = opened.enter_context(distributed.Client(cluster))
            client.register_plugin(_ignoring_interrupts(distributed))
        yield client


def _ignoring_interrupts(distributed: Any) -> Any:
    """Ctrl-C reaches every process of a terminal; what it means is up to the one that runs the command."""

    class IgnoreInterrupts(distributed.WorkerPlugin):
        name = "ignore-interrupts"

        def setup(self, worker: Any) -> None:
            with suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    return IgnoreInterrupts()


@contextmanager
def existing_scheduler(address: str) -> Iterator[Client]:
    """The workers of a scheduler that runs; certificates come from Dask's own configuration.

    Args:
        address: for example "tls://10.0.0.5:8786", or a scheduler file.

    Raises:
        DependencyMissing: Dask is not installed.
        ClusterFailed: nobody answers there.
    """
    _, distributed = _dask()
    try:
        where = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
        client = distributed.Client(**where, timeout=_ANSWER_SECONDS)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterFailed(
            f"No Dask scheduler answers at {address}: {error or type(error).__name__}"
        ) from error
    with client:
        yield client


@dataclass(frozen=True)
class SlurmJob:
    """What each job of SLURM asks for; one worker runs in it.

    Attributes:
        cores, memory, walltime: of a job, as SLURM has them.
        gpus: of a job, 0 or 1.
        queue: the partition; empty for SLURM's own default.
        account: that is charged; empty for the user's own.
        interface: network interface that workers are reached over, for example "ib0"; empty for the default.
    """

    cores: int = 4
    memory: str = "16GB"
    walltime: str = "04:00:00"
    gpus: int = 0
    queue: str = ""
    account: str = ""
    interface: str = ""

    def __post_init__(self) -> None:
        if self.cores < 1 or self.gpus not in (0, 1):
            raise InvalidRequest(
                "A job of SLURM has at least one core, and no GPU or one: it does one series"
            )
        if self.seconds <= 2 * _LEAVE_SECONDS:
            raise InvalidRequest(f"walltime={self.walltime} is too short for a job; give 00:15:00 or more")

    @classmethod
    def parse(cls, words: list[str]) -> SlurmJob:
        """From words like "gpus=1".

        Raises:
            InvalidRequest: a name that is not known, or a value that makes no sense.
        """
        numbers = {"cores", "gpus"}
        values: dict[str, Any] = {}
        for word in words:
            name, is_given, value = word.partition("=")
            if not is_given or name not in {entry.name for entry in fields(cls)}:
                known = ", ".join(entry.name for entry in fields(cls))
                raise InvalidRequest(f"--slurm takes NAME=VALUE with one of the names {known}, not {word!r}")
            if name in numbers and not value.isdecimal():
                raise InvalidRequest(f"--slurm {name}= wants a number, not {value!r}")
            values[name] = int(value) if name in numbers else value
        return cls(**values)

    @property
    def seconds(self) -> int:
        """Its walltime."""
        days, _, clock = self.walltime.rpartition("-")
        parts = clock.split(":")
        if not (all(part.isdecimal() for part in parts) and len(parts) == 3 and (days or "0").isdecimal()):
            raise InvalidRequest(f"walltime={self.walltime} is no time; write HH:MM:SS or D-HH:MM:SS")
        hours, minutes, seconds = map(int, parts)
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


_LEAVE_SECONDS = 300  # before its job is ended, a worker leaves, and what it had is done by another


@contextmanager
def slurm_workers(
    job: SlurmJob, count: int, *, cluster_class: Callable[..., Any] | None = None
) -> Iterator[Client]:
    """Jobs of SLURM, asked for from where this runs: a node that may submit jobs and that they can reach.

    A job that ends is replaced.

    Args:
        job: what each asks for.
        count: how many.
        cluster_class: in place of `dask_jobqueue.SLURMCluster`.

    Raises:
        DependencyMissing: Dask or dask-jobqueue is not installed.
        ClusterFailed: the jobs cannot be asked for.
    """
    dask, distributed = _dask()
    make = cluster_class or _slurm_cluster()
    with ExitStack() as opened:
        with _starting():
            opened.enter_context(dask.config.set(_CONFIGURATION))
            cluster = opened.enter_context(make(**slurm_options(job)))
            cluster.scale(count)
            opened.enter_context(_kept(cluster, count))
            client = opened.enter_context(distributed.Client(cluster))
        yield client


def slurm_options(job: SlurmJob) -> dict[str, Any]:
    """What `SLURMCluster` is given for a job."""
    return {
        "queue": job.queue or None,
        "account": job.account or None,
        "walltime": job.walltime,
        "memory": job.memory,
        # Dask's core is a thread, and a thread a series; SLURM's are what that series may compute with.
        "cores": 1,
        "processes": 1,
        "job_cpu": job.cores,
        "interface": job.interface or None,
        "security": True,
        "shared_temp_directory": str(Path.home()),  # where jobs find the keys
        "scheduler_options": {"dashboard_address": _LOOPBACK},
        "job_extra_directives": ["--gres=gpu:1"] if job.gpus else [],
        "job_script_prologue": [f"export OMP_NUM_THREADS={job.cores}"],
        "worker_extra_args": [
            *("--lifetime", f"{job.seconds - _LEAVE_SECONDS}s"),
            *("--resources", "GPU=1") * job.gpus,
        ],
        "silence_logs": "error",
    }


_INSTALL = "{} is not installed; in the folder of this repository: pip install '.[cluster]'"


def _dask() -> tuple[Any, Any]:
    try:
        import cryptography  # noqa: F401  # makes the keys
        import dask
        import distributed
    except ImportError as error:
        raise DependencyMissing(_INSTALL.format(f"Python package {error.name}")) from error
    return dask, distributed


@contextmanager
def _kept(cluster: Any, count: int) -> Iterator[None]:
    """Ask again and again for as many workers as there should be; Dask itself replaces none."""
    from tornado.ioloop import PeriodicCallback

    again = PeriodicCallback(lambda: cluster.scale(count), 1000 * _REPLACE_SECONDS)
    cluster.loop.add_callback(again.start)
    try:
        yield
    finally:
        cluster.loop.add_callback(again.stop)


def _slurm_cluster() -> Callable[..., Any]:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise DependencyMissing(_INSTALL.format("dask-jobqueue")) from error
    return SLURMCluster


@contextmanager
def _starting() -> Iterator[None]:
    """Tell what keeps workers from being started in the user's words."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ClusterFailed(f"Workers could not be started: {error}") from error
