"""`python -m fuzz`: mutants of every kind of input, or of one; outcomes counted, findings with their seed."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .runner import Tally, fuzz, run_mutant
from .targets import targets


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--target", "--reader", nargs="+", choices=list(targets()), default=list(targets()))
    parser.add_argument("--count", type=int, default=1000, help="mutants of each target (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--seconds", type=float, help="for each target; no mutant is begun after that")
    parser.add_argument("--only", type=int, metavar="I", help="make mutant I in this process, and keep it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if arguments.only is not None:
        return _once(arguments.target[0], arguments.seed, arguments.only)
    tallies = {}
    for name in arguments.target:
        tally = fuzz(name, arguments.count, arguments.seed, first=arguments.first, budget=arguments.seconds)
        tallies[name] = tally
        print(_line(name, tally), flush=True)
        for finding in tally.findings:
            again = f"python -m fuzz --target {name} --seed {arguments.seed} --only {finding.index}"
            print(f"  {finding.kind}: {finding.detail}\n    {again}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({n: _figures(t) for n, t in tallies.items()}, indent=1))
    return 1 if any(tally.findings for tally in tallies.values()) else 0


def _once(name: str, seed: int, index: int) -> int:
    """Without limits, so that a debugger can be attached; the mutant stays where it is printed."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    target = targets()[name]
    (root / "seeds").mkdir()
    target.prepare(root / "seeds")
    print(root)
    print(*run_mutant(target, root, seed, index))
    return 0


def _figures(tally: Tally) -> dict[str, object]:
    found = [vars(finding) for finding in tally.findings]
    return {
        "mutants": tally.count,
        "outcomes": dict(tally.outcomes.most_common()),
        "findings": found,
        "seconds": round(tally.seconds, 1),
    }


def _line(name: str, tally: Tally) -> str:
    outcomes = ", ".join(f"{kind} {count}" for kind, count in tally.outcomes.most_common())
    return (
        f"{name}: {tally.count} mutants in {tally.seconds:.0f} s: {outcomes}; findings {len(tally.findings)}"
    )


if __name__ == "__main__":
    sys.exit(main())
