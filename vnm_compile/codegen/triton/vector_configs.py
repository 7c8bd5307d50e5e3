"""Tiles for one token, without tensor cores: a thread takes four groups of each of its rows.

As `configs` does for the other kernels; on a device all of them are timed.
"""

from __future__ import annotations

from vnm_compile.codegen.triton.configs import LAUNCH_SECONDS, Config, Shape, largest_block, memory_seconds
from vnm_compile.hardware import Target

# Of what was timed on an H200: 126 configurations in bf16, alone, and 12 layers in bf16, int8 and int4.
_ROUND_SECONDS = 2e-6
"""A round of the loop: columns from memory, the activations that they name, products, one after the other."""
_WARP_CYCLES = 46
"""Of a multiprocessor, for a warp's 128 groups of a row, whatever their values are stored as."""


def vector_configurations(shape: Shape) -> list[Config]:
    """The configurations that suit a problem: as they were timed, best first, then those of which no time is known.

    Rows of few groups want many programs, long ones many groups in a round: so many warps side by side along them.
    Quantised values leave registers for more rows in a thread, which share the activations that it has gathered.
    """
    if shape.groups <= 128:
        sizes = [(8, 128, 1), (4, 128, 1), (16, 128, 2), (16, 256, 2)]
    elif shape.groups <= 256:
        sizes = [(16, 128, 2), (8, 256, 1), (8, 256, 2), (32, 128, 4)]
    elif shape.groups <= 512:
        sizes = [(8, 256, 2), (16, 256, 4), (32, 256, 4), (8, 256, 1)]
    else:
        sizes = [(8, 256, 2), (16, 256, 4), (32, 256, 4)]
    untimed = [] if shape.groups <= 256 else [(8, 512, 4)] if shape.groups <= 512 else [(8, 512, 4), (8, 1024, 8)]
    if shape.quantization is not None:
        untimed += [(16, 256, 2)] if shape.groups <= 512 else [(16, 512, 4), (16, 1024, 8)]
    known, unknown = (
        [
            Config(block_o, 1, block_g, warps, 1)
            for block_o, block_g, warps in each
            if block_o <= largest_block(shape.spec)
        ]
        for each in (sizes, untimed)
    )
    return [*known, *(config for config in unknown if config not in known)]


def vector_seconds(config: Config, shape: Shape, target: Target) -> float:
    """Estimated time: the longest of memory, of the rounds of a program, and of what all warps of the busiest
    multiprocessor take."""
    weights = 2 if shape.gated else 1
    programs = -(-config.tiles(shape) // target.multiprocessors)
    warps = weights * programs * config.steps(shape) * config.block_o * config.block_g / 128
    rounds = weights * config.steps(shape) * _ROUND_SECONDS
    return LAUNCH_SECONDS + max(memory_seconds(shape, target), rounds, warps * _WARP_CYCLES / target.clock)
