"""What pruning did to each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vnm_compile.inventory import DenseWeight
from vnm_compile.names import by_name, printable
from vnm_compile.prune.plot import plot_layers

if TYPE_CHECKING:  # imported when something is printed: compiling does not need it
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class LayerPruned:
    """One pruned layer.

    Attributes:
        name: qualified name.
        shape: `[out_features, in_features]`.
        spec: its pattern as text.
        retained: share of the weight's L1 norm that stood in the kept places, before any update of the weights.
        output_error: `||X W' - X W|| / ||X W||` on the calibration data; None where it was not measured.
        held_out_error: the same on the held-out data, for the inputs of the dense model; None without such data.
        importance_before: with `permute`, the share of its importance that the best mask keeps in the model's own order
            of channels; None without.
        importance_after: the same in the order found.
    """

    name: str
    shape: tuple[int, int]
    spec: str
    retained: float
    output_error: float | None = None
    held_out_error: float | None = None
    importance_before: float | None = None
    importance_after: float | None = None


@dataclass(frozen=True)
class LayerLeft:
    """What multiplies by a weight and was left dense: a linear, experts, a convolution.

    Attributes:
        name: qualified name.
        shape: of the weight as it is stored.
        reason: why, in one line.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


class SparsifyReport:
    """What `vnm.sparsify` returns: `print` it, or take `.layers`, `.dense`, `.totals` or `.to_dict()`.

    Attributes:
        method: by which the layers were pruned.
        layers: those that were pruned.
        dense: what else of the model multiplies by weights, with the reason why it was left dense.
    """

    def __init__(self, method: str, layers: Iterable[LayerPruned], dense: Iterable[DenseWeight] = ()) -> None:
        self.method = method
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
        }

    def plot(self, path: str | Path) -> None:
        """Draw the layers' errors as bars, into a file whose suffix says the format (.png, .svg, .pdf).

        Raises:
            VNMError: matplotlib is not installed, or the file cannot be written.
        """
        plot_layers(self.layers, f"pruned by {self.method}", path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"pruned by {self.method}", title_justify="left")
        table.add_column("layer", overflow="fold")
        permuted = any(layer.importance_before is not None for layer in self.layers)
        shares = ("kept before", "kept permuted") if permuted else ()
        for column in ("weight", "spec", *shares, "L1 norm kept", "output error", "held out"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            kept = (layer.importance_before, layer.importance_after) if permuted else ()
            figures = map(_shown, (*kept, layer.retained, layer.output_error, layer.held_out_error))
            table.add_row(Text(printable(layer.name)), shape, layer.spec, *figures)
        yield table
        yield Text(self._summary())

    def _summary(self) -> str:
        totals = self.totals
        share = totals["weights"] / totals["all_weights"] if totals["all_weights"] else 0.0
        lines = [f"{totals['weights']:,} of {totals['all_weights']:,} weights that are multiplied by ({share:.0%})."]
        reasons: dict[str, list[LayerLeft]] = {}
        for each in self.dense:
            reasons.setdefault(each.reason, []).append(each)
        for reason, left in reasons.items():
            names = ", ".join(printable(each.name) for each in left[:3]) + (", ..." if len(left) > 3 else "")
            weights = sum(math.prod(each.shape) for each in left)
            lines.append(f"Dense: {names} ({weights:,} weights): {reason}.")
        return "\n".join(lines)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=max(120, Console().width))
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.3f}"
