"""C++ that is not part of a graph, compiled and cached by Inductor's own means."""

from __future__ import annotations

import ctypes

from torch._inductor.codecache import CppCodeCache


def load_cpp(source: str) -> ctypes.CDLL:
    """The library of the `extern "C"` functions in a C++ source; compiled unless Inductor's cache has it."""
    return CppCodeCache.load(source)  # type: ignore[return-value]
