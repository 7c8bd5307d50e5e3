"""PTX text to a list of instructions.

Of a file one kernel is read, as LLVM writes them: parameters, declarations of registers, labels, and instructions, with
the blocks of inline assembly, whose own registers are given names of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tests.ptx.errors import NotModelled

SPECIAL = ("%tid.x", "%laneid", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x")


@dataclass(frozen=True, slots=True)
class Register:
    """A register of each thread."""

    name: str


@dataclass(frozen=True, slots=True)
class Special:
    """A register that the hardware fills: the number of the thread, of the block."""

    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant, as its bits."""

    bits: int


@dataclass(frozen=True, slots=True)
class Name:
    """A label, a parameter or an array in shared memory."""

    name: str


@dataclass(frozen=True, slots=True)
class Address:
    """`[base+offset]`."""

    base: Register | Immediate | Name
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


Operand = Register | Special | Immediate | Name | Address | Vector


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `@!predicate opcode operands`. What has been cut out of a program has the opcode `nop`."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    text: str


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        instructions: in their order.
        labels: place of the instruction that follows each label.
        parameters: names, in order.
        widths: bits of registers, by prefix (`%rd`) or name (of inline assembly); 1 is a predicate.
        threads: of a block.
    """

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    parameters: tuple[str, ...]
    widths: dict[str, int]
    threads: int

    def width(self, name: str) -> int:
        """Bits of a register."""
        found = self.widths.get(name) or self.widths.get(name.rstrip("0123456789"))
        if found is None:
            raise NotModelled(f"register {name} is not declared")
        return found

    def changed(self, place: int, text: str) -> Program:
        """The program with another instruction at a place."""
        instructions = list(self.instructions)
        instructions[place] = instruction(text)
        return replace(self, instructions=tuple(instructions))


def parse(ptx: str) -> Program:
    """The kernel of a PTX file."""
    head, body = _kernel(ptx)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
    if threads is None:
        raise NotModelled("a kernel without a number of threads")
    parameters = tuple(re.findall(r"\.param[^,()]*?(\w+_param_\d+)", head))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    widths: dict[str, int] = {}
    scopes: list[dict[str, str]] = []
    opened = 0
    for statement in _statements(body):
        if statement == "{":
            opened += 1
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif statement.startswith(".reg"):
            names = scopes[-1] if scopes else None
            widths |= _declared(statement, names, opened)
        elif not statement.startswith(".pragma"):
            instructions.append(instruction(_renamed(statement, scopes)))
    return Program(tuple(instructions), labels, parameters, widths, int(threads[1]))


def _kernel(ptx: str) -> tuple[str, str]:
    """What stands before the body of the one kernel, from its name on, and the body."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*$", "", text, flags=re.M)
    if text.count(".entry") != 1:
        raise NotModelled(f"a file of {text.count('.entry')} kernels")
    if re.search(r"\.func\b", text):
        raise NotModelled("functions that are called")
    text = text[text.index(".entry") :]
    begin = text.index("{")
    depth, end = 0, begin
    for found in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if found[0] == "{" else -1
        if not depth:
            end = begin + found.start()
            break
    return text[:begin], text[begin + 1 : end]


def _statements(body: str) -> Iterator[str]:
    """Statements without their semicolons, labels with their colons, and braces that open and close blocks."""
    place = 0
    pattern = re.compile(r"\s*(?:([\w$]+:)|([{}])|([^;]*?);)")
    while body[place:].strip():
        found = pattern.match(body, place)
        if found is None:
            raise NotModelled(f"not a statement: {body[place : place + 80].strip()!r}")
        place = found.end()
        statement = " ".join((found[1] or found[2] or found[3]).split())
        if statement:
            yield statement


def _declared(statement: str, scope: dict[str, str] | None, number: int) -> dict[str, int]:
    """Widths of the registers of a declaration; within a block of assembly each gets a name of its own."""
    _, kind, names = statement.split(None, 2)
    bits = 1 if kind == ".pred" else int(re.sub(r"\D", "", kind))
    widths = {}
    for name in (each.strip() for each in names.split(",")):
        if scope is not None:
            scope[name] = f"{name}#{number}"
        widths[scope[name] if scope is not None else name.partition("<")[0]] = bits
    return widths


def _renamed(statement: str, scopes: Sequence[dict[str, str]]) -> str:
    for names in reversed(scopes):
        for name, own in names.items():
            statement = re.sub(rf"(?<![\w%#.$]){re.escape(name)}(?![\w#.])", own, statement)
    return statement


def instruction(text: str) -> Instruction:
    """One instruction from its text."""
    found = re.fullmatch(r"(?:@(!?)([%\w#]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
    if found is None:
        raise NotModelled(f"not an instruction: {text!r}")
    negated, predicate, opcode, rest = found.groups()
    operands = tuple(operand(each) for each in split(rest))
    return Instruction(opcode, operands, predicate, bool(negated), text)


def split(text: str) -> list[str]:
    """Operands at the commas that stand in no brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()] if current.strip() else parts


def operand(text: str) -> Operand:
    """One operand from its text."""
    if text.startswith("{"):
        return Vector(tuple(operand(each) for each in split(text[1:-1])))
    if text.startswith("["):
        return _address(text[1:-1].strip())
    if text in SPECIAL:
        return Special(text)
    if re.fullmatch(r"%[a-z]+\d+|[%\w]+#\d+", text):
        return Register(text)
    if re.fullmatch(r"-?(0[xX][\da-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"0[fF][\da-fA-F]{8}|0[dD][\da-fA-F]{16}", text):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"[A-Za-z_$][\w$]*|\d+\.\d+", text):
        return Name(text)
    raise NotModelled(f"operand {text!r}")


def _address(text: str) -> Address:
    base, _, offset = (each.strip() for each in text.partition("+"))
    found = operand(base)
    assert isinstance(found, Register | Immediate | Name), text
    return Address(found, int(offset, 0) if offset else 0)
