"""Plant mutants in the kernels of a case, run each, and see which are caught.

A mutant is caught if it makes an error, or if the case's outputs are no longer as near to the exact ones as dense ones
are, with asynchronous work as early as it may be or as late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from tests.ptx.cases import Built
from tests.ptx.errors import NotModelled, PTXError
from tests.ptx.launch import Launch, as_bytes
from tests.ptx.mutants import Mutant, Watched, candidates, plant, separating, spread
from tests.ptx.run import Run

_TRIED = 8
"""How many times as many candidates of a kind are looked at as are planted."""


@dataclass
class Hunt:
    """What became of the mutants of some kernels.

    Attributes:
        planted, caught: by kind.
        ways: how those were caught.
        missed: what was not.
    """

    planted: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    missed: list[Mutant] = field(default_factory=list)

    def add(self, other: Hunt) -> None:
        """Take another's counts."""
        self.planted += other.planted
        self.caught += other.caught
        self.ways += other.ways
        self.missed += other.missed


def hunt(built: Built, done: Run, most: int) -> Hunt:
    """Plant at most `most` mutants of each kind in each sparse kernel of a run of a case."""
    result = Hunt()
    for i, launch in enumerate(done.launches):
        if launch.kernel.template:
            result.add(_of_kernel(built, done, i, most))
    return result


def _of_kernel(built: Built, done: Run, number: int, most: int) -> Hunt:
    launch, program = done.launches[number], done.launches[number].kernel.program
    for each in done.launches[:number]:
        each.run()
    state = _State(done)
    plain = launch.run(late=False)
    after = {True: state.differences(), False: state.differences()}
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in candidates(program, plain.taken):
        by_kind.setdefault(mutant.kind, []).append(mutant)
    watched: dict[int, list[Watched]] = {}
    for found in by_kind.values():
        for mutant in spread(found, _TRIED * most):
            watched.setdefault(mutant.place, []).append(Watched(mutant))
    state.restore()
    launch.run(late=True, watch=watched)
    after[True] = state.differences()
    result = Hunt()
    for mutant in plant(watched, separating(program, plain.meetings), most):
        changed = launch.with_program(program.changed(mutant.place, mutant.text))
        way = _caught(built, done, number, changed, state, after, 3 * plain.steps + 1000, plain.hazards)
        result.planted[mutant.kind] += 1
        if way:
            result.caught[mutant.kind] += 1
            result.ways[way] += 1
        else:
            result.missed.append(mutant)
    state.restore()
    return result


def _caught(
    built: Built, done: Run, number: int, changed: Launch, state: _State, after: dict[bool, bytes], steps: int,
    hazards: set[str],
) -> str:  # fmt: skip
    """How a changed launch is caught; nothing if it is not."""
    for late in (True, False):
        state.restore()
        try:
            if changed.run(late, steps).hazards - hazards:
                return "error: a register that wgmma uses is written"
            if state.differences() == after[late]:
                continue
            for each in done.launches[number + 1 :]:
                each.run(late)
            built.check(done.outputs)
        except AssertionError:
            return "wrong result"
        except PTXError as error:
            return f"error: {str(error).partition(' (')[0]}"
        except NotModelled:
            return "not modelled"
    return ""


class _State:
    """The memory that all launches of a run use, as it is now."""

    def __init__(self, done: Run) -> None:
        tensors = [each for launch in done.launches for each in launch.tensors()]
        self._arrays = [as_bytes(each) for each in _storages(tensors)]
        self._before = [array.copy() for array in self._arrays]

    def restore(self) -> None:
        """Put it back."""
        for array, before in zip(self._arrays, self._before, strict=True):
            array[:] = before

    def differences(self) -> bytes:
        """What has changed since: the bytes of arrays that differ."""
        changed = [i for i, array in enumerate(self._arrays) if not np.array_equal(array, self._before[i])]
        return b"".join(i.to_bytes(2) + self._arrays[i].tobytes() for i in changed)


def _storages(tensors: list[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    found = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    yield from found.values()
