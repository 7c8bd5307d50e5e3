"""Pruning by scores: what has the largest keeps its value, everything else goes."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from vnm_compile.errors import BadOption
from vnm_compile.layers import Layer
from vnm_compile.prune.calibration import output_error
from vnm_compile.prune.project import project
from vnm_compile.prune.pruned import Pruned, slabs
from vnm_compile.spec import Spec

Norm = Literal["l1", "l2"]


def check_norm(method: Any, norm: Any) -> None:
    """Refuse another norm than l1 and l2.

    Raises:
        VNMError: names the method and the norm.
    """
    if norm not in ("l1", "l2"):
        raise BadOption(f"{type(method).__name__}(norm={norm!r}): it takes 'l1' or 'l2'.")


def prune_by_scores(layer: Layer, spec: Spec, norm: Norm, moment: Tensor | None = None) -> Pruned:
    """Keep what has the largest sum of |w|, times the root of the mean square of its input where `moment` is given.

    Args:
        layer: with its dense weight `[O, K]`.
        spec: the pattern.
        norm: "l1" sums these scores over a block, "l2" their squares.
        moment: `[K, K]` float32, the mean of `x xᵀ` over the layer's inputs.
    """
    weight = layer.weight.detach()
    pruned = Pruned(layer, spec)
    scale = None if moment is None else moment.diagonal().sqrt()
    for rows in slabs(weight, spec):
        scores = weight[rows].float().abs()
        scores = scores if scale is None else scores * scale
        pruned.add(rows, weight[rows] * project(scores if norm == "l1" else scores.square(), spec), weight[rows])
    if moment is not None:
        pruned.output_error = output_error(weight, pruned.weight(), moment)
    return pruned
