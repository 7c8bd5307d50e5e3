"""Pruning by weight times input: a large weight of an input that is always small is worth little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vnm_compile.layers import Layer
from vnm_compile.prune.methods.layer_by_layer import LayerMethod
from vnm_compile.prune.methods.scores import Norm, check_norm, prune_by_scores
from vnm_compile.prune.pruned import Pruned
from vnm_compile.spec import Spec


@dataclass(frozen=True)
class Wanda(LayerMethod):
    """Keep the weights whose size times the norm of their input is largest, as they are.

    Source: Wanda, arXiv 2306.11695, with the V:N:M mask in the place of its N:M one.

    Attributes:
        norm: what is summed over a block: these scores ("l1") or their squares ("l2").
        sequential: prune a block on the inputs that the blocks pruned before it produce, which keeps the whole model
            closer to the dense one; False: on those of the dense model, which keeps each layer closer to itself.
    """

    norm: Norm = "l1"
    sequential: bool = True

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "keep the largest weights times the norm of their inputs; needs calibration data"

    def __post_init__(self) -> None:
        check_norm(self, self.norm)

    @property
    def on_pruned_inputs(self) -> bool:
        """As `sequential` says."""
        return self.sequential

    def prune_layer(self, layer: Layer, spec: Spec, moment: Tensor | None) -> Pruned:
        """Prune one layer by its weight and the diagonal of the second moment."""
        return prune_by_scores(layer, spec, self.norm, moment)
