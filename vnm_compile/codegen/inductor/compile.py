"""Compiling a graph with Inductor, under our cache key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from vnm_compile.codegen.inductor.cache_key import CacheKey


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
