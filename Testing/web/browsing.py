"""A running `medanomalyclip web`, and a reader with a browser, as the tests handle them."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SERVED = Path(__file__).with_name("served.py")
COMMAND = ("-m", "MedAnomalyCLIPLib.cli", "web")  # with a detector that is one
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOLD = "MEDANOMALYCLIP_TEST_HOLD"
SIZE = {"width": 1200, "height": 900}
WAIT_MS = 120_000  # busy machines start slowly


def find_python() -> str | None:
    """The Python that has trame-slicer: this one, or that of the environment which `make test` makes."""
    beside = ROOT / ".venv-web" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for python in (os.environ.get("MEDANOMALYCLIP_WEB_PYTHON"), sys.executable, str(beside)):
        if python and Path(python).is_file() and _has_trame_slicer(python):
            return python
    return None


def _has_trame_slicer(python: str) -> bool:
    # slicer_layer_dm ties it to its own slicer-core, and comes with the extra `web` only.
    code = "from importlib.util import find_spec as f; exit(not (f('trame_slicer') and f('slicer_layer_dm')))"
    return subprocess.run([python, "-c", code], timeout=60).returncode == 0


def find_chromium() -> str | None:
    """This machine's Chromium; nothing is downloaded."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)


@contextmanager
def headless(program: str) -> Iterator[Any]:
    """A browser of playwright without a window."""
    from playwright.sync_api import sync_playwright

    # Its sandbox refuses to run as root, as in containers.
    sandbox = [] if os.name == "nt" or os.getuid() else ["--no-sandbox"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu", *sandbox])
        yield browser
        browser.close()


class Server:
    """A running `medanomalyclip web`.

    Attributes:
        address: what it printed, token included.
        place: the address without token.
        hold: while this file is there, only as many slices are detected as it says.
    """

    def __init__(
        self, python: str, options: list[str], log: Path, program: Sequence[str] = (str(SERVED),)
    ) -> None:
        """
        Args:
            python: that has trame-slicer.
            options: of `medanomalyclip web`.
            log: file for standard error.
            program: with a fake detector, if nothing is said.
        """
        self._log = log
        command = [python, *program, *options]
        self.hold = log.with_name("hold")
        paths = [str(ROOT / "MedAnomalyCLIP"), str(ROOT / "Testing")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), HOLD: str(self.hold)}
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
            )
        self._line = self.process.stdout.readline()
        assert self._line.startswith("Open http"), self._line + log.read_text()
        self.address = self._line.removeprefix("Open ").strip()
        parts = urlsplit(self.address)
        self.port, self.place = parts.port, f"{parts.scheme}://{parts.netloc}/"

    def told(self) -> str:
        """Everything that was printed; only after `stop` is it complete."""
        rest = self.process.stdout.read() if self.process.poll() is not None else ""
        return self._line + rest + self._log.read_text()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


class Reader:
    """Somebody with a browser of their own.

    Attributes:
        page: of playwright.
        requests: addresses that the page asked for.
    """

    def __init__(self, browser: Any, address: str) -> None:
        context = browser.new_context(viewport=SIZE)
        context.set_default_timeout(WAIT_MS)
        self.page = context.new_page()
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector(".detect-button")

    def text(self, name: str) -> str:
        return self.page.text_content(f".{name}") or ""

    def wait_for_text(self, name: str, part: str) -> None:
        self.page.locator(f".{name}", has_text=part).first.wait_for()

    def wait_for_study(self, words: str = "voxels") -> None:
        self.wait_for_text("volume-words", words)
        self.page.wait_for_selector(".detect-button:not([disabled])")

    def click(self, name: str) -> None:
        self.page.click(f".{name}")

    def choose(self, name: str, title: str) -> None:
        """One of the items of a selector."""
        self.click(name)
        self.page.get_by_role("option", name=title, exact=True).click()

    def upload(self, path: Path, button: str = "file") -> None:
        """Hand a file to the page, or with "folder" all that a folder holds."""
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(f".mdi-{button}-upload").click()
        chooser.value.set_files(path)

    def axial(self) -> np.ndarray:
        """(H, W, 3) int: the axial view as it is on the screen, without its slider and its title."""
        from PIL import Image

        box = self.page.locator(".layout-grid-item").first.bounding_box()
        inside = {"x": box["x"], "y": box["y"] + 30, "width": box["width"], "height": box["height"] - 80}
        picture = self.page.screenshot(clip=inside)
        return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)

    def settled_axial(self, shows: Callable[[np.ndarray], Any] = lambda _: True) -> np.ndarray:
        """The axial view once it shows something and does not change any more."""
        picture = self.axial()
        for _ in range(WAIT_MS // 300):
            self.page.wait_for_timeout(300)
            before, picture = picture, self.axial()
            if np.array_equal(before, picture) and shows(picture):
                return picture
        raise TimeoutError("the axial view never showed what was waited for")


def write_volume(path: Path, voxels: np.ndarray) -> Path:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((2.0, 2.0, 8.0))
    SimpleITK.WriteImage(image, str(path))
    return path
