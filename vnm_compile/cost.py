"""A symbolic cost model: how fast V:N:M can be at best, and from how many tokens on what bounds it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import sympy
import torch

from vnm_compile.hardware import Core, Target, allows_tf32, machine_of
from vnm_compile.layout import Layout
from vnm_compile.spec import KEPT_COLUMNS

TOKENS = sympy.Symbol("T", positive=True)


@dataclass(frozen=True)
class CostModel:
    """Bytes, flops and time of one linear, dense and sparse, as expressions in the number of tokens T.

    Assumptions: every byte of weight, input and output crosses the memory bus once; memory traffic and arithmetic
    overlap perfectly, so the longer of the two is the time. On GPUs the sparse kernels compute on the 4 kept columns of
    each group at the dense tensor-core rate (sparse tensor cores would halve that once more); on CPUs they multiply the
    kept values only, at the rate of dense vectors.

    Attributes:
        out_features, in_features: size of the weight.
        layout: how it is stored; None for a layer that stays dense, whose sparse figures are the dense ones.
        dtype: of weight and activation.
        balance: arithmetic per byte of memory traffic at which the machine is in balance, flop/byte.
        values_only: arithmetic on the kept values only (CPUs), not on the kept columns (GPUs).
    """

    out_features: int
    in_features: int
    layout: Layout | None
    dtype: torch.dtype
    balance: float
    values_only: bool = False

    @classmethod
    def on(
        cls,
        device: torch.device | str | Target,
        out_features: int,
        in_features: int,
        layout: Layout | None,
        dtype: torch.dtype,
    ) -> CostModel:
        """The model for a device, or a GPU that is not here, as `vnm_compile.hardware` knows it; on GPUs fp32 counts as
        tf32 where torch lets it be."""
        machine = device if isinstance(device, Target) else machine_of(device)
        balance = machine.peak_flops(dtype, allows_tf32()) / machine.bandwidth
        return cls(out_features, in_features, layout, dtype, balance, values_only=isinstance(machine, Core))

    @property
    def activation_bytes(self) -> sympy.Expr:
        """Bytes of input and output."""
        return TOKENS * (self.in_features + self.out_features) * self.dtype.itemsize

    @property
    def dense_bytes(self) -> sympy.Expr:
        """Bytes that the dense layer moves."""
        return self.out_features * self.in_features * self.dtype.itemsize + self.activation_bytes

    @property
    def sparse_bytes(self) -> sympy.Expr:
        """Bytes that the sparse layer moves."""
        if self.layout is None:
            return self.dense_bytes
        return self.layout.nbytes(self.dtype) + self.activation_bytes

    @property
    def dense_flops(self) -> sympy.Expr:
        """Floating-point operations of the dense layer."""
        return 2 * TOKENS * self.out_features * self.in_features

    @property
    def sparse_flops(self) -> sympy.Expr:
        """Floating-point operations of the sparse layer: those on the kept values, or on the kept columns."""
        if self.layout is None:
            return self.dense_flops
        kept = self.layout.kept if self.values_only else self.layout.groups * KEPT_COLUMNS
        return 2 * TOKENS * self.layout.rows * kept

    @property
    def dense_time(self) -> sympy.Expr:
        """Least time of the dense layer, in bytes that the memory bus moves in it."""
        return sympy.Max(self.dense_bytes, self.dense_flops / sympy.nsimplify(self.balance))

    @property
    def sparse_time(self) -> sympy.Expr:
        """Least time of the sparse layer, in bytes that the memory bus moves in it."""
        return sympy.Max(self.sparse_bytes, self.sparse_flops / sympy.nsimplify(self.balance))

    @cached_property
    def speedup(self) -> sympy.Expr:
        """Upper limit of dense time over sparse time, in T."""
        return self.dense_time / self.sparse_time

    def time_at(self, tokens: int, sparse: bool) -> float:
        """The least time for a number of tokens, in bytes that the memory bus moves in it."""
        return float((self.sparse_time if sparse else self.dense_time).subs(TOKENS, tokens))

    def speedup_at(self, tokens: int) -> float:
        """The limit for a number of tokens."""
        return float(self.speedup.subs(TOKENS, tokens))

    def compute_bound_from(self, sparse: bool) -> float | None:
        """Tokens from which arithmetic and not memory bounds the layer; None if memory always does."""
        flops, moved = (self.sparse_flops, self.sparse_bytes) if sparse else (self.dense_flops, self.dense_bytes)
        crossings = sympy.solve(sympy.Eq(flops / sympy.nsimplify(self.balance), moved), TOKENS)
        positive = [float(t) for t in crossings if t.is_positive]
        return min(positive, default=None)
