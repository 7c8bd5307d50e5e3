"""The C++ template of `vnm::linear` and `vnm::gated_linear`: what it is filled in with, and how Inductor's epilogue
joins it."""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vnm_compile.activations import ACTIVATIONS
from vnm_compile.codegen.inductor import (
    CppTemplateKernel,
    FusingTemplate,
    V,
    export_declaration,
    fake_buffer,
    local_buffer,
    reindexer,
    store_copy,
    view_in_2d,
)
from vnm_compile.layout import Layout
from vnm_compile.ops import parts_of

_FOLDER = Path(__file__).parent


@cache
def _source(name: str) -> str:
    return (_FOLDER / name).read_text()


@cache
def _most_rows() -> int:
    """Rows of a tile, at most, as the header has it."""
    (number,) = re.findall(r"constexpr int64_t kMostRows = (\d+);", _source("sparse_rows.h"))
    return int(number)


@cache
def _arithmetic() -> str:
    """The kernels' headers as one text."""
    headers = (
        "sparse_rows.h",
        "rounded.h",
        "rows.h",
        "kept.h",
        "few_tokens_bf16.h",
        "few_tokens.h",
        "token_lanes.h",
        "row_lanes.h",
    )
    text = "".join(map(_source, headers))
    text = re.sub(r'^#(pragma once|include ".*")\n', "", text, flags=re.MULTILINE)
    # With cpp_wrapper all kernels of a graph are one translation unit.
    return f"#ifndef VNM_ARITHMETIC\n#define VNM_ARITHMETIC\n{text}\n#endif  // VNM_ARITHMETIC"


class SparseLinearTemplate(FusingTemplate):
    """One C++ kernel for a sparse linear, or for a gated pair of them, with whatever Inductor fuses after it."""

    def __init__(
        self,
        input_nodes: list[Any],
        result: Any,
        layout: Layout,
        num_threads: int,
        activation: str | None = None,
    ) -> None:
        super().__init__("vnm_gated_linear" if activation else "vnm_linear", input_nodes, result, num_threads)
        self.weight = layout
        self.activation = activation

    def render(  # type: ignore[override]
        self,
        kernel: CppTemplateKernel,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[Any] | None = None,
        **_: Any,
    ) -> str:
        """Return the source of the kernel; the nodes are the result and what Inductor computes from it in place."""
        result: Any = template_buffer_node if template_buffer_node is not None else self.output_node
        product, target, target_2d = result, result, result
        epilogues: list[Any] = []
        reindexers: list[Any] = []
        aliases: set[str] = set()
        with ExitStack() as stack:
            if epilogue_nodes and flag_template_buffer_has_other_users:
                # Somebody else reads the bare result: it is written too, from a product that only exists in the tile.
                product = fake_buffer(f"{result.get_name()}_product", result.layout)
                stack.enter_context(patch.object(V.graph, "get_dtype", self._fake_get_dtype(product)))
                epilogues.append(store_copy(result.get_name(), product))
                reindexers.append(None)
                aliases.add(product.get_name())
            if epilogue_nodes:
                if not flag_template_buffer_has_other_users:
                    aliases.add(result.get_name())
                epilogues += epilogue_nodes
                target = epilogues[-1]
                target_2d = view_in_2d(target, result)
                reindexers += [reindexer(node, result) for node in epilogue_nodes]
            x, *arrays = self.input_nodes
            parts = [dict(zip(self.weight.names, each, strict=True)) for each in parts_of(arrays, self.weight)]
            quantization = self.weight.quantization
            return self._template_from_string(_source("linear.cpp.jinja")).render(
                template=self,
                kernel=kernel,
                arithmetic=_arithmetic(),
                export_declaration=export_declaration(),
                X=x,
                parts=parts,
                inputs=dict(zip(self._names(len(parts)), self.input_nodes, strict=True)),
                starts=self._starts(parts),
                levels="int8_t" if quantization and quantization.bits == 8 else "uint8_t",
                rounds=self.weight.rounds,
                value_row=self.weight.shapes[0][1],
                scale_row=self.weight.shapes[3][1] if quantization else 0,
                group=(quantization.group or "vnm::kWholeRow") if quantization else 0,
                Y=target,
                Y_2d=target_2d,
                GemmOut=product,
                aliases={alias: target.get_name() for alias in sorted(aliases)},
                epilogue_nodes=epilogues,
                reindexers=reindexers,
                spec=self.weight.spec,
                in_features=self.weight.in_features,
                out_features=self.weight.out_features,
                most_rows=min(self.weight.spec.v, _most_rows()),
                num_threads=self.num_threads,
                gated=self.activation is not None,
                activation=ACTIVATIONS[self.activation].cpp if self.activation else None,
            )

    def _names(self, parts: int) -> list[str]:
        """What the kernel calls the buffers of its inputs."""
        numbers = ["", *(f"_{part}" for part in range(1, parts))]
        return ["x_buffer", *(f"{name}_buffer{number}" for number in numbers for name in self.weight.names)]

    def _starts(self, parts: list[dict[str, Any]]) -> list[int]:
        """The block in which each weight begins; of one alone the number of rows may be a symbol."""
        return [sum(int(part["columns"].get_size()[0]) for part in parts[:i]) for i in range(len(parts))]

    def local_tile(self, kernel: CppTemplateKernel, name: str, sizes: list[Any]) -> Any:
        """Make a local float buffer, which the template allocates itself, known to the kernel."""
        return local_buffer(kernel, name, sizes, torch.float32)
