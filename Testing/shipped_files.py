"""The files that ship with the extension: those in the folders, and those that its CMake file lists.

Run it to see what the lists lack; with `--write` it writes them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "MedAnomalyCLIP"
CMAKE = MODULE / "CMakeLists.txt"
SCRIPTS, RESOURCES = "MODULE_PYTHON_SCRIPTS", "MODULE_PYTHON_RESOURCES"

_NOT_SHIPPED = {"__pycache__", ".DS_Store", ".mypy_cache", ".ruff_cache"}


def files_present() -> dict[str, list[str]]:
    """Every file of the module, relative to its folder: Python code, and all else."""
    library = (MODULE / "MedAnomalyCLIPLib").rglob("*")
    resources = (MODULE / "Resources").rglob("*")
    files = [p for p in (*library, *resources) if p.is_file() and not _NOT_SHIPPED & set(p.parts)]
    names = sorted(p.relative_to(MODULE).as_posix() for p in files)
    scripts = [name for name in names if name.endswith(".py")]
    return {
        SCRIPTS: ["${MODULE_NAME}.py", *scripts],
        RESOURCES: [name for name in names if not name.endswith(".py")],
    }


def files_listed(cmake: str) -> dict[str, list[str]]:
    """The two lists of the module's CMake file."""
    lists = {name: re.search(rf"set\({name}\n(.*?)\)", cmake, re.DOTALL) for name in (SCRIPTS, RESOURCES)}
    return {name: found.group(1).split() if found else [] for name, found in lists.items()}


def with_lists(cmake: str, lists: dict[str, list[str]]) -> str:
    """The CMake file with other lists, one file a line."""
    for name, files in lists.items():
        body = "".join(f"  {file}\n" for file in files)
        cmake = re.sub(
            rf"(set\({name}\n).*?(  \))", lambda m, b=body: m[1] + b + m[2], cmake, flags=re.DOTALL
        )
    return cmake


def main() -> int:
    cmake = CMAKE.read_text(encoding="utf-8")
    wanted = with_lists(cmake, files_present())
    if "--write" in sys.argv[1:]:
        CMAKE.write_text(wanted, encoding="utf-8", newline="\n")
        return 0
    listed = files_listed(cmake)
    for name, files in files_present().items():
        for file in sorted(set(files) ^ set(listed[name])):
            print("not listed:" if file in files else "not there:", file)
    return int(wanted != cmake)


if __name__ == "__main__":
    sys.exit(main())
