"""Derivatives of an op in every way that torch asks for them: backward, double backward, forward mode, torch.func.

`torch.library.register_autograd` knows only the first, and where no gradient is recorded it drops the tangents of
forward-mode AD without a word: a derivative of zero. Here an op's rules are those of a `torch.autograd.Function`, run
at whatever level of torch.func is being differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vnm_compile._torch import (
    OpOverload,
    SingleLevelFunction,
    below_autograd,
    forward_mode_recorded,
    in_forward_mode,
    in_transform,
    single_level_functions_allowed,
    tree_leaves,
)

Rule = Callable[..., Any]


def register_derivatives(
    library: torch.library.Library,
    op: OpOverload,
    backward: Rule,
    forward_mode: Rule,
    needed: Callable[[Any, int], bool] = lambda ctx, i: True,
) -> None:
    """Give an op of tensors and numbers its derivatives.

    Args:
        library: that defines the op.
        op: returns a tensor or a list of tensors; none of them is a view of an argument.
        backward: of `ctx` and the gradients of the results, one argument each; returns a gradient or None for each
            argument of the op. `ctx.args` are those arguments, `ctx.needs_input_grad[1:]` which gradients are wanted.
        forward_mode: of `ctx` and a tangent or None for each argument; returns what the op returns, of tangents.
        needed: of `ctx` and the position of a tensor among the arguments: whether `backward` reads it. What it does not
            read is not kept, and None in `ctx.args`.
    """

    def forward(ctx, recording, *args):
        tangents = in_forward_mode() or in_transform()
        saved = {i for i, arg in enumerate(args) if isinstance(arg, Tensor) and (tangents or needed(ctx, i))}
        tensors = [args[i] for i in sorted(saved)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.saved_places = sorted(saved)
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        # A Function runs with all recording off, but the op may yet be differentiated at the levels below this one.
        with torch.set_grad_enabled(recording), forward_mode_recorded(True):
            result = _below_autograd(op, args)
        return tuple(result) if isinstance(result, list) else result

    def run_backward(ctx, *grads):
        _restore_args(ctx)
        return None, *backward(ctx, *grads)

    def run_forward_mode(ctx, _, *tangents):
        _restore_args(ctx)
        result = forward_mode(ctx, *tangents)
        return tuple(result) if isinstance(result, list) else result

    rules = {"forward": forward, "backward": run_backward, "jvp": run_forward_mode}
    kind: Any = type(
        f"{op._opname}_derivatives", (SingleLevelFunction,), {k: staticmethod(v) for k, v in rules.items()}
    )

    def kernel(*args):
        if not differentiates(args):
            return _below_autograd(op, args)
        with single_level_functions_allowed():
            result = kind.apply(torch.is_grad_enabled(), *args)
        return list(result) if isinstance(result, tuple) else result

    library.impl(op, kernel, "Autograd")


def differentiates(args: Any) -> bool:
    """Whether a derivative of what is computed from `args` may be asked for, in any mode."""
    if in_forward_mode() or in_transform():
        return True
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in tree_leaves(args))


def _below_autograd(op: OpOverload, args: Any) -> Any:
    with below_autograd():
        return op(*args)


def _restore_args(ctx: Any) -> None:
    """Set `ctx.args` to the arguments of the op; a tensor that was not kept is None."""
    ctx.args = list(ctx.others)
    for place, tensor in zip(ctx.saved_places, ctx.saved_tensors, strict=True):
        ctx.args[place] = tensor
