"""Compiling a graph with Inductor, under our cache key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_origin

import torch
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from vnm_compile.codegen.inductor.cache_key import CacheKey
from vnm_compile.errors import BadOption
from vnm_compile.options import OUR_OPTIONS


def mode_options(mode: str | None, dynamic: bool | None = None) -> dict[str, Any]:
    """Inductor's options for a `torch.compile` mode.

    Raises:
        VNMError: there is no such mode.
    """
    known = list_mode_options(None, dynamic)
    if mode is not None and mode not in known:
        raise BadOption(f"unknown mode {mode!r}; there are {', '.join(known)}.")
    return dict(known[mode]) if mode else {}


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return Inductor's options under the names that its configuration has.

    Raises:
        VNMError: an option that Inductor does not have, or a value of another type than it takes.
    """
    known = inductor_config.get_config_copy()
    checked = {}
    for given, value in options.items():
        key = given.replace("-", "_")
        if key not in known:
            close = difflib.get_close_matches(key, [*known, *OUR_OPTIONS], n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise BadOption(f"unknown option {given}: neither Inductor's nor ours{hint}")
        expected = inductor_config.get_type(key)  # type: ignore[attr-defined]
        if get_origin(expected) is None and isinstance(expected, type) and not isinstance(value, expected):
            raise BadOption(f"option {given}={value!r}; Inductor takes {expected.__name__} there.")
        checked[key] = value
    return checked


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
