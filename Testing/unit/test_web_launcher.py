"""Several readers behind one address, with processes that only say who they are."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp comes with the extras web and test")
web = pytest.importorskip("aiohttp.web")

from MedAnomalyCLIPLib.web.launcher import Launcher  # noqa: E402

TOKEN = "the launcher's"
SERVER = """
import asyncio, os
from aiohttp import web
async def page(request):
    token = os.environ["MEDANOMALYCLIP_WEB_TOKEN"]
    assert request.path != "/index.html" or request.query["secret"] == token
    return web.Response(text=f"process {os.getpid()}", headers={"Set-Cookie": "own=1"})
async def socket(request):
    answer = web.WebSocketResponse()
    await answer.prepare(request)
    async for message in answer:
        await answer.send_bytes(f"{os.getpid()} heard ".encode() + message.data)
    return answer
async def leave(request):
    os._exit(0)
app = web.Application()
app.router.add_get("/ws", socket)
app.router.add_get("/leave", leave)
app.router.add_get("/{any:.*}", page)
async def main():
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"Open http://127.0.0.1:{runner.addresses[0][1]}/?secret=-", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@asynccontextmanager
async def launched(most=2, code=SERVER):
    """The address of a launcher."""
    runner = web.AppRunner(Launcher([sys.executable, "-c", code], TOKEN, most).application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def browser():
    return aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))  # keeps cookies of bare addresses


def run(coroutine):
    """In a thread of its own: tests in a browser leave an event loop behind in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


async def text(client, address, **options):
    async with client.get(address, **options) as answer:
        return answer.status, await answer.text()


def test_each_browser_has_a_process_and_keeps_it():
    async def check():
        async with launched() as place, browser() as one, browser() as two:
            first = await text(one, f"{place}/", params={"secret": TOKEN})
            second = await text(two, f"{place}/", params={"secret": TOKEN})
            assert first[0] == second[0] == 200 and first != second
            assert await text(one, f"{place}/index.html") == await text(one, f"{place}/logo.png") == first
            assert await text(two, f"{place}/") == second
            async with one.ws_connect(f"{place}/ws") as socket:
                await socket.send_bytes(b"detect")
                heard = (await socket.receive()).data.decode()
            assert f"process {heard.split()[0]}" == first[1] and heard.endswith("heard detect")
            async with one.get(f"{place}/index.html") as answer:
                policy = answer.headers["Content-Security-Policy"]
            assert f"ws://{place.removeprefix('http://')}" in policy and "http" not in policy
            assert not [cookie for cookie in one.cookie_jar if cookie.key == "own"]

    run(check())


def test_without_the_token_there_is_nothing():
    async def check():
        async with launched() as place, browser() as client:
            for path in ("/", "/index.html", "/?secret=wslink-secret", "/ws", "/logo.png"):
                status, words = await text(client, place + path)
                assert (status, "holds the token" in words) == (403, True)

    run(check())


def test_the_place_of_a_reader_who_has_left_is_given_to_another():
    async def check():
        async with launched(most=1) as place, browser() as one, browser() as two:
            assert (await text(one, f"{place}/", params={"secret": TOKEN}))[0] == 200
            status, words = await text(two, f"{place}/", params={"secret": TOKEN})
            assert status == 503 and "taken" in words
            with pytest.raises(aiohttp.ClientError):
                async with one.get(f"{place}/leave") as answer:
                    answer.raise_for_status()
            for _ in range(100):  # until the process is known to have ended
                status, _ = await text(two, f"{place}/", params={"secret": TOKEN})
                if status == 200:
                    return
                await asyncio.sleep(0.05)
            pytest.fail("the place was not given")

    run(check())


def test_a_process_that_cannot_start_takes_no_place():
    async def check():
        async with launched(most=1, code="print('nothing can be served')") as place, browser() as client:
            for _ in range(2):
                status, words = await text(client, f"{place}/", params={"secret": TOKEN})
                assert status == 500 and "taken" not in words

    run(check())


@pytest.mark.skipif(os.name == "nt", reason="processes are ended otherwise on Windows")
def test_no_process_outlives_the_launcher():
    code = f"""
import sys
from MedAnomalyCLIPLib.web.launcher import Launcher, launch
launcher = Launcher([sys.executable, "-c", {SERVER!r}], "t", 1)
launch(launcher, "127.0.0.1", 0, lambda place: print(place, flush=True))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    place = launcher.stdout.readline().strip()

    async def enter():
        async with browser() as client:
            return await text(client, f"{place}/", params={"secret": "t"})

    process = int(run(enter())[1].split()[1])
    os.kill(process, 0)
    launcher.terminate()
    launcher.wait(timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
