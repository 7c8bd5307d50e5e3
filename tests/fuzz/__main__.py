"""`python -m tests.fuzz`: fuzz for a while, print the figures, exit with 1 on any fault."""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from pathlib import Path

from tests.fuzz.campaign import Campaign, Plan, summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; a case is its seed, nothing else")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--graphs", type=int, help="stop after so many compiled graphs (and calls)")
    parser.add_argument("--calls", type=int, help="stop after so many compared calls (and graphs)")
    parser.add_argument("--cases", type=int, help="stop after so many programs")
    parser.add_argument("--kernels", type=float, default=0.1, help="share of programs that go through Inductor")
    parser.add_argument("--only", action="append", metavar="KIND", help="steps of this kind only (repeatable)")
    parser.add_argument("--without", action="append", default=[], help="leave out steps or writes of this kind")
    parser.add_argument("--out", type=Path, help="write failing cases, shrunk, as scripts into this directory")
    parser.add_argument("--shrink", type=float, default=60, help="seconds to spend on making a failing case small")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one such script")
    given = parser.parse_args()
    if given.replay:
        return _replay(given.replay)
    plan = Plan(
        given.seed, given.minutes, given.graphs, given.calls, given.cases, given.workers, given.kernels, given.only,
        given.without, out=given.out, shrink_seconds=given.shrink,
    )  # fmt: skip
    start = time.monotonic()
    totals = Campaign(plan).run()
    print("\n" + summary(totals, time.monotonic() - start))
    return 1 if totals.failed else 0


def _replay(path: Path) -> int:
    from tests.fuzz.run import replay
    from tests.fuzz.worker import prepare

    prepare()
    script = runpy.run_path(str(path))
    return 1 if replay(script).status in ("wrong", "raises") else 0


if __name__ == "__main__":
    sys.exit(main())
