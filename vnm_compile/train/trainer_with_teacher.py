"""Distillation in a `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from transformers.utils import ModelOutput

from vnm_compile.train.distillation import Distillation


class DistillationTrainer(Trainer):
    """A Trainer whose loss is a `Distillation`: `DistillationTrainer(model, args, distillation=..., ...)`.

    The teacher goes to the model's device. The mean of each term over what was computed since the last log is logged
    beside the loss, as `distillation_hidden` and so on. Losses are means over a batch, so accumulated batches weigh the
    same.
    """

    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any) -> None:
        """As `transformers.Trainer`, and the loss."""
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        self.distillation.teacher.to(self.args.device)
        # The Trainer shall divide by the number of accumulated batches: this loss is not normalised by their tokens.
        self.model_accepts_loss_kwargs = False
        self._seen: dict[str, list[torch.Tensor]] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distillation loss of a batch."""
        found = self.distillation(model, **inputs)
        if model.training:
            for name, term in found.terms.items():
                self._seen.setdefault(f"distillation_{name}", []).append(term)
        if not return_outputs:
            return found.loss
        outputs = found.outputs
        if not model.training and isinstance(outputs, ModelOutput):
            # The Trainer gathers all that an evaluation returns; the hidden states were for the loss alone.
            outputs = type(outputs)(**{name: each for name, each in outputs.items() if name != "hidden_states"})
        return found.loss, outputs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms beside the loss."""
        if "loss" in logs:
            logs.update({name: float(torch.stack(each).mean()) for name, each in self._seen.items()})
            self._seen.clear()
        super().log(logs, *args, **kwargs)
