"""The page in a real browser: `medanomalyclip web` in its own environment, driven in headless Chromium.

Where either cannot be had, the tests are skipped and say what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from web.browsing import Reader, Server, find_chromium, find_python, headless, write_volume

SHAPE = (12, 80, 72)


@pytest.fixture(scope="session")
def web_python() -> str:
    python = find_python()
    if python is None:
        pytest.skip("trame-slicer is not installed: make .venv-web/.for-web, or MEDANOMALYCLIP_WEB_PYTHON")
    return python


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium), and CHROMIUM names none")
    with headless(program) as browser:
        yield browser


@pytest.fixture(scope="session")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom with its bright spot as a NIfTI file."""
    from harness import phantom

    return write_volume(tmp_path_factory.mktemp("volumes") / "head.nii.gz", phantom.head(SHAPE)[0])


@pytest.fixture(scope="session")
def start_server(
    web_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """Starts a server with arguments of `medanomalyclip web`; all are stopped at the end."""
    servers = []

    def start(*arguments: Any, **options: Any) -> Server:
        log = tmp_path_factory.mktemp("log") / "stderr"
        words = ["--port", "0", "--no-browser", *map(str, arguments)]
        servers.append(Server(web_python, words, log, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server], head_file: Path) -> Server:
    """A server for all tests that do not need one of their own."""
    return start_server(head_file)


@pytest.fixture(scope="session")
def open_page(browser: Any) -> Callable[[str], Reader]:
    return lambda address: Reader(browser, address)


@pytest.fixture(scope="module")
def reader(server: Server, open_page: Callable[[str], Reader]) -> Reader:
    """A browser with the phantom on its screen, shared by the tests of a file in their order."""
    reader = open_page(server.address)
    reader.wait_for_study()
    return reader
