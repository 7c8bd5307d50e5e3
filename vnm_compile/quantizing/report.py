"""What `vnm.quantize` returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vnm_compile.names import by_name, printable
from vnm_compile.printing import Printed

if TYPE_CHECKING:  # imported when something is printed
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class LayerQuantized:
    """What quantising did to one layer.

    Attributes:
        name: of the layer.
        shape: `[out_features, in_features]`.
        spec, values: its pattern, and how its values are stored now.
        float_bytes, stored_bytes: of the weight, compressed: with floats, and as it is stored now.
        weight_error: `||W' - W|| / ||W||`, of the pruned weight before and after.
        output_error: `||X W' - X W|| / ||X W||` on the calibration data; None without.
    """

    name: str
    shape: tuple[int, int]
    spec: str
    values: str
    float_bytes: int
    stored_bytes: int
    weight_error: float
    output_error: float | None


class QuantizeReport(Printed):
    """The layers that `vnm.quantize` has quantised: `print` it, or take `.layers`, `.totals` or `.to_dict()`."""

    least_width = 110

    def __init__(self, layers: Iterable[LayerQuantized]) -> None:
        self.layers = list(layers)

    def __getitem__(self, name: str) -> LayerQuantized:
        """The record of the layer called `name`.

        Raises:
            UnknownName: there is none; the message has the names that come close.
        """
        return by_name(name, self.layers)  # type: ignore[no-any-return]

    @property
    def totals(self) -> dict[str, int]:
        """Numbers of layers and bytes."""
        return {
            "layers": len(self.layers),
            "float_bytes": sum(layer.float_bytes for layer in self.layers),
            "stored_bytes": sum(layer.stored_bytes for layer in self.layers),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers], "totals": self.totals}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.filesize import decimal
        from rich.table import Table
        from rich.text import Text

        table = Table(title="quantised values", title_justify="left")
        table.add_column("layer", overflow="fold")
        for column in ("weight", "spec", "values", "bytes", "before", "weight error", "output error"):
            table.add_column(column, justify="right")
        for each in self.layers:
            output = "-" if each.output_error is None else f"{each.output_error:.4f}"
            table.add_row(
                Text(printable(each.name)),
                " x ".join(map(str, each.shape)),
                each.spec,
                each.values,
                decimal(each.stored_bytes),
                decimal(each.float_bytes),
                f"{each.weight_error:.4f}",
                output,
            )
        yield table
        totals = self.totals
        yield Text(
            f"{totals['layers']} layers: {decimal(totals['float_bytes'])} became {decimal(totals['stored_bytes'])}."
        )
