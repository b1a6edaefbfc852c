"""Talking to an archive's web server: whom we trust, how patient we are, how much we take.

An address and a login in; a `requests.Session` out. Imported only when an archive is asked for, since it
needs requests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPBasicAuth
from urllib3.util import Retry

from . import __version__
from .dicomweb_login import Login
from .errors import UnsupportedImage
from .limits import VARIABLE, limits

# Waits of 0, 1, 2, 4 and 8 seconds, or as long as the server asks for; fewer where nobody answers at all.
_TRIES, _TRIES_TO_REACH, _TRIES_TO_HEAR, _WAIT = 5, 3, 2, 0.5
_BUSY = (408, 429, 502, 503, 504)

# These name studies and queries in their warnings, which Python would print where nobody handles them.
for _name in ("urllib3", "dicomweb_client"):
    logging.getLogger(_name).addHandler(logging.NullHandler())


def open_session(url: str, login: Login) -> requests.Session:
    """A session with one server.

    Args:
        url: address of its DICOMweb service. Redirections away from its server are not followed, so that
            neither images nor credentials get anywhere else.
        login: who we are.
    """
    session = requests.Session()
    address = urlsplit(url)
    session.adapters.clear()
    session.mount(f"{address.scheme}://{address.netloc}/", _Adapter(login.authorities))
    session.auth = _Bearer(login.token) if login.token else None
    if login.user:
        session.auth = HTTPBasicAuth(login.user.encode(), login.password.encode())
    if login.certificate:
        session.cert = (login.certificate, login.key) if login.key else login.certificate
    session.headers.update(
        {"User-Agent": f"medanomalyclip/{__version__}", "Accept": "application/dicom+json"}
    )
    session.hooks["response"].append(_bounded)
    return session


class _Bearer(AuthBase):
    """A token; unlike a header of the session, it is not given to whoever we are redirected to."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class _Adapter(HTTPAdapter):
    """Tries again with growing waits, what stores too: the same objects can be stored twice without harm."""

    def __init__(self, authorities: str) -> None:
        super().__init__(
            max_retries=Retry(
                total=_TRIES,
                connect=_TRIES_TO_REACH,
                read=_TRIES_TO_HEAR,
                other=0,  # certificates that are not trusted
                backoff_factor=_WAIT,
                status_forcelist=_BUSY,
                allowed_methods=("GET", "POST"),
                raise_on_status=False,
            )
        )
        self._authorities = authorities

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        request.headers.pop("Host", None)  # dicomweb-client leaves out the port
        if self._authorities:
            # Set on the session, it would give way to REQUESTS_CA_BUNDLE.
            options["verify"] = self._authorities
        return super().send(request, *args, **options)


def _bounded(response: requests.Response, *args: Any, **options: Any) -> requests.Response:
    """Let no answer fill memory or disk, whatever its header says of its size."""
    text = "json" in response.headers.get("Content-Type", "")
    most = limits().text_bytes if text else limits().fetched_bytes
    told = response.headers.get("Content-Length", "")
    if told.isdecimal() and int(told) > most:
        response.close()
        raise _too_large(most)
    read = response.iter_content

    def bounded(*args: Any, **options: Any) -> Iterator[bytes]:
        seen = 0
        for chunk in read(*args, **options):
            seen += len(chunk)
            if seen > most:
                response.close()
                raise _too_large(most)
            yield chunk

    response.iter_content = bounded  # type: ignore[method-assign]
    return response


def _too_large(most: int) -> UnsupportedImage:
    return UnsupportedImage(
        f"The archive sends more than the {most:,} bytes that are taken at once; {VARIABLE} moves the limit"
    )
