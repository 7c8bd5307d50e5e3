"""What no launch of a GPU kernel can be faster than, by its configuration: memory, caches and tensor cores."""

from __future__ import annotations

from vnm_compile.codegen.triton.configs import Config, Shape, seconds
from vnm_compile.codegen.triton.sparse_configs import SparseConfig, sparse_seconds
from vnm_compile.codegen.triton.vector_configs import vector_seconds
from vnm_compile.hardware import Target, allows_tf32
from vnm_compile.spec import KEPT_COLUMNS

DRAM, L2, TENSOR = "DRAM", "L2", "tensor"

_SECTOR = 32  # bytes: what L2 hands out at least


def least_seconds(
    config: Config, shape: Shape, target: Target, dram_bytes: int, written: int, multiplies: bool
) -> dict[str, float]:
    """The least time of a launch by what could bound it: "DRAM", "L2" and, where they are used, "tensor" cores.

    Args:
        dram_bytes: read and written, each once.
        written: bytes of the results.
        multiplies: it is done on tensor cores.
    """
    least = {
        DRAM: dram_bytes / target.bandwidth,
        L2: l2_bytes(config, shape, written) / (target.cache_bytes * target.multiprocessors * target.clock),
    }
    if multiplies:
        least[TENSOR] = config.tiles(shape) * config.steps(shape) * tensor_seconds(config, shape, target)
    return least


def l2_bytes(config: Config, shape: Shape, written: int) -> int:
    """What all tiles read from L2, and the results.

    One token's activations lie side by side and come in sectors.
    """
    read = config.step_bytes(shape)
    if config.is_vector:
        size = shape.dtype.itemsize
        in_sectors = min(shape.spec.m * size, KEPT_COLUMNS * _SECTOR) - KEPT_COLUMNS * size
        read += (2 if shape.gated else 1) * config.block_g * in_sectors
    return round(config.tiles(shape) * config.steps(shape) * read) + written


def products(config: Config, shape: Shape) -> float:
    """Multiplications and additions of a step of a tile, each counted, as they are carried out."""
    terms = shape.spec.n if config.is_vector else KEPT_COLUMNS
    return (2.0 if shape.gated else 1.0) * 2 * config.block_o * config.block_t * terms * config.block_g


def tensor_seconds(config: Config, shape: Shape, target: Target) -> float:
    """What a step of a tile takes if all of the device's tensor cores share it."""
    peak = target.peak_flops(shape.dtype, allows_tf32())
    if isinstance(config, SparseConfig):
        peak = target.sparse_flops or peak
    return products(config, shape) / peak


def estimated_seconds(config: Config, shape: Shape, target: Target) -> float:
    """The time by the model that ranks configurations."""
    if isinstance(config, SparseConfig):
        return sparse_seconds(config, shape, target)
    return vector_seconds(config, shape, target) if config.is_vector else seconds(config, shape, target)
