"""The one door to Inductor: the only module that imports `torch._inductor` privates.

torch 2.11 to the newest differ here and nowhere else. It offers `compile_graph` to the backend, registers the
lowerings of the `vnm` ops, and hands on to the templates the private classes that they are built from.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch
import torch._inductor.kernel.mm
import torch._inductor.utils
import torch.utils._triton
from torch._inductor import config as inductor_config
from torch._inductor import ir, list_mode_options, lowering
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf, get_export_declaration
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel, parse_expr_with_index_symbols
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import (
    TritonTemplate,
    autotune_select_algorithm,
    get_algorithm_selector_cache,
)
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inner_ops
from torch.utils._ordered_set import OrderedSet
from torch.utils._sympy.functions import FloorDiv

from vnm_compile import ops  # noqa: F401  (defines the ops that are lowered below)

__all__ = [
    "CppTemplate",
    "CppTemplateKernel",
    "TritonTemplate",
    "V",
    "apply",
    "cache_dir",
    "choose",
    "choose_fastest",
    "compile_graph",
    "contiguous_matrix",
    "copy_strided",
    "cpu_threads",
    "device_patches",
    "export_declaration",
    "fake_buffer",
    "forget_device_answers",
    "has_lowering",
    "ir",
    "layout_of",
    "local_buffer",
    "matrix_layout",
    "mode_options",
    "realized",
    "reshape",
    "round_up",
    "size_hint",
    "source_hash",
    "store_copy",
    "template_name",
    "tunes_exhaustively",
    "view_epilogue_in_2d",
    "watch_codegen",
]


@functools.cache
def source_hash(folder: str = "") -> str:
    """Hash of every source and template file in a folder of the package: what a cached kernel depends on."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(p for p in (package / folder).rglob("*") if p.suffix in {".py", ".jinja", ".h"}):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class CacheKey(CustomGraphPass):
    """A pass that changes nothing; its uuid puts our sources and options into Inductor's cache keys.

    Lowerings and templates are not part of those keys: without this a new version of the package would be answered
    with kernels of the old one. The user's own pass is run and hashed as it would be without us.
    """

    def __init__(self, options: str, users: Any = None) -> None:
        self.options = options
        self.users = list(users) if isinstance(users, list | tuple) else [users] if users else []

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.users:
            each(graph)

    def uuid(self) -> Any:
        """The package's sources, the options, and the uuids of the user's passes (None where one has none)."""
        theirs = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.users]
        return None if None in theirs else ("vnm", source_hash(), self.options, *theirs)


def cache_dir() -> Path:
    """Where Inductor keeps its caches; ours lie beside them."""
    return Path(inductor_cache_dir())


def mode_options(mode: str | None, dynamic: bool | None = None) -> dict[str, Any]:
    """Inductor's options for a `torch.compile` mode."""
    return dict(list_mode_options(mode, dynamic)) if mode and mode != "default" else {}


def compile_graph(
    gm: torch.fx.GraphModule,
    inputs: Sequence[Any],
    patches: dict[str, Any],
    options_key: str,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[..., Any]:
    """Compile a graph with Inductor.

    `patches` are Inductor options, `options_key` goes into its cache keys. `context` is entered after tracing, for the
    device-dependent part: passes on the aten graph, lowering and code generation.
    """
    hook = "post_grad_custom_post_pass"
    users = patches.get(hook, getattr(inductor_config, hook))
    config_patches = {**patches, hook: CacheKey(options_key, users)}

    def inner_compile(*args: Any, **kwargs: Any) -> Any:
        with context():
            return compile_fx_inner(*args, **kwargs)

    return compile_fx(gm, list(inputs), inner_compile, config_patches)  # type: ignore[return-value]


def _register(op: torch._ops.OpOverload, name: str) -> None:
    """Lower `op` to the function `name` of the lowering module that fits the device of its first argument."""

    @lowering.register_lowering(op, type_promotion_kind=None)
    def lower(x, *args):  # type: ignore[no-untyped-def]
        ours = _device_lowering(x.get_device().type, name) if _ours_is_compiling() else None
        # Sizes of a weight are made static here where dynamic=True has made them symbols.
        static = [V.graph.sizevars.guard_int(arg) if isinstance(arg, sympy.Expr) else arg for arg in args]
        result = ours(x, *static) if ours else None
        return lowering.fallback_handler(op, add_to_fallback_set=False)(x, *args) if result is None else result


_LOWERINGS = {"cpu": "vnm_compile.codegen.cpp.lowering", "cuda": "vnm_compile.codegen.triton.lowering"}
"""The module with the lowerings of a device type."""


def _ours_is_compiling() -> bool:
    """Whether the compilation under way carries our cache key.

    Plain Inductor may meet the ops too, through a VNMTensor. Its caches would keep our kernels under a key that does
    not name our sources, and answer a later version of the package with them; so there the reference runs.
    """
    return isinstance(inductor_config.post_grad_custom_post_pass, CacheKey)


def has_lowering(device: str) -> bool:
    """Whether `vnm::linear` is lowered to a sparse kernel on this device type."""
    return _device_lowering(device, "linear") is not None


def _device_lowering(device: str, name: str) -> Callable[..., Any] | None:
    """The lowering of a device type; it may answer None for a case that it does not handle."""
    # Imported when first used: the templates import this module for the classes they are built from.
    module = _LOWERINGS.get(device)
    return getattr(importlib.import_module(module), name, None) if module else None


_register(torch.ops.vnm.linear.default, "linear")
_register(torch.ops.vnm.gated_linear.default, "gated_linear")


@lowering.register_lowering(torch.ops.vnm.sections.default, type_promotion_kind=None)
def _lower_sections(y, widths, strides):  # type: ignore[no-untyped-def]
    """Views of the joined output: the kernel that made it has written every section in place."""
    cut, last = lowering.lowerings[torch.ops.aten.slice.Tensor], len(y.get_size()) - 1
    starts = [sum(strides[:i]) for i in range(len(strides))]
    return [cut(y, last, start, start + width) for start, width in zip(starts, widths, strict=True)]


# What lowerings are written with.


def contiguous_matrix(node: Any, flatten: bool = True) -> Any:
    """A realised, contiguous buffer; with leading dimensions flattened into one where asked for."""
    if flatten:
        *leading, last = node.get_size()
        node = reshape(node, [sympy.prod(leading), last])
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node))


def matrix_layout(matrix: Any, columns: int) -> Any:
    """The layout of a contiguous result with the rows, dtype and device of `matrix`."""
    return ir.FixedLayout(matrix.get_device(), matrix.get_dtype(), [matrix.get_size()[0], columns])


def reshape(node: Any, size: Sequence[Any]) -> Any:
    """A view of an IR node in another size."""
    return lowering.lowerings[torch.ops.aten.view.default](node, list(size))


def choose(template: Any, inputs: list[Any], layout: Any) -> Any:
    """The node of a template that needs no choice between configurations."""
    choices: list[Any] = []
    error = template.maybe_append_choice(choices)
    if error is not None:
        raise error
    return choose_fastest(template.name, choices, inputs, layout)


def choose_fastest(
    name: str,
    choices: list[Any],
    inputs: list[Any],
    layout: Any,
    make_inputs: dict[int, Callable[[Any], Any]] | None = None,
) -> Any:
    """The node of whichever choice Inductor measures to be fastest, on random inputs or what `make_inputs` makes."""
    # What computes the inputs may not have a buffer yet; it is no part of this kernel all the same.
    with patch.object(ir.IRNode, "_current_origins", OrderedSet([V.graph.current_node])):
        result = autotune_select_algorithm(name, choices, inputs, layout, input_gen_fns=make_inputs)
    return result[0] if isinstance(result, tuple) else result  # a pair from torch 2.13 on


def size_hint(size: Any) -> int:
    """A size as a number; of a symbolic one the value it was traced with, without a guard."""
    if isinstance(size, int | sympy.Integer):
        return int(size)
    return int(V.graph.sizevars.optimization_hint(size))


def round_up(size: Any, step: int) -> Any:
    """The next multiple of `step`, in integers also where the size is symbolic."""
    return FloorDiv(size + step - 1, step) * step


def layout_of(like: Any, size: Sequence[Any], dtype: torch.dtype | None = None) -> Any:
    """A contiguous layout on the device of `like`."""
    return ir.FixedLayout(like.get_device(), dtype or like.get_dtype(), list(size))


def copy_strided(node: Any, stride: Sequence[Any], allocated: Sequence[Any]) -> Any:
    """A copy of a matrix with given strides, in memory for a matrix of the size `allocated`.

    It is an ordinary pointwise kernel, so Inductor fuses it with what computes the matrix where it can.
    """
    layout = ir.FixedLayout(node.get_device(), node.get_dtype(), node.get_size(), list(stride))
    data = ir.Pointwise(
        device=node.get_device(), dtype=node.get_dtype(), inner_fn=node.make_loader(), ranges=node.get_size()
    )
    buffer = ir.ComputedBuffer(name=None, layout=layout, data=data)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    V.graph.buffer_to_padded_size[buffer.name] = list(allocated)
    return ir.TensorBox(ir.StorageBox(buffer))


def realized(node: Any) -> Any:
    """The node with a buffer of its own, in the layout that it happens to have."""
    return ir.ExternKernel.realize_input(node)


def tunes_exhaustively() -> bool:
    """Whether the user asked for the slow search (mode="max-autotune")."""
    return bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)


def apply(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Lower an aten op: what a lowering makes of its own results (sums, casts, activations) and Inductor fuses."""
    return lowering.lowerings[op](*args, **kwargs)


# What C++ templates are written with.


def cpu_threads() -> int:
    """Threads that a generated C++ kernel uses, as Inductor's own do."""
    return parallel_num_threads()


def export_declaration() -> str:
    """What makes a C++ function visible to Inductor's loader."""
    return get_export_declaration()


def fake_buffer(name: str, layout: Any) -> Any:
    """A buffer that exists only inside a template."""
    return ir.Buffer(name=name, layout=layout)


def local_buffer(kernel: CppTemplateKernel, name: str, sizes: list[Any], dtype: torch.dtype) -> Any:
    """A buffer that the template's code allocates under `name`; sizes may be names of its C++ variables."""
    layout = ir.FixedLayout(torch.device("cpu"), dtype, parse_expr_with_index_symbols(sizes))
    kernel.local_buffers[name] = ir.Buffer(name=name, layout=layout)
    return kernel.local_buffers[name]


def store_copy(name: str, source: Any) -> Any:
    """A computed buffer `name` that copies `source`, converted to its dtype."""
    load, dtype = source.make_loader(), source.get_dtype()
    data = ir.Pointwise(
        device=source.get_device(),
        dtype=dtype,
        inner_fn=lambda index: inner_ops.to_dtype(load(index), dtype),
        ranges=source.get_size(),
    )
    return ir.ComputedBuffer(name=name, layout=source.layout, data=data)


def view_epilogue_in_2d(target: Any, result: Any, nodes: list[Any], reindexers: list[Any]) -> tuple[Any, list[Any]]:
    """The last of `nodes` seen as the 2-D result of the template, and how each node's indices follow from 2-D ones."""
    return gen_2d_view_of_epilogue_buf(target, result, nodes, reindexers, default_reindexers=[None] * len(nodes))


# What the virtual device is made with.


def forget_device_answers() -> None:
    """Clear what Inductor has cached about the device: its properties, and the features that follow from them."""
    for module in (torch._inductor.utils, torch._inductor.kernel.mm, torch.utils._triton):
        for value in vars(module).values():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
    DeviceProperties.create.cache_clear()


def device_patches() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value): how Inductor behaves where it can generate code but run none of it."""
    selector = get_algorithm_selector_cache()
    return [
        # Nothing can be measured: of several choices the first is taken.
        (selector, "preprocessing_fns", [*selector.preprocessing_fns, lambda choices: choices[:1]]),
        # Every generated kernel looks for an active device when it is loaded.
        (triton_helpers, "set_driver_to_gpu", lambda: None),
    ]


def template_name(buffer: Any) -> str:
    """Name of the template that a buffer is computed with."""
    template = getattr(buffer, "template", None)
    if template is None:  # Triton's are known to the function that renders them only
        template = inspect.getclosurevars(buffer.make_kernel_render).nonlocals["self"]
    return template.name


@contextmanager
def watch_codegen(on_kernel: Callable[[str, Sequence[Any]], None], on_graph: Callable[[str], None]) -> Iterator[None]:
    """See what Inductor generates in this block.

    `on_kernel` gets a kernel's name and the scheduler nodes that it computes, each time one is defined or reused;
    `on_graph` the module that Inductor has written for a graph. `V.graph` is that graph in both.
    """

    def watched(scheduling: Any) -> Any:
        define = scheduling.define_kernel

        def define_kernel(self: Any, source: str, nodes: Sequence[Any], *args: Any, **kwargs: Any) -> str:
            name = define(self, source, nodes, *args, **kwargs)
            on_kernel(name, nodes)
            return name

        return patch.object(scheduling, "define_kernel", define_kernel)

    with watched(TritonScheduling), watched(CppScheduling), patch.object(GraphLowering, "save_output_code", on_graph):
        yield
