"""What the virtual device is made with, and how generated code is watched."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.kernel.mm
import torch._inductor.utils
import torch.utils._triton
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import get_algorithm_selector_cache


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
