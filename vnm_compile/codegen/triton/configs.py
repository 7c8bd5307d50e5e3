"""Tile sizes for a problem on a target: those that fit, the most promising first.

Which is fastest is measured where there is a device. The model here keeps out what cannot run well (shared memory,
registers, tiles larger than the problem) and orders the rest, so that the first is a fair choice without measuring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vnm_compile.hardware import Target, allows_tf32
from vnm_compile.quantization import Quantization
from vnm_compile.spec import KEPT_COLUMNS, Spec

DECODE_TOKENS = 32
"""Up to this many tokens reading the weight takes longer than multiplying: it is read once, by as many as it takes."""


_SPLIT_TOKENS = 128
"""Up to this many tokens K may be split; beyond, partial results are more to write and read than is won."""

_REGISTERS = {("cuda", 32): 178, ("hip", 64): 100, ("hip", 32): 78}
_REGISTERS_OF_WARP_GROUPS = 216
"""How many of a thread's (at most 256) registers the estimate may fill; with more, real kernels were seen to spill. By
backend and threads of a warp: AMD's RDNA has 32. Where four warps multiply together, the activations stay in shared
memory, and the compiler needs fewer than the estimate says."""

_LAST_RESORTS = 4
"""Configurations that are left where none fits."""


@dataclass(frozen=True)
class Shape:
    """What the choice of a configuration depends on.

    Attributes:
        tokens: expected number of tokens.
        rows: of the weight, padded to blocks; of one of the two where `gated`.
        groups: of a row.
        quantization: of the values, if they are integers.
    """

    tokens: int
    rows: int
    groups: int
    spec: Spec
    dtype: torch.dtype
    gated: bool = False
    quantization: Quantization | None = None

    @property
    def group_bytes(self) -> float:
        """Of a group of a row as it is stored: values and indices, and its share of scales."""
        if self.quantization is None:
            return self.spec.n * (self.dtype.itemsize + 0.25)
        of_scale = self.dtype.itemsize / (self.quantization.group or self.groups * self.spec.n)
        return self.spec.n * (self.quantization.bits / 8 + of_scale + 0.25)

    def scale_bytes(self, groups: int) -> int:
        """Of the scales of some groups of a row, as a tile loads them: words, or where one is too many, two of which
        one is full."""
        if self.quantization is None or self.quantization.group is None:
            return 0
        return max(8, groups * self.spec.n // self.quantization.group * self.dtype.itemsize)


@dataclass(frozen=True)
class Config:
    """How a kernel cuts its problem: rows, tokens and groups of a tile; warps, pipeline stages, and splits of K."""

    block_o: int
    block_t: int
    block_g: int
    warps: int
    stages: int
    splits: int = 1

    @property
    def is_vector(self) -> bool:
        """Whether it is for the kernels for one token, which have no tensor cores."""
        return self.block_t == 1

    def shared_bytes(self, shape: Shape) -> int:
        """Shared memory that the loop's buffers take, as measured on Triton 3.6 and 3.7 (an upper bound).

        A load whose address was itself loaded (activations, by column) needs two steps, so every second stage of the
        pipeline adds a buffer.
        """
        depth = (self.stages - 1) // 2
        size = shape.dtype.itemsize
        terms = KEPT_COLUMNS * self.block_g
        activation = terms * self.block_t * size
        values = shape.quantization.bits / 8 if shape.quantization else size
        of_row = self.block_g * shape.spec.n * (values + 0.25) + shape.scale_bytes(self.block_g)
        weight = self.block_o * math.ceil(of_row)
        expanded = self.block_o * terms * size  # where it passes through shared memory
        tiles = 2 if shape.gated else 1
        return tiles * ((depth + 1) * activation + depth * (weight + 16 * self.block_g)) + expanded

    def tiles(self, shape: Shape) -> int:
        """Programs of a launch."""
        return -(-shape.rows // self.block_o) * -(-shape.tokens // self.block_t) * self.splits

    def steps(self, shape: Shape) -> int:
        """Rounds of a tile's loop over groups."""
        groups = -(-shape.groups // self.splits)
        return -(-groups // self.block_g)

    def step_bytes(self, shape: Shape) -> float:
        """What a step of a tile reads from L2: weights and kept activations."""
        weight = self.block_o * self.block_g * shape.group_bytes
        activations = KEPT_COLUMNS * self.block_g * self.block_t * shape.dtype.itemsize
        return (2 if shape.gated else 1) * (weight + activations)

    def registers(self, shape: Shape, warp_size: int = 32) -> int:
        """32-bit registers of a thread: accumulators, the expanded tile, addresses of the loads, and what is around."""
        threads = warp_size * self.warps
        accumulators = self.block_o * self.block_t * (2 if shape.gated else 1)
        expanded = self.block_o * KEPT_COLUMNS * self.block_g * shape.dtype.itemsize // 4
        loads = KEPT_COLUMNS * self.block_g * self.block_t * shape.dtype.itemsize // 16
        levels = 12 if shape.quantization else 0  # measured: they pass through registers on their way
        return 40 + levels + (accumulators + expanded + 2 * loads) // threads


def configurations(shape: Shape, target: Target) -> list[Config]:
    """The configurations that suit a problem, best first; all cut K into as many parts."""
    candidates = list(_candidates(shape, target))
    fitting = [config for config in candidates if _fits(config, shape, target)]
    fitting = fitting or _smallest([config for config in candidates if _runs(config, shape, target)], shape)
    # Where memory is what all of them wait for, small tiles keep more of it on its way.
    ranked = sorted(fitting, key=lambda each: (seconds(each, shape, target), each.block_o, each.block_g))
    return [config for config in ranked if config.splits == ranked[0].splits]


def _smallest(runnable: list[Config], shape: Shape) -> list[Config]:
    """Those that ask a thread for the fewest registers: what is left where the rules of thumb leave none.

    They may spill, or copy metadata by less than four bytes; unpacking the weight on every call would take far longer.
    """
    ordered = sorted(runnable, key=lambda each: (each.splits, each.registers(shape), each.stages))
    return ordered[:_LAST_RESORTS]


def two_passes(shape: Shape, target: Target) -> bool:
    """Whether gate and up take less time as one weight of twice the rows, and a kernel of what they make together.

    One kernel for both has half of its accumulators for each, so its tiles hold half the tokens.
    """
    both = [replace(shape, gated=True), replace(shape, rows=2 * shape.rows, gated=False)]
    ranked = [(configurations(each, target), each) for each in both]
    if not all(found for found, _ in ranked):
        return False
    one, two = (seconds(found[0], each, target) for found, each in ranked)
    written_and_read = 2 * shape.tokens * 2 * shape.rows * shape.dtype.itemsize
    return one > two + LAUNCH_SECONDS + written_and_read / target.bandwidth


def splits(shape: Shape, target: Target) -> int:
    """Into how many parts K may be cut so that a problem with few tiles keeps the whole device reading.

    The partial results are summed by a second kernel, which is not always worth its launch.
    """
    if shape.tokens > _SPLIT_TOKENS:
        return 1
    block = min(64, largest_block(shape.spec))
    tiles = -(-shape.rows // block) * -(-shape.tokens // 64) * (2 if shape.gated else 1)
    wanted = 2 * target.multiprocessors / tiles
    longest = shape.groups // 64  # each part is long enough to fill a pipeline
    return 1 << max(0, min(math.floor(math.log2(max(1.0, wanted))), int(math.log2(max(1, longest))), 3))


def largest_block(spec: Spec) -> int:
    """The largest power of two that divides V: rows that a tile can have and still lie in one block."""
    return spec.v & -spec.v


def _candidates(shape: Shape, target: Target) -> Iterator[Config]:
    few, parts = shape.tokens <= DECODE_TOKENS, sorted({1, splits(shape, target)})
    tokens = [max(16, 1 << (shape.tokens - 1).bit_length())] if few else [32, 64, 128, 256]
    for block_o in (16, 32, 64, 128):
        for block_t in tokens:
            for warps in (1, 2, 4, 8):
                for block_g in (16, 32, 64) if few else (16, 32):
                    for stages in (3, 5, 7):
                        for each in parts:
                            yield Config(block_o, block_t, block_g, warps, stages, each)


def _runs(config: Config, shape: Shape, target: Target) -> bool:
    """Whether the device can run a configuration at all."""
    threads = target.warp_size * config.warps
    return (
        config.block_o <= largest_block(shape.spec)
        and config.block_t <= 2 * max(16, shape.tokens)
        and config.block_o * config.block_g * shape.spec.n // 4 >= threads
        and config.shared_bytes(shape) <= target.shared_bytes
    )


def _fits(config: Config, shape: Shape, target: Target) -> bool:
    # A warp takes 16 rows, or, where there are more warps than such, all rows of a part of the tokens. What is in a
    # thread then must leave registers for addresses and an epilogue: more than this was seen to spill.
    if _by_warp_groups(target) and largest_block(shape.spec) >= 64 and (config.block_o < 64 or config.warps % 4):
        return False
    rows_of_warps = config.block_o // 16
    columns_of_warps = -(-config.warps // rows_of_warps)
    return (
        _runs(config, shape, target)
        and _loops(config, shape)
        and config.block_t >= (64 * columns_of_warps if columns_of_warps > 1 else 1)
        and rows_of_warps <= 2 * config.warps
        # A thread's share of the metadata is 4 bytes at least, the narrowest that can be copied asynchronously.
        and config.block_o * config.block_g * shape.spec.n // 4 >= 4 * target.warp_size * config.warps
        and config.registers(shape, target.warp_size) <= _most_registers(config, target)
        and config.registers(shape, target.warp_size) * target.warp_size * config.warps <= target.registers
    )


def _most_registers(config: Config, target: Target) -> int:
    if _by_warp_groups(target) and target.capability[0] == 9 and config.warps % 4 == 0 and config.block_o % 64 == 0:
        return _REGISTERS_OF_WARP_GROUPS
    return _REGISTERS[target.backend, target.warp_size]


def _loops(config: Config, shape: Shape) -> bool:
    """Whether the loop over groups has two rounds, as a single one is unrolled into code that spills; two-byte values
    get by with one of the smallest, and four-byte ones are given an empty second one."""
    return config.block_g < -(-shape.groups // config.splits) or config.block_g == 16


def has_empty_round(config: Config, shape: Shape) -> bool:
    """Whether the loop over groups would have a single round of four-byte values, and gets a second one with none."""
    return shape.dtype.itemsize == 4 and config.splits == 1 and shape.groups <= config.block_g


def _by_warp_groups(target: Target) -> bool:
    """Whether four warps multiply 64 rows together (wgmma of sm_90, tcgen05 of sm_100), faster than each its own."""
    return target.backend == "cuda" and target.capability[0] in (9, 10)


# What the estimate of a time is made of: fitted to 330 configurations of 35 problems timed on an H200, which it tells
# to 13 % (docs/kernels.md). Elsewhere it orders configurations by the same account.
_LANES = 128
"""Lanes of a multiprocessor that run an instruction each in a cycle."""
_EXPAND_DIRECT, _EXPAND = 6, 10
"""Instructions that bring a term of the weight to the tensor cores: where a warp group multiplies out of the registers
that it expands to, and where what is expanded changes lanes first (of machine code, not timed)."""
_DEQUANTISE = 1
_DEQUANTISE_SINGLY = 5
"""Instructions more for a term whose value is quantised: where two are made at a time, and elsewhere (counted)."""
_GATHER = 9
"""Instructions that bring 16 bytes of activations, whose place a column from memory says."""
_STEP_CYCLES = {1: 1130}
_STEP_CYCLES_DEEP = 280
"""Cycles of a step of the loop that nothing hides, by how many tiles are under way at a time."""
_OF_BANDWIDTH = 0.69
"""Of a long copy's bandwidth, as much as weights reach that are read once."""
LAUNCH_SECONDS = 3.8e-6
"""From the end of the kernel before to the first step, and from the last step to the end."""
_SUM_SECONDS = 2e-6
"""Of the kernel that adds partial sums up: 1.2 us, and the gap before it."""


def seconds(config: Config, shape: Shape, target: Target) -> float:
    """Estimated time: the slower of memory and of the busiest multiprocessor's steps.

    Tiles on a multiprocessor take turns: their arithmetic adds up, and so does what they read from the cache; the
    longer of the two passes, and one step's latency with the first.
    """
    weights = 2 if shape.gated else 1
    threads = target.warp_size * config.warps
    share = -(-config.tiles(shape) // target.multiprocessors)  # tiles of the busiest multiprocessor
    resident = min(
        share,
        target.shared_bytes // config.shared_bytes(shape),
        target.registers // (config.registers(shape, target.warp_size) * threads),
        target.threads // threads,
    )
    resident = max(1, resident)
    rounds = (-(-share // resident) + max(1.0, share / resident)) / 2  # the last is as short as it is empty
    terms = KEPT_COLUMNS * config.block_g
    rate = target.peak_flops(shape.dtype, allows_tf32()) / target.multiprocessors / target.clock
    multiply = 2 * config.block_o * config.block_t * terms / rate
    direct = _by_warp_groups(target) and config.block_o % 64 == 0 and config.warps % 4 == 0
    repeated = max(1, 16 * config.warps // config.block_o)  # warps that share rows expand each for itself
    each = (_EXPAND_DIRECT if direct else _EXPAND) + _dequantise(shape, target)
    expand = each * config.block_o * terms * repeated / _LANES
    gather = _GATHER * terms * max(1, config.block_t * shape.dtype.itemsize // 16) / _LANES
    read = config.step_bytes(shape) / target.cache_bytes
    latency = _STEP_CYCLES.get((config.stages - 1) // 2, _STEP_CYCLES_DEEP)
    step = max(resident * read, resident * weights * (multiply + expand + gather) + latency)
    extra = LAUNCH_SECONDS + (_SUM_SECONDS if config.splits > 1 else 0)
    return extra + max(rounds * config.steps(shape) * step / target.clock, memory_seconds(shape, target))


def memory_seconds(shape: Shape, target: Target) -> float:
    """What reading the weight takes at the bandwidth that such kernels reach."""
    weights = 2 if shape.gated else 1
    stored = weights * shape.rows * shape.groups * (shape.group_bytes + 4 / shape.spec.v)
    return stored / (_OF_BANDWIDTH * target.bandwidth)


def _dequantise(shape: Shape, target: Target) -> int:
    if shape.quantization is None:
        return 0
    in_pairs = target.backend == "cuda" and shape.spec.n == 2 and shape.dtype.itemsize == 2
    return _DEQUANTISE if in_pairs else _DEQUANTISE_SINGLY
