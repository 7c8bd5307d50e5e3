"""How an explanation is shown: a table, with layers that are alike in one row, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vnm_compile.explanation.layer import LayerReport
from vnm_compile.names import printable

if TYPE_CHECKING:  # imported when something is printed: compiling does not need it
    from rich.table import Table
    from rich.text import Text


def layers_table(layers: Sequence[LayerReport]) -> Table:
    """A table with a row for every kind of layer."""
    from rich.table import Table

    table = Table(title="V:N:M layers", title_justify="left", expand=False)
    table.add_column("layer", overflow="fold")
    for column in ("weight", "spec", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("runs", no_wrap=True)
    table.add_column("speed-up (limit)", justify="right")
    table.add_column("why", overflow="fold")
    for alike in _alike(layers):
        table.add_row(*_row(alike))
    return table


def _row(layers: list[LayerReport]) -> list[str | Text]:
    from rich.filesize import decimal
    from rich.text import Text

    first = layers[0]
    name = printable(_common_name([layer.name for layer in layers]))
    name += f" ({len(layers)})" if len(layers) > 1 else ""
    shape = " x ".join(map(str, first.shape)) if first.shape else "-"
    stored = sum(layer.stored_bytes or 0 for layer in layers)
    dense = sum(layer.dense_bytes or 0 for layer in layers)
    size = f"{decimal(dense)} > {decimal(stored)}" if stored != dense else decimal(dense)
    measured = [layer.speedup for layer in layers if layer.speedup is not None]
    gain = f"{min(measured):.2f}x" if measured else "-"
    gain += f" ({first.limit:.1f}x)" if first.limit else ""
    joined = f"; one kernel with {', '.join(n.rpartition('.')[2] for n in first.joined)}" if first.joined else ""
    why = Text(printable(first.reason + joined))
    return [Text(name), shape, first.spec or "-", size, first.decision, gain, why]


def summary(layers: Sequence[LayerReport], totals: Mapping[str, Any], device: str) -> str:
    """What the table comes to, a sentence a line."""
    from rich.filesize import decimal

    what = "linears" if all(layer.linear for layer in layers) else "linears and other weights"
    stored, dense, resident = (decimal(totals[f"{kind}_bytes"]) for kind in ("stored", "dense", "resident"))
    lines = [
        f"{totals['sparse']} of {totals['layers']} {what} run sparse; the weights of all take {stored} as they run, "
        f"{dense} dense."
    ]
    if totals["resident_bytes"] > totals["dense_bytes"]:
        lines.append(
            f"In memory stay {resident}: the dense weights beside what is packed of them, until "
            "vnm.compress_model(model) lets them go."
        )
    if totals["seconds"] is not None:
        lines.append(
            f"Measured time in linears: {totals['seconds'] * 1e3:.2f} ms a pass, "
            f"dense {totals['dense_seconds'] * 1e3:.2f} ms."
        )
    bounds = [layer for layer in layers if layer.crossover]
    if bounds:
        low, high = min(s.crossover or 0 for s in bounds), max(s.crossover or 0 for s in bounds)
        span = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} (smallest layer) to {high:.0f} (largest)"
        lines.append(
            f"Limits: the cost model of vnm_compile.cost for {device}, every byte moved once. "
            f"Arithmetic, not memory, bounds the sparse kernels from T = {span} on."
        )
    return "\n".join(lines)


def _alike(layers: Sequence[LayerReport]) -> list[list[LayerReport]]:
    """Layers that differ in nothing but their name and what was measured, together, in order of their first."""

    def traits(layer: LayerReport) -> tuple[Any, ...]:
        last = tuple(name.rpartition(".")[2] for name in (layer.name, *layer.joined))
        return last, layer.shape, layer.spec, layer.decision, layer.reason

    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(traits(layer), []).append(layer)
    return list(groups.values())


def _common_name(names: list[str]) -> str:
    """One name for several: `encoder.layer.0-5.output.dense`."""
    merged = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        numbers = [int(part) for part in parts if part.isdecimal()]
        varied = f"{min(numbers)}-{max(numbers)}" if len(numbers) == len(parts) else "*"
        merged.append(parts[0] if len(set(parts)) == 1 else varied)
    return ".".join(merged)
