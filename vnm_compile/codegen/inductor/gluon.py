"""Templates in Gluon, Triton's language with explicit layouts: Inductor writes around them what it writes elsewhere.

What Inductor writes is Triton. Gluon takes it but for a few words: a constant has a layout there (or is a scalar), a
scalar is not broadcast to a block by `tl.broadcast_to`, and no block of one element is added to others, as
`triton_helpers.maximum` does to find out about a dtype. `gluon_header.py` has the words in their place.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._inductor.select_algorithm import TritonTemplate, TritonTemplateKernel

_WORDS = (
    (re.compile(r"@triton\.jit\b"), "@gluon.jit"),
    (re.compile(r"\btl\.full\(\[1(?:, 1)*\], "), "gl.full([], "),
    (re.compile(r"\btl\.full\("), "gl.full("),
    (re.compile(r"\btl\.broadcast_to\("), "spread("),
    (re.compile(r"\btriton_helpers\.(maximum|minimum)\("), r"\1("),
)


class GluonTemplateKernel(TritonTemplateKernel):
    """A kernel of a template in Gluon."""

    @classmethod
    def gen_common_triton_imports(cls) -> str:  # type: ignore[override]
        """What the file of a kernel begins with."""
        return super().gen_common_triton_imports() + _header()

    def size(self, name: str | None, index: int) -> str:
        """A size of an input, for the template."""
        return _in_gluon(super().size(name, index))

    def _register_hook(self, hook_name: str, hook_fn: Callable[[], str], **options: Any) -> str:
        return super()._register_hook(hook_name, lambda: _in_gluon(hook_fn()), **options)


class GluonTemplate(TritonTemplate):
    """A template in Gluon."""

    kernel_type = GluonTemplateKernel


@functools.cache
def _header() -> str:
    """The text of `gluon_header.py` behind its docstring."""
    return Path(__file__).with_name("gluon_header.py").read_text().split('"""', 2)[2]


def _in_gluon(text: str) -> str:
    """What Inductor has written in Triton, in Gluon."""
    for pattern, word in _WORDS:
        text = pattern.sub(word, text)
    return text
