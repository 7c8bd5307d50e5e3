"""Registration of the lowerings of the `vnm` ops: which function of ours Inductor calls, and when."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor import config as inductor_config
from torch._inductor import lowering
from torch._inductor.virtualized import V

from vnm_compile import ops  # noqa: F401  (defines the ops that are lowered below)
from vnm_compile.codegen.inductor import sections  # noqa: F401  (registers its lowering)
from vnm_compile.codegen.inductor.cache_key import CacheKey


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
