"""Work that goes on while its thread does: copies to shared memory (cp.async), and products (wgmma).

Both come in groups: what a thread has begun since its last commit is one group, and it waits until all but its last few
groups are done. A device may do the work at any time between. Here it is done as early as it may be, or as late; what
races with it is an error either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.errors import PTXError
from tests.ptx.memory import SharedMemory
from tests.ptx.parse import Register, Vector

if TYPE_CHECKING:
    from tests.ptx.machine import Machine


INPUT_HAZARD = "a register of A is written while wgmma reads it"
"""Noted and not raised: Triton to 3.7 makes it in loops, 3.9 does not (triton-lang/triton, issue 9433). Products are
computed from what the registers of A held when they began."""
COPY_HAZARD = "wgmma reads what was copied asynchronously, with no fence.proxy.async since"
"""Noted and not raised: Triton 3.6 leaves fences out there, 3.7 does not."""


@dataclass(frozen=True)
class _Copy:
    """One instruction's copies: of each thread, where to, what, and in which of its groups."""

    threads: np.ndarray
    addresses: np.ndarray
    data: np.ndarray
    groups: np.ndarray

    def of(self, chosen: np.ndarray) -> _Copy:
        return _Copy(self.threads[chosen], self.addresses[chosen], self.data[chosen], self.groups[chosen])


class Copies:
    """Asynchronous copies of some blocks."""

    def __init__(self, shared: SharedMemory, threads: int, late: bool) -> None:
        self._shared, self._late = shared, late
        self._committed = np.zeros(threads, np.int64)
        self._open: list[_Copy] = []

    def begin(self, addresses: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        """Copy `data`, bytes `[threads, size]`, to each thread's address."""
        self._shared.begin_copy(addresses, data.shape[1], threads)
        if not self._late:
            self._shared.fill(addresses, data, threads)
        self._open.append(_Copy(threads, addresses, data, self._committed[threads]))

    def commit(self, threads: np.ndarray) -> None:
        """What the threads have begun is a group."""
        self._committed[threads] += 1

    def finishes(self, threads: np.ndarray, pending: int) -> int:
        """How many copies are still under way that such a wait would be for."""
        chosen = [np.isin(copy.threads, threads) for copy in self._open]
        return sum(
            int((each & (copy.groups < self._committed[copy.threads] - pending)).sum())
            for each, copy in zip(chosen, self._open, strict=True)
        )

    def wait(self, threads: np.ndarray, pending: int) -> None:
        """Until all but the last `pending` groups of each thread are there; -1 for what is in no group as well."""
        waiting = np.zeros(self._committed.size, bool)
        waiting[threads] = True
        left = []
        for copy in self._open:
            done = waiting[copy.threads] & (copy.groups < self._committed[copy.threads] - pending)
            if done.any():
                self._finish(copy.of(done))
            if not done.all():
                left.append(copy.of(~done))
        self._open = left

    def _finish(self, copy: _Copy) -> None:
        if self._late:
            self._shared.fill(copy.addresses, copy.data, copy.threads)
        self._shared.end_copy(copy.addresses, copy.data.shape[1], copy.threads)


@dataclass(frozen=True)
class Product:
    """One wgmma of some warps.

    Attributes:
        warps: their numbers.
        groups: in which of its groups each warp has it.
        accumulators: registers that it adds to.
        inputs: registers that it reads.
        places: of shared memory, that it reads: `[warps, ...]`.
        compute: adds to the accumulators of some of its warps, given as a mask.
    """

    warps: np.ndarray
    groups: np.ndarray
    accumulators: tuple[str, ...]
    inputs: tuple[str, ...]
    places: np.ndarray
    compute: Callable[[np.ndarray], None]

    def of(self, chosen: np.ndarray) -> Product:
        """The same product of some of its warps."""
        whole = np.zeros(self.warps.size, bool)

        def compute(warps: np.ndarray) -> None:
            inner = whole.copy()
            inner[np.flatnonzero(chosen)[warps]] = True
            self.compute(inner)

        parts = {"warps": self.warps[chosen], "groups": self.groups[chosen], "places": self.places[chosen]}
        return replace(self, compute=compute, **parts)  # type: ignore[arg-type]


class Products:
    """Asynchronous products of some blocks, and the registers that they are using."""

    def __init__(self, machine: Machine, late: bool) -> None:
        self._machine, self._late = machine, late
        self._committed = np.zeros(machine.threads // 32, np.int64)
        self._open: list[Product] = []
        self._reading: dict[str, np.ndarray] = {}  # threads whose products use a register, by its name
        self._adding: dict[str, np.ndarray] = {}
        self._unfenced: dict[str, np.ndarray] = {}  # threads that have written a register since their last fence
        products = [each for each in machine.program.instructions if each.opcode.startswith("wgmma.mma_async")]
        self._used = bool(products)
        vectors = [each for product in products for each in product.operands[:2] if isinstance(each, Vector)]
        self._names = {each.name for vector in vectors for each in vector.items if isinstance(each, Register)}

    def check_read(self, name: str) -> None:
        """No thread reads a register that its products add to."""
        if name in self._adding and self._adding[name][self._machine.active()].any():
            raise PTXError(f"{name} is read while wgmma adds to it")

    def check_write(self, name: str) -> None:
        """No thread writes a register that its products use."""
        if not self._used:
            return
        self.check_read(name)
        active = self._machine.active()
        if name in self._reading and self._reading[name][active].any():
            self._machine.hazards.add((INPUT_HAZARD, name))
        if name not in self._unfenced:
            self._unfenced[name] = np.zeros(self._machine.threads, bool)
        self._unfenced[name][active] = True

    def fence(self) -> None:
        """Order what the threads have written to registers before the products that follow."""
        if self._machine.mask is None:
            self._unfenced.clear()
        for threads in self._unfenced.values():
            threads[self._machine.active()] = False

    def orders(self, threads: np.ndarray) -> bool:
        """Whether threads have written to a register of some product since their last fence."""
        return any(self._unfenced[name][threads].any() for name in self._names & self._unfenced.keys())

    def begin(self, product: Product) -> None:
        """Begin a product."""
        threads = self._lanes(product.warps)
        for name in (*product.accumulators, *product.inputs):
            if name in self._unfenced and self._unfenced[name][threads].any():
                raise PTXError(f"wgmma uses {name}, written since the last wgmma.fence")
        if self._machine.shared.begin_product(product.places, self._first(product)):
            self._machine.hazards.add((COPY_HAZARD, ""))
        if not self._late:
            product.compute(np.ones(product.warps.size, bool))
        self._open.append(product)
        self._note_use()

    def group(self, warps: np.ndarray) -> np.ndarray:
        """The number of the group that each warp is putting together."""
        return self._committed[warps]

    def commit(self) -> None:
        """What the warps have begun is a group."""
        self._committed[np.unique(self._machine.active() // 32)] += 1

    def finishes(self, threads: np.ndarray, pending: int) -> int:
        """How many products are still under way that such a wait would be for."""
        return sum(
            int((np.isin(each.warps, threads // 32) & (each.groups < self._committed[each.warps] - pending)).sum())
            for each in self._open
        )

    def wait(self, pending: int) -> None:
        """Until all but the last `pending` groups of each warp are done."""
        waiting = np.zeros(self._committed.size, bool)
        waiting[self._machine.active() // 32] = True
        left = []
        for product in self._open:
            done = waiting[product.warps] & (product.groups < self._committed[product.warps] - pending)
            if done.any():
                finished = product.of(done)
                if self._late:
                    product.compute(done)
                self._machine.shared.end_product(finished.places, self._first(finished))
            if not done.all():
                left.append(product.of(~done))
        self._open = left
        self._note_use()

    def _note_use(self) -> None:
        self._adding, self._reading = {}, {}
        for product in self._open:
            lanes = self._lanes(product.warps)
            for table, names in ((self._adding, product.accumulators), (self._reading, product.inputs)):
                for name in names:
                    table.setdefault(name, np.zeros(self._machine.threads, bool))[lanes] = True

    def _first(self, product: Product) -> np.ndarray:
        """A thread of each warp, in the shape of its places."""
        return (32 * product.warps).reshape(-1, *[1] * (product.places.ndim - 1))

    @staticmethod
    def _lanes(warps: np.ndarray) -> np.ndarray:
        return (32 * warps[:, None] + np.arange(32)).ravel()
