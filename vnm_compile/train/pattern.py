"""The patterns that a weight passes through on its way to V:N:M: any number of kept columns, any N of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vnm_compile.prune.project import project_columns, project_together
from vnm_compile.spec import KEPT_COLUMNS, Spec


@dataclass(frozen=True)
class Pattern:
    """Of every V rows and M columns `columns` columns are kept, and of those in each row `n`; V:N:M keeps 4."""

    v: int
    columns: int
    n: int
    m: int

    @classmethod
    def of(cls, spec: Spec) -> Pattern:
        """The pattern of compressed weights."""
        return cls(spec.v, KEPT_COLUMNS, spec.n, spec.m)

    @property
    def density(self) -> float:
        """Share of the weights that it keeps."""
        return self.n / self.m

    def mask(self, scores: Tensor) -> Tensor:
        """The mask that keeps the largest sum of `scores` `[O, K]`, as `vnm_compile.prune.project` finds it."""
        return project_columns(scores, self.v, self.columns, self.n, self.m)

    def masks(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The masks of several matrices of one dtype and device, small ones at once."""
        return project_together(scores, self.v, self.columns, self.n, self.m)

    def __str__(self) -> str:
        if self.columns == KEPT_COLUMNS:
            return f"{self.v}:{self.n}:{self.m}"
        return f"{self.v}:({self.n} of {self.columns}):{self.m}"
