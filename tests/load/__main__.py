"""`python -m tests.load`: load and faults at length; prints figures, and writes them into docs/reliability.md."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from tests.load import processes
from tests.load.threads import serve
from vnm_compile.machine import processor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
START, END = "<!-- load: begin -->", "<!-- load: end -->"


def measurements(calls: int, quick: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """What is run, and what it prints."""

    def threads(**how: object) -> Callable[[], str]:
        def run() -> str:
            s = serve(calls, **how)  # type: ignore[arg-type]
            return (
                f"{s.wrong} wrong of {s.calls} calls, {s.reloads} reloads, {s.stale_at_the_end} stale at the end, "
                f"{s.rss_growth:+.0f} MB in the second half"
            )

        return run

    def torn(backend: str) -> Callable[[], str]:
        def run() -> str:
            s = serve(max(50, calls // 10), locked=False, backend=backend, reloads_a_second=500)
            return f"{s.wrong} mixtures of {s.calls} calls, {s.stale_at_the_end} stale at the end"

        return run

    many = 3 if quick else 8
    yield "8 threads, weights loaded in place between calls (a lock)", threads(locked=True)
    yield "8 threads, one weight assigned at any time, no lock", threads(locked=False, assign=True, layers=1)
    yield "8 threads, several weights loaded in place during calls (a race of the caller)", torn("vnm")
    yield "the same with Inductor", torn("inductor")
    yield (
        f"{many} processes compile into one cache",
        lambda: "{} right, {} other answers".format(*processes.one_cache(many)),
    )
    yield (
        "a second process on a warm cache",
        lambda: "{} graphs compiled, bit-equal: {}, {} libraries added".format(*processes.warm_start()),
    )
    yield "writer killed at a random moment, 8 times, then run", lambda: f"{processes.killed(8)} wrong"
    yield "our cache files cut in half", lambda: f"{processes.cut_files()} wrong"
    yield "no file may grow beyond 4 KB", processes.full_disk
    yield "a forked child (one thread)", lambda: "right" if processes.forked() else "WRONG"
    yield "a spawned child", lambda: "right" if processes.spawned() else "WRONG"
    yield (
        "50 rounds of compile and reset",
        lambda: "{:+.0f} MB in the second half, {} packed weights left".format(*processes.rounds(10 if quick else 50)),
    )


def main() -> None:
    """Run everything, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="of each of the 8 threads (default 10,000)")
    parser.add_argument("--quick", action="store_true", help="fewer processes and rounds")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    console = Console()
    rows = []
    for name, run in measurements(options.calls, options.quick):
        with console.status(name):
            result = run()
        console.print(f"{name}: {result}", markup=False)
        rows.append(f"| {name} | {result} |")
    where = f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads"
    table = "\n".join([f"{where} on an {processor()}.", "", "| | |", "|---|---|", *rows])
    if options.write:
        text = PAGE.read_text()
        head, tail = text.split(START)[0], text.split(END)[1]
        PAGE.write_text(f"{head}{START}\n{table}\n{END}{tail}")


if __name__ == "__main__":
    main()
