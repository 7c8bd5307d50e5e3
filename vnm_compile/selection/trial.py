"""Trying patterns out: copies of the model, pruned and measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vnm_compile.errors import BadLoss
from vnm_compile.prune import Method, sparsify
from vnm_compile.prune.calibration import calibrating
from vnm_compile.spec import Spec


@dataclass(frozen=True)
class Trial:
    """How `vnm.select_spec` tries out the patterns that rank best, where it has calibration data.

    Attributes:
        loss: `loss(model, batch)`, a number; without it the mean relative output error of the layers is compared.
        method: how copies are pruned, as for `vnm.sparsify`.
        candidates: how many of the best patterns are tried out.
    """

    loss: Callable[[nn.Module, Any], float] | None = None
    method: str | Method = "magnitude"
    candidates: int = 3

    def run(self, model: nn.Module, spec: Spec, names: list[str], batches: Sequence[Any], progress: bool) -> float:
        """Prune the layers `names` of a copy of the model, and return its mean loss.

        Raises:
            VNMError: the layers cannot be pruned with this data, or a loss is no finite number.
        """
        pruned = copy.deepcopy(model)
        unseen = batches if self.loss is None else None
        report = sparsify(
            pruned, spec, self.method, include=names, calibration=batches, held_out=unseen, progress=progress
        )  # fmt: skip
        if self.loss is None:
            return sum(layer.held_out_error or 0.0 for layer in report.layers) / len(report.layers)
        with torch.no_grad(), calibrating(pruned):
            mean = sum(float(self.loss(pruned, batch)) for batch in batches) / len(batches)
        if not math.isfinite(mean):
            raise BadLoss(f"the mean loss of the model pruned to {spec} is {mean}; a loss has to be a finite number.")
        return mean
