"""`medanomalyclip batch`: studies in; results for each series, one manifest and one table out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster_start import SlurmJob, existing_scheduler, local_workers, slurm_workers, threads_of_each
from ..errors import InvalidRequest
from .options import DetectorLoader, add_device_options, add_dicom_options, fraction
from .terminal import (
    EPILOG,
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    print_json,
    stop_on_interrupt,
)

if TYPE_CHECKING:
    from ..batch_series import Engine, Sink
    from ..batch_source import FileInput, SeriesInput
    from ..dicomweb_source import ArchivedSeries


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    batch = commands.add_parser(
        "batch",
        help="detect on every image and series in folders, and go on where an earlier run stopped",
        description="Detect on every image and series of each INPUT. DIR gets a numbered folder for each in"
        " that of its study, manifest.json, which tells of each whether it is done or why it failed, and a"
        " table of all slices. The same command goes on where it was stopped. No file's name goes into DIR;"
        " --list tells which number is which.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = batch.add_argument
    add("input", type=Path, nargs="*", metavar="INPUT", help="image files, or folders of them at any depth")
    add("--output", type=Path, required=True, metavar="DIR", help="where results, manifests and table go")
    add("--list", action="store_true", help="tell which number is which file, and what became of it")
    add("--retry", action="store_true", help="do the series again that failed before")
    add("--table", choices=("csv", "parquet"), default="csv", help="format of the table (default: csv)")
    add("--middle", action="store_true", help="only the middle slice of each volume (default: every slice)")
    add(
        "--axis",
        default="acquisition",
        metavar="AXIS",
        help="direction across the slices: axial, coronal, sagittal, acquisition, I, J or K",
    )
    add("--modality", help="CT, MR, CR, DX, US, ...: instead of what the files say")
    add("--model", type=Path, metavar="BUNDLE", help="folder of a detector (default: the bundled one)")
    add(
        "--threshold",
        type=fraction,
        help="anomaly value from which a pixel counts, 0 to 1 (default: the model's)",
    )
    add(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="pixel values shown as black and white"
    )
    add_device_options(batch)
    archive = batch.add_argument_group(
        "an archive instead of INPUT (pip install '.[dicomweb]')",
        "Its series are fetched one by one, and DICOM results are stored beside them. Credentials come from"
        " the environment or the keyring, see the README.",
    )
    archive.add_argument("--dicomweb", metavar="URL", help="address of its DICOMweb service")
    archive.add_argument(
        "--query",
        nargs="+",
        default=[],
        metavar="KEYWORD=VALUE",
        help="which studies and series, by DICOM keyword: ModalitiesInStudy=CT StudyDate=20260101-20260131",
    )
    archive.add_argument(
        "--allow-http", action="store_true", help="take a connection without encryption to another computer"
    )
    workers = batch.add_argument_group("many processes (pip install '.[cluster]')")
    workers.add_argument(
        "--workers", type=_count, metavar="N", help="on N processes of this computer, or in N jobs of SLURM"
    )
    where = workers.add_mutually_exclusive_group()
    where.add_argument("--scheduler", metavar="ADDRESS", help="on the workers of a Dask scheduler that runs")
    where.add_argument(
        "--slurm",
        nargs="*",
        metavar="NAME=VALUE",
        help="in jobs of SLURM, each with cores=4 memory=16GB walltime=04:00:00 gpus=0, and queue=, account="
        " and interface= as your cluster wants them",
    )
    add("--json", action="store_true", help="print the manifest instead of lines")
    add("--quiet", action="store_true", help="print errors only")
    add_dicom_options(batch)
    batch.set_defaults(run=run)


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return int(text)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    from ..batch import run_batch
    from ..batch_series import BatchSettings

    if arguments.window and not arguments.window[0] < arguments.window[1]:
        raise InvalidRequest("--window wants the lower value first, and two different ones")
    if arguments.list:
        return _list(arguments)
    settings = BatchSettings(
        axis=arguments.axis,
        middle=arguments.middle,
        modality=arguments.modality,
        threshold=arguments.threshold,
        window=tuple(arguments.window) if arguments.window else None,
        dicom=tuple(sorted(set(arguments.dicom))),
    )
    with (
        stop_on_interrupt() as is_stopped,
        _engine(arguments, load) as engine,
        _progress(arguments.json or arguments.quiet) as tell,
    ):
        manifest = run_batch(
            _source(arguments),
            arguments.output,
            engine,
            settings=settings,
            sinks=_sinks(arguments),
            table=arguments.table,
            retry=arguments.retry,
            on_series=tell,
            is_stopped=is_stopped,
        )
        stopped = is_stopped()
    return _conclude(manifest, arguments, stopped)


def _source(arguments: argparse.Namespace) -> Iterable[FileInput | ArchivedSeries]:
    """The series of the files, or of the archive, that the options name."""
    if bool(arguments.input) == bool(arguments.dicomweb):
        raise InvalidRequest(
            "Give either INPUT, files and folders, or the address of an archive: --dicomweb URL"
        )
    if not arguments.dicomweb:
        if arguments.query or arguments.allow_http:
            raise InvalidRequest("--query and --allow-http are about an archive: --dicomweb URL")
        from ..batch_source import search

        return search(arguments.input, leave_out=arguments.output)
    from ..dicomweb import Archive
    from ..dicomweb_source import parse_query, search_archive

    archive = Archive(arguments.dicomweb, allow_http=arguments.allow_http)
    return search_archive(archive, parse_query(arguments.query))


def _sinks(arguments: argparse.Namespace) -> tuple[Sink, ...]:
    """The archive, if there is one, and something to store in it."""
    if not (arguments.dicomweb and arguments.dicom):
        return ()
    from ..dicomweb_sink import StoredInArchive

    return (StoredInArchive(tuple(sorted(set(arguments.dicom)))),)


@contextmanager
def _engine(arguments: argparse.Namespace, load: DetectorLoader) -> Iterator[Engine]:
    """What does the series: this process, or whatever the options ask for."""
    from ..batch import InProcess

    job = None if arguments.slurm is None else SlurmJob.parse(arguments.slurm)
    if arguments.scheduler and arguments.workers:
        raise InvalidRequest("--scheduler brings its own workers: leave out --workers")
    if job and not arguments.workers:
        raise InvalidRequest("--slurm wants the number of jobs too: --workers N")
    if not (arguments.workers or arguments.scheduler):
        yield InProcess(lambda: load(arguments.model, arguments.device))
        return
    from ..cluster import WorkerDetector, Workers
    from ..runtime import gpu_count

    threads = None
    with ExitStack() as opened:
        if arguments.scheduler:
            client = opened.enter_context(existing_scheduler(arguments.scheduler))
        elif job:
            threads = job.cores
            client = opened.enter_context(slurm_workers(job, arguments.workers))
        else:
            threads = threads_of_each(arguments.workers)
            gpus = gpu_count(arguments.device)
            client = opened.enter_context(local_workers(arguments.workers, gpus=gpus))
        if not arguments.quiet:
            print(f"Progress of all workers: {client.dashboard_link}", file=sys.stderr)
        model = arguments.model and arguments.model.absolute()
        yield Workers(client, WorkerDetector(load, model, arguments.device, threads))


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[..., None] | None]:
    """A line for each series, above a bar of all that were found where somebody watches."""
    if quiet:
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="series", leave=False, disable=None) as bar:

        def tell(settled: int, found: int, item: SeriesInput, record: dict[str, Any]) -> None:
            tqdm.write(_line(settled, found, item, record), file=sys.stdout)
            sys.stdout.flush()
            bar.total = found
            bar.update(settled - bar.n)

        yield tell


def _conclude(manifest: dict[str, Any], arguments: argparse.Namespace, stopped: bool) -> int:
    """Tell what became of all, and the exit code that goes with it."""
    counts = manifest["counts"]
    if arguments.json:
        print_json(manifest)
    elif not arguments.quiet:
        present = f", {counts['present']} in the archive already" if counts["present"] else ""
        print(f"{counts['done']} done, {counts['failed']} failed, {counts['stopped']} stopped{present}")
    if counts["failed"]:
        print(
            f"medanomalyclip: {counts['failed']} of {len(manifest['inputs'])} inputs failed;"
            " manifest.json tells why",
            file=sys.stderr,
        )
    if stopped:
        return EXIT_INTERRUPTED
    if any(record.get("error") == "Fault" for record in manifest["inputs"]):
        return EXIT_BUG
    return EXIT_USER_ERROR if counts["failed"] else EXIT_DONE


def _line(settled: int, found: int, item: SeriesInput, record: dict[str, Any]) -> str:
    """One series in one line; the terminal is not the results, so the file may be named."""
    words = record["state"]
    if "highest" in record:
        top = record["highest"]
        words += f"  highest score {top['score']:.3f} at slice {top['index']} of {record['slices']}"
    elif "reason" in record:
        words += f"  {record['reason']}"
    return f"{settled}/{found}  {record['number']:04d}  {item.place}  {words}"


def _list(arguments: argparse.Namespace) -> int:
    from ..batch_records import read_records

    records = read_records(arguments.output)
    for item in _source(arguments):
        record = records.get(item.key, {})
        number = f"{record['number']:04d}" if record else "----"
        print("  ".join(filter(None, (number, record.get("state") or "to do", item.place, item.series))))
    return EXIT_DONE
