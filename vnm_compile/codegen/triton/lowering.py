"""Lowering of the vnm ops on GPUs: each function returns an Inductor node, or None for the reference.

Activations are wanted with tokens next to each other (K-major), in rows that are padded to 16 bytes: a kept column is
then a contiguous row, read 16 bytes at a time, whatever the number of tokens. What computes the activations writes
them so where Inductor can fuse it; else a copy does. One token is read as it lies, by a kernel without tensor cores.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import sympy
import torch

from vnm_compile.activations import ACTIVATIONS
from vnm_compile.codegen.inductor import (
    apply,
    apply_function,
    choose_fastest,
    copy_strided,
    fits_32_bits,
    fuses_multiply_add,
    known_equal,
    layout_of,
    reshape,
    round_up,
    rows_in_place,
    run_choice,
    size_hint,
    tunes_exhaustively,
)
from vnm_compile.codegen.triton import self_check, sparse_cores
from vnm_compile.codegen.triton.configs import (
    Config,
    Shape,
    configurations,
    has_empty_round,
    largest_block,
    two_passes,
)
from vnm_compile.codegen.triton.operands import NAMES, Operands
from vnm_compile.codegen.triton.prepack import WIDEST_LOAD
from vnm_compile.codegen.triton.sparse_configs import SparseConfig, of_both_kinds, two_sparse_passes
from vnm_compile.codegen.triton.templates import (
    gated_template,
    gated_vector_template,
    linear_template,
    sparse_cores_template,
    vector_template,
)
from vnm_compile.codegen.triton.vector_configs import vector_configurations
from vnm_compile.codegen.virtual_device import active_target, device_target
from vnm_compile.format import Packed
from vnm_compile.hardware import Target, allows_tf32
from vnm_compile.layout import Layout

log = logging.getLogger(__name__)

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEWEST_ROWS = 16  # of a tensor core's tile
_FEWEST_TOKENS = 16  # of a tile: rows of so many are read whole
_MEASURED = 4  # configurations, where the user has not asked for more
_MEASURED_EXHAUSTIVELY = 24
_PROGRAM_GROUP = 8  # tiles of tokens that run side by side


def linear(x: Any, arrays: list[Any], layout: Layout) -> Any:
    """`vnm::linear` as one Triton kernel, or, where a single pass leaves the device idle, partial sums and their sum.

    None for dtypes other than fp32, bf16 and fp16, for blocks that hold no 16 rows of a power of two, for a single
    output feature, where there are no tokens, and where activations are rounded.
    """
    if not _supported(x, arrays, layout):
        return None
    *leading, _ = x.get_size()
    result = _Sparse(x, arrays, layout).linear()
    return None if result is None else reshape(result, [*leading, layout.out_features])


def gated_linear(x: Any, arrays: list[Any], layout: Layout, activation: str) -> Any:
    """`vnm::gated_linear` as one Triton kernel, or partial sums of both and what is made of them; None as `linear`."""
    if not _supported(x, arrays, layout):
        return None
    *leading, _ = x.get_size()
    result = _Sparse(x, arrays, layout).gated(activation)
    return None if result is None else reshape(result, [*leading, layout.out_features])


def lacking(layout: Layout, dtype: torch.dtype) -> str | None:
    """Why no kernel multiplies by weights of a layout and a dtype, whatever the activation; None if one does."""
    if layout.rounds:
        return "no kernel on GPUs rounds activations"
    if dtype not in _DTYPES:
        return f"no kernel on GPUs takes {str(dtype).removeprefix('torch.')}"
    if largest_block(layout.spec) < _FEWEST_ROWS:
        return f"no kernel on GPUs takes blocks of {layout.spec.v} rows, which are no multiple of {_FEWEST_ROWS}"
    # Inductor stores to a tensor of one element without a mask, and a tile's other elements would overwrite it.
    return "no kernel on GPUs takes a single output" if layout.out_features == 1 else None


def _supported(x: Any, arrays: list[Any], layout: Layout) -> bool:
    same = layout.weight_dtype([array.get_dtype() for array in arrays]) == x.get_dtype()
    return same and lacking(layout, x.get_dtype()) is None and 0 not in x.get_size()


class _Sparse:
    """One multiplication that is being lowered."""

    def __init__(self, x: Any, arrays: list[Any], layout: Layout) -> None:
        self.layout, self.spec = layout, layout.spec
        self.dtype = x.get_dtype()
        self.target: Target = device_target(x.get_device())
        self.given = _as_matrix(x)
        self.weight = Operands(arrays, layout, self.dtype)
        self.tokens = self.given.get_size()[0]

    @functools.cached_property
    def x(self) -> Any:
        """The activations, K-major with aligned rows."""
        return _k_major(self.given)

    @property
    def permutes_bytes(self) -> bool:
        """Whether a word of values is expanded by permutations of bytes, which are NVIDIA's."""
        return self.dtype.itemsize == 2 and self.spec.n == 2 and self.target.backend == "cuda"

    @property
    def is_vector(self) -> bool:
        """Whether there is one token, and a kernel without tensor cores for the values."""
        return self.permutes_bytes and known_equal(self.tokens, 1)

    @functools.cached_property
    def has_sparse_cores(self) -> bool:
        """Whether sparse tensor cores may multiply, and do it right where that can be tried."""
        quantised = self.layout.quantization is not None  # fragments are read as they are stored: floats
        if quantised or not sparse_cores.may_multiply(self.dtype, self.spec, self.weight.first, self.target):
            return False
        key = f"{self.dtype} on {self.target.card}"
        first = self.layout.with_rows(self.weight.rows[0])
        return active_target() is not None or self_check.passes(key, first, self._try_sparse_cores)

    def linear(self) -> Any:
        """Node of the product, `[tokens, out_features]`; None where no configuration fits the device."""
        if self.is_vector:
            return self._vector(vector_template(), gated=False)
        ranked = self._ranked(gated=False)
        if not ranked:
            return None
        return self._cast(self._product(ranked, self.layout.out_features))

    def gated(self, activation: str) -> Any:
        """Node of the gated product, `[tokens, out_features]`; None as in `linear`."""
        if self.is_vector:
            return self._vector(gated_vector_template(activation), gated=True)
        ranked = self._ranked(gated=True)
        if not ranked:
            return None
        if ranked[0].splits == 1 and not self._takes_two_passes():
            return self._call(gated_template(activation), ranked, self.layout.out_features)
        # Gate and up are one weight of twice the rows here.
        ranked = self._ranked(gated=False, rows=2 * self.layout.rows)
        if not ranked:
            return None
        both = self._product(ranked, self.layout.rows + self.layout.out_features)
        gate = apply(aten.slice.Tensor, both, 1, 0, self.layout.out_features)
        up = apply(aten.slice.Tensor, both, 1, self.layout.rows, self.layout.rows + self.layout.out_features)
        product = apply(aten.mul.Tensor, apply_function(ACTIVATIONS[activation].eager, gate), up)
        return self._cast(product)

    def _takes_two_passes(self) -> bool:
        shape = self._shape(gated=True)
        return two_passes(shape, self.target) or (self.has_sparse_cores and two_sparse_passes(shape, self.target))

    def _try_sparse_cores(self) -> tuple[torch.Tensor, Packed, torch.Tensor]:
        """Random activations and arrays of the problem's sizes, and what sparse tensor cores make of them; of several
        weights the arrays of the first."""
        rows = sum(self.weight.rows)
        layout = layout_of(self.x, [self.tokens, rows])
        choices: list[Any] = []
        error = self._append(choices, None, sparse_cores.SMALLEST, rows, layout)
        if error is not None:
            raise error
        made = self.weight.random(self.given.get_device())
        operands = [make(array) for make, array in zip(made, self.weight.all, strict=True)]
        (tokens, width), (step, row) = (
            [size_hint(each) for each in of] for of in (self.x.get_size(), self.x.get_stride())
        )
        x = torch.randn(width, row // step, device=operands[0].device).to(self.dtype).T[:tokens]
        out = torch.empty(tokens, rows, dtype=self.dtype, device=x.device)
        run_choice(choices[0], [x, *operands], out)
        return x, Packed(*operands[: len(self.weight.first)]), out

    def _cast(self, node: Any) -> Any:
        if node.get_dtype() == self.dtype:
            return node
        return apply(torch.ops.prims.convert_element_type.default, node, self.dtype)

    def _vector(self, template: Any, gated: bool) -> Any:
        x = rows_in_place(self.given, self.dtype.itemsize)
        found = vector_configurations(self._shape(gated))
        return self._call(template, found, self.layout.out_features, x=x)

    def _shape(self, gated: bool, rows: int | None = None) -> Shape:
        tokens = max(1, size_hint(self.tokens))
        quantization = self.layout.quantization
        return Shape(tokens, rows or self.layout.rows, self.layout.groups, self.spec, self.dtype, gated, quantization)

    def _ranked(self, gated: bool, rows: int | None = None) -> list[Config]:
        shape = self._shape(gated, rows)
        ranked = configurations(shape, self.target)
        most = _MEASURED_EXHAUSTIVELY if tunes_exhaustively() else _MEASURED
        both = self.has_sparse_cores and not gated
        kept = of_both_kinds(ranked, shape, self.target, most) if both else ranked[:most]
        log.debug("%s on %s: %s", shape, self.target.name, kept)
        return kept

    def _product(self, ranked: list[Config], columns: int) -> Any:
        """`[tokens, columns]`: one kernel's, or the sum of partial products, which is left in fp32."""
        parts = ranked[0].splits
        product = self._call(linear_template(), ranked, columns, parts)
        return product if parts == 1 else apply(aten.sum.dim_IntList, product, [0])

    def _call(self, template: Any, ranked: list[Config], columns: int, parts: int = 1, x: Any = None) -> Any:
        x = self.x if x is None else x
        size = [self.tokens, columns] if parts == 1 else [parts, self.tokens, columns]
        layout = layout_of(x, size, self.dtype if parts == 1 else torch.float32)
        choices: list[Any] = []
        errors = [self._append(choices, template, config, columns, layout, x) for config in ranked]
        if not choices:
            raise next(error for error in errors if error is not None)
        random = dict(enumerate(self.weight.random(self.given.get_device()), 1))
        return choose_fastest(template.name, choices, [x, *self.weight.all], layout, random)

    def _append(
        self, choices: list[Any], template: Any, config: Config, columns: int, layout: Any, x: Any = None
    ) -> Exception | None:
        """Append a choice, or say what is the matter with it. A configuration for sparse cores has their template."""
        inputs = [self.x if x is None else x, *self.weight.all]
        template = sparse_cores_template() if isinstance(config, SparseConfig) else template
        error: Exception | None = template.maybe_append_choice(
            choices,
            input_nodes=tuple(inputs),
            layout=layout,
            num_warps=config.warps,
            num_stages=config.stages,
            # Said, and not left to Triton, whose default changes with 3.10.
            triton_meta={"enable_fp_fusion": fuses_multiply_add()},
            **self._constants(config, columns, inputs),
        )
        if error is not None:
            log.warning("%s with %s: %s", template.name, config, error)
        return error

    def _constants(self, config: Config, columns: int, inputs: list[Any]) -> dict[str, Any]:
        spec, groups = self.spec, self.layout.groups
        split_groups = -(-groups // (config.splits * config.block_g)) * config.block_g
        empty_round = has_empty_round(config, self._shape(gated=False))
        told = {
            "V": spec.v,
            "N": spec.n,
            "M": spec.m,
            "O": columns,
            "K": self.layout.in_features,
            "G": groups,
            "R": self.layout.rows,
            "BLOCK_O": config.block_o,
            "BLOCK_T": config.block_t,
            "BLOCK_G": config.block_g,
            "GROUP_T": _PROGRAM_GROUP,
            "SPLITS": config.splits,
            "SPLIT_G": split_groups,
            "EVEN_G": groups % config.block_g == 0 and not empty_round,
            "EMPTY_ROUND": empty_round,
            "TAIL": self.layout.tail != 0,
            "DTYPE": NAMES[self.dtype],
            "WIDE": not fits_32_bits(inputs[0].get_size()[1] * inputs[0].get_stride()[1], *self.weight.extents()),
            "COLUMN_BITS": 8 * spec.column_dtype.itemsize,
            "PERMUTE_BYTES": self.permutes_bytes,
            "ALLOW_TF32": allows_tf32(),
            **self.weight.constants(),
        }
        return told | sparse_cores.constants(config, told, spec) if isinstance(config, SparseConfig) else told


def _as_matrix(x: Any) -> Any:
    """The activations as `[tokens, in_features]`."""
    *leading, width = x.get_size()
    tokens = 1
    for size in leading:
        tokens = tokens * size
    return reshape(x, [tokens, width])


def _k_major(x: Any) -> Any:
    """A matrix of activations, K-major with aligned rows."""
    tokens, width = x.get_size()
    padded = round_up(tokens, WIDEST_LOAD // x.get_dtype().itemsize)
    if isinstance(tokens, int | sympy.Integer):
        padded = max(padded, _FEWEST_TOKENS)
    return copy_strided(x, [1, padded], [padded, width])
