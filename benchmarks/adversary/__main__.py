"""Run the cases whose names have WORDS and count: `python -m benchmarks.adversary [WORDS]`."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.progress import track

from benchmarks.adversary import commands, knobs, library
from benchmarks.adversary.case import FAULTS, Case, run


def main() -> int:
    """Exit code 1 when there is a fault."""
    words = " ".join(sys.argv[1:])
    with tempfile.TemporaryDirectory() as place:
        every = (*commands.cases(Path(place)), *library.cases(), *knobs.cases())
        return report([case for case in every if words in case.name])


def report(cases: list[Case]) -> int:
    """Run them, and print the faults and the counts."""
    outcomes = [run(case) for case in track(cases, description="cases")]
    counts = Counter(outcome.verdict for outcome in outcomes)
    faults = [outcome for outcome in outcomes if outcome.verdict in FAULTS]
    for outcome in faults:
        print(f"{outcome.verdict}: {outcome.name}\n    {outcome.text.strip()[-600:]}")
    print(f"{len(cases)} cases: {counts['fine']} fine, {counts['refused']} refused in a sentence; "
          + ", ".join(f"{counts[fault]} {fault}" for fault in FAULTS))  # fmt: skip
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(f"slowest: {slowest.seconds:.1f} s, {slowest.name}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
