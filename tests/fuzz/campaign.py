"""Many cases in worker processes: seeds handed out, outcomes counted, failures shrunk and written."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CASES_A_PROCESS = 60  # Dynamo keeps something of every graph: a fresh process now and then keeps memory flat


@dataclass
class Totals:
    """What a campaign counted."""

    cases: int = 0
    graphs: int = 0
    calls: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    through: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return self.statuses["wrong"] + self.statuses["raises"] + self.statuses["crashed"]

    def add(self, record: dict[str, Any]) -> None:
        self.cases += 1
        self.graphs += record.get("graphs", 0)
        self.calls += record.get("calls", 0)
        self.statuses[record["status"]] += 1
        self.through[record.get("through", "?")] += record.get("graphs", 0)
        self.units.update(record.get("units", {}))
        self.kinds.update(record.get("kinds", []))
        self.writes.update(record.get("writes", []))
        if record["status"] in ("wrong", "raises", "crashed"):
            self.faults.setdefault(record.get("signature", "crashed"), []).append(record["seed"])


@dataclass
class Plan:
    """What to run: for `minutes`, or until `graphs` and `calls` are both reached, where they are given."""

    seed: int = 0
    minutes: float = 10
    graphs: int | None = None
    calls: int | None = None
    cases: int | None = None
    workers: int = 2
    kernels: float = 0.1
    only: list[str] | None = None
    without: list[str] = field(default_factory=list)
    means: list[str] = field(default_factory=list)
    storage: str | None = None
    out: Path | None = None
    shrink_seconds: float = 60
    quiet: bool = False
    root: Path | None = None  # where the package lies that is fuzzed, if not here
    first_fault: bool = False  # stop at it


class Campaign:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.totals = plan, Totals()
        self.next, self.start = plan.seed, time.monotonic()
        self.lock = threading.Lock()
        self.records: queue.Queue[dict[str, Any]] = queue.Queue()

    def run(self) -> Totals:
        threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(self.plan.workers)]
        for thread in threads:
            thread.start()
        shown = 0.0
        while any(thread.is_alive() for thread in threads) or not self.records.empty():
            try:
                record = self.records.get(timeout=1)
            except queue.Empty:
                continue
            self.totals.add(record)
            if record.get("report") and not self.plan.quiet:
                print("\n" + record["report"], flush=True)
            if not self.plan.quiet and time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(self.line(), flush=True)
        return self.totals

    def line(self) -> str:
        t = self.totals
        spent = time.monotonic() - self.start
        return (
            f"{spent / 60:5.1f} min  {t.graphs} graphs ({t.through['inductor']} with kernels)  {t.calls} calls  "
            f"{t.statuses['wrong']} wrong  {t.statuses['raises']} exceptions  {t.statuses['crashed']} crashes  "
            f"{t.statuses['skipped']} skipped  {t.statuses['invalid']} invalid"
        )

    def _over(self) -> bool:
        plan, t = self.plan, self.totals
        goals = [(plan.graphs, t.graphs), (plan.calls, t.calls)]
        reached = [count >= goal for goal, count in goals if goal is not None]
        return (
            time.monotonic() - self.start > 60 * plan.minutes
            or (reached != [] and all(reached))
            or (plan.first_fault and t.failed > 0)
        )

    def _take(self, count: int) -> list[int]:
        with self.lock:
            if self.plan.cases is not None:
                count = min(count, self.plan.seed + self.plan.cases - self.next)
            seeds = list(range(self.next, self.next + count))
            self.next += count
            return seeds

    def _work(self, number: int) -> None:
        while not self._over() and (todo := self._take(CASES_A_PROCESS)):
            while todo and not self._over():
                todo = self._process(number, todo)

    def _process(self, number: int, seeds: list[int]) -> list[int]:
        """Run seeds in one process; those that are left if it dies."""
        cache = Path(tempfile.gettempdir()) / f"vnm_fuzz_{os.getuid()}_{number}"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
        plan = self.plan
        if plan.root is not None:
            environment["PYTHONPATH"] = str(plan.root)
        work = {
            "seeds": seeds,
            "kernels": plan.kernels,
            "only": plan.only,
            "without": plan.without,
            "means": plan.means,
            "storage": plan.storage,
            "out": str(plan.out) if plan.out else None,
            "shrink": plan.shrink_seconds,
        }
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if plan.quiet else None,
            text=True,
            env=environment,
            cwd=plan.root,
        )
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(work) + "\n")
        process.stdin.close()
        left, running = list(seeds), seeds[0]
        for text in process.stdout:
            if not text.startswith("{"):
                continue
            message = json.loads(text)
            if "begin" in message:
                running = message["begin"]
                continue
            left.remove(message["seed"])
            self.records.put(message)
            if self._over():
                process.terminate()
                break
        ended = process.wait()
        if ended not in (0, -15):
            left.remove(running)
            self.records.put({"seed": running, "status": "crashed", "signature": f"crashed {ended}"})
        return left if ended != -15 else []


def summary(totals: Totals, seconds: float) -> str:
    """The figures of a campaign, as text."""
    lines = [
        f"{totals.cases} programs, {totals.graphs} graphs ({totals.through['inductor']} through Inductor's kernels), "
        f"{totals.calls} calls in {seconds / 60:.1f} min",
        f"wrong answers {totals.statuses['wrong']}, exceptions {totals.statuses['raises']}, "
        f"crashes {totals.statuses['crashed']}, skipped (Inductor) {totals.statuses['skipped']}, "
        f"refused (writes into a compressed weight) {totals.statuses['refused']}, "
        f"invalid programs {totals.statuses['invalid']}",
        "units: " + ", ".join(f"{kind} {count}" for kind, count in totals.units.most_common()),
    ]
    lines += [f"  {name}: seeds {seeds[:12]}" for name, seeds in totals.faults.items()]
    return "\n".join(lines)
