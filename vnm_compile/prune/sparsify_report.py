"""What `vnm.sparsify` returns: the layers' records, shown as a table or a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vnm_compile.inventory import DenseWeight
from vnm_compile.names import by_name
from vnm_compile.printing import Printed
from vnm_compile.prune.outcome import LayerLeft, LayerPruned
from vnm_compile.prune.plot import plot_layers
from vnm_compile.prune.table import pruned_table, summary

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from vnm_compile.quantizing import QuantizeReport


class SparsifyReport(Printed):
    """What `vnm.sparsify` returns: `print` it, or take `.layers`, `.dense`, `.totals` or `.to_dict()`.

    Attributes:
        method: by which the layers were pruned.
        layers: those that were pruned.
        dense: what else of the model multiplies by weights, with the reason why it was left dense.
        quantized: what quantising the kept values did, where it was asked for.
    """

    least_width = 120

    def __init__(
        self,
        method: str,
        layers: Iterable[LayerPruned],
        dense: Iterable[DenseWeight] = (),
        quantized: QuantizeReport | None = None,
    ) -> None:
        self.method, self.quantized = method, quantized
        self.layers = list(layers)
        self.dense = [LayerLeft(each.name, each.shape, each.reason) for each in dense]

    def __getitem__(self, name: str) -> LayerPruned | LayerLeft:
        """The record of the layer called `name`.

        Raises:
            UnknownName: there is none; the message has the names that come close.
        """
        return by_name(name, [*self.layers, *self.dense])

    @property
    def totals(self) -> dict[str, int]:
        """Numbers of layers and of weights: those pruned, and of all that multiply by weights."""
        pruned = sum(math.prod(layer.shape) for layer in self.layers)
        return {
            "layers": len(self.layers),
            "all_layers": len(self.layers) + len(self.dense),
            "weights": pruned,
            "all_weights": pruned + sum(math.prod(each.shape) for each in self.dense),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {
            "method": self.method,
            "layers": [asdict(layer) for layer in self.layers],
            "dense": [asdict(each) for each in self.dense],
            "totals": self.totals,
            **({"quantized": self.quantized.to_dict()} if self.quantized else {}),
        }

    def plot(self, path: str | Path) -> None:
        """Draw the layers' errors as bars, into a file whose suffix says the format (.png, .svg, .pdf).

        Raises:
            VNMError: matplotlib is not installed, or the file cannot be written.
        """
        plot_layers(self.layers, f"pruned by {self.method}", path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield pruned_table(self.layers, f"pruned by {self.method}")
        yield Text(summary(self.dense, self.totals))
        if self.quantized is not None:
            yield self.quantized
