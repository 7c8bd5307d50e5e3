"""The ways to run a model that are compared: four dense ones a user could pick, and ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.codecache import PyCodeCache

from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.format import unpack
from vnm_compile.layout import Layout
from vnm_compile.spec import Spec

OURS = "vnm"


def contenders(model: nn.Module, args: tuple[Any, ...], policy: str) -> dict[str, Callable[[], Any]]:
    """Eager, compiled, frozen, frozen and autotuned, and `backend="vnm"`, each bound to its arguments."""
    compiled: dict[str, Callable[..., Any]] = {
        "eager": model,
        "compile": torch.compile(model),
        "freezing": _frozen(model, args),
        "max-autotune": _frozen(model, args, max_autotune=True),
        OURS: torch.compile(model, backend="vnm", options={"vnm.policy": policy}),
    }
    return {name: partial(call, *args) for name, call in compiled.items()}


def _frozen(model: nn.Module, args: tuple[Any, ...], **options: Any) -> Callable[..., Any]:
    """Compiled with its weights frozen; Dynamo looks at the global switch when it traces, the option comes too late.

    On CPUs Inductor's autotuning has templates of its own for frozen weights only.
    """
    compiled = torch.compile(model, options={"freezing": True, **options})
    with config.patch(freezing=True), torch.no_grad():
        compiled(*args)
    return compiled


def forget_compiled() -> None:
    """Let go of what was compiled before, weights included: Inductor keeps frozen ones in the modules it generated."""
    torch._dynamo.reset()
    for module in PyCodeCache.modules:
        for name in [name for name, value in vars(module).items() if isinstance(value, Tensor)]:
            delattr(module, name)


def random_weight(out_features: int, in_features: int, spec: Spec, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random dense weight `[out_features, in_features]` that follows `spec`."""
    layout = Layout(spec, out_features, in_features)
    return unpack(random_packed(layout, dtype, torch.device("cpu"), seed), layout)


def fill_with_pattern(model: nn.Module, spec: Spec, exclude: tuple[str, ...] = ()) -> nn.Module:
    """Give every `nn.Linear` of `model` a random weight that follows `spec`, in place."""
    for seed, (name, layer) in enumerate(model.named_modules()):
        if isinstance(layer, nn.Linear) and name not in exclude:
            weight = random_weight(layer.out_features, layer.in_features, spec, layer.weight.dtype, seed)
            with torch.no_grad():
                layer.weight.copy_(weight)
    return model
