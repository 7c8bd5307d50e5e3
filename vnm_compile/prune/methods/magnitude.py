"""Pruning by magnitude: the largest weights stay, as they are."""

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
class Magnitude(LayerMethod):
    """Keep, of each V x M block, the columns and in every row the weights with the largest sum.

    Source: VENOM, arXiv 2310.02065, section 5.

    Attributes:
        norm: what is summed over a block: the weights' sizes ("l1") or their squares ("l2").
    """

    norm: Norm = "l1"

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "keep the largest weights"
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_norm(self, self.norm)

    def prune_layer(self, layer: Layer, spec: Spec, moment: Tensor | None) -> Pruned:
        """Prune one layer by its weight alone."""
        return prune_by_scores(layer, spec, self.norm)
