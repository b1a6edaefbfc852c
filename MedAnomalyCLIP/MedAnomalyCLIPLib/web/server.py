"""Serves the page to one reader: this computer alone unless told otherwise, and never without a token."""

from __future__ import annotations

import os
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest
from .application import start
from .entrance import address, cannot_listen, guard

if TYPE_CHECKING:
    from ..detection import SliceDetector


@dataclass(frozen=True)
class ServerOptions:
    """How a page is served.

    Attributes:
        token: what a browser has to show.
        study: file or folder to begin with; None to wait for one from the browser.
        model: folder of the detector to begin with; None for the bundled one.
        detectors: a folder with those of others to choose from; None for no others.
        device: as torch names it, or "auto".
        host: address to listen on.
        port: 0 for any that is free.
        idle_seconds: end when no browser was connected for so long; 0 to go on.
        open_browser: let this computer's browser show the page.
    """

    token: str = field(repr=False)
    study: Path | None = None
    model: Path | None = None
    detectors: Path | None = None
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8090
    idle_seconds: int = 0
    open_browser: bool = False


def serve(
    options: ServerOptions,
    load: Callable[[Path | str | None, str], SliceDetector],
    ready: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C, or until no browser is left.

    Args:
        load: makes a detector of a folder, on a device.
        ready: called with the address to open, token included.

    Raises:
        BundleInvalid: the detector to begin with cannot be used.
        DependencyMissing: trame-slicer is not installed.
        InvalidRequest: the port is taken, or the address is not this computer's.
    """
    app = start()
    # trame would take this program's arguments for its own, and tell what happens on standard output.
    os.environ["TRAME_ARGS"] = ""
    os.environ["WSLINK_READY_MSG"] = ""
    from trame.app import get_server

    from .detectors import DetectorList
    from .page import build_page
    from .reader import Reader, ReaderLogic
    from .views import SliceViews
    from .volume_reader import VolumeReader

    server = get_server(client_type="vue3")
    server.cli.set_defaults(authKey=options.token)
    views = SliceViews(server, app)
    detectors = DetectorList(options.model, options.detectors)
    reader = Reader(server, ReaderLogic(load), views, detectors, options.device)
    build_page(server, reader, VolumeReader(server, reader), views)

    def on_ready(**_: Any) -> None:
        place = f"{address(options.host, server.port)}/?secret={options.token}"
        ready(place)
        if options.study is not None:
            from trame_server.utils.asynchronous import create_task

            create_task(reader.open(options.study))
        if options.open_browser:
            webbrowser.open(place)

    server.controller.on_server_bind.add(lambda web: guard(web.app, web.config["static"]["/"], options.token))
    server.controller.on_server_ready.add(on_ready)
    try:
        server.start(
            host=options.host,
            port=options.port,
            timeout=options.idle_seconds,
            open_browser=False,
            show_connection_info=False,
        )
    except OSError as error:
        raise InvalidRequest(cannot_listen(options.host, options.port, error)) from error
    finally:
        reader.close()
