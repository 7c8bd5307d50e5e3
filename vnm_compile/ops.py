"""The op `vnm::linear`: schema, shapes, a reference that runs anywhere, and its gradients.

One opaque op is all that the passes, Inductor and eager mode agree on. Bias and activation stay outside, where
Inductor fuses them. Codegen lowers it to sparse kernels; without codegen the reference below runs: it unpacks the
weight and multiplies, so it equals the masked dense layer to the last bit.

Every op here is linear in its activation and in `values`, so all their derivatives, of any order and in any mode, are
the three ops `linear`, `linear_input_grad` and `linear_values_grad` again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vnm_compile._torch import OpOverload, autocast_excluded, autocast_key, below_autograd
from vnm_compile.activations import ACTIVATIONS
from vnm_compile.derivatives import differentiates, register_derivatives
from vnm_compile.format import Packed, kept_offsets, unpack
from vnm_compile.layout import Layout
from vnm_compile.quantization import rounded_activations

_library = torch.library.Library("vnm", "DEF")
_WEIGHT = "Tensor values, Tensor[] structure, str layout"
for _schema in (
    f"linear(Tensor x, {_WEIGHT}) -> Tensor",
    f"linear_input_grad(Tensor grad, {_WEIGHT}) -> Tensor",
    "linear_values_grad(Tensor grad, Tensor x, Tensor[] structure, str layout) -> Tensor",
    f"gated_linear(Tensor x, {_WEIGHT}, str activation) -> Tensor",
    "sections(Tensor y, SymInt[] widths, SymInt[] strides) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_ops = torch.ops.vnm


def weight_args(arrays: Sequence[Any], layout: Layout) -> tuple[Any, list[Any], str]:
    """The arrays of a weight, or their nodes in a graph, as the ops take them: `values`, `structure`, `layout`.

    `values` is what the ops are differentiable in; `structure` holds the arrays that follow it in `layout.names`, and
    then, where several weights are computed as one, the arrays of the others, one weight after the other.
    """
    values, *structure = arrays
    return values, structure, layout.text


def linear(x: Tensor, arrays: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return `x @ W.T` for a packed weight W `[out_features, in_features]`; the op `vnm::linear`.

    Args:
        x: `[..., in_features]`, the dtype of the values.
        arrays: the canonical arrays (see `vnm_compile.format`). Rows may be further apart than they are wide; on a GPU
            what lies between, up to a multiple of 16 bytes, must then be zeros. Those of several weights, one after
            the other, stand for the weights one above the other.
        layout: of W, all of it; the arrays are padded up to blocks.

    Returns:
        `[..., out_features]`, contiguous, the dtype of x. Under autocast that is its dtype, to which x and values are
        cast as those of F.linear are; a bias has to be cast to the dtype of the result before it is added.
    """
    return _ops.linear.default(x, *weight_args(arrays, layout))


def parts_of(arrays: Sequence[Any], layout: Layout) -> list[tuple[Any, ...]]:
    """The arrays of each weight, of those of several one after the other."""
    each = len(layout.names)
    return [tuple(arrays[i : i + each]) for i in range(0, len(arrays), each)]


def _whole(values, structure, layout):
    """The arrays of the weight, or of several one above the other."""
    parts = parts_of((values, *structure), layout)
    return Packed(*(parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))))


def _linear(x, values, structure, layout):
    layout = Layout.parse(layout)
    packed = _whole(values, structure, layout)
    if not layout.rounds:
        return torch.nn.functional.linear(x, unpack(packed, layout)).contiguous()
    levels, step = rounded_activations(x)
    weight = unpack(packed.replaced(3, packed.scales.to(levels.dtype)), layout)
    return (torch.nn.functional.linear(levels, weight) * step).to(x.dtype).contiguous()


def _linear_shape(x, values, structure, layout):
    layout = Layout.parse(layout)
    torch._check(x.dim() >= 1, lambda: "vnm::linear: x needs at least one dimension")
    torch._check(
        x.shape[-1] == layout.in_features,
        lambda: f"vnm::linear: x is {list(x.shape)}; expected [..., {layout.in_features}]",
    )
    torch._check(
        x.dtype == layout.weight_dtype([array.dtype for array in (values, *structure)]),
        lambda: f"vnm::linear: x is {x.dtype}, the weight {values.dtype}; they must agree",
    )
    return x.new_empty((*x.shape[:-1], layout.out_features))


def _linear_input_grad(grad, values, structure, layout):
    """`grad @ W`, the gradient of `vnm::linear` for x: `[..., out_features]` to `[..., in_features]`."""
    layout = Layout.parse(layout)
    return torch.matmul(grad, unpack(_whole(values, structure, layout), layout)).contiguous()


def _linear_input_grad_shape(grad, values, structure, layout):
    return grad.new_empty((*grad.shape[:-1], Layout.parse(layout).in_features))


def _linear_values_grad(grad, x, structure, layout):
    """The gradient of `vnm::linear` for `values`: `grad.T @ x` at the kept places, `[R, G*N]`.

    Padding (rows past `out_features`, columns past `in_features`) gets zero.
    """
    layout = Layout.parse(layout)
    dense = x.new_zeros(layout.rows, layout.groups * layout.spec.m)
    product = grad.reshape(-1, layout.out_features).T @ x.reshape(-1, layout.in_features)
    dense[: layout.out_features, : layout.in_features] = product
    metadata, columns, *_ = structure
    offsets = kept_offsets(metadata, columns, layout)
    return dense.view(*offsets.shape[:3], layout.spec.m).gather(3, offsets).reshape(layout.shapes[0])


def _linear_values_grad_shape(grad, x, structure, layout):
    return x.new_empty(Layout.parse(layout).shapes[0])


def gated_linear(x: Tensor, arrays: Sequence[Tensor], layout: Layout, activation: str) -> Tensor:
    """Return `activation(x @ gate.T) * (x @ up.T)` for two packed weights of one size, stored one above the other.

    Args:
        x: `[..., in_features]`, the dtype of the values.
        arrays: the canonical arrays of gate, then those of up; or both joined along their first dimension: `values`
            is `[2 R, G*N]` then, with R the padded rows of one of the two.
        layout: of one of the two weights.
        activation: a name in `vnm_compile.activations`.

    Returns:
        `[..., out_features]`, contiguous, the dtype of x.
    """
    return _ops.gated_linear.default(x, *weight_args(arrays, layout), activation)


def _gated_linear(x, values, structure, layout, activation):
    halves = [array.tensor_split(2) for array in _whole(values, structure, Layout.parse(layout))]
    gate, up = (_ops.linear.default(x, first, rest, layout) for first, *rest in zip(*halves, strict=True))
    return ACTIVATIONS[activation].eager(gate) * up


def _gated_linear_shape(x, values, structure, layout, activation):
    return x.new_empty((*x.shape[:-1], Layout.parse(layout).out_features))


def sections(y: Tensor, widths: Sequence[int], strides: Sequence[int]) -> list[Tensor]:
    """Cut the output of joined linears into theirs.

    Args:
        y: `[..., sum(strides)]`.
        widths: columns of each section.
        strides: columns from the start of each section to that of the next; the rest is padding.

    Returns:
        One `[..., width]` a section, contiguous as far as anyone can see (compiled, they are views of y).
    """
    return _ops.sections.default(y, widths, strides)


def _sections(y, widths, strides):
    pieces = y.split(strides, -1)
    return [
        piece[..., :width].clone(memory_format=torch.contiguous_format)
        for piece, width in zip(pieces, widths, strict=True)
    ]


def _sections_shape(y, widths, strides):
    return [y.new_empty((*y.shape[:-1], width)) for width in widths]


for _name, _reference, _shape in (
    ("linear", _linear, _linear_shape),
    ("linear_input_grad", _linear_input_grad, _linear_input_grad_shape),
    ("linear_values_grad", _linear_values_grad, _linear_values_grad_shape),
    ("gated_linear", _gated_linear, _gated_linear_shape),
    ("sections", _sections, _sections_shape),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vnm::{_name}", _shape, lib=_library)


# Derivatives. A tangent or gradient that does not exist is None.


def _sum(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _with(op: Any, tangent: Tensor | None, position: int, args: Sequence[Any]) -> Tensor | None:
    """The op with one of its arguments replaced, or None if that is by nothing."""
    if tangent is None:
        return None
    return op.default(*_exact(*args[:position], tangent, *args[position + 1 :]))


def _exact(*args: Any) -> tuple[Any, ...]:
    """Arguments whose last is a layout, of which activations are not rounded: rounding counts as the identity where
    something is differentiated."""
    *others, layout = args
    return *others, Layout.parse(layout).exact.text


def _register_bilinear(op: Any, grads: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Derivatives of an op that is linear in each of its first two arguments, whose gradients `grads` returns."""

    def backward(ctx, grad):
        _, first, second, *rest = ctx.needs_input_grad
        return *grads(grad, *ctx.args, first=first, second=second), *[None] * len(rest)

    def forward_mode(ctx, one, other, *_):
        return _sum(_with(op, one, 0, ctx.args), _with(op, other, 1, ctx.args))

    def needed(ctx, i):
        return i > 0 or ctx.needs_input_grad[2]  # an activation is not kept for its own gradient

    register_derivatives(_library, op.default, backward, forward_mode, needed)


def _linear_grads(grad, x, values, *weight, first, second):
    return (
        _ops.linear_input_grad.default(*_exact(grad, values, *weight)) if first else None,
        _ops.linear_values_grad.default(*_exact(grad, x, *weight)) if second else None,
    )


def _linear_input_grad_grads(grad, given, values, *weight, first, second):
    return (
        _ops.linear.default(grad, values, *weight) if first else None,
        _ops.linear_values_grad.default(given, grad, *weight) if second else None,
    )


def _linear_values_grad_grads(grad, given, x, *weight, first, second):
    return (
        _ops.linear.default(x, grad, *weight) if first else None,
        _ops.linear_input_grad.default(given, grad, *weight) if second else None,
    )


def _sections_backward(ctx, *grads):
    _, widths, strides = ctx.args
    padded = [
        torch.nn.functional.pad(grad, (0, stride - width)) if stride > width else grad
        for grad, width, stride in zip(grads, widths, strides, strict=True)
    ]
    return torch.cat(padded, -1), None, None


def _differentiable_gated_linear(*args):
    """A gated pair whose derivative is asked for is computed as its parts, which have one."""
    if differentiates(args):
        return _gated_linear(*args)
    with below_autograd():
        return _ops.gated_linear.default(*args)


_register_bilinear(_ops.linear, _linear_grads)
_register_bilinear(_ops.linear_input_grad, _linear_input_grad_grads)
_register_bilinear(_ops.linear_values_grad, _linear_values_grad_grads)
register_derivatives(
    _library,
    _ops.sections.default,
    _sections_backward,
    lambda ctx, tangent, *_: _ops.sections.default(tangent, *ctx.args[1:]),
)
_library.impl("gated_linear", _differentiable_gated_linear, "Autograd")


# vmap: over activations it is one more leading dimension; over weights, a loop.


def _register_vmap(op: Any, leading: int) -> None:
    """`leading`: how many of the first arguments may have any number of leading dimensions, the batch among them."""

    def vmap(info, in_dims, *args):
        moved = [_batch_first(arg, dim) for arg, dim in zip(args, in_dims, strict=True)]
        batched = [_is_batched(dim) for dim in in_dims]
        if not any(batched[leading:]):
            result = op.default(*moved)
        else:
            each = [[_at(arg, dim, j) for arg, dim in zip(moved, in_dims, strict=True)] for j in range(info.batch_size)]
            result = torch.stack([op.default(*row) for row in each])
        return result, [0] * len(result) if isinstance(result, list) else 0

    torch.library.register_vmap(op.default, vmap, lib=_library)


def _is_batched(dim: Any) -> bool:
    return any(map(_is_batched, dim)) if isinstance(dim, list | tuple) else isinstance(dim, int)


def _batch_first(arg: Any, dim: Any) -> Any:
    """An argument with its batch dimension, if it has one, in front; a list of tensors has one each."""
    if isinstance(dim, list | tuple):
        return [_batch_first(*each) for each in zip(arg, dim, strict=True)]
    return arg.movedim(dim, 0) if isinstance(dim, int) else arg


def _at(arg: Any, dim: Any, j: int) -> Any:
    """Member `j` of a batch of such arguments."""
    if isinstance(dim, list | tuple):
        return [_at(*each, j) for each in zip(arg, dim, strict=True)]
    return arg[j] if isinstance(dim, int) else arg


for _op, _leading in (
    (_ops.linear, 1),
    (_ops.linear_input_grad, 1),
    (_ops.linear_values_grad, 0),
    (_ops.gated_linear, 1),
    (_ops.sections, 1),
):
    _register_vmap(_op, _leading)


# Autocast


def _autocast(device: str) -> None:
    """Under autocast the floating-point operands take its dtype, as those of F.linear do."""

    def register(op: OpOverload) -> None:
        def cast(*args):
            dtype = torch.get_autocast_dtype(device)
            with autocast_excluded(device):
                return op(*(_cast(arg, dtype) for arg in args))

        _library.impl(op, cast, autocast_key(device))

    register(_ops.linear.default)
    register(_ops.gated_linear.default)


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    """An argument as autocast hands it on; of the arrays of a weight those that are floats, as scales."""
    if isinstance(arg, list | tuple):
        return [_cast(each, dtype) for each in arg]
    return arg.to(dtype) if _is_castable(arg) else arg


def _is_castable(arg: object) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64


for _device in ("cpu", "cuda"):
    _autocast(_device)


# FLOPs, as torch.utils.flop_counter counts them: two for a multiplication and an addition. Counted are those with kept
# values, 2 T O K N/M for a linear: what the layer asks for, whatever a kernel makes of it.


def _tokens(shape: Sequence[int]) -> int:
    return torch.Size(shape[:-1]).numel()


@register_flop_formula([_ops.linear, _ops.linear_input_grad])
def _linear_flops(x_shape, values_shape, structure_shapes, layout, *_, **__):
    return 2 * _tokens(x_shape) * Layout.parse(layout).out_features * Layout.parse(layout).kept


@register_flop_formula(_ops.linear_values_grad)
def _values_grad_flops(grad_shape, x_shape, structure_shapes, layout, **_):
    return _linear_flops(x_shape, None, structure_shapes, layout)


@register_flop_formula(_ops.gated_linear)
def _gated_flops(*arguments, **_):
    return 2 * _linear_flops(*arguments[:-1])
