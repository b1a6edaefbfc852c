"""Serves the page as `medanomalyclip web` does, with a detector that needs no network; for the tests.

It takes the same arguments. What is bright is anomalous. While the file that the environment variable HOLD
names is there, only as many slices are detected as it says. With --readers, their processes are served alike.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from harness.fake_detector import BrightnessDetector
from MedAnomalyCLIPLib.cli import main
from MedAnomalyCLIPLib.web import launcher

HOLD = "MEDANOMALYCLIP_TEST_HOLD"


class HeldDetector(BrightnessDetector):
    def detect(self, plane: Any, **choice: Any) -> Any:
        hold = Path(os.environ[HOLD])
        while hold.exists():
            left = int(hold.read_text() or 0)
            if left:
                hold.write_text(str(left - 1))
                break
            time.sleep(0.02)
        return super().detect(plane, **choice)


def served_alike(*options: str, idle_seconds: int) -> list[str]:
    own = [sys.executable, __file__, "--port", "0", "--no-browser", "--idle", str(idle_seconds)]
    return [*own, *options]


if __name__ == "__main__":
    launcher.reader_command = served_alike
    sys.exit(main(["web", *sys.argv[1:]], load=lambda _folder, _device: HeldDetector()))
