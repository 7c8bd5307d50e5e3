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
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_leaves

Rule = Callable[..., Any]


def register_derivatives(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
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
        tangents = torch.autograd.forward_ad._current_level >= 0 or _transforms()
        saved = {i for i, arg in enumerate(args) if isinstance(arg, Tensor) and (tangents or needed(ctx, i))}
        tensors = [args[i] for i in sorted(saved)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.saved_places = sorted(saved)
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        # A Function runs with all recording off, but the op may yet be differentiated at the levels below this one.
        with torch.set_grad_enabled(recording), _set_fwd_grad_enabled(True):
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
        f"{op._opname}_derivatives", (_SingleLevelFunction,), {k: staticmethod(v) for k, v in rules.items()}
    )

    def kernel(*args):
        if not differentiates(args):
            return _below_autograd(op, args)
        allowed = torch._C._functorch.get_single_level_autograd_function_allowed()
        torch._C._functorch.set_single_level_autograd_function_allowed(True)
        try:
            result = kind.apply(torch.is_grad_enabled(), *args)
        finally:
            torch._C._functorch.set_single_level_autograd_function_allowed(allowed)
        return list(result) if isinstance(result, tuple) else result

    library.impl(op, kernel, "Autograd")


def differentiates(args: Any) -> bool:
    """Whether a derivative of what is computed from `args` may be asked for, in any mode."""
    if torch.autograd.forward_ad._current_level >= 0 or _transforms():
        return True
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in tree_leaves(args))


def _transforms() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _below_autograd(op: torch._ops.OpOverload, args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _restore_args(ctx: Any) -> None:
    """Set `ctx.args` to the arguments of the op; a tensor that was not kept is None."""
    ctx.args = list(ctx.others)
    for place, tensor in zip(ctx.saved_places, ctx.saved_tensors, strict=True):
        ctx.args[place] = tensor
