"""The recipes in a `transformers.Trainer`: one callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback

from vnm_compile.annotate import Selector
from vnm_compile.spec import Spec
from vnm_compile.train.recipes import Recipe
from vnm_compile.train.training import Training, begin


class MaskCallback(TrainerCallback):
    """Trains the Trainer's model into a pattern: `Trainer(..., callbacks=[MaskCallback("64:2:8", MaskDecay())])`.

    Masks are put on when the Trainer is made, steps are those of the optimizer (accumulated batches count once), the
    run's length is the Trainer's, and at the end the weights are made exact. A checkpoint of the Trainer has the masks
    among the weights; a run that goes on from one with another recipe is refused.
    """

    def __init__(
        self,
        spec: Spec | str | Mapping[Selector, Spec | str | None] | None,
        recipe: Recipe | None = None,
        include: Iterable[Selector] | Selector | None = None,
        exclude: Iterable[Selector] | Selector | None = None,
        finalize: bool = True,
    ) -> None:
        """As `vnm.train.begin`; `finalize=False` leaves the masks on at the end."""
        self._given = spec, recipe, include, exclude
        self._finalize = finalize
        self.training: Training | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Put masks on."""
        spec, recipe, include, exclude = self._given
        self.training = begin(model, spec, recipe, include=include, exclude=exclude)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Set the clock."""
        assert self.training is not None
        self.training.start(state.max_steps, state.global_step, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the weights exact."""
        assert self.training is not None
        self.training.unfollow()
        if self._finalize and state.global_step >= state.max_steps:
            self.training.finalize()  # the model as it was given, not as the Trainer has wrapped it
