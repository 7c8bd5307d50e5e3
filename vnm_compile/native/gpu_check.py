"""The fingerprint of weights on a GPU: compared there on every call, the answer looked at on the next.

Nothing waits for the device. A kernel reads the sampled lines of all weights of a graph and raises a flag in pinned
host memory if one is not what it was when its weight was packed. So a write that torch does not count is seen one call
late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 16  # of 4 bytes: a line
_BLOCK = 64  # lines a program


@triton.jit
def compare_lines(  # type: ignore[no-untyped-def]
    addresses, words, expected, flag, count, RECORD: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr
):
    """Hash each line; keep the hashes where RECORD, else raise the flag if one differs.

    addresses: [count] int64. words: [count] int32, 4-byte words of each line, at most WORDS. expected: [count] int32.
    """
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = line < count
    word = tl.arange(0, WORDS)
    start = tl.load(addresses + line, mask=real, other=0).to(tl.pointer_type(tl.int32))
    inside = real[:, None] & (word[None, :] < tl.load(words + line, mask=real, other=0)[:, None])
    values = tl.load(start[:, None] + word[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
    # Spread every bit of a word over all of them, so that changes of the same bit in many words (signs) do not cancel
    # out. Each step is a bijection: a change of a single word is always seen.
    values = (values ^ (values >> 16)) * 0x7FEB352D
    values = (values ^ (values >> 15)) * 0x846CA68B
    values = (values ^ (values >> 16)) * (2 * word[None, :] + 1).to(tl.uint32)
    hashed = tl.sum(values.to(tl.int32, bitcast=True), axis=1)
    if RECORD:
        tl.store(expected + line, hashed, mask=real)
    else:
        differs = real & (hashed != tl.load(expected + line, mask=real, other=0))
        tl.store(flag + line * 0, 1, mask=differs)


class Lines(NamedTuple):
    """Sampled lines of a weight and what they held: `[n]` int64 addresses, int32 words of 4 bytes, int32 hashes."""

    addresses: Tensor
    words: Tensor
    expected: Tensor


def record_lines(samples: Sequence[int], device: torch.device) -> Lines:
    """What the lines hold now, in stream order; `samples` are pairs of an address and a number of bytes."""
    addresses = torch.tensor([address // 4 * 4 for address in samples[::2]], dtype=torch.int64, device=device)
    words = torch.tensor([max(1, length // 4) for length in samples[1::2]], dtype=torch.int32, device=device)
    lines = Lines(addresses, words, torch.empty(len(words), dtype=torch.int32, device=device))
    _launch(lines, lines.expected, record=True)
    return lines


class GpuCheck:
    """Compares the lines of several weights on one GPU with what they held when those were packed."""

    def __init__(self, weights: Sequence[Lines]) -> None:
        """Join the lines of the weights."""
        self._lines = Lines(*map(torch.cat, zip(*weights, strict=True)))
        on_gpu = self._lines.words.device.type == "cuda"
        self._flag = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        self._raised = self._flag.numpy()

    @property
    def raised(self) -> bool:
        """Whether an earlier call found a line changed."""
        return bool(self._raised[0])

    def moved(self) -> bool:
        """Whether an earlier call found a line changed; else looks again, which the next call will hear of."""
        if self.raised:
            return True
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            _launch(self._lines, self._flag, record=False)
        return False


def _launch(lines: Lines, flag: Tensor, record: bool) -> None:
    count = len(lines.words)
    with torch.cuda.device_of(lines.words):
        compare_lines[(-(-count // _BLOCK),)](*lines, flag, count, RECORD=record, BLOCK=_BLOCK, WORDS=_WORDS)
