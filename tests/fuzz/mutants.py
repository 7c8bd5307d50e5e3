"""`python -m tests.fuzz.mutants`: break the package in known ways, and count the graphs until the fuzzer finds each.

A mutant is an edit of the package's source, applied to a copy in a temporary directory. The first line of the table is
no mutant: the same seeds find nothing in the package as it is.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.campaign import Campaign, Plan, Totals
from tests.fuzz.mutations import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]


def mutated(mutant: Mutant | None, folder: Path) -> Path:
    """A copy of the package and the fuzzer in `folder`, with the edits of a mutant."""
    for part in ("vnm_compile", "tests/fuzz"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/__init__.py", "tests/support.py"):
        shutil.copy(ROOT / name, folder / name)
    for file, text, replacement in mutant.edits if mutant else ():
        path = folder / file
        source = path.read_text()
        if source.count(text) != 1:
            raise ValueError(f"mutant {mutant.name!r}: {file} holds {text!r} {source.count(text)} times")  # type: ignore[union-attr]
        path.write_text(source.replace(text, replacement))
    return folder


def hunt(
    mutant: Mutant | None, minutes: float, seed: int, workers: int, cases: int | None = None
) -> tuple[Totals, float]:
    """Fuzz a mutant until its first fault."""
    with tempfile.TemporaryDirectory() as folder:
        root = mutated(mutant, Path(folder))
        kernels = mutant.kernels if mutant else 0.1
        only = list(mutant.only) if mutant and mutant.only else None
        plan = Plan(
            seed=seed, minutes=minutes, workers=workers, kernels=kernels, only=only, shrink_seconds=0,
            quiet=True, root=root, first_fault=True, means=list(mutant.means) if mutant else [],
            storage=mutant.storage if mutant else None,
        )  # fmt: skip
        start = time.monotonic()
        return Campaign(plan).run(), time.monotonic() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants to hunt; all, and the package itself, when none is named")
    parser.add_argument("--minutes", type=float, default=5, help="for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if not given.names or mutant.name in given.names]
    missed = 0
    print(f"{'mutant':<58} {'graphs':>6} {'calls':>6} {'seconds':>7}  found as")
    if not given.names:
        totals, seconds = hunt(None, given.minutes, given.seed, given.workers)
        print(_line("none: the package as it is", totals, seconds), flush=True)
        missed += totals.failed > 0
    for mutant in chosen:
        totals, seconds = hunt(mutant, given.minutes, given.seed, given.workers)
        print(_line(mutant.name, totals, seconds), flush=True)
        missed += totals.failed == 0
    return 1 if missed else 0


def _line(name: str, totals: Totals, seconds: float) -> str:
    found = next(iter(totals.faults), "nothing")
    return f"{name:<58} {totals.graphs:>6} {totals.calls:>6} {seconds:>7.0f}  {found}"


if __name__ == "__main__":
    sys.exit(main())
