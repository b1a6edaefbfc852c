"""`medanomalyclip web`: the panel's experience in a browser, without Slicer."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path

from ..errors import InvalidRequest, UnreadableImage
from .options import DetectorLoader
from .terminal import EXIT_DONE

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_UNENCRYPTED = "medanomalyclip: images travel unencrypted to other computers; put a proxy with TLS before it"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    web = commands.add_parser(
        "web",
        help="open a study in the browser",
        description="Show slices, detect and look at the results in a browser. The page is served to this "
        "computer alone unless --host says otherwise, and only to who opens the address that is printed: it "
        "holds a token, made anew each time unless MEDANOMALYCLIP_WEB_TOKEN is set to one.",
    )
    add = web.add_argument
    add("input", type=Path, nargs="?", metavar="INPUT", help="image file or DICOM folder to begin with")
    add("--model", type=Path, metavar="BUNDLE", help="folder of a detector (default: the bundled one)")
    add(
        "--detectors",
        type=Path,
        metavar="FOLDER",
        help="offer the detectors whose folders lie in it, too, such as My detectors of Slicer's panel",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this computer alone)")
    add("--port", type=int, default=8090, help="0 for any that is free (default: 8090)")
    add(
        "--readers",
        type=_count,
        metavar="N",
        help="up to N readers at once, each with a process of their own",
    )
    add(
        "--idle",
        type=int,
        metavar="SECONDS",
        help="end when no browser was there for so long (default: never; with --readers, 300 for each)",
    )
    add("--no-browser", action="store_true", help="print the address only")
    web.set_defaults(run=run, json=False)


def run(arguments: argparse.Namespace, load: DetectorLoader) -> int:
    if arguments.input is not None and not arguments.input.exists():
        raise UnreadableImage(f"{arguments.input.name} does not exist")
    if arguments.detectors is not None and not arguments.detectors.is_dir():
        raise InvalidRequest(f"{arguments.detectors} is no folder of detectors")
    if not 0 <= arguments.port <= 65535:
        raise InvalidRequest("--port wants a number from 0 to 65535")
    if arguments.host not in _LOOPBACK:
        print(_UNENCRYPTED, file=sys.stderr)
    if arguments.readers:
        _serve_readers(arguments)
    else:
        _serve_one(arguments, load)
    return EXIT_DONE


def _serve_one(arguments: argparse.Namespace, load: DetectorLoader) -> None:
    from ..web.server import ServerOptions, serve

    options = ServerOptions(
        study=arguments.input,
        model=arguments.model,
        detectors=arguments.detectors,
        device=arguments.device,
        host=arguments.host,
        port=arguments.port,
        token=_token(),
        idle_seconds=arguments.idle or 0,
        open_browser=not arguments.no_browser,
    )
    serve(options, load, _tell)


def _serve_readers(arguments: argparse.Namespace) -> None:
    from ..web.application import require
    from ..web.launcher import Launcher, launch, reader_command

    require()
    options = ["--device", arguments.device]
    if arguments.model is not None:
        options += ["--model", str(arguments.model)]
    if arguments.detectors is not None:
        options += ["--detectors", str(arguments.detectors)]
    if arguments.input is not None:
        options.append(str(arguments.input))
    token = _token()
    command = reader_command(*options, idle_seconds=300 if arguments.idle is None else arguments.idle)
    launcher = Launcher(command, token, arguments.readers)
    launch(launcher, arguments.host, arguments.port, lambda address: _tell(f"{address}/?secret={token}"))


def _token() -> str:
    from ..web.entrance import TOKEN

    return os.environ.get(TOKEN) or secrets.token_urlsafe(24)


def _tell(address: str) -> None:
    print(f"Open {address}\nCtrl-C ends it.", flush=True)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of readers")
    return int(text)
