"""One address for several readers: each gets a process of their own, which no other browser reaches.

wslink's own launcher asks nobody for a token, and its processes listen to the network themselves. Here they
listen to this computer alone, and what belongs to a browser is passed on to its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import InvalidRequest
from .entrance import TOKEN, address, cannot_listen, headers, is_shown, refusal, remember, remembered

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web

_START_SECONDS = 120.0


@dataclass(frozen=True)
class Place:
    """One reader's process.

    Attributes:
        process: it ends by itself when its browser has been gone for a while.
        port: where it listens on this computer.
        token: what it wants to be shown.
        ended: done when the process has ended.
    """

    process: asyncio.subprocess.Process
    port: int
    token: str
    ended: asyncio.Task[Any]

    @property
    def is_there(self) -> bool:
        return not self.ended.done()


class Launcher:
    """Starts processes for readers who have the token, and passes requests on."""

    def __init__(self, command: Sequence[str], token: str, most: int) -> None:
        """
        Args:
            command: starts one reader's server, which takes its token from the environment, and prints its
                address in its first line.
            token: what a browser has to show to get a place.
            most: readers at the same time.
        """
        self._command, self._token, self._most = tuple(command), token, most
        self._places: dict[str, Place] = {}  # by what the browser's cookie says
        self._starting = 0
        self._client: aiohttp.ClientSession | None = None

    def application(self) -> web.Application:
        from aiohttp import web

        app = web.Application()
        app.router.add_get("/", self._enter)
        app.router.add_get("/index.html", self._enter)
        app.router.add_get("/ws", self._pass_socket)
        app.router.add_get("/{path:.+}", self._pass_file)
        app.cleanup_ctx.append(self._life)
        return app

    async def _life(self, _app: web.Application) -> AsyncIterator[None]:
        import aiohttp

        # Compressed files are handed on as they are.
        self._client = aiohttp.ClientSession(auto_decompress=False)
        yield
        await self._client.close()
        for place in self._places.values():
            if place.is_there:
                place.process.terminate()
        await asyncio.gather(*(place.ended for place in self._places.values()))

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        place = self._place_of(request)
        if place is not None and request.path != "/" and request.query.get("secret") == place.token:
            return await self._pass_file(request)
        if place is None:
            if not is_shown(request, self._token):
                return refusal(request)
            self._places = {key: place for key, place in self._places.items() if place.is_there}
            if len(self._places) + self._starting >= self._most:
                words = f"All {self._most} places are taken; try again when a reader has left."
                return web.Response(status=503, text=words, headers=headers(request))
            key = secrets.token_urlsafe(24)
            place = self._places[key] = await self._start()
        else:
            key = remembered(request)
        response = web.Response(
            status=302, headers={**headers(request), "Location": f"/index.html?secret={place.token}"}
        )
        remember(request, response, key)
        return response

    async def _start(self) -> Place:
        token = secrets.token_urlsafe(24)
        self._starting += 1
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, TOKEN: token},
            )
            port = await _port_of(process)
        finally:
            self._starting -= 1
        return Place(process, port, token, asyncio.create_task(process.communicate()))

    def _place_of(self, request: web.Request) -> Place | None:
        place = self._places.get(remembered(request))
        return place if place is not None and place.is_there else None

    async def _pass_file(self, request: web.Request) -> web.Response:
        from aiohttp import web

        place = self._place_of(request)
        if place is None:
            return refusal(request)
        assert self._client is not None
        source = f"http://127.0.0.1:{place.port}{request.path_qs}"
        async with self._client.get(source, allow_redirects=False) as answer:
            kept = ("Content-Type", "Content-Encoding")
            told = {name: answer.headers[name] for name in kept if name in answer.headers}
            # The process takes the launcher for the browser, and does not know the address of the page.
            told |= headers(request) if request.path == "/index.html" else {}
            return web.Response(status=answer.status, body=await answer.read(), headers=told)

    async def _pass_socket(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        place = self._place_of(request)
        if place is None:
            return refusal(request)
        assert self._client is not None
        browser = web.WebSocketResponse(max_msg_size=0)
        await browser.prepare(request)
        async with self._client.ws_connect(f"ws://127.0.0.1:{place.port}/ws", max_msg_size=0) as server:
            ways = [asyncio.create_task(_pump(*way)) for way in ((browser, server), (server, browser))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        with contextlib.suppress(ConnectionError):
            await browser.close()
        return browser


async def _port_of(process: asyncio.subprocess.Process) -> int:
    """Where a reader's server listens, when it says so."""
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), _START_SECONDS)
        port = urlsplit(line.decode().strip().removeprefix("Open ")).port
        if port is not None:
            return port
    except asyncio.TimeoutError:  # another class before Python 3.11
        process.kill()
    await process.communicate()
    raise RuntimeError("A reader's process ended before it could be reached; its errors are above")


async def _pump(
    source: web.WebSocketResponse | aiohttp.ClientWebSocketResponse,
    sink: web.WebSocketResponse | aiohttp.ClientWebSocketResponse,
) -> None:
    import aiohttp

    async for message in source:
        if message.type == aiohttp.WSMsgType.BINARY:
            await sink.send_bytes(message.data)
        elif message.type == aiohttp.WSMsgType.TEXT:
            await sink.send_str(message.data)


def reader_command(*options: str, idle_seconds: int) -> list[str]:
    """The command line of one reader's server, for `Launcher`."""
    serve = [sys.executable, "-m", "MedAnomalyCLIPLib.cli", "web", "--port", "0", "--no-browser"]
    return [*serve, "--idle", str(idle_seconds), *options]


def launch(launcher: Launcher, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C, or until it is told to end; readers' processes end with it.

    Args:
        ready: called with the address, when it can be opened.

    Raises:
        InvalidRequest: the port is taken, or the address is not this computer's.
    """
    from aiohttp import web

    async def serve() -> None:
        # Addresses hold tokens, so that no access is logged.
        runner = web.AppRunner(launcher.application(), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            ready(address(host, runner.addresses[0][1]))
            ended = asyncio.Event()
            with contextlib.suppress(NotImplementedError):  # on Windows
                # Else the processes of readers would outlive this one.
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
            await ended.wait()
        finally:
            await runner.cleanup()

    try:
        asyncio.run(serve())
    except OSError as error:
        raise InvalidRequest(cannot_listen(host, port, error)) from error
