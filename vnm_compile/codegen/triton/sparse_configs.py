"""Tiles for sparse tensor cores: those that fit, the most promising first.

As `configs` does for the other kernels. Nothing here was timed: the estimate takes its constants from there, and counts
of instructions from compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vnm_compile.codegen.triton import configs
from vnm_compile.codegen.triton.configs import Config, Shape, configurations, largest_block
from vnm_compile.hardware import Target
from vnm_compile.spec import KEPT_COLUMNS

_ACCUMULATORS = (4, 64)
"""Of a thread: a fragment at least; with twice as many as the most an epilogue was seen to spill."""
_STAGES = (2, 3, 4, 5)
_SHARED_BYTES_A_CYCLE = 128
_INSTRUCTIONS, _COPY, _DIVIDE = 25, 11, 10
"""Of machine code, instructions of a warp in a step besides products: fixed; for each 16 bytes that a thread copies;
for each word of two values that takes part in two products (N = 1)."""


@dataclass(frozen=True)
class SparseConfig(Config):
    """How a kernel on sparse tensor cores cuts its problem.

    `stages` are tiles in shared memory: one that is multiplied, the others on their way.

    Attributes:
        warps_o: warps along the rows of a tile; the others lie along its tokens.
    """

    warps_o: int = 1

    @property
    def warps_t(self) -> int:
        """Warps along the tokens of a tile."""
        return self.warps // self.warps_o

    def step_bytes(self, shape: Shape) -> int:
        """What a step copies: kept rows of the activations, values and indices."""
        activations = KEPT_COLUMNS * self.block_g * self.block_t * shape.dtype.itemsize
        group = shape.spec.n * (8 * shape.dtype.itemsize + 2)  # bits
        return activations + self.block_o * self.block_g * group // 8

    def shared_bytes(self, shape: Shape) -> int:
        """The ring of tiles, or what the accumulators change threads in before they are stored."""
        return max(self.stages * self.step_bytes(shape), 4 * self.block_o * self.block_t)

    def registers(self, shape: Shape, warp_size: int = 32) -> int:
        """32-bit registers of a thread: accumulators, fragments, and two of an address for each 16 bytes it copies."""
        threads = warp_size * self.warps
        fragments = self.block_o // self.warps_o // 2 + self.block_t // self.warps_t
        return 40 + self.block_o * self.block_t // threads + fragments + 2 * self.copies(shape)

    def copies(self, shape: Shape) -> int:
        """How often a thread copies 16 bytes in a step."""
        return -(-self.step_bytes(shape) // (16 * 32 * self.warps))


def sparse_configurations(shape: Shape, target: Target) -> list[SparseConfig]:
    """The configurations that suit a problem, best first; all cut K into as many parts."""
    fitting = [config for config in _candidates(shape, target) if _fits(config, shape, target)]
    ranked = sorted(fitting, key=lambda each: (sparse_seconds(each, shape, target), each.block_o, each.block_g))
    return [config for config in ranked if config.splits == ranked[0].splits]


def of_both_kinds(ranked: list[Config], shape: Shape, target: Target, most: int) -> list[Config]:
    """The first of `ranked`, which is for other tensor cores, and of those for sparse ones: the better kind in front.

    Where there is a device the first of both are timed, `most` of the better and half as many of the other.
    """
    sparse = sparse_configurations(shape, target)
    if not (sparse and ranked):
        return [*sparse, *ranked][:most]
    faster = sparse_seconds(sparse[0], shape, target) <= configs.seconds(ranked[0], shape, target)
    better: list[Config] = [*(sparse if faster else ranked)]
    other: list[Config] = [*(ranked if faster else sparse)]
    other = [config for config in other if config.splits == better[0].splits]
    return [*better[:most], *other[: most // 2]]


def two_sparse_passes(shape: Shape, target: Target) -> bool:
    """Whether gate and up take less time as one weight of twice the rows on sparse tensor cores, and a kernel of what
    they make together, than in one kernel on others."""
    both = replace(shape, rows=2 * shape.rows, gated=False)
    one, two = configurations(replace(shape, gated=True), target), sparse_configurations(both, target)
    if not (one and two):
        return False
    written_and_read = 2 * shape.tokens * 2 * shape.rows * shape.dtype.itemsize
    seconds = sparse_seconds(two[0], both, target) + configs.LAUNCH_SECONDS + written_and_read / target.bandwidth
    return seconds < configs.seconds(one[0], replace(shape, gated=True), target)


def _candidates(shape: Shape, target: Target) -> Iterator[SparseConfig]:
    few, parts = shape.tokens <= configs.DECODE_TOKENS, sorted({1, configs.splits(shape, target)})
    tokens = [max(16, 1 << (shape.tokens - 1).bit_length())] if few else [32, 64, 128, 256]
    for block_o in (16, 32, 64, 128):
        for block_t in tokens:
            for warps_o in (1, 2, 4):
                for warps_t in (1, 2, 4):
                    for block_g in (16, 32):
                        for stages in _STAGES:
                            for each in parts:
                                warps = warps_o * warps_t
                                yield SparseConfig(block_o, block_t, block_g, warps, stages, each, warps_o)


def _fits(config: SparseConfig, shape: Shape, target: Target) -> bool:
    threads = 32 * config.warps
    rounds = -(-shape.groups // (config.splits * config.block_g))
    return (
        config.block_o <= largest_block(shape.spec)
        and config.block_o >= 16 * config.warps_o
        and config.block_t >= 8 * config.warps_t
        and config.block_t <= 2 * max(16, shape.tokens)
        and _ACCUMULATORS[0] <= config.block_o * config.block_t // threads <= _ACCUMULATORS[1]
        and config.stages <= rounds + 2  # as many tiles on their way as there are, and one
        # A thread's share of the metadata is 4 bytes at least, the narrowest that can be copied asynchronously.
        and config.block_o * config.block_g * shape.spec.n // 4 >= 4 * 32
        and config.shared_bytes(shape) <= target.shared_bytes
    )


def sparse_seconds(config: SparseConfig, shape: Shape, target: Target) -> float:
    """Estimated time, as `configs.seconds` says it: the slower of memory and of the busiest multiprocessor's steps.

    Products take half of what they would on dense tensor cores, and nothing is expanded; fragments come from shared
    memory, which every warp reads its part of both operands from.
    """
    threads = 32 * config.warps
    share = -(-config.tiles(shape) // target.multiprocessors)  # tiles of the busiest multiprocessor
    resident = min(
        share,
        target.shared_bytes // config.shared_bytes(shape),
        target.registers // (config.registers(shape) * threads),
        target.threads // threads,
    )
    resident = max(1, resident)
    rounds = (-(-share // resident) + max(1.0, share / resident)) / 2  # the last is as short as it is empty
    terms = KEPT_COLUMNS * config.block_g
    rate = target.sparse_flops / target.multiprocessors / target.clock
    multiply = 2 * config.block_o * config.block_t * terms / rate
    fragments = config.block_o * config.warps_t // 2 + config.block_t * config.warps_o  # elements of a term
    shared = (fragments * terms * shape.dtype.itemsize + config.step_bytes(shape)) / _SHARED_BYTES_A_CYCLE
    around = config.warps * (_INSTRUCTIONS + _COPY * config.copies(shape)) * 32 / configs._LANES
    if shape.spec.n == 1:
        around += _DIVIDE * config.block_o * config.block_g // 2 * config.warps_t / configs._LANES
    read = config.step_bytes(shape) / target.cache_bytes
    latency = configs._STEP_CYCLES.get(config.stages - 1, configs._STEP_CYCLES_DEEP)
    step = max(resident * read, resident * (max(multiply, shared) + around) + latency)
    extra = configs.LAUNCH_SECONDS + (configs._SUM_SECONDS if config.splits > 1 else 0)
    return extra + max(rounds * config.steps(shape) * step / target.clock, configs.memory_seconds(shape, target))
