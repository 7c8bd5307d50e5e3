"""Plant mutants in the kernels of a case, run each, and see which are caught.

A mutant is caught if it makes an error, or if the case's outputs are no longer as near to the exact ones as dense ones
are: with asynchronous work as early as it may be, or as late, and with every second row of the weight infinite, which
the other rows have nothing to do with.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.cases import Built
from tests.ptx.errors import NotModelled, PTXError
from tests.ptx.launch import Launch, Ran, as_bytes
from tests.ptx.mutants import Mutant, Watched, candidates, plant, spread
from tests.ptx.run import Run

_TRIED = 8
"""How many times as many candidates of a kind are looked at as are planted."""


SAME = "same"
OF_REGISTERS = (
    "constant wrong",
    "operands swapped",
    "bound off by one",
    "fragment order",
    "matrix turned",
    "wrong lane",
)


@dataclass
class Hunt:
    """What became of the mutants of some kernels.

    Attributes:
        planted, caught: by kind.
        ways: how those were caught.
        missed: what was not.
        same: mutants that were not counted, as what they changed went nowhere.
    """

    planted: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    missed: list[Mutant] = field(default_factory=list)
    same: int = 0

    def add(self, other: Hunt) -> None:
        """Take another's counts."""
        self.planted += other.planted
        self.caught += other.caught
        self.ways += other.ways
        self.missed += other.missed
        self.same += other.same


def hunt(built: Built, done: Run, most: int) -> Hunt:
    """Plant at most `most` mutants of each kind in each sparse kernel of a run of a case."""
    result = Hunt()
    for i, launch in enumerate(done.launches):
        if launch.kernel.template:
            result.add(_of_kernel(built, done, i, most))
    return result


def _of_kernel(built: Built, done: Run, number: int, most: int) -> Hunt:
    launch, program = done.launches[number], done.launches[number].kernel.program
    plain, settings = _settings(built, done, number)
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in candidates(program, plain.taken):
        by_kind.setdefault(mutant.kind, []).append(mutant)
    watched: dict[int, list[Watched]] = {}
    for found in by_kind.values():
        for mutant in spread(found, _TRIED * most):
            watched.setdefault(mutant.place, []).append(Watched(mutant))
    settings[0].restore()
    ran = launch.run(late=True, watch=watched)
    result = Hunt()
    for mutant in plant(program, watched, ran, most):
        changed = launch.with_program(program.changed(mutant.place, mutant.text))
        way = _caught(built, done, number, changed, settings, plain)
        if way == SAME and mutant.kind in OF_REGISTERS:
            result.same += 1
            continue
        result.planted[mutant.kind] += 1
        if way and way != SAME:
            result.caught[mutant.kind] += 1
            result.ways[way] += 1
        else:
            result.missed.append(mutant)
    settings[0].restore()
    return result


def _settings(built: Built, done: Run, number: int) -> tuple[Ran, list[_Setting]]:
    """What a kernel does as it is, late and early, and with every second row of the weight infinite."""
    launch, settings, plain = done.launches[number], [], None
    values = built.inputs[1]
    kept = values.clone()
    for late, step in ((True, 1), (False, 1), (True, 2)):
        if step > 1:
            built.spoil()
        for each in done.launches[:number]:
            each.run()
        setting = _Setting(_memory(done), late, step)
        ran = launch.run(late)
        plain = plain or ran
        setting.note_result(ran)
        settings.append(setting)
        setting.restore()
    values.copy_(kept)
    assert plain is not None
    return plain, settings


def _caught(
    built: Built, done: Run, number: int, changed: Launch, settings: list[_Setting], plain: Ran
) -> str:  # fmt: skip
    """How a changed launch is caught; nothing if it is not; SAME if what it changed goes nowhere."""
    steps, same = 3 * plain.steps + 1000, True
    for each in settings:
        each.restore()
        try:
            ran = changed.run(each.late, steps)
            for hazard, _ in ran.hazards - plain.hazards:
                return f"error: {hazard}"
            same &= each.step > 1 or ran.digest == each.digest
            if each.is_as_noted():
                continue
            for launch in done.launches[number + 1 :]:
                launch.run(each.late)
            built.check(done.outputs, each.step)
        except AssertionError:
            return "wrong result" if each.step == 1 else "wrong result where the next row is infinite"
        except PTXError as error:
            return f"error: {str(error).partition(' (')[0]}"
        except NotModelled:
            return "not modelled"
    return SAME if same else ""


class _Setting:
    """The memory of all launches of a run, before one of them, and how that one is run and judged."""

    def __init__(self, arrays: list[np.ndarray], late: bool, step: int) -> None:
        self.late, self.step = late, step
        self._arrays = arrays
        self._before = [array.copy() for array in arrays]
        self._after = b""
        self.digest: list[int] = []

    def restore(self) -> None:
        """Put it back."""
        for array, before in zip(self._arrays, self._before, strict=True):
            array[:] = before

    def note_result(self, ran: Ran) -> None:
        """What the memory holds now is what the launch makes of it."""
        self.digest = ran.digest
        self._after = self._differences()

    def is_as_noted(self) -> bool:
        """Whether the memory holds the same again."""
        return self._differences() == self._after

    def _differences(self) -> bytes:
        changed = [i for i, array in enumerate(self._arrays) if not np.array_equal(array, self._before[i])]
        return b"".join(i.to_bytes(2, "little") + self._arrays[i].tobytes() for i in changed)


def _memory(done: Run) -> list[np.ndarray]:
    """What all launches of a run use."""
    tensors = [each for launch in done.launches for each in launch.tensors()]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return [as_bytes(storage) for storage in storages.values()]
