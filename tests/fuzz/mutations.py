"""The mutants: each undoes what keeps one kind of answer right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One way to break the package.

    Attributes:
        name: what is broken.
        edits: (file, text, replacement); each text stands in its file exactly once.
        only: kinds of steps to draw, where the fault needs one of them; all when empty.
        kernels: share of programs through Inductor, where the fault lies in what it generates.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    only: tuple[str, ...] = ()
    kernels: float = 0.0


MUTANTS: tuple[Mutant, ...] = ()
