"""Make a failing case small: leave out steps, writes and calls, and return to plain settings, while it still fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.program import Program, Settings
from tests.fuzz.run import Outcome


def shrink(program: Program, outcome: Outcome, run: Callable[[Program], Outcome], seconds: float = 60) -> Program:
    """The smallest program found within `seconds` of processor time that fails in the same way as `outcome`."""
    deadline = time.process_time() + seconds
    again = True
    while again:
        again = False
        for smaller in _smaller(program):
            if time.process_time() > deadline:
                return program
            if run(smaller).signature == outcome.signature:
                program, again = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    settings = program.settings
    if len(program.steps) > 2:  # halves first
        half = len(program.steps) // 2
        yield replace(program, steps=program.steps[half:])
        yield replace(program, steps=program.steps[:half])
    for i in range(len(program.steps)):
        if len(program.steps) > 1:
            yield replace(program, steps=program.steps[:i] + program.steps[i + 1 :])
    yield from (replace(program, settings=each) for each in _plainer(settings))


def _plainer(settings: Settings) -> Iterator[Settings]:
    if any(write != "none" for write in settings.writes):
        yield replace(settings, writes=("none",) * len(settings.writes))
    for i, write in enumerate(settings.writes):
        if write != "none":
            yield replace(settings, writes=(*settings.writes[:i], "none", *settings.writes[i + 1 :]))
    for i in reversed(range(len(settings.calls))):
        if len(settings.calls) > 1:
            at = max(i - 1, 0)
            writes = settings.writes[:at] + settings.writes[at + 1 :]
            yield replace(settings, calls=settings.calls[:i] + settings.calls[i + 1 :], writes=writes)
    plain = Settings()
    for name in ("through", "autocast", "input", "storage", "mode", "annotated", "flat", "merge", "dynamic", "dtype"):
        if getattr(settings, name) != getattr(plain, name):
            yield replace(settings, **{name: getattr(plain, name)})
