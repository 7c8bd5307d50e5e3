"""How results show themselves: rich renders them, and `print` and `str` give the same text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # imported when something is printed: compiling does not need it
    from rich.console import Console, ConsoleOptions, RenderResult


class Printed:
    """A result that is printed: a subclass says by `__rich_console__` what.

    Attributes:
        least_width: characters a line has in `str`, even where the terminal is narrower.
    """

    least_width = 100

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        raise NotImplementedError

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=max(self.least_width, Console().width))
        with console.capture() as capture:
            console.print(self)
        return capture.get()


Item = TypeVar("Item")


def tracked(items: Sequence[Item], what: str, shown: bool) -> Iterable[Item]:
    """The items one after the other, with a progress bar on stderr while they last, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, transient=True, console=console, disable=not (shown and console.is_terminal))
