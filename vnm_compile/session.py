"""What the process remembers between compilations: one owner, one lock, one way to forget it.

Modules keep here what they remember (packed arrays, patterns found, timings, compiled graphs, warnings given), so that
it can be counted and forgotten together. Nothing here is needed for an answer to be right: what is forgotten is looked
at, packed or measured again. Annotations are the user's word and are not forgotten.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol, TypeVar


class Memory(Protocol):
    """What can be kept: it tells its size, and can be emptied."""

    def clear(self) -> None: ...  # noqa: D102

    def __len__(self) -> int: ...


M = TypeVar("M", bound=Memory)


class Session:
    """The memory of this process."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Memory]] = {}
        self._lasting: set[str] = set()
        self._said: set[str] = self.keep("warnings given", set())
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        # A lock that another thread held when the process forked would stay held in the child.
        self.lock = threading.RLock()
        """Held while what is remembered changes; what takes long, such as measuring, does not hold it."""

    def keep(self, what: str, memory: M, lasting: bool = False) -> M:
        """Own `memory` under a name that several may share, and return it; `lasting` outlives `reset`."""
        self._kept.setdefault(what, []).append(memory)
        if lasting:
            self._lasting.add(what)
        return memory

    def first_time(self, what: str) -> bool:
        """Whether this is asked for the first time in the process: for warnings that are given once."""
        with self.lock:
            new = what not in self._said
            self._said.add(what)
            return new

    def counts(self) -> dict[str, int]:
        """How much is remembered of each kind."""
        return {what: sum(map(len, memories)) for what, memories in self._kept.items()}

    def reset(self) -> None:
        """Forget everything but annotations. What was made last, which rests on what was made first, goes first.

        The lock is not held: a compiled graph has one of its own, and takes this one while it holds that.
        """
        for what, memories in reversed([*self._kept.items()]):
            if what not in self._lasting:
                for memory in reversed(memories):
                    memory.clear()


session = Session()
"""The only one."""
