"""Lets `python -m MedAnomalyCLIPLib.cli` stand for `medanomalyclip`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
