"""A real archive: Orthanc with its DICOMweb plugin, on this computer alone, in a folder that goes with it.

Files go in and out over Orthanc's own interface, not over the DICOMweb that is tested.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread

PROGRAM = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
IS_INSTALLED = PROGRAM is not None and PLUGIN.exists()
MISSING = "Orthanc with its DICOMweb plugin is missing: apt-get install orthanc orthanc-dicomweb"
USER, PASSWORD = "reader", "pass phrase: geheim-4711"
_SECONDS_TO_START = 60


@dataclass(frozen=True)
class Orthanc:
    """One that runs.

    Attributes:
        address: of its own interface.
    """

    address: str

    @property
    def url(self) -> str:
        """Of its DICOMweb service."""
        return f"{self.address}/dicom-web"

    def upload(self, *files: Path) -> None:
        for path in files:
            self._ask("/instances", path.read_bytes())

    def objects(self) -> list[Dataset]:
        """All that it holds."""
        return [
            dcmread(BytesIO(self._ask(f"/instances/{name}/file")))
            for name in json.loads(self._ask("/instances"))
        ]

    def clear(self) -> None:
        for name in json.loads(self._ask("/patients")):
            self._ask(f"/patients/{name}", method="DELETE")

    def _ask(self, path: str, data: bytes | None = None, method: str | None = None) -> Any:
        request = urllib.request.Request(self.address + path, data, method=method)
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read()


@contextmanager
def running(folder: Path) -> Iterator[Orthanc]:
    """Start it, and end it.

    Args:
        folder: for its database and its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([PROGRAM, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        archive = Orthanc(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            try:
                archive.objects()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "log").read_text()) from None
                time.sleep(0.1)
        yield archive
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
