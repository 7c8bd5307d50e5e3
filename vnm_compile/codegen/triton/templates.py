"""The Triton templates: their sources, put together from the files beside this one, and how they are launched."""

from __future__ import annotations

import functools
import textwrap
from pathlib import Path
from typing import Any

from vnm_compile.activations import ACTIVATIONS
from vnm_compile.codegen.inductor import GluonTemplate, TritonTemplate

_HERE = Path(__file__).parent

_TILE = ("weight", "levels", "quantised")
_ROWS = ("row_products", "levels")
"""What kernels on tensor cores share, and those for one token."""


def source(*names: str) -> str:
    """A template and what it shares with others, one after the other."""
    return "".join((_HERE / f"{name}.py.jinja").read_text() for name in ("operands", *names))


def _grid(*sizes_and_meta: Any, cdiv: Any = None) -> tuple[int, int, int]:
    """Programs of a kernel whose result is `[tokens, out]`, or `[splits, tokens, out]`."""
    *sizes, meta = sizes_and_meta
    *parts, tokens, out = sizes

    def ceil(size: Any, block: int) -> Any:
        return (size + block - 1) // block

    return (ceil(tokens, meta["BLOCK_T"]) * ceil(out, meta["BLOCK_O"]), parts[0] if parts else 1, 1)


@functools.cache
def linear_template() -> Any:
    """`x @ W.T`."""
    return TritonTemplate(name="vnm_linear", grid=_grid, source=source("linear", *_TILE))


@functools.cache
def sparse_cores_template() -> Any:
    """`x @ W.T` on sparse tensor cores."""
    return GluonTemplate(name="vnm_sparse_cores", grid=_grid, source=source("sparse_cores"))


@functools.cache
def gated_template(activation: str) -> Any:
    """`activation(x @ gate.T) * (x @ up.T)`; `activation` is a name in `vnm_compile.activations`."""
    text = _activated(source("gated", *_TILE), activation)
    return TritonTemplate(name=f"vnm_gated_{activation}", grid=_grid, source=text)


@functools.cache
def vector_template() -> Any:
    """`x @ W.T` for one token, without tensor cores."""
    return TritonTemplate(name="vnm_vector", grid=_grid, source=source("vector", *_ROWS))


@functools.cache
def gated_vector_template(activation: str) -> Any:
    """`activation(x @ gate.T) * (x @ up.T)` for one token, without tensor cores."""
    text = _activated(source("gated_vector", *_ROWS), activation)
    return TritonTemplate(name=f"vnm_gated_vector_{activation}", grid=_grid, source=text)


def _activated(text: str, activation: str) -> str:
    body = textwrap.indent(ACTIVATIONS[activation].triton, "    ")
    return text.replace("ACTIVATE", activation) + f"\n\n@triton.jit\ndef {activation}(x):\n{body}\n"
