"""The answer to "did sparse run at all, and did it help?": the layers' records, and totals over them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vnm_compile.explanation.layer import LayerReport
from vnm_compile.explanation.table import layers_table, summary
from vnm_compile.names import by_name
from vnm_compile.printing import Printed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class Explanation(Printed):
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
            "resident_bytes": sum(layer.resident_bytes or 0 for layer in self.layers),
            "dense_seconds": sum(s.dense_seconds or 0 for s in timed) if timed else None,
            "seconds": sum(s or 0 for s in chosen) if timed else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        layers = [
            {**asdict(layer), "speedup": layer.speedup, "resident_bytes": layer.resident_bytes} for layer in self.layers
        ]
        return {"layers": layers, "totals": self.totals, "graphs": self.graphs, "device": self.device}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield layers_table(self.layers)
        yield Text(summary(self.layers, self.totals, self.device))
