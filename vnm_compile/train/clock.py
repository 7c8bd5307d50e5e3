"""Where in its run a training is, from the number of optimizer steps alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vnm_compile.errors import BadOption
from vnm_compile.spec import Spec
from vnm_compile.train.recipes import Recipe


@dataclass(frozen=True)
class Clock:
    """The phases of a run of `steps` optimizer steps: dense, masked, fixed.

    Attributes:
        first: the first step with masks.
        last: the first step with final masks.
    """

    recipe: Recipe
    steps: int
    first: int
    last: int

    @classmethod
    def of(cls, recipe: Recipe, steps: int, specs: list[Spec]) -> Clock:
        """The clock of a run.

        Raises:
            VNMError: the steps are too few for the recipe to reach its final masks.
        """
        if type(steps) is not int or steps < 1:
            raise BadOption(f"steps={steps!r}: the number of optimizer steps of the run, from 1 on.")
        first = math.ceil(recipe.dense * steps)
        last = steps - math.ceil(recipe.fixed * steps)
        least = max(map(recipe.frames, specs), default=1)
        if last - first < least:
            raise BadOption(
                f"{steps} steps leave {max(0, last - first)} between the dense and the fixed phase, where "
                f"{type(recipe).__name__} needs {least} to reach its final masks; train for longer, or give smaller "
                "shares dense= and fixed=."
            )
        return cls(recipe, steps, first, last)

    def share(self, step: int) -> float:
        """The share of the masked phase that has passed: 0 up to its first step, 1 from the first fixed step on."""
        return min(1.0, max(0.0, (step - self.first) / (self.last - self.first)))

    def masks(self, step: int) -> bool:
        """Whether there are masks at all."""
        return step >= self.first

    def final(self, step: int) -> bool:
        """Whether masks are final."""
        return step >= self.last

    def looks(self, step: int) -> bool:
        """Whether weights are looked at for NaN, in whatever phase."""
        return step % self.recipe.every == 0

    def recomputes(self, step: int, spec: Spec) -> bool:
        """Whether a layer's mask is recomputed for this step."""
        if self.recipe.keeps_zeros:  # an optimizer with momentum goes on moving what is outside of a mask
            return step == self.first
        if not self.masks(step) or step > self.last:
            return False
        if step in (self.first, self.last) or (step - self.first) % self.recipe.every == 0:
            return True
        now, before = (self.recipe.pattern(spec, self.share(each)) for each in (step, step - 1))
        return now != before
