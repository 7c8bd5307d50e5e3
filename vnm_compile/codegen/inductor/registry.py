"""Registration of the lowerings of the `vnm` ops: which function of ours Inductor calls, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor import lowering

from vnm_compile import ops  # noqa: F401  (defines the ops that are lowered below)
from vnm_compile.codegen.inductor import sections  # noqa: F401  (registers its lowering)
from vnm_compile.codegen.inductor.cache_key import CacheKey
from vnm_compile.layout import Layout
from vnm_compile.prepack import Prepack


@dataclass(frozen=True)
class Kernels:
    """What there is for one type of device.

    Attributes:
        linear, gated_linear: lowerings, of nodes for `x`, the arrays as a list, the layout (and the activation); each
            returns a node, or None for a case that it does not handle.
        lacking: of a layout and a dtype, why they multiply by no such weight whatever the activation; None if they do.
        prepack: what they want the arrays to be like.
    """

    linear: Callable[..., Any]
    gated_linear: Callable[..., Any]
    lacking: Callable[[Layout, torch.dtype], str | None]
    prepack: Prepack


_kernels: dict[str, Kernels] = {}


def register_kernels(device: str, kernels: Kernels) -> None:
    """Say how the `vnm` ops are lowered on a type of device."""
    _kernels[device] = kernels


def has_lowering(device: str) -> bool:
    """Whether there are sparse kernels for a type of device."""
    return device in _kernels


def why_no_kernel(device: str, layout: Layout, dtype: torch.dtype) -> str | None:
    """Why weights of a layout and a dtype are unpacked on every call on a type of device; None where they are not."""
    if device not in _kernels:
        return f"there are no sparse kernels for {device}"
    return _kernels[device].lacking(layout, dtype)


def prepack_of(device: str) -> Prepack:
    """What packed arrays have to be like on a type of device; canonical where there are no kernels."""
    return _kernels[device].prepack if device in _kernels else Prepack()


def _register(op: torch._ops.OpOverload, name: str) -> None:
    """Lower `op` to the kernel `name` of the device of its first argument."""

    @lowering.register_lowering(op, type_promotion_kind=None)
    def lower(x, values, structure, layout, *rest):  # type: ignore[no-untyped-def]
        kernels = _kernels.get(x.get_device().type) if _ours_is_compiling() else None
        ours = getattr(kernels, name) if kernels is not None else None
        result = ours(x, [values, *structure], Layout.parse(layout), *rest) if ours else None
        if result is None:
            return lowering.fallback_handler(op, add_to_fallback_set=False)(x, values, structure, layout, *rest)
        return result


def _ours_is_compiling() -> bool:
    """Whether the compilation under way carries our cache key.

    Plain Inductor may meet the ops too, through a VNMTensor. Its caches would keep our kernels under a key that does
    not name our sources, and answer a later version of the package with them; so there the reference runs.
    """
    return isinstance(inductor_config.post_grad_custom_post_pass, CacheKey)


_register(torch.ops.vnm.linear.default, "linear")
_register(torch.ops.vnm.gated_linear.default, "gated_linear")
