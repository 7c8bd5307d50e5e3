"""What `vnm.select_spec` found: the candidates, what each is worth, and the choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vnm_compile.printing import Printed
from vnm_compile.spec import Spec

if TYPE_CHECKING:  # imported when something is printed
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Candidate:
    """One pattern on the whole model, or a pattern a layer.

    Attributes:
        spec: the pattern as text, or "per layer".
        speedup: dense time over sparse time, summed over the layers in question.
        density: share of these layers' weights that is kept.
        log_masks: ln of the number of masks it allows, the sum over the layers.
        loss: what was measured with the pruned model, or None.
    """

    spec: str
    speedup: float
    density: float
    log_masks: float
    loss: float | None = None


class Selection(Printed):
    """What `vnm.select_spec` returns: `print` it, or pass its `choice` to `vnm.sparsify`.

    Attributes:
        choice: the pattern chosen, or with `per_layer` a pattern (None: stay dense) by layer name.
        candidates: all that were looked at, the best first.
        target: the speed-up that was asked for.
    """

    def __init__(
        self,
        choice: Spec | Mapping[str, Spec | None],
        candidates: Sequence[Candidate],
        chosen: Candidate,
        target: float,
    ) -> None:
        self.choice = choice
        self.candidates = list(candidates)
        self.chosen = chosen
        self.target = target

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        if isinstance(self.choice, Spec):
            choice: Any = str(self.choice)
        else:
            choice = {name: None if spec is None else str(spec) for name, spec in self.choice.items()}
        return {
            "target": self.target,
            "choice": choice,
            "chosen": asdict(self.chosen),
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table(title=f"patterns for a speed-up of {self.target:g}x", title_justify="left")
        for column in ("pattern", "speed-up", "density", "ln masks", "loss", ""):
            table.add_column(column, justify="right")
        for each in self.candidates:
            note = "chosen" if each is self.chosen else "too slow" if each.speedup < self.target else ""
            loss = "-" if each.loss is None else f"{each.loss:.4g}"
            table.add_row(each.spec, f"{each.speedup:.2f}x", f"{each.density:.3f}", f"{each.log_masks:.3g}", loss, note)
        yield table
        if not isinstance(self.choice, Spec):
            counts = Counter("dense" if spec is None else str(spec) for spec in self.choice.values())
            yield "layers: " + ", ".join(f"{count} at {spec}" for spec, count in counts.most_common())
