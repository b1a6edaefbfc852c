"""An archive that speaks DICOMweb: search it (QIDO-RS), fetch series (WADO-RS), store results (STOW-RS).

An address in; attributes as the archive tells them, or files, out. Everything that an archive or the network
can do wrong becomes one typed error, whose text names no study.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .dicomweb_login import AUTHORITIES, CERTIFICATE, PASSWORD, TOKEN, USER, Login
from .errors import (
    ArchiveFailed,
    Cancelled,
    DependencyMissing,
    InvalidRequest,
    MedAnomalyCLIPError,
    UnsupportedImage,
)
from .limits import VARIABLE, limits
from .output_folder import writing

if TYPE_CHECKING:
    from pydicom import Dataset

Attributes = dict[str, Any]
"""One study, series or instance in DICOM's JSON: {"0020000D": {"vr": "UI", "Value": [...]}, ...}."""

_PAGE = 100  # studies or series asked for at once
_SECONDS = (10, 120)  # to be reached, and to say anything: it may have to check what it stores
_REQUEST_BYTES = 2**27  # of files that are stored at once
_STORED_BEFORE = 0x0111  # the archive has this object already (PS3.4 table GG.4-2, PS3.7 annex C)
_IN_ONE_PIECE = 2**40


@dataclass(frozen=True)
class Archive:
    """Where an archive is. It goes to workers, so nothing in it is secret.

    Attributes:
        url: of its DICOMweb service, for example "https://pacs.example/dicom-web".
        allow_http: take a connection that is not encrypted; with this computer itself, it is taken anyway.

    Raises:
        InvalidRequest: no such address, one that holds a password, or one that is not encrypted.
    """

    url: str
    allow_http: bool = False

    def __post_init__(self) -> None:
        try:
            address = urlsplit(self.url)
            host, _ = address.hostname or "", address.port
        except ValueError:
            host = ""
        if not host or address.scheme not in ("http", "https") or address.query or address.fragment:
            raise InvalidRequest(
                "The archive wants the address of a DICOMweb service, such as https://pacs.example/dicom-web"
            )
        if address.username is not None or address.password is not None:
            raise InvalidRequest(
                "The archive's address holds a user or password, which others can see there: leave them out, "
                "and set the environment variables, or use the keyring (see the README)"
            )
        if address.scheme == "http" and not (self.allow_http or _is_loopback(host)):
            raise InvalidRequest(
                f"{host} is asked for without encryption (http), so that others could read images and "
                "password: use https, or --allow-http on a network that you trust"
            )
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def connect(self) -> Connection:
        """The connection of this process; it is opened once for the same credentials.

        Raises:
            DependencyMissing: dicomweb-client is not installed.
            InvalidRequest: the environment's credentials contradict each other.
        """
        return _connection(self.url, Login.of_environment())


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@lru_cache(maxsize=4)
def _connection(url: str, login: Login) -> Connection:
    return Connection(url, login)


class Connection:
    """What is asked of one archive."""

    def __init__(self, url: str, login: Login) -> None:
        """Prepare it; nothing is sent yet."""
        try:
            from dicomweb_client import DICOMwebClient

            from .dicomweb_session import open_session
        except ImportError as error:
            raise DependencyMissing(
                f"Python package {error.name} is not installed, which archives need: "
                "pip install dicomweb-client"
            ) from error

        session = open_session(url, login.completed(url))

        def client(**options: Any) -> Any:
            made = DICOMwebClient(url, session, timeout=_SECONDS, **options)
            made.set_http_retry_params(retry=False)  # the session does, for failures of the network too
            return made

        self._client = client()
        # A request that is sent in pieces cannot be sent again.
        self._storing = client(chunk_size=_IN_ONE_PIECE)

    def studies(self, query: Mapping[str, str]) -> Iterator[Attributes]:
        """Studies that match, as the archive has them; QIDO-RS's matching, by DICOM keyword."""
        with _asking("search for studies"):
            yield from _pages(self._client.search_for_studies, "StudyInstanceUID", query)

    def series(self, study: str, query: Mapping[str, str]) -> Iterator[Attributes]:
        """Series of a study that match."""

        def search(**options: Any) -> list[Attributes]:
            fields = ["SeriesDescription", "NumberOfSeriesRelatedInstances"]
            return self._client.search_for_series(study, fields=fields, **options)

        with _asking("search for series"):
            yield from _pages(search, "SeriesInstanceUID", query)

    def sample(self, study: str, series: str) -> Attributes:
        """All attributes but pixels of one object of a series; empty for a series without any."""
        with _asking("search for an object"):
            found = self._client.search_for_instances(study, series, limit=1)
            if not found:
                return {}
            told = self._client.retrieve_instance_metadata(study, series, first(found[0], "SOPInstanceUID"))
            return told[0] if isinstance(told, list) else told

    def fetch(
        self, study: str, series: str, folder: Path, *, is_stopped: Callable[[], bool] = lambda: False
    ) -> int:
        """Write all files of a series, compressed as they are stored, into a folder.

        Args:
            study, series: UIDs.
            folder: is there; files have neutral names.
            is_stopped: asked before each file.

        Returns:
            How many they are.

        Raises:
            ArchiveFailed: the archive cannot be reached, or does not send them.
            UnsupportedImage: they are more than `limits` lets pass.
            OutputFailed: they cannot be written.
            Cancelled: it was stopped.
        """
        count = 0
        wanted = (("application/dicom", "*"),)
        with _asking("send a series"), _unwarned():
            for dataset in self._client.iter_series(study, series, media_types=wanted):
                if is_stopped():
                    raise Cancelled("The series was not fetched to its end")
                count += 1
                check_count(count)
                path = folder / f"{count:05d}.dcm"
                with writing(path):
                    dataset.save_as(path, enforce_file_format=True)
        return count

    def store(self, study: str, files: Sequence[Path]) -> None:
        """Store files in a study; those that the archive has already are left as they are.

        Raises:
            ArchiveFailed: the archive cannot be reached, or does not take all of them.
        """
        from pydicom import dcmread

        for some in _requests(files):
            datasets = [dcmread(path) for path in some]
            with _asking("store results"), _unwarned():
                refused = self._store(study, datasets)
            if refused:
                reasons = ", ".join(sorted({f"0x{reason:04X}" for reason in refused}))
                raise ArchiveFailed(
                    f"The archive did not store {len(refused)} of {len(some)} results (failure {reasons}); "
                    "ask whoever runs it which objects it takes"
                )

    def _store(self, study: str, datasets: Sequence[Dataset]) -> list[int]:
        """Failure reasons of those that were not stored."""
        from pydicom import Dataset
        from requests import HTTPError

        try:
            answer = self._storing.store_instances(datasets, study)
        except HTTPError as error:
            # None was stored, and the text says why; perhaps because they are there.
            if error.response is None or error.response.status_code != HTTPStatus.CONFLICT:
                raise
            answer = Dataset.from_json(error.response.json())
            if not answer.get("FailedSOPSequence"):
                raise
        reasons = [int(item.get("FailureReason") or 0) for item in answer.get("FailedSOPSequence") or []]
        return [reason for reason in reasons if reason != _STORED_BEFORE]


def first(attributes: Attributes, keyword: str) -> str:
    """First value of an attribute as text; empty where the archive does not tell it."""
    values = values_of(attributes, tag(keyword))
    return "" if not values or values[0] is None else str(values[0])


def values_of(attributes: Attributes, tag: str) -> list[Any]:
    """Values of an attribute; none for what an archive tells against DICOM's rules."""
    element = attributes.get(tag) if isinstance(attributes, dict) else None
    values = element.get("Value") if isinstance(element, dict) else None
    return values if isinstance(values, list) else []


def tag(keyword: str) -> str:
    """Eight hexadecimal digits, by which DICOM's JSON knows an attribute; empty for what is no keyword."""
    from pydicom.datadict import tag_for_keyword

    number = tag_for_keyword(keyword)
    return "" if number is None else f"{number:08X}"


def check_count(count: int) -> None:
    """Refuse a series of more files than are taken."""
    if count > limits().folder_files:
        raise UnsupportedImage(
            f"The series has more than the {limits().folder_files:,} files that are taken; "
            f"{VARIABLE} moves the limit"
        )


def _pages(
    search: Callable[..., list[Attributes]], name: str, query: Mapping[str, str]
) -> Iterator[Attributes]:
    """All that match, asked for in parts: an archive may tell fewer at once than it was asked for."""
    seen: set[str] = set()
    offset = 0
    while True:
        page = search(search_filters=dict(query), limit=_PAGE, offset=offset)
        if not all(first(found, name) for found in page):
            raise ValueError("something without a UID")
        fresh = [found for found in page if first(found, name) not in seen]
        if not fresh:  # the end, or an archive that begins anew whatever it is asked
            return
        seen.update(first(found, name) for found in fresh)
        offset += len(page)
        yield from fresh


def _requests(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Files in their order, in parts that can be sent at once."""
    some: list[Path] = []
    size = 0
    for path in files:
        size += path.stat().st_size
        if some and size > _REQUEST_BYTES:
            yield some
            some, size = [], path.stat().st_size
        some.append(path)
    if some:
        yield some


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without warnings, which quote headers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turn whatever goes wrong with the archive into one typed error.

    dicomweb-client and pydicom meet here what a strange server sends, and raise nearly every exception type
    there is. The texts of their errors are left out, as is their chain: they quote addresses, which name
    studies.
    """
    from requests import exceptions

    try:
        yield
    except MedAnomalyCLIPError:
        raise
    except exceptions.HTTPError as error:
        raise ArchiveFailed(
            _refusal(what, 0 if error.response is None else error.response.status_code)
        ) from None
    except exceptions.SSLError:
        raise ArchiveFailed(
            "No encrypted connection to the archive: its certificate, or ours, is not trusted. "
            f"Set {AUTHORITIES} to the PEM file of its authority, and {CERTIFICATE} to a client certificate "
            "if it wants one"
        ) from None
    except exceptions.Timeout:
        raise ArchiveFailed(f"The archive was asked to {what}, and did not answer in time") from None
    except exceptions.InvalidSchema:
        raise ArchiveFailed(
            "The archive sends us on to another server, which is not followed: give that one's address"
        ) from None
    except exceptions.ChunkedEncodingError:
        raise ArchiveFailed(f"The archive was asked to {what}, and broke off its answer") from None
    except exceptions.ConnectionError:
        raise ArchiveFailed(
            "The archive cannot be reached: is its address right, does it run, is there a proxy or firewall?"
        ) from None
    except Exception as error:
        raise ArchiveFailed(
            f"The archive was asked to {what}, and its answer is not understood ({type(error).__name__}): "
            "is its address that of a DICOMweb service?"
        ) from None


def _refusal(what: str, status: int) -> str:
    words = {known.value: f" {known.phrase}" for known in HTTPStatus}.get(status, "")
    told = f"The archive was asked to {what}, and answered {status}{words}"
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return (
            f"{told}: are the credentials there and right? {TOKEN}, or {USER} and {PASSWORD}, or the "
            "keyring, on every computer that works for this batch"
        )
    return told
