"""Count what matters in machine code: tensor-core instructions, and loads from global memory by width."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Names of SASS instructions: CUDA Binary Utilities, "Instruction Set Reference". Names of AMD's: the ISA guides of
# CDNA 3 and RDNA 3.
_TENSOR_CORE = re.compile(r"[HIBDQO]G?MMA|UTC\w*MMA|v_s?mfma\w*|v_smfmac\w*|v_wmma\w*")
_SPARSE = re.compile(r"[HIBDQO]G?MMA\.SP\b|v_smfmac")
_SASS = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_SASS_LABEL = re.compile(r"^\s*\.(L_x_\d+):")
_SASS_BRANCH = re.compile(r"\bBRA\b.*?`\(\.(L_x_\d+)\)")
_AMD = re.compile(r"^\s+([a-z]\w+)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_BRANCH = re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)")
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "u8": 1, "i8": 1, "ushort": 2, "sshort": 2, "short": 2, "u16": 2, "i16": 2}
_AMD_WIDTHS |= {"dword": 4, "b32": 4, "dwordx2": 8, "b64": 8, "dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16}


@dataclass(frozen=True)
class Instructions:
    """Instructions of a kernel, or of a part of one.

    Attributes:
        total: number of instructions.
        tensor_core: number of those that multiply matrices.
        sparse: number of those among them that do on sparse tensor cores (HMMA.SP).
        loads: number of loads from global memory by bytes a thread; asynchronous copies among them.
        names: how often each occurs, with its modifiers.
    """

    total: int
    tensor_core: int
    sparse: int
    loads: dict[int, int]
    names: dict[str, int]


def count_instructions(assembly: str, loop_only: bool = False) -> Instructions:
    """Count the instructions of a kernel, or of its hot loop: the smallest loop that multiplies matrices, if one does.

    Args:
        assembly: SASS as nvdisasm prints it, or amdgcn.
        loop_only: leave out what runs once.
    """
    lines: Sequence[str] = assembly.splitlines()
    if loop_only:
        lines = hot_loop(lines)
    names = Counter(_instructions(lines))
    loads: Counter[int] = Counter()
    for name, times in names.items():
        width = _load_width(name)
        if width:
            loads[width] += times
    tensor_core = sum(times for name, times in names.items() if _TENSOR_CORE.match(name))
    sparse = sum(times for name, times in names.items() if _SPARSE.match(name))
    ordered = dict(sorted(loads.items()))
    return Instructions(sum(names.values()), tensor_core, sparse, ordered, dict(names.most_common()))


def _instructions(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        found = _SASS.search(line) or _AMD.match(line)
        if found:
            yield found[1]


def _load_width(name: str) -> int | None:
    """Bytes that a load from global memory brings a thread; None for everything else."""
    mnemonic, *modifiers = name.split(".")
    if mnemonic in ("LDG", "LDGSTS"):
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((widths[each] for each in modifiers if each in widths), 4)
    found = re.match(r"(?:global|buffer|flat)_load_(?:d16_|hi_|lds_)*(\w+?)(?:_d16\w*)?$", name)
    return _AMD_WIDTHS.get(found[1]) if found else None


def hot_loop(lines: Sequence[str]) -> Sequence[str]:
    """The smallest loop with tensor-core instructions; without one the largest; nothing where no loop is."""
    labels: dict[str, int] = {}
    loops: list[Sequence[str]] = []
    for i, line in enumerate(lines):
        label = _SASS_LABEL.match(line) or _AMD_LABEL.match(line)
        if label:
            labels[label[1]] = i
        branch = _SASS_BRANCH.search(line) or _AMD_BRANCH.search(line)
        if branch and branch[1] in labels:
            loops.append(lines[labels[branch[1]] : i + 1])
    multiplying = [loop for loop in loops if any(_TENSOR_CORE.match(name) for name in _instructions(loop))]
    if multiplying:
        return min(multiplying, key=len)
    return max(
        (loop for loop in loops if len(loop) > 2), key=len, default=[]
    )  # a kernel ends in an idle branch to itself
