"""The op `vnm::linear`: schema, shapes, a reference that runs anywhere, and its gradients.

One opaque op is all that the passes, Inductor and eager mode agree on. Bias and activation stay outside, where
Inductor fuses them. Codegen lowers it to sparse kernels; without codegen the reference below runs: it unpacks the
weight and multiplies, so it equals the masked dense layer to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vnm_compile.format import Packed, unpack, unpack_indices
from vnm_compile.spec import Spec


@torch.library.custom_op("vnm::linear", mutates_args=())
def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    columns: Tensor,
    v: int,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    """Return `x @ W.T` for a packed weight W `[out_features, in_features]`.

    Args:
        x: `[..., in_features]`, the dtype of `values`.
        values, metadata, columns: the canonical arrays (see `vnm_compile.format`). Rows may be further apart than they
            are wide; on a GPU what lies between, up to a multiple of 16 bytes, must then be zeros.
        v, n, m: the pattern.
        in_features, out_features: size of the weight; the arrays are padded up to blocks.

    Returns:
        `[..., out_features]`, contiguous, the dtype of x.
    """
    weight = unpack(Packed(values, metadata, columns), Spec(v, n, m), out_features, in_features)
    return torch.nn.functional.linear(x, weight).contiguous()


@linear.register_fake
def _(x, values, metadata, columns, v, n, m, in_features, out_features):
    torch._check(x.dim() >= 1, lambda: "vnm::linear: x needs at least one dimension")
    torch._check(
        x.shape[-1] == in_features,
        lambda: f"vnm::linear: x is {list(x.shape)}; expected [..., {in_features}]",
    )
    torch._check(
        x.dtype == values.dtype,
        lambda: f"vnm::linear: x is {x.dtype}, the weight {values.dtype}; they must agree",
    )
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("vnm::linear_input_grad", mutates_args=())
def linear_input_grad(
    grad: Tensor,
    values: Tensor,
    metadata: Tensor,
    columns: Tensor,
    v: int,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    """Return `grad @ W`, the gradient of `vnm::linear` for x: `[..., out_features]` to `[..., in_features]`."""
    weight = unpack(Packed(values, metadata, columns), Spec(v, n, m), out_features, in_features)
    return torch.matmul(grad, weight).contiguous()


@linear_input_grad.register_fake
def _(grad, values, metadata, columns, v, n, m, in_features, out_features):
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.custom_op("vnm::linear_values_grad", mutates_args=())
def linear_values_grad(
    grad: Tensor,
    x: Tensor,
    metadata: Tensor,
    columns: Tensor,
    v: int,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    """Return the gradient of `vnm::linear` for `values`: `grad.T @ x` at the kept places, `[R, G*N]`.

    Padding (rows past `out_features`, columns past `in_features`) gets zero.
    """
    spec = Spec(v, n, m)
    rows, groups = spec.rows(out_features), spec.groups(in_features)
    dense = x.new_zeros(rows, groups * m)
    dense[:out_features, :in_features] = grad.reshape(-1, out_features).T @ x.reshape(-1, in_features)
    per_block = (rows // v, v, groups, n)
    chosen = unpack_indices(metadata, groups * n).reshape(per_block)
    offsets = columns.long().unsqueeze(1).expand(-1, v, -1, -1).gather(3, chosen.long())
    return dense.view(*per_block[:3], m).gather(3, offsets).reshape(rows, groups * n)


@linear_values_grad.register_fake
def _(grad, x, metadata, columns, v, n, m, in_features, out_features):
    spec = Spec(v, n, m)
    return x.new_empty((spec.rows(out_features), spec.groups(in_features) * n))


def _setup_context(ctx, inputs, output):
    x, values, metadata, columns, *sizes = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, metadata, columns)
    ctx.sizes = sizes


def _backward(ctx, grad):
    x, values, metadata, columns = ctx.saved_tensors
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.vnm.linear_input_grad(grad, values, metadata, columns, *ctx.sizes)
    if ctx.needs_input_grad[1]:
        grad_values = torch.ops.vnm.linear_values_grad(grad, x, metadata, columns, *ctx.sizes)
    return grad_x, grad_values, *[None] * 7


linear.register_autograd(_backward, setup_context=_setup_context)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "sigmoid": torch.sigmoid,
}
"""The activations that `vnm::gated_linear` takes, by name."""


@torch.library.custom_op("vnm::gated_linear", mutates_args=())
def gated_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    columns: Tensor,
    v: int,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
    activation: str,
) -> Tensor:
    """Return `activation(x @ gate.T) * (x @ up.T)` for two packed weights of one size, stored one above the other.

    Args:
        x: `[..., in_features]`, the dtype of `values`.
        values, metadata, columns: the canonical arrays of gate, then those of up, joined along their first
            dimension: `values` is `[2 R, G*N]` with R the padded rows of one of the two.
        v, n, m: the pattern of both.
        in_features, out_features: size of one of the two weights.
        activation: a key of `GATES`.

    Returns:
        `[..., out_features]`, contiguous, the dtype of x.
    """
    rows = values.shape[0] // 2
    sizes = (v, n, m, in_features, out_features)
    gate = linear(x, values[:rows], metadata[:rows], columns[: rows // v], *sizes)
    up = linear(x, values[rows:], metadata[rows:], columns[rows // v :], *sizes)
    return GATES[activation](gate) * up


@gated_linear.register_fake
def _(x, values, metadata, columns, v, n, m, in_features, out_features, activation):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("vnm::sections", mutates_args=())
def sections(y: Tensor, widths: list[int], strides: list[int]) -> list[Tensor]:
    """Cut the output of joined linears into theirs.

    Args:
        y: `[..., sum(strides)]`.
        widths: columns of each section.
        strides: columns from the start of each section to that of the next; the rest is padding.

    Returns:
        One `[..., width]` a section, contiguous as far as anyone can see (compiled, they are views of y).
    """
    pieces = y.split(strides, -1)
    return [piece[..., :width].clone() for piece, width in zip(pieces, widths, strict=True)]


@sections.register_fake
def _(y, widths, strides):
    return [y.new_empty((*y.shape[:-1], width)) for width in widths]


def _sections_context(ctx, inputs, output):
    _, ctx.widths, ctx.strides = inputs


def _sections_backward(ctx, grads):
    padded = [
        torch.nn.functional.pad(grad, (0, stride - width)) if stride > width else grad
        for grad, width, stride in zip(grads, ctx.widths, ctx.strides, strict=True)
    ]
    return torch.cat(padded, -1), None, None


sections.register_autograd(_sections_backward, setup_context=_sections_context)


def _autocast(device: str) -> None:
    """Under autocast the floating-point operands take its dtype, as those of F.linear do."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def register(op: torch._ops.OpOverload) -> None:
        def cast(*args):
            dtype = torch.get_autocast_dtype(device)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*(arg.to(dtype) if _is_castable(arg) else arg for arg in args))

        _library.impl(op, cast, f"Autocast{device.upper()}")

    register(torch.ops.vnm.linear.default)
    register(torch.ops.vnm.gated_linear.default)


def _is_castable(arg: object) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64


_library = torch.library.Library("vnm", "IMPL")
for _device in ("cpu", "cuda"):
    _autocast(_device)
