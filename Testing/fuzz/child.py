"""One process of the fuzzer: target, seed, first and last mutant, seconds; started by `runner`."""

import sys

from .runner import child

if __name__ == "__main__":
    name, seed, first, end, budget = sys.argv[1:]
    child(name, int(seed), int(first), int(end), float(budget))
