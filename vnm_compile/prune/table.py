"""What pruning did to the layers, as a table and in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vnm_compile.names import printable
from vnm_compile.prune.outcome import LayerLeft, LayerPruned

if TYPE_CHECKING:  # imported when something is printed: compiling does not need it
    from rich.table import Table


def pruned_table(layers: Sequence[LayerPruned], title: str) -> Table:
    """A row a layer; after a permutation with what masks kept before and after."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    permuted = any(layer.importance_before is not None for layer in layers)
    shares = ("kept before", "kept permuted") if permuted else ()
    for column in ("weight", "spec", *shares, "L1 norm kept", "output error", "held out"):
        table.add_column(column, justify="right")
    for layer in layers:
        shape = " x ".join(map(str, layer.shape))
        kept = (layer.importance_before, layer.importance_after) if permuted else ()
        figures = map(_shown, (*kept, layer.retained, layer.output_error, layer.held_out_error))
        table.add_row(Text(printable(layer.name)), shape, layer.spec, *figures)
    return table


def summary(dense: Sequence[LayerLeft], totals: Mapping[str, int]) -> str:
    """How much of the model was pruned, and for each reason what stayed dense."""
    share = totals["weights"] / totals["all_weights"] if totals["all_weights"] else 0.0
    lines = [f"{totals['weights']:,} of {totals['all_weights']:,} weights that are multiplied by ({share:.0%})."]
    reasons: dict[str, list[LayerLeft]] = {}
    for each in dense:
        reasons.setdefault(each.reason, []).append(each)
    for reason, left in reasons.items():
        names = ", ".join(printable(each.name) for each in left[:3]) + (", ..." if len(left) > 3 else "")
        weights = sum(math.prod(each.shape) for each in left)
        lines.append(f"Dense: {names} ({weights:,} weights): {reason}.")
    return "\n".join(lines)


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.3f}"
