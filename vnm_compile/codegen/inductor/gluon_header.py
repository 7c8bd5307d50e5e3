"""What the file of a kernel in Gluon begins with, as text: names that differ between versions of Triton, and what lets
Inductor, who knows of Triton only, compile it. It stands in the file itself, which needs nothing of this package."""

from triton.compiler.compiler import ASTSource
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# From Triton 3.7 and 3.8 on.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
begin_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def spread(x, shape: gl.constexpr):  # type: ignore[no-untyped-def]
    """A scalar or a block as a block of a shape."""
    if x.type.is_block():  # noqa: SIM108 (Gluon would compile both)
        result = x.broadcast_to(shape)
    else:
        result = gl.full(shape, x, x.dtype)
    return result


@gluon.jit
def maximum(a, b):  # type: ignore[no-untyped-def]
    """The larger; NaN where one is."""
    return gl.where((a > b) | (a != a), a, b)


@gluon.jit
def minimum(a, b):  # type: ignore[no-untyped-def]
    """The smaller; NaN where one is."""
    return gl.where((a < b) | (a != a), a, b)


def source_of(cls, fn=None, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Make the source of a Gluon kernel where somebody makes one of a Triton kernel."""
    return object.__new__(GluonASTSource if cls is ASTSource and fn is not None and fn.is_gluon() else cls)


if ASTSource.__new__ is object.__new__:
    ASTSource.__new__ = source_of  # type: ignore[method-assign, assignment]
