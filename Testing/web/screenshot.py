"""A picture of the page with the bundled detector on a head-like phantom, for the README.

    python Testing/web/screenshot.py [PICTURE]

Writes `Resources/web.png`, if nothing else is named. No patient is shown.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "Testing"), str(ROOT / "MedAnomalyCLIP")]

from harness import phantom  # noqa: E402
from web.browsing import COMMAND, Reader, Server, find_chromium, find_python, headless, write_volume  # noqa: E402


def main() -> int:
    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "Resources" / "web.png"
    python, chromium = find_python(), find_chromium()
    if python is None or chromium is None:
        print("trame-slicer or Chromium is missing", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        head = write_volume(Path(scratch) / "head.nii.gz", phantom.head((24, 160, 144))[0])
        server = Server(python, ["--port", "0", "--no-browser", str(head)], Path(scratch) / "log", COMMAND)
        try:
            with headless(chromium) as browser:
                reader = Reader(browser, server.address)
                reader.page.set_default_timeout(300_000)
                reader.wait_for_study()
                reader.click("detect-button")
                reader.wait_for_text("score-words", "Score")
                reader.click("range-button")
                reader.page.locator("[data-slice='24']").wait_for()
                reader.page.locator(".progress").wait_for(state="detached")
                reader.page.get_by_role("button", name="Next candidate").click()
                reader.page.wait_for_timeout(10_000)  # pictures of the other views come after the words
                reader.page.screenshot(path=picture)
        finally:
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
