"""How a weight is stored: the one descriptor that goes with packed arrays, from the format to the kernels.

Passes, ops, lowerings, measurements and checkpoints hand a `Layout` on and read from it what they need. It travels
through graphs as text, an argument of the `vnm` ops. What a new kind of storage needs (a number of experts) becomes a
field here, and an array in `names`; schemas and passes stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from vnm_compile.errors import DamagedWeight
from vnm_compile.quantization import Quantization
from vnm_compile.spec import KEPT_COLUMNS, Spec

ARRAYS = ("values", "metadata", "columns", "scales")
"""Every array that a layout may have, in order; `Layout.names` are those that one has."""

_TEXT = re.compile(r"([0-9:]+) ([0-9]+)x([0-9]+)(?: (int[0-9a-z/]+))?")


@dataclass(frozen=True)
class Layout:
    """The storage of one weight `[out_features, in_features]` that follows `spec`; written `"64:2:8 4096x11008"`, with
    quantised values `"64:2:8 4096x11008 int8/64"`.

    R is `out_features` rounded up to a multiple of V, G is `in_features / M` rounded up.
    """

    spec: Spec
    out_features: int
    in_features: int
    quantization: Quantization | None = None

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Return the layout that `text` describes.

        Raises:
            VNMError: the text is none of a layout.
        """
        return _parse(text)

    text: str = field(init=False, repr=False, compare=False)
    """The layout as the `vnm` ops take it."""

    def __post_init__(self) -> None:
        # Kept as text: where a compiler traces, nothing has to be put together.
        quantised = f" {self.quantization}" if self.quantization else ""
        object.__setattr__(self, "text", f"{self.spec} {self.out_features}x{self.in_features}{quantised}")

    def __str__(self) -> str:
        return self.text

    def __deepcopy__(self, memo: object) -> Layout:
        """Itself: nobody can change it, and what is the same is compared fastest."""
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays, in order; the first one holds what the weight is a linear function of."""
        return ARRAYS if self.quantization else ARRAYS[:3]

    @property
    def typed(self) -> str:
        """The array whose dtype is the weight's."""
        return "scales" if self.quantization else "values"

    @property
    def stored_as(self) -> str:
        """Pattern and, where values are quantised, how: `"64:2:8"`, `"64:2:8 int4/64"`."""
        return f"{self.spec} {self.quantization}" if self.quantization else str(self.spec)

    @property
    def rows(self) -> int:
        """Rows that are stored: R."""
        return self.spec.rows(self.out_features)

    @property
    def groups(self) -> int:
        """Column groups that are stored: G. The last one may be a tail."""
        return self.spec.groups(self.in_features)

    @property
    def tail(self) -> int:
        """Real columns of the last group where it is not full; 0 where it is."""
        return self.in_features % self.spec.m

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the arrays, as `names` lists them."""
        blocks = self.rows // self.spec.v
        metadata, columns = (self.rows, -(-self.kept // 4)), (blocks, self.groups, KEPT_COLUMNS)
        if self.quantization is None:
            return (self.rows, self.kept), metadata, columns
        values, scales = self.quantization.width(self.kept), self.quantization.scales(self.kept)
        return (self.rows, values), metadata, columns, (self.rows, scales)

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Dtypes of the arrays for a weight of `dtype`."""
        if self.quantization is None:
            return dtype, torch.uint8, self.spec.column_dtype
        return self.quantization.dtype, torch.uint8, self.spec.column_dtype, dtype

    def weight_dtype(self, dtypes: Sequence[torch.dtype]) -> torch.dtype:
        """Dtype of the weight whose arrays have `dtypes`: what an activation has to have, too."""
        return dtypes[self.names.index(self.typed)]

    @property
    def kept(self) -> int:
        """Kept values of a row: G*N."""
        return self.groups * self.spec.n

    def with_rows(self, out_features: int) -> Layout:
        """The layout of a weight with other rows that is stored in the same way."""
        return replace(self, out_features=out_features)

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded where a layer with the weight is computed."""
        return self.quantization is not None and self.quantization.activations is not None

    @property
    def exact(self) -> Layout:
        """The layout of the same weight whose activations are not rounded."""
        if self.quantization is None or not self.rounds:
            return self
        return replace(self, quantization=replace(self.quantization, activations=None))

    def joins(self, other: Layout) -> bool:
        """Whether weights of the two can be stored one above the other: they differ in their rows alone."""
        return self.with_rows(other.out_features) == other

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that a weight of `dtype` takes: its arrays, nothing else."""
        kinds = zip(self.shapes, self.dtypes(dtype), strict=True)
        return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in kinds)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Layout:
    found = _TEXT.fullmatch(text)
    if found is None:
        raise DamagedWeight(
            f'{text!r} is no layout of a weight; it reads "64:2:8 4096x11008": pattern, rows x columns, and how values '
            'are quantised, if they are ("int8/64").'
        )
    quantization = Quantization.parse(found[4]) if found[4] else None
    return Layout(Spec.parse(found[1]), int(found[2]), int(found[3]), quantization)
