"""A bar plot of what pruning did to the layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vnm_compile.errors import BadFile, MissingPackage
from vnm_compile.names import printable
from vnm_compile.prune.outcome import LayerPruned


def plot_layers(layers: Sequence[LayerPruned], title: str, path: str | Path) -> None:
    """Draw bars for each layer: its relative output error where it was measured, else the share of the norm it lost.

    After a permutation, two more: the share of the importance lost in the model's own order, and in the one found.

    Raises:
        VNMError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise MissingPackage("a plot needs matplotlib: pip install 'vnm-compile[plot]'.") from missing
    series: dict[str, list[float | None]] = {
        "output error, held out": [layer.held_out_error for layer in layers],
        "output error, calibration": [layer.output_error for layer in layers],
        "L1 norm lost": [1 - layer.retained for layer in layers],
    }
    measured = {name: values for name, values in series.items() if None not in values}
    shown = dict(list(measured.items())[: max(1, len(measured) - 1)])  # the norm only where nothing better is known
    if all(layer.importance_after is not None for layer in layers):
        shown["importance lost, own order"] = [1 - (layer.importance_before or 0) for layer in layers]
        shown["importance lost, permuted"] = [1 - (layer.importance_after or 0) for layer in layers]
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(shown)
    for i, (name, values) in enumerate(shown.items()):
        axes.barh([j + i * height for j in range(len(layers))], values, height, label=name)  # type: ignore[arg-type]
    names = [printable(layer.name) for layer in layers]
    # A "$" in a name is no formula.
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(layers))], names, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title(title)
    axes.legend()
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise BadFile(f"the plot cannot be written to {path}: {error}") from error
