"""Products on sparse tensor cores: when they may be used, and what their template is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vnm_compile.codegen.inductor import graph_has
from vnm_compile.codegen.triton.prepack import WIDEST_LOAD
from vnm_compile.codegen.triton.sparse_configs import SparseConfig
from vnm_compile.hardware import Target
from vnm_compile.spec import Spec

SMALLEST = SparseConfig(block_o=16, block_t=16, block_g=16, warps=1, stages=2)
"""The configuration that every problem and device can run."""

_NOT_FUSED = (torch.ops.aten.bucketize, torch.ops.aten.searchsorted)
"""What Inductor would fuse into a kernel, and Gluon does not compile."""


def may_multiply(dtype: torch.dtype, spec: Spec, arrays: Sequence[Any], target: Target) -> bool:
    """Whether a device's sparse tensor cores may multiply by a weight.

    Two of four 16-bit values are what they take; one of four has its place in one of two products. Of tf32 they take
    one of two: a row may keep both. Rows begin at whole loads, which is how arrays are prepared.
    """
    if graph_has(*_NOT_FUSED):
        return False
    aligned = all(int(each.get_stride()[0]) * each.get_dtype().itemsize % WIDEST_LOAD == 0 for each in arrays[:2])
    return bool(target.sparse_flops) and dtype.itemsize == 2 and aligned


def constants(config: SparseConfig, others: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """What the template is told besides, and instead of, what the others are: strides and widths of values are counted
    in elements, those of metadata in 16 bits."""
    # Of 16 bits each: metadata of a row, and a thread's share of a tile's; it copies 4 to 16 bytes.
    row = config.block_g * spec.n // 8
    share = config.block_o * row // (32 * config.warps)
    return {
        "WARPS_O": config.warps_o,
        "WARPS_T": config.warps_t,
        "STAGES": config.stages,
        "METADATA_COPY": max(2, min(8, row, share)),
        "VALUES_STRIDE": others["VALUES_STRIDE"] * spec.n,
        "VALUES_WIDTH": others["VALUES_WIDTH"] * spec.n,
        "METADATA_STRIDE": others["METADATA_STRIDE"] * spec.n // 2,
        "METADATA_WIDTH": others["METADATA_WIDTH"] * spec.n // 2,
        "DTYPE": others["DTYPE"].replace("tl.", "gl."),
    }
