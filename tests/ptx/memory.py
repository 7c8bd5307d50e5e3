"""Global and shared memory: where a thread may access, and which accesses race.

Global memory holds the buffers of one launch with room between them that nobody may touch. Shared memory keeps, for
every place, who wrote and who read it last, and what asynchronous work is still under way there.
"""

from __future__ import annotations

import zlib

import numpy as np

from tests.ptx.errors import PTXError
from tests.ptx.ordering import Ordering

BASE = 0x7F12_0000_0000
_ALIGNMENT = 512
_GUARD = 1024


class _Traced:
    """Memory that sums up what is done to it: `digest` tells different accesses and stores apart."""

    digest = 0

    def _trace(self, *arrays: np.ndarray) -> None:
        for array in arrays:
            self.digest = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1), self.digest)


class GlobalMemory(_Traced):
    """The buffers of one launch. Their places are aligned as an allocator's are."""

    def __init__(self, buffers: list[np.ndarray]) -> None:
        """`buffers` are arrays of bytes, copied in; `contents` has what became of them."""
        places, top = [], _ALIGNMENT
        for buffer in buffers:
            places.append(top)
            top = -(-(top + buffer.size + _GUARD) // _ALIGNMENT) * _ALIGNMENT
        self._data = np.full(top, 0xFF, np.uint8)
        self._allowed = np.zeros(top, bool)
        self._writer = np.full(top, -1, np.int64)
        self.first_thread = 0  # of those that run now, among all of the launch
        self._places = [(place, buffer.size) for place, buffer in zip(places, buffers, strict=True)]
        for (place, size), buffer in zip(self._places, buffers, strict=True):
            self._data[place : place + size] = buffer
            self._allowed[place : place + size] = True

    def address(self, buffer: int) -> int:
        """Where a buffer begins."""
        return BASE + self._places[buffer][0]

    def contents(self, buffer: int) -> np.ndarray:
        """The bytes of a buffer."""
        place, size = self._places[buffer]
        return self._data[place : place + size]

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """`size` bytes at each address: `[threads, size]`."""
        index, threads = self._index(addresses, size, "load"), threads + self.first_thread
        writer = self._writer[index]
        if ((writer >= 0) & (writer != threads[:, None])).any():
            raise PTXError("global load of what another thread of this launch stores")
        return self._data[index]

    def store(self, addresses: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        """Store `data`, bytes `[threads, size]`. Several threads may store the same value at a place."""
        index, threads = self._index(addresses, data.shape[1], "store"), threads + self.first_thread
        self._trace(data)
        writer = self._writer[index]
        differs = self._data[index] != data
        if (differs & (writer >= 0) & (writer != threads[:, None])).any():
            raise PTXError("global store of another value than another thread's")
        self._data[index] = data
        self._writer[index] = threads[:, None]
        if (self._data[index] != data).any():
            raise PTXError("global stores of different values at one place")

    def _index(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        if (addresses % size).any():
            raise PTXError(f"misaligned global {what}")
        self._trace(addresses)
        first = addresses - BASE
        last = first + size - 1
        # The room between buffers is wider than any access.
        if (
            (first < 0).any()
            or (last >= self._data.size).any()
            or not (self._allowed[first] & self._allowed[last]).all()
        ):
            raise PTXError(f"global {what} out of bounds")
        return first[:, None] + np.arange(size)


class SharedMemory(_Traced):
    """Shared memory of a number of blocks, and the accesses that nothing orders.

    An access is ordered after another of the same thread, of the same warp if `bar.warp.sync` stands between, and of
    the same block if `bar.sync` does. Asynchronous copies are writes that may happen at any time until they are waited
    for; wgmma's reads likewise, through another proxy: what threads have written is fenced for it first.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        """`size` bytes for each of `blocks` blocks of `threads` threads."""
        self.size, self._threads = size, threads
        n = blocks * size
        self._data = np.full(n, 0xCD, np.uint8)
        self._writer = np.full(n, -1, np.int32)
        self._reader = np.full(n, -1, np.int32)  # -2: several of a warp
        self._reading_warp = np.full(n, -1, np.int32)  # -2: several
        self._write_time = np.full((2, n), -1, np.int32)  # barriers of the block, of the warp, before the last write
        self._read_time = np.full((2, n), -1, np.int32)
        self._copied = np.zeros(n, np.int16)  # asynchronous copies to this place that are under way
        self._multiplied = np.zeros(n, np.int16)  # asynchronous products that read it
        self._unfenced = np.zeros(n, np.int8)  # since the last fence: 1, copied to; 2, written
        self.accesses = 0
        # For whoever plants faults: reads that leave no trace, and which instructions' writes are read.
        self.quiet, self.traces, self.place = False, False, 0
        self.read_back: set[int] = set()
        self._source = np.full(n, -1, np.int32)
        self.ordering: Ordering | None = None  # for whoever plants faults: which barriers are needed
        self._clock = np.zeros((2, blocks * threads), np.int32)  # of each thread: barriers of its block, of its warp

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray, many: bool = False) -> np.ndarray:
        """`size` bytes at each thread's address; `many` if what is read goes to other threads of the warp as well."""
        index = self._index(addresses, size, threads)
        if not self.quiet:
            self._check_read(index, threads[:, None])
            self._note_read(index, threads[:, None], many)
        return self._data[index]

    def store(self, addresses: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        """Store `data`, bytes `[threads, size]`."""
        index = self._index(addresses, data.shape[1], threads)
        self._trace(data)
        self._check_write(index, threads[:, None])
        self._note_write(index, threads[:, None])
        self._unfenced[index] = 2
        self._source[index] = self.place
        self._data[index] = data
        if (self._data[index] != data).any():
            raise PTXError("shared stores of different values at one place")

    def begin_copy(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> None:
        """Asynchronous copies begin: from now on nobody may access what they write."""
        index = self._index(addresses, size, threads)
        self._check_write(index, threads[:, None])
        if self.ordering:
            self.ordering.access(index, threads[:, None], writes=True)
        np.add.at(self._copied, index, 1)
        self._source[index] = self.place
        if (self._copied[index] > 1).any():
            raise PTXError("two asynchronous copies to one place")

    def fill(self, addresses: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        """The bytes of asynchronous copies arrive."""
        self._trace(data)
        self._data[self._index(addresses, data.shape[1], threads)] = data

    def end_copy(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> None:
        """Asynchronous copies have been waited for, by the threads that began them."""
        self.accesses += 1
        index = self._index(addresses, size, threads)
        np.subtract.at(self._copied, index, 1)
        self._note_write(index, threads[:, None])
        self._unfenced[index] = 1

    def begin_product(self, index: np.ndarray, threads: np.ndarray) -> bool:
        """A product reads places (as `places` returns) until it is waited for; `threads` are one of each warp.

        Returns whether it reads what was copied there and has not been fenced since; what was written is an error.
        """
        self._check_read(index, threads)
        unfenced = self._unfenced[index]
        if (unfenced == 2).any():
            raise PTXError("wgmma reads what fence.proxy.async has not made visible to it")
        np.add.at(self._multiplied, index, 1)
        return bool(unfenced.any())

    def end_product(self, index: np.ndarray, threads: np.ndarray) -> None:
        """The warp has waited for its product."""
        self.accesses += 1
        np.subtract.at(self._multiplied, index, 1)
        self._note_read(index, np.broadcast_to(threads, index.shape), many=True)

    def peek(self, index: np.ndarray, size: int) -> np.ndarray:
        """Bytes at places, whoever asks: `[..., size]`."""
        return self._data[index[..., None] + np.arange(size)]

    def places(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Indices of the bytes of accesses: addresses `[threads, ...]` to `[threads, ...]`, of their first bytes."""
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise PTXError("shared access out of bounds")
        block = threads // self._threads
        return block.reshape(-1, *[1] * (addresses.ndim - 1)) * self.size + addresses

    def watch(self, together: int) -> None:
        """Note what faults can be planted by: writes that are read, and barriers that are needed (`Ordering`)."""
        self.traces, self.ordering = True, Ordering(self._data.size, self.size, self._threads, together)

    def barrier(self, threads: np.ndarray) -> None:
        """All threads of a block have met."""
        self._clock[0, threads] += 1
        if self.ordering:
            self.ordering.barrier(threads, self.place)

    def warp_barrier(self, threads: np.ndarray) -> None:
        """All threads of a warp have met."""
        self._clock[1, threads] += 1

    def fence(self, threads: np.ndarray) -> None:
        """Threads make what they have written, or see written before a barrier, visible to asynchronous products."""
        self._unfenced[self._visible(threads)] = 0

    def fences(self, threads: np.ndarray) -> bool:
        """Whether there is anything that such a fence would be for."""
        return bool(self._unfenced[self._visible(threads)].any())

    def _visible(self, threads: np.ndarray) -> np.ndarray:
        now = np.full(self._unfenced.size // max(self.size, 1), -1, np.int32)
        now[threads // self._threads] = self._clock[0, threads]
        mine = np.zeros(self._clock.shape[1] + 1, bool)
        mine[threads] = True
        return (self._write_time[0] < np.repeat(now, self.size)) | mine[self._writer]

    def _index(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        if (addresses % size).any():
            raise PTXError("misaligned shared access")
        self._trace(addresses)
        return self.places(addresses, size, threads)[:, None] + np.arange(size)

    def _check_read(self, index: np.ndarray, threads: np.ndarray) -> None:
        self.accesses += 1
        if self.traces:
            self.read_back.update(np.unique(self._source[index]).tolist())
        writer = self._writer[index]
        if (writer == -1).any():
            raise PTXError("shared memory read before it is written")
        if self._copied[index].any():
            raise PTXError("race: shared memory read while it is copied to")
        if self._unordered(writer, self._write_time[:, index], threads).any():
            raise PTXError("race: shared memory read after another thread's write, with nothing between")

    def _check_write(self, index: np.ndarray, threads: np.ndarray) -> None:
        self.accesses += 1
        if self._copied[index].any():
            raise PTXError("race: shared memory written while it is copied to")
        if self._multiplied[index].any():
            raise PTXError("race: shared memory written while it is multiplied")
        writer = self._writer[index]
        if ((writer != -1) & self._unordered(writer, self._write_time[:, index], threads)).any():
            raise PTXError("race: shared memory written after another thread's write, with nothing between")
        reader, warp, time = self._reader[index], self._reading_warp[index], self._read_time[:, index]
        now = self._clock[:, threads]
        same_warp = warp == threads // 32
        late = (time[0] == now[0]) & (~same_warp | ((time[1] == now[1]) & (reader != threads)))
        if ((warp != -1) & late).any():
            raise PTXError("race: shared memory written after another thread's read, with nothing between")

    def _unordered(self, other: np.ndarray, time: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Whether a thread's access at a time is not ordered before one that another makes now."""
        now = self._clock[:, threads]
        same_warp = other // 32 == threads // 32
        return (other != threads) & (time[0] == now[0]) & (~same_warp | (time[1] == now[1]))

    def _note_read(self, index: np.ndarray, threads: np.ndarray, many: bool) -> None:
        if self.ordering:
            self.ordering.access(index, threads, writes=False)
        threads = np.broadcast_to(threads, index.shape)
        now = self._clock[:, threads]
        warp = threads // 32
        same_time = self._read_time[0][index] == now[0]
        before = self._reading_warp[index]
        self._reading_warp[index] = warp
        # Of several warps that read in one access the last is kept: all others differ from it.
        several = (same_time & (before != -1) & (before != warp)) | (self._reading_warp[index] != warp)
        self._reading_warp[index[several]] = -2
        reader = self._reader[index]
        again = same_time & (self._read_time[1][index] == now[1]) & (reader != -1) & (reader != threads)
        self._reader[index] = threads
        others = again | (self._reader[index] != threads) | many
        self._reader[index[others]] = -2
        self._read_time[:, index] = now

    def _note_write(self, index: np.ndarray, threads: np.ndarray) -> None:
        if self.ordering:
            self.ordering.access(index, threads, writes=True)
        self._writer[index] = threads
        self._write_time[:, index] = self._clock[:, np.broadcast_to(threads, index.shape)]
