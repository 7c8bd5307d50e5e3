"""`python -m tests.ptx`: execute every case as PTX, plant mutants, and print what was found.

Takes about 20 minutes. `--mutants 0` leaves the mutants out; cases and targets can be named.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from tests.ptx.cases import BY_NAME, HUNTED, TARGETS, Case, build, pairs
from tests.ptx.errors import NotModelled, PTXError
from tests.ptx.hunt import Hunt, hunt
from tests.ptx.run import Run, run
from vnm_compile.activations import ACTIVATIONS


class Totals:
    """What was found."""

    def __init__(self) -> None:
        self.cases = 0
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.hazards: Counter[str] = Counter()
        self.failures: list[str] = []
        self.hunt = Hunt()

    def add(self, case: Case, target: str, mutants: int) -> None:
        """Run a case for a target, and plant mutants in it."""
        self.cases += 1
        start, done, found = time.monotonic(), None, Hunt()
        try:
            built = build(case, target)
            for late in (False, True):
                done = run(built.generated.wrapper, built.inputs, target, late)
                built.check(done.outputs)
            if mutants and done and case.name in HUNTED and target not in ("sm_86", "sm_89"):
                found = hunt(built, done, mutants)
        except (PTXError, NotModelled, AssertionError) as error:
            self.failures.append(f"{target} {case.name}: {type(error).__name__}: {error}")
        if done:
            self._count(done, {each.name: each.schedule.template for each in built.generated.kernels}, target)
        self.hunt.add(found)
        planted, caught = found.planted.total(), found.caught.total()
        mark = "FAILED" if self.failures and self.failures[-1].startswith(f"{target} {case.name}:") else "right"
        line = f"{target:<7} {case.name:<32} {mark:<7} {time.monotonic() - start:>5.1f} s"
        print(line + (f"  mutants {caught}/{planted}" if planted else ""), flush=True)

    def _count(self, done: Run, templates: Mapping[str, str | None], target: str) -> None:
        for launch in done.launches:
            name = templates.get(launch.kernel.name)
            self.kernels[_without_activation(name) if name else "Inductor's own", target] += 1
        self.hazards.update(done.hazards)

    def report(self) -> None:
        """Print the totals."""
        templates = sorted({template for template, _ in self.kernels})
        print(f"\n{'kernels run, early and late':<32}" + "".join(f"{target:>8}" for target in TARGETS))
        for template in templates:
            print(f"{template:<32}" + "".join(f"{self.kernels[template, target]:>8}" for target in TARGETS))
        print(f"\n{self.cases} cases, {self.kernels.total()} kernels, {len(self.failures)} failures")
        print("\n".join(self.failures))
        for hazard, count in self.hazards.items():
            print(f"noted in {count} cases: {hazard}")
        planted, caught = self.hunt.planted, self.hunt.caught
        if not planted.total():
            return
        print(f"\n{'mutants':<32}{'planted':>8}{'caught':>8}")
        for kind in sorted(planted):
            print(f"{kind:<32}{planted[kind]:>8}{caught[kind]:>8}")
        print(f"{'all':<32}{planted.total():>8}{caught.total():>8}  {caught.total() / planted.total():.1%}")
        print(f"{self.hunt.same} others changed nothing that went anywhere")
        print("\ncaught as")
        for way, count in self.hunt.ways.most_common():
            print(f"{count:>8}  {way}")


def _without_activation(template: str) -> str:
    for activation in ACTIVATIONS:
        template = template.removesuffix(f"_{activation}")
    return template


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="case", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--targets", default=",".join(TARGETS), help="separated by commas")
    parser.add_argument("--mutants", type=int, default=2, help="of each kind in each kernel")
    given = parser.parse_args(arguments)
    totals = Totals()
    for case, target in pairs(given.names or None, given.targets.split(",")):
        totals.add(case, target, given.mutants)
    totals.report()
    return 1 if totals.failures else 0


if __name__ == "__main__":
    sys.exit(main())
