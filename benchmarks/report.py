"""Rows of a benchmark as a table on the screen, in Markdown and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from vnm_compile.machine import machine

ROOT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    """One line of a benchmark's table; seconds are a call's, ratio and spread those of `timing.Result`."""

    section: str
    name: str
    dtype: str
    spec: str
    tokens: str
    baseline: str
    dense: float
    sparse: float
    ratio: float
    low: float
    high: float
    limit: float | None
    target: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text; a ratio below its target carries an exclamation mark."""
        missed = self.target is not None and self.ratio < self.target
        return (
            self.name,
            self.dtype,
            self.spec,
            self.tokens,
            f"{self.dense * 1e3:.3f} ({self.baseline})",
            f"{self.sparse * 1e3:.3f}",
            f"{self.ratio:.2f}{' !' if missed else ''}",
            f"{self.low:.2f}-{self.high:.2f}",
            f"{self.target:.2f}" if self.target is not None else "",
            f"{self.limit:.2f} ({self.ratio / self.limit:.0%})" if self.limit is not None else "",
        )


def save(name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows and machine to `results/<name>.json`."""
    saved = {"machine": machine(), "rows": rows}
    (ROOT / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(saved, indent=1) + "\n")


def keep(name: str, rows: list[dict[str, Any]], table: str, page: str, marker: str) -> None:
    """Write rows and machine to `results/<name>.json`, and the table between the markers of a page of the docs."""
    save(name, rows)
    replace_between(ROOT / "docs" / page, marker, table)


HEADINGS = ("case", "dtype", "pattern", "T", "dense ms", "vnm ms", "ratio", "quartiles", "asked", "limit (share)")


def show(rows: list[Row], title: str) -> None:
    """Print a table."""
    table = Table(*HEADINGS, title=title)
    for row in rows:
        table.add_row(*row.cells)
    Console(width=140).print(table)


def markdown(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_between(path: Path, marker: str, text: str) -> None:
    """Put `text` between the comments `<!-- marker -->` and `<!-- /marker -->` of a document.

    Raises:
        ValueError: the document has no such comments.
    """
    before, start, rest = path.read_text().partition(f"<!-- {marker} -->")
    _, end, after = rest.partition(f"<!-- /{marker} -->")
    if not (start and end):
        raise ValueError(f"{path} has no comments <!-- {marker} --> and <!-- /{marker} -->")
    path.write_text(f"{before}{start}\n{text}\n{end}{after}")


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Bars of the ratios by case, the limit as a dash above each, 1.0 (as fast as dense) as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{row.name}, {row.dtype}\n{row.spec}, T={row.tokens}" if row.tokens else row.name for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.34 * len(rows)))
    places = range(len(rows))
    colours = ["#4477aa" if row.ratio >= 1 else "#cc6677" for row in rows]
    errors = [[max(0, r.ratio - r.low) for r in rows], [max(0, r.high - r.ratio) for r in rows]]
    axes.barh(places, [row.ratio for row in rows], xerr=errors, color=colours, ecolor="#222222", height=0.7)
    for place, row in zip(places, rows, strict=True):
        if row.limit is not None:
            axes.plot([row.limit] * 2, [place - 0.4, place + 0.4], color="#222222", linewidth=2)
    axes.axvline(1, color="#888888", linestyle=":")
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the fastest dense (bar), limit (dash)")
    axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
