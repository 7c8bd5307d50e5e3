"""The one door to Inductor: the only module that imports `torch._inductor` privates.

torch 2.11 to the newest differ here and nowhere else. It offers `compile_graph` to the backend, registers the
lowerings of the `vnm` ops, and hands on to the templates the private classes that they are built from.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

from vnm_compile import ops  # noqa: F401  (defines the ops that are lowered below)

__all__ = ["cache_dir", "compile_graph", "has_lowering", "mode_options", "source_hash"]


@functools.cache
def source_hash(folder: str = "") -> str:
    """Hash of every source and template file in a folder of the package: what a cached kernel depends on."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(p for p in (package / folder).rglob("*") if p.suffix in {".py", ".jinja"}):
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
    gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any], options_key: str
) -> Callable[..., Any]:
    """Compile a graph with Inductor; `patches` are Inductor options, `options_key` goes into its cache keys."""
    hook = "post_grad_custom_post_pass"
    users = patches.get(hook, getattr(inductor_config, hook))
    config_patches = {**patches, hook: CacheKey(options_key, users)}
    return compile_fx(gm, list(inputs), config_patches=config_patches)  # type: ignore[return-value]


def _register(op: torch._ops.OpOverload, name: str) -> None:
    """Lower `op` to the function `name` of the lowering module that fits the device of its first argument."""

    @register_lowering(op, type_promotion_kind=None)
    def lower(x, *args):  # type: ignore[no-untyped-def]
        lowering = _device_lowering(x.get_device().type, name)
        result = lowering(x, *args) if lowering else None
        return fallback_handler(op, add_to_fallback_set=False)(x, *args) if result is None else result


def has_lowering(device: str) -> bool:
    """Whether `vnm::linear` is lowered to a sparse kernel on this device type."""
    return _device_lowering(device, "linear") is not None


def _device_lowering(device: str, name: str) -> Callable[..., Any] | None:
    """The lowering of a device type; it may answer None for a case that it does not handle."""
    # Imported when first used: the templates import this module for the classes they are built from.
    if device == "cpu":
        from vnm_compile.codegen.cpp import lowering as module
    elif device == "cuda":
        from vnm_compile.codegen.triton import lowering as module  # type: ignore[no-redef]
    else:
        return None
    return getattr(module, name, None)


_register(torch.ops.vnm.linear.default, "linear")
_register(torch.ops.vnm.gated_linear.default, "gated_linear")


@register_lowering(torch.ops.vnm.sections.default, type_promotion_kind=None)
def _lower_sections(y, widths, strides):  # type: ignore[no-untyped-def]
    """Views of the joined output: the kernel that made it has written every section in place."""
    cut, last = lowerings[torch.ops.aten.slice.Tensor], len(y.get_size()) - 1
    starts = [sum(strides[:i]) for i in range(len(strides))]
    return [cut(y, last, start, start + width) for start, width in zip(starts, widths, strict=True)]
