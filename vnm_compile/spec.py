"""The V:N:M pattern: three numbers, and what follows from them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import comb, log

import torch

from vnm_compile.errors import BadOption

KEPT_COLUMNS = 4
"""Columns that a V x M block keeps. Four, so that what is left is N:4, which sparse tensor cores know."""

LARGEST_V = 65536
"""Rows of the largest block: far beyond what helps, and small enough that no product of sizes overflows."""

_TEXT = re.compile(r"\s*([0-9]{1,9})\s*:\s*([0-9]{1,9})\s*:\s*([0-9]{1,9})\s*")


@dataclass(frozen=True, slots=True)
class Spec:
    """A V:N:M sparsity pattern, written `"V:N:M"`.

    A weight `[out_features O, in_features K]` is cut into blocks of `v` rows and `m` columns. Each block keeps 4
    of its columns, shared by its rows, and inside them each row keeps `n` values. The density is `n / m`.
    `m == 4` is plain N:4 sparsity; `v` is then without effect.

    Source: VENOM, arXiv 2310.02065, section 3.

    Raises:
        VNMError: `v` outside 1 to 65536, `n` not 1 or 2, or `m` outside 4 to 65536.

    >>> Spec.parse("64:2:8").density
    0.25
    """

    v: int
    n: int
    m: int

    def __post_init__(self) -> None:
        for name in ("v", "n", "m"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise BadOption(f"{name} is {getattr(self, name)!r}; a V:N:M pattern takes three integers.")
        if not 1 <= self.v <= LARGEST_V:
            raise BadOption(f"v={self.v}: a block has 1 to {LARGEST_V} rows; use 1, 16, 32, 64 or 128.")
        if self.n not in (1, 2):
            raise BadOption(f"n={self.n}: a row keeps 1 or 2 of the 4 columns that its block keeps.")
        if not 4 <= self.m <= 65536:
            raise BadOption(f"m={self.m}: a block keeps 4 of its m columns, so m is at least 4 (and at most 65536).")

    @classmethod
    def parse(cls, text: str | Spec) -> Spec:
        """Return the spec that `text` ("64:2:8") names; a `Spec` is returned as it is.

        Raises:
            VNMError: the text is not three integers with colons between them.
        """
        if isinstance(text, Spec):
            return text
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise BadOption(f'{text!r} is not a V:N:M pattern; write three integers, such as "64:2:8".')
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of the weights that the pattern keeps, `n / m`."""
        return self.n / self.m

    @property
    def column_dtype(self) -> torch.dtype:
        """The dtype of `columns`: uint8, or uint16 where an offset does not fit (m > 256)."""
        return torch.uint8 if self.m <= 256 else torch.uint16

    def rows(self, out_features: int) -> int:
        """Rows that are stored for a weight of `out_features` rows: R, a multiple of `v`."""
        return -(-out_features // self.v) * self.v

    def groups(self, in_features: int) -> int:
        """Column groups of a weight of `in_features` columns: G. The last one may be a tail."""
        return -(-in_features // self.m)

    def fits(self, out_features: int, in_features: int) -> bool:
        """Whether a weight of this size is at least one block."""
        return out_features >= self.v and in_features >= self.m

    def log_mask_diversity(self, out_features: int, in_features: int) -> float:
        """Natural logarithm of the number of masks that the pattern allows on a weight of this size.

        Source: "Beyond 2:4", arXiv 2410.16135, section 4.
        """
        blocks = (out_features / self.v) * (in_features / self.m)
        return blocks * (log(comb(self.m, KEPT_COLUMNS)) + self.v * log(comb(KEPT_COLUMNS, self.n)))
