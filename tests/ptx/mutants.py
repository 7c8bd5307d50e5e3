"""Faults planted in the PTX of a kernel: what a compiler, or a template, may get wrong.

A mutant is one instruction changed or left out. Some are the same program: what is planted is decided by rules, on a
run of the kernel as it is.

- Only instructions that were carried out are changed.
- One that writes registers is changed only where the changed one has written something else to them, in that run, and
  only where some other instruction names one of them.
- One that writes to shared memory is changed only where something that it has written was read, in that run.
- A wait is weakened only where the weaker one would have left something unfinished; a fence is dropped only where
  something was written since the last one, by a thread that it is for; a predicate or the size of a copy is taken away
  only where it was false, or zero, in a thread.
- One that writes registers does not count where its own run has accessed the same places of memory, stored the same
  there and taken the same branches: what it changed went nowhere.
- A barrier is dropped only where shared memory was accessed since the last one, and again before the next; one of a
  block only where two threads access one place right before and after it, and one of them writes (`ordering.py`).

Of each kind as many are taken of a kernel as are asked for, spread evenly over it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tests.ptx.launch import Ran
from tests.ptx.machine import Machine
from tests.ptx.parse import Instruction, Program, instruction, split

REGISTER = r"%[a-z]+\d+|[%\w]+#\d+"


@dataclass(frozen=True)
class Mutant:
    """A kind of fault, and the instruction that stands in its place."""

    kind: str
    place: int
    text: str


def candidates(program: Program, taken: set[int]) -> Iterator[Mutant]:
    """All changes of instructions that were carried out, equivalent ones among them."""
    named = Counter(name for each in program.instructions for name in set(re.findall(REGISTER, each.text)))
    for place in sorted(taken):
        each = program.instructions[place]
        results = re.findall(REGISTER, split(each.text)[0])
        if results and all(named[name] == 1 for name in results):
            continue
        for kind, text in _changes(each):
            if text != each.text:
                yield Mutant(kind, place, text)


def _changes(each: Instruction) -> Iterator[tuple[str, str]]:
    guard = each.text[: each.text.index(each.opcode)]
    body = each.text[len(guard) + len(each.opcode) :].strip()
    operands = split(body)
    name = each.opcode

    def with_operands(changed: list[str]) -> str:
        return f"{guard}{name} {', '.join(changed)}"

    yield from _of_synchronisation(each, operands)
    if guard and name.startswith(("ld.global", "st.", "cp.async")):
        yield "mask dropped", each.text[len(guard) :]
    if re.match(r"(ld|st)\.(global|shared)|cp\.async\.c[ag]|ldmatrix|stmatrix", name):
        yield from (("offset wrong", f"{guard}{name} {moved}") for moved in _moved(body, _step(name, operands)))
    if name.startswith(("cp.async.ca", "cp.async.cg")) and len(operands) > 3:
        yield "mask dropped", with_operands([*operands[:3], operands[2]])
        yield "copy dropped", "nop"
    if name.startswith("setp"):
        how = name.split(".")[1]
        other = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}.get(how)
        if other:
            yield "bound off by one", f"{guard}{name.replace(how, other, 1)} {body}"
    for i, text in _constants(name, operands):
        kind = "bound off by one" if name.startswith("setp") else "constant wrong"
        yield kind, with_operands([*operands[:i], text, *operands[i + 1 :]])
    yield from (("operands swapped", with_operands(changed)) for changed in _swapped(name, operands))
    yield from (("fragment order", with_operands(changed)) for changed in _reordered(name, operands))
    if name.startswith(("ldmatrix", "stmatrix")):
        turned = name.replace(".trans", "") if ".trans" in name else name.replace(".shared", ".trans.shared")
        yield "matrix turned", f"{guard}{turned} {body}"
    if name.startswith("mma.sp"):
        yield "wrong lane", with_operands([*operands[:5], str(1 - int(operands[5], 0))])  # whose metadata is meant
    if name.startswith("shfl.sync") and operands[2].isdigit():
        yield "wrong lane", with_operands([*operands[:2], str(int(operands[2]) * 2 % 32 or 1), *operands[3:]])


def _of_synchronisation(each: Instruction, operands: list[str]) -> Iterator[tuple[str, str]]:
    name = each.opcode
    if name in ("bar.sync", "bar.warp.sync"):
        yield "barrier dropped", "nop"
    if ".wait_group" in name:
        yield "wait weakened", f"{name} {int(operands[0]) + 1}"
    if ".commit_group" in name:
        yield "commit dropped", "nop"
    if name.startswith(("fence.", "wgmma.fence")):
        yield "fence dropped", "nop"


def _step(name: str, operands: list[str]) -> int:
    """Bytes of an access."""
    if name.startswith("cp.async"):
        return int(operands[2], 0)
    if "matrix" in name:
        return 16
    found = re.search(r"(?:\.v(\d))?\.[a-z]+(\d+)$", name)
    assert found is not None, name
    return int(found[1] or 1) * int(found[2]) // 8


def _moved(body: str, step: int) -> Iterator[str]:
    """The same operands with another offset in each address."""
    for found in re.finditer(r"\[\s*([^\]+]+?)\s*(?:\+\s*(-?\d+))?\s*\]", body):
        yield f"{body[: found.start()]}[{found[1]}+{int(found[2] or 0) + step}]{body[found.end() :]}"


def _constants(name: str, operands: list[str]) -> Iterator[tuple[int, str]]:
    """Integer constants of arithmetic, one more or one less; of masks and tables one bit or nibble changed."""
    if not re.match(r"(add|sub|mul|mad|shl|shr|and|or|xor|setp|selp|bfe|prmt|mov)\.", name) or name.endswith("f32"):
        return
    for i, text in enumerate(operands[1:], 1):
        if not re.fullmatch(r"-?(0x[\da-fA-F]+|\d+)", text):
            continue
        value = int(text, 0)
        if name.startswith(("and", "or", "xor")):
            yield i, str(value ^ (value & -value)) if value else "1"
        elif name.startswith("prmt"):
            yield i, hex(value ^ 0x1)
        elif name.endswith("pred"):
            yield i, "0" if value else "-1"
        else:
            yield i, str(value + 1)
            if value > 0:
                yield i, str(value - 1)


def _swapped(name: str, operands: list[str]) -> Iterator[list[str]]:
    """Operands whose order matters, exchanged."""
    if re.match(r"(sub|div|rem|prmt|selp|setp|shl|shr|cvt\.rn\.b?f16x2)\b", name) and len(operands) > 2:
        yield [operands[0], operands[2], operands[1], *operands[3:]]
    elif re.match(r"(mad\.lo|fma)\b", name):
        yield [operands[0], operands[3], operands[2], operands[1]]


def _reordered(name: str, operands: list[str]) -> Iterator[list[str]]:
    """The first two registers of a fragment or a vector exchanged; of mma, of each fragment."""
    chosen = {"mma.sync": (1, 2, 3), "mma.sp": (1, 2, 3), "ldmatrix": (0,), "stmatrix": (1,), "wgmma.mma_async": (1,)}
    places = next((each for start, each in chosen.items() if name.startswith(start)), ())
    if re.match(r"ld\.(shared|global).*\.v\d", name):
        places = (0,)
    elif re.match(r"st\.(shared|global).*\.v\d", name):
        places = (1,)
    for i in places:
        registers = split(operands[i].strip("{} "))
        if len(registers) > 1 and registers[0] != registers[1]:
            changed = "{" + ", ".join([registers[1], registers[0], *registers[2:]]) + "}"
            yield [*operands[:i], changed, *operands[i + 1 :]]


class Watched:
    """A mutant, and whether it has ever made a difference where it stands, in a run of the kernel as it is."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.instruction = instruction(mutant.text)
        self.differs = False

    def compare(self, machine: Machine, original: Instruction, reached: np.ndarray) -> None:
        """Called before the original is carried out, by the machine's active threads of those that have reached it."""
        if self.differs:
            return
        name, active = original.opcode, machine.active()
        if self.mutant.kind == "mask dropped":
            hidden = np.count_nonzero(reached) > active.size
            if original.predicate is None:
                hidden = bool((machine.read_all(original.operands[3], "u32")[active] == 0).any())
            self.differs = hidden
        elif not active.size or self.mutant.kind == "barrier dropped":
            return
        elif ".wait_group" in name:
            work = machine.products if name.startswith("wgmma") else machine.copies
            weak, strong = (int(each.text.split()[-1]) for each in (self.instruction, original))
            self.differs = work.finishes(active, strong) > work.finishes(active, weak)
        elif name == "wgmma.fence.sync.aligned":
            self.differs = machine.products.orders(active)
        elif name.startswith("fence.proxy"):
            self.differs = machine.shared.fences(active)
        elif re.match(r"(st|cp|stmatrix|wgmma)\b", name):
            self.differs = True
        else:
            self.differs = machine.results(original) != machine.results(self.instruction)


def separating(program: Program, meetings: list[tuple[int, int]]) -> set[int]:
    """Barriers with accesses of shared memory since the last one and before the next. A barrier of a warp has barriers
    of blocks beside it, those of a block only their own kind."""
    found = set()
    for name in ("bar.sync", "bar.warp.sync"):
        beside = [each for each in meetings if name == "bar.warp.sync" or program.instructions[each[0]].opcode == name]
        counts = [0, *(accesses for _, accesses in beside)]
        for i, (place, accesses) in enumerate(beside[:-1]):
            if program.instructions[place].opcode == name and counts[i] < accesses < counts[i + 2]:
                found.add(place)
        if beside:
            found.add(beside[-1][0])
    return found


def plant(program: Program, watched: Mapping[int, list[Watched]], ran: Ran, most: int) -> list[Mutant]:
    """Of each kind at most so many that make a difference, spread over the kernel."""
    kinds: dict[str, list[Mutant]] = {}
    barriers = separating(program, ran.meetings)
    of_blocks = {place for place in barriers if program.instructions[place].opcode == "bar.sync"}
    barriers -= of_blocks - ran.ordering
    for place in sorted(watched):
        writes = re.match(r"cp\.async\.c[ag]|st\.shared|stmatrix", program.instructions[place].opcode)
        for each in watched[place]:
            differs = place in barriers if each.mutant.kind == "barrier dropped" else each.differs
            if differs and (not writes or place in ran.read_back):
                kinds.setdefault(each.mutant.kind, []).append(each.mutant)
    return [each for found in kinds.values() for each in spread(found, most)]


def spread(found: list[Mutant], most: int) -> list[Mutant]:
    """At most so many, evenly."""
    if len(found) <= most:
        return found
    return [found[i * len(found) // most] for i in range(most)]
