"""What kernels in Gluon import, and what lets Inductor compile them.

Names differ between versions of Triton; kernels use those that are given here. A kernel's file imports this module, so
wherever one is compiled (a worker process of Inductor's, another program that finds it in a cache) Triton's compiler
knows what to do with it.
"""

from __future__ import annotations

from typing import Any

from triton.compiler.compiler import ASTSource
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.ampere import async_copy

begin_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Copies from global to shared memory, asynchronously. It has another name from Triton 3.8 on."""

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Waits for all threads of a program. It has another name from Triton 3.7 on."""


@gluon.jit
def spread(x, shape: gl.constexpr):  # type: ignore[no-untyped-def]
    """A scalar or a block as a block of a shape."""
    if x.type.is_block():
        result = x.broadcast_to(shape)
    else:
        result = gl.full(shape, x, x.dtype)
    return result


def _source(cls: type, fn: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Make the source of a Gluon kernel where somebody, who knows of Triton only, makes one of a Triton kernel."""
    return object.__new__(GluonASTSource if cls is ASTSource and fn is not None and fn.is_gluon() else cls)


ASTSource.__new__ = _source  # type: ignore[method-assign, assignment]
