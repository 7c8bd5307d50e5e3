"""Templates in Gluon, Triton's language with explicit layouts: Inductor writes around them what it writes around others.

What Inductor writes is Triton. Gluon takes it but for a few words: a constant has a layout there (or is a scalar), and a
scalar is not broadcast to a block by `tl.broadcast_to`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch._inductor.select_algorithm import TritonTemplate, TritonTemplateKernel

_IMPORTS = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from vnm_compile.codegen.gluon import begin_copy, barrier, spread
"""

_WORDS = (
    (re.compile(r"@triton\.jit\b"), "@gluon.jit"),
    (re.compile(r"\btl\.full\(\[1(?:, 1)*\], "), "gl.full([], "),
    (re.compile(r"\btl\.full\("), "gl.full("),
    (re.compile(r"\btl\.broadcast_to\("), "spread("),
)


class GluonTemplateKernel(TritonTemplateKernel):
    """A kernel of a template in Gluon."""

    @classmethod
    def gen_common_triton_imports(cls) -> str:
        """What the file of a kernel begins with."""
        return super().gen_common_triton_imports() + _IMPORTS

    def size(self, name: str | None, index: int) -> str:
        """A size of an input, for the template."""
        return _in_gluon(super().size(name, index))

    def _register_hook(self, hook_name: str, hook_fn: Callable[[], str], **options: Any) -> str:
        return super()._register_hook(hook_name, lambda: _in_gluon(hook_fn()), **options)


class GluonTemplate(TritonTemplate):
    """A template in Gluon."""

    kernel_type = GluonTemplateKernel


def _in_gluon(text: str) -> str:
    """What Inductor has written in Triton, in Gluon."""
    for pattern, word in _WORDS:
        text = pattern.sub(word, text)
    return text
