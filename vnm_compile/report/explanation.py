"""The answer to "did sparse run at all, and did it help?": a record a layer, totals, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vnm_compile.names import by_name, printable

if TYPE_CHECKING:  # imported when something is printed: compiling does not need it
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear, or of something else that multiplies by a weight (experts, a convolution).

    Attributes:
        name: qualified name of the layer.
        shape: `[out_features, in_features]`; the shape as stored of what is no linear; None where it is not known.
        spec: its pattern as text, or None.
        density: share of the weights that the pattern keeps; 1.0 without one.
        dense_bytes, stored_bytes: bytes of the weight dense, and as the compiled model reads it.
        decision: "sparse", "dense", or "not run" for a layer that the given inputs did not reach.
        reason: why, in one line.
        joined: names of the layers that it is computed together with.
        tokens: rows of its input.
        sparse_seconds, dense_seconds: what was measured, where something was.
        limit: upper limit of the speed-up at these tokens, from `CostModel`.
        crossover: tokens from which arithmetic bounds the sparse kernel, from `CostModel`.
        linear: whether it is the weight of a linear layer; experts and convolutions are not.
    """

    name: str
    shape: tuple[int, ...] | None
    spec: str | None
    density: float
    dense_bytes: int | None
    stored_bytes: int | None
    decision: str
    reason: str
    joined: tuple[str, ...] = ()
    tokens: int | None = None
    sparse_seconds: float | None = None
    dense_seconds: float | None = None
    limit: float | None = None
    crossover: float | None = None
    linear: bool = True

    @property
    def speedup(self) -> float | None:
        """Measured dense time over measured sparse time, or None where nothing was measured."""
        return self.dense_seconds / self.sparse_seconds if self.dense_seconds and self.sparse_seconds else None


class Explanation:
    """What `vnm.explain` returns: `print` it, or take `.layers`, `.totals` or `.to_dict()`."""

    def __init__(self, layers: Iterable[LayerReport], graphs: int, device: str) -> None:
        self.layers = list(layers)
        self.graphs = graphs
        self.device = device

    def __getitem__(self, name: str) -> LayerReport:
        """The report of the layer called `name`.

        Raises:
            UnknownName: there is none (a VNMError and a KeyError); the message has the names that come close.
        """
        return by_name(name, self.layers)

    @property
    def totals(self) -> dict[str, Any]:
        """Counts, bytes and measured seconds over all layers; seconds are None where nothing was measured."""
        timed = [layer for layer in self.layers if layer.speedup is not None]
        chosen = [s.sparse_seconds if s.decision == "sparse" else s.dense_seconds for s in timed]
        return {
            "layers": len(self.layers),
            "sparse": sum(layer.decision == "sparse" for layer in self.layers),
            "dense_bytes": sum(layer.dense_bytes or 0 for layer in self.layers),
            "stored_bytes": sum(layer.stored_bytes or 0 for layer in self.layers),
            "dense_seconds": sum(s.dense_seconds or 0 for s in timed) if timed else None,
            "seconds": sum(s or 0 for s in chosen) if timed else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        layers = [{**asdict(layer), "speedup": layer.speedup} for layer in self.layers]
        return {"layers": layers, "totals": self.totals, "graphs": self.graphs, "device": self.device}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield self._table()
        yield Text(self._summary())

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=max(100, Console().width))
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(title="V:N:M layers", title_justify="left", expand=False)
        table.add_column("layer", overflow="fold")
        for column in ("weight", "spec", "size"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("runs", no_wrap=True)
        table.add_column("speed-up (limit)", justify="right")
        table.add_column("why", overflow="fold")
        for layers in _alike(self.layers):
            table.add_row(*self._row(layers))
        return table

    def _row(self, layers: list[LayerReport]) -> list[str | Text]:
        from rich.text import Text

        first = layers[0]
        name = printable(_common_name([layer.name for layer in layers]))
        name += f" ({len(layers)})" if len(layers) > 1 else ""
        shape = " x ".join(map(str, first.shape)) if first.shape else "-"
        from rich.filesize import decimal

        stored = sum(layer.stored_bytes or 0 for layer in layers)
        dense = sum(layer.dense_bytes or 0 for layer in layers)
        size = f"{decimal(dense)} > {decimal(stored)}" if stored != dense else decimal(dense)
        measured = [layer.speedup for layer in layers if layer.speedup is not None]
        gain = f"{min(measured):.2f}x" if measured else "-"
        gain += f" ({first.limit:.1f}x)" if first.limit else ""
        joined = f"; one kernel with {', '.join(n.rpartition('.')[2] for n in first.joined)}" if first.joined else ""
        why = Text(printable(first.reason + joined))
        return [Text(name), shape, first.spec or "-", size, first.decision, gain, why]

    def _summary(self) -> str:
        from rich.filesize import decimal

        totals = self.totals
        what = "linears" if all(layer.linear for layer in self.layers) else "linears and other weights"
        lines = [
            f"{totals['sparse']} of {totals['layers']} {what} run sparse; the weights of all take "
            f"{decimal(totals['stored_bytes'])} as they run, {decimal(totals['dense_bytes'])} dense."
        ]
        if totals["seconds"] is not None:
            lines.append(
                f"Measured time in linears: {totals['seconds'] * 1e3:.2f} ms a pass, "
                f"dense {totals['dense_seconds'] * 1e3:.2f} ms."
            )
        bounds = [layer for layer in self.layers if layer.crossover]
        if bounds:
            low, high = min(s.crossover or 0 for s in bounds), max(s.crossover or 0 for s in bounds)
            span = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} (smallest layer) to {high:.0f} (largest)"
            lines.append(
                f"Limits: the cost model of vnm_compile.report.cost for {self.device}, every byte moved once. "
                f"Arithmetic, not memory, bounds the sparse kernels from T = {span} on."
            )
        return "\n".join(lines)


def _alike(layers: list[LayerReport]) -> list[list[LayerReport]]:
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
