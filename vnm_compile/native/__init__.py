"""The few C++ functions that run outside of compiled graphs; built when first needed, kept in Inductor's cache."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


@cache
def fingerprint() -> Callable[[Any, int], int]:
    """`vnm_fingerprint(samples, count)`: `samples` points to pairs of an address and a number of bytes.

    It keeps the GIL: no other Python thread may free what it reads, and it takes microseconds.
    """
    function = ctypes.PyDLL(_library()._name).vnm_fingerprint
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    return function


@cache
def checksum() -> Callable[[int, int, int, int], int]:
    """`vnm_checksum(address, rows, bytes of a row, bytes from row to row)`; it reads everything, without the GIL."""
    function = _library().vnm_checksum
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_uint64
    return function


def source(*names: str) -> str:
    """Files of this folder, one after the other."""
    return "\n".join(Path(__file__).with_name(name).read_text() for name in names)


def load(text: str) -> ctypes.CDLL:
    """The library of a C++ source, compiled unless it was before."""
    from vnm_compile.codegen.inductor import load_cpp  # Inductor takes seconds to import

    return load_cpp(text)


@cache
def _library() -> ctypes.CDLL:
    return load(source("contents.cpp"))
