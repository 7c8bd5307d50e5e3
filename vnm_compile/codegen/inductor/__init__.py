"""The one door to Inductor: the only package that imports `torch._inductor` privates.

torch 2.11 to the newest differ here and nowhere else. It offers `compile_graph` to the backend, registers the
lowerings of the `vnm` ops, and hands on to the templates the private classes that they are built from.
"""

from vnm_compile.codegen.inductor.addresses import fits_32_bits, fuses_multiply_add, rows_in_place
from vnm_compile.codegen.inductor.cache_key import cache_dir, source_hash
from vnm_compile.codegen.inductor.compile import check_options, compile_graph, mode_options
from vnm_compile.codegen.inductor.cpp import (
    CppTemplateKernel,
    cpu_threads,
    export_declaration,
    fake_buffer,
    local_buffer,
    store_copy,
)
from vnm_compile.codegen.inductor.device import device_patches, forget_device_answers, template_name, watch_codegen
from vnm_compile.codegen.inductor.epilogue import FusingTemplate, reindexer, view_in_2d
from vnm_compile.codegen.inductor.gluon import GluonTemplate
from vnm_compile.codegen.inductor.native import load_cpp
from vnm_compile.codegen.inductor.nodes import (
    TritonTemplate,
    V,
    apply,
    apply_function,
    choose,
    choose_fastest,
    contiguous_copy,
    copy_strided,
    graph_has,
    ir,
    is_number,
    known_equal,
    layout_of,
    matrix_layout,
    readable,
    realized,
    reshape,
    round_up,
    run_choice,
    size_hint,
    tunes_exhaustively,
    with_these_strides,
)
from vnm_compile.codegen.inductor.registry import Kernels, has_lowering, prepack_of, register_kernels, why_no_kernel

__all__ = [
    "CppTemplateKernel",
    "FusingTemplate",
    "GluonTemplate",
    "Kernels",
    "TritonTemplate",
    "V",
    "apply",
    "apply_function",
    "cache_dir",
    "check_options",
    "choose",
    "choose_fastest",
    "compile_graph",
    "contiguous_copy",
    "copy_strided",
    "cpu_threads",
    "device_patches",
    "export_declaration",
    "fake_buffer",
    "fits_32_bits",
    "forget_device_answers",
    "fuses_multiply_add",
    "graph_has",
    "has_lowering",
    "ir",
    "is_number",
    "known_equal",
    "layout_of",
    "load_cpp",
    "local_buffer",
    "matrix_layout",
    "mode_options",
    "prepack_of",
    "readable",
    "realized",
    "register_kernels",
    "reindexer",
    "reshape",
    "round_up",
    "rows_in_place",
    "run_choice",
    "size_hint",
    "source_hash",
    "store_copy",
    "template_name",
    "tunes_exhaustively",
    "view_in_2d",
    "watch_codegen",
    "why_no_kernel",
    "with_these_strides",
]
