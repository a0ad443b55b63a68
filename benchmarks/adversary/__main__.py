"""Run the cases whose names have WORDS and count: `python -m benchmarks.adversary [WORDS]`."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.progress import track

from benchmarks.adversary import commands, knobs, library
from benchmarks.adversary.case import FAULTS, Case, Outcome, run

CASES: list[Case] = []  # what a process that was forked from this one runs by number


def main() -> int:
    """Exit code 1 when there is a fault."""
    words = " ".join(sys.argv[1:])
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # names without a folder land there
        every = (*commands.cases(Path(place)), *library.cases(), *knobs.cases())
        wanted = [case for case in every if words in case.name]
        alone = [case for case in wanted if case.before is not None]
        CASES.extend(case for case in wanted if case.before is None)
        outcomes = list(map(run, track(alone, description="one by one")))
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=fork) as pool:
            running = pool.map(run_number, range(len(CASES)))
            outcomes += track(running, description="side by side", total=len(CASES))
        os.chdir("/")
    return report(outcomes)


def run_number(place: int) -> Outcome:
    """One of the cases."""
    return run(CASES[place])


def report(outcomes: list[Outcome]) -> int:
    """Print the faults and the counts."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    faults = [outcome for outcome in outcomes if outcome.verdict in FAULTS]
    for outcome in faults:
        print(f"{outcome.verdict}: {outcome.name}\n    {outcome.text.strip()[-600:]}")
    print(
        f"{len(outcomes)} cases: {counts['fine']} fine, {counts['refused']} refused in a sentence; "
        + ", ".join(f"{counts[fault]} {fault}" for fault in FAULTS)
    )
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(f"slowest: {slowest.seconds:.1f} s, {slowest.name}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
