"""The one place that hangs hooks on modules while something runs, and takes them off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Before = Callable[[int, tuple[Any, ...], Mapping[str, Any]], None]
"""`before(i, args, kwargs)`: module i is about to be called with these."""


@contextmanager
def hooked(
    modules: Sequence[nn.Module], before: Before | None = None, after: Callable[[int], None] | None = None
) -> Iterator[None]:
    """While it lasts, call `before` and `after` around every call of each module; neither changes what it gets.

    Args:
        modules: known to both functions by their place in this list.
        after: `after(i)`, called when module i has run, also where it raised.
    """

    def enter(i: int) -> Callable[..., None]:
        return lambda module, args, kwargs: before(i, args, kwargs) if before is not None else None

    def leave(i: int) -> Callable[..., None]:
        return lambda module, args, output: after(i) if after is not None else None

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            if before is not None:
                stack.callback(module.register_forward_pre_hook(enter(i), with_kwargs=True).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(leave(i), always_call=True).remove)
        yield
