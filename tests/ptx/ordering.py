"""Which barriers of blocks order accesses that nothing else does: those that a mutant leaves out.

Told of every access of shared memory in a run, and of every barrier. A barrier is needed if a place is accessed right
before it by one thread and right after it by another, and one of the two writes: with no other barrier of the block
between. Asynchronous copies write when they begin and when somebody has waited for them. Where a program has barriers
of warps they order a warp's threads, and only its warps are told apart here.
"""

from __future__ import annotations

import numpy as np

_NONE, _SEVERAL = -1, -2


class Ordering:
    """What was accessed by whom in some blocks, since the last barrier and between the two before."""

    def __init__(self, places: int, size: int, threads: int, together: int) -> None:
        """`places` bytes of shared memory, `size` for each block of `threads` threads, so many `together` as one."""
        self._size, self._threads, self._together = size, threads, together
        # By read and write, before and since the last barrier.
        self._by = {(writes, since): np.full(places, _NONE, np.int32) for writes in (0, 1) for since in (0, 1)}
        self._barrier = np.full(max(places // max(size, 1), 1), _NONE, np.int64)  # of each block, the last one's place
        self.needed: set[int] = set()

    def access(self, index: np.ndarray, threads: np.ndarray, writes: bool) -> None:
        """Threads read or write places, each a row of `index`."""
        index, threads = np.broadcast_arrays(index, threads)
        index, who = index.ravel(), (threads // self._together).ravel().astype(np.int32)
        conflict = self._differs(index, who, 1)
        if writes:
            conflict |= self._differs(index, who, 0)
        if conflict.any():
            self.needed.update(np.unique(self._barrier[index[conflict] // self._size]).tolist())
        table = self._by[int(writes), 1]
        before = table[index]
        table[index] = who
        several = ((before != _NONE) & (before != who)) | (table[index] != who)
        table[index[several]] = _SEVERAL

    def barrier(self, threads: np.ndarray, place: int) -> None:
        """All threads of some blocks have met."""
        for block in np.unique(threads // self._threads):
            self._barrier[block] = place
            part = slice(block * self._size, (block + 1) * self._size)
            for writes in (0, 1):
                self._by[writes, 0][part] = self._by[writes, 1][part]
                self._by[writes, 1][part] = _NONE

    def _differs(self, index: np.ndarray, who: np.ndarray, writes: int) -> np.ndarray:
        """Where somebody else has accessed a place before the last barrier."""
        before = self._by[writes, 0][index]
        return (before != _NONE) & (before != who)
