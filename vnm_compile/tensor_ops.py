"""What the ops of torch do with a VNMTensor.

Two tables: functions, answered before autograd and before they are cut into ops, and ops. What stands in neither sees
the dense weight, unpacked for that op alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile._torch import in_transform, let_move, tree_leaves, tree_map_only, without_torch_function
from vnm_compile.errors import RefusedWrite
from vnm_compile.ops import linear
from vnm_compile.quantization import rounded_activations
from vnm_compile.read_only import ReadOnly, note_traced_views
from vnm_compile.tensor import VNMTensor, compress, set_ops, write_refused
from vnm_compile.validation import VALUE_DTYPES


def torch_function(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What `func`, a function or method of torch's Python API, does with a VNMTensor among its arguments."""
    handler = _FUNCTIONS.get(func)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    with without_torch_function():
        return func(*args, **kwargs)


# Dynamo would compile what runs here where a graph breaks at one of these ops, packing for example.
@torch.compiler.disable
def torch_dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What `func`, an op below autograd, does with a VNMTensor among its arguments."""
    views = any(info.alias_info is not None for info in func._schema.returns)
    if views and torch.is_inference_mode_enabled() and not _weight(args, kwargs).is_inference():
        # There too, a view of an ordinary tensor is an ordinary tensor.
        with torch.inference_mode(False), torch.no_grad():
            return torch_dispatch(func, args, kwargs)
    handler = _DISPATCH.get(func)
    if handler is not None:
        result = handler(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    for weight in _written(func, args, kwargs):
        raise write_refused(str(func), weight)
    dense_args, dense_kwargs = tree_map_only(VNMTensor, VNMTensor._unpacked, (args, kwargs))
    result = func(*dense_args, **dense_kwargs)
    # A view of the weight is, after unpacking, a view of something else.
    if views and _traced(_weight(args, kwargs)):
        note_traced_views(result)
    elif views:
        return ReadOnly.of(result)
    return result


# Functions.


def _traced(*operands: Any) -> bool:
    """Whether a compiler looks on: eager mode multiplies by the dense weight, exactly as it would have been, unless
    activations are rounded."""
    return any(type(each.packed.values) is not Tensor for each in operands)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, VNMTensor) or weight._transposed or isinstance(input, VNMTensor):
        return NotImplemented
    rounds, trains = weight.layout_of_arrays.rounds, weight.requires_grad and torch.is_grad_enabled()
    if rounds and trains:
        # The gradient of the dense weight is asked for, at activations that are rounded; their own passes through.
        levels, step = rounded_activations(input.detach())
        given = input + ((levels * step).to(input.dtype) - input.detach())
        return torch.nn.functional.linear(given, weight.to_dense(), bias)
    if not rounds and (not _traced(weight) or trains):
        return NotImplemented
    if isinstance(bias, VNMTensor) or (bias is not None and bias.dim() > 1 and not rounds):
        return NotImplemented
    cast = torch.is_autocast_enabled(weight.device.type)
    if bias is not None and cast and in_transform():
        return NotImplemented  # a product and an addition there, of which autocast casts the product only
    y = linear(input, weight.packed, weight.layout_of_arrays)
    if bias is None:
        return y
    # Under autocast the bias takes the dtype of the result, as that of F.linear does.
    if bias.dtype != y.dtype and cast:
        bias = bias.to(y.dtype)
    return y + bias if bias.dtype == y.dtype else NotImplemented


def _matmul(input: Tensor, other: Any = None, mat2: Any = None, tensor2: Any = None, **rest: Any) -> Any:
    matrix = next((each for each in (other, mat2, tensor2) if each is not None), None)
    if rest or not isinstance(matrix, VNMTensor) or not matrix._transposed:
        return NotImplemented
    return _linear(input, matrix.t())


def _addmm(
    input: Tensor, mat1: Any = None, mat2: Any = None, *more: Any, beta: Any = 1, alpha: Any = 1, **rest: Any
) -> Any:
    plain = not more and not rest and beta == alpha == 1 and isinstance(input, Tensor)
    if not plain or not isinstance(mat2, VNMTensor) or not mat2._transposed:
        return NotImplemented
    return _linear(mat1, mat2.t(), input)


def _set_item(target: Tensor, index: Any, value: Any) -> Any:
    if not isinstance(target, VNMTensor):
        return NotImplemented
    raise write_refused("item assignment", target)


def _set_data(target: VNMTensor, source: Tensor) -> Any:
    """`weight.data = source`: the arrays are replaced with everything else."""
    if not isinstance(source, VNMTensor):
        raise RefusedWrite(
            f"weight.data = dense: the compressed weight {list(target.shape)} could not follow later writes into the "
            "dense tensor. Copy it (weight.data.copy_(dense)), or assign a compressed one (vnm.compress(dense, spec))."
        )
    with without_torch_function():
        torch.Tensor.data.__set__(target, source)  # type: ignore[attr-defined]
    target._stored = source._checked
    return None


def _moved(weight: Any, *_: Any, **__: Any) -> Any:
    """`weight.to(...)` and the like, which `module.to(...)` calls before it swaps the weight for the result."""
    if not torch.compiler.is_compiling():
        let_move(weight)
    return NotImplemented


def _dlpack(tensor: Tensor, *_: Any, **__: Any) -> Any:
    return tensor.__dlpack__()


def _storage(tensor: Tensor, *_: Any, **__: Any) -> Any:
    raise RefusedWrite(
        "a compressed weight has no dense storage; weight.values, .metadata and .columns are what it stores, and "
        "weight.to_dense() is the dense weight. To write a model to a file, call vnm.save(model, directory)."
    )


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    Tensor.__setitem__: _set_item,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.utils.dlpack.to_dlpack: _dlpack,
    Tensor.storage: _storage,
    Tensor._typed_storage: _storage,
    torch.empty_like: _moved,
    Tensor.module_load: _moved,
    **dict.fromkeys(
        (Tensor.to, Tensor.type, Tensor.cpu, Tensor.cuda, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
        _moved,
    ),
}


# Ops on the arrays themselves.


def _rewrap(weight: VNMTensor, arrays: Iterable[Tensor]) -> VNMTensor:
    return VNMTensor._wrap(weight.packed.remade(arrays), weight.layout_of_arrays, weight._transposed)


def _each(func: Any, weight: VNMTensor, *args: Any, **kwargs: Any) -> VNMTensor:
    return _rewrap(weight, [func(array, *args, **kwargs) for array in weight.packed])


def _clone(func: Any, weight: VNMTensor, *, memory_format: Any = None) -> Any:
    # A transposed weight made contiguous would not be transposed any more: that is a dense matrix.
    if weight._transposed and memory_format is torch.contiguous_format:
        return NotImplemented
    return _rewrap(weight, [func(array) for array in weight.packed])


def _to_copy(func: Any, weight: VNMTensor, **kwargs: Any) -> Any:
    contiguous = kwargs.pop("memory_format", None) is torch.contiguous_format
    if kwargs.get("dtype", weight.dtype) not in VALUE_DTYPES or (contiguous and weight._transposed):
        return NotImplemented
    # Only the values have the weight's dtype; the integer arrays move along and keep theirs.
    moved = {key: value for key, value in kwargs.items() if key != "dtype"}
    return _rewrap(weight, [func(each, **(kwargs if each.is_floating_point() else moved)) for each in weight.packed])


def _empty_like(func: Any, weight: VNMTensor, **kwargs: Any) -> Any:
    """Values without a value; indices and offsets are never left to chance, for kernels trust them."""
    kwargs.pop("memory_format", None)
    if kwargs.get("dtype", weight.dtype) not in VALUE_DTYPES:
        return NotImplemented
    moved = {key: value for key, value in kwargs.items() if key != "dtype"}
    values, metadata, columns, *rest = weight.packed
    first = torch.arange(columns.shape[-1], device=kwargs.get("device", columns.device)).to(columns.dtype)
    # 0b0100: the first two kept columns, for both groups of a byte.
    indices = func(metadata, **moved).fill_(0x44 if weight.spec.n == 2 else 0)
    rest = [func(each, **(kwargs if each.is_floating_point() else moved)).zero_() for each in rest]
    values = func(values, **(kwargs if values.is_floating_point() else moved)).zero_()
    return _rewrap(weight, [values, indices, func(columns, **moved).copy_(first), *rest])


def _transpose(func: Any, weight: VNMTensor, *dims: Any) -> Any:
    order = dims[0] if len(dims) == 1 else dims
    if dims and [dim % 2 for dim in order] not in ([0, 1], [1, 0]):
        return NotImplemented
    if func is _aten.permute.default and order[0] % 2 == 0:
        return _each(_aten.alias.default, weight)
    return VNMTensor._wrap(weight.packed, weight.layout_of_arrays, not weight._transposed)


def _same(func: Any, weight: VNMTensor) -> VNMTensor:
    return weight


def _all(func: Any, weight: VNMTensor, *args: Any) -> bool:
    return all(func(array, *args) for array in weight.packed)


def _on_each(func: Any, weight: VNMTensor, *args: Any) -> None:
    for array in weight.packed:
        func(array, *args)


def _copy_(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, VNMTensor):
        return func(target, source._unpacked(), non_blocking)  # type: ignore[attr-defined]
    if target.quantization is not None:
        _check_quantised_alike(target, source)
    packed = source if isinstance(source, VNMTensor) else _compressed_like(target, source)
    otherwise = packed._transposed != target._transposed or packed.quantization != target.quantization
    if packed.spec == target.spec and packed.shape == target.shape and otherwise:
        packed = _compressed_like(target, packed._unpacked())
    if (packed.spec, packed.shape) != (target.spec, target.shape):
        raise RefusedWrite(
            f"a weight {list(packed.shape)} with pattern {packed.spec} cannot be copied into one "
            f"{list(target.shape)} with pattern {target.spec}; compress the model with the same patterns first."
        )
    for mine, theirs in zip(target.packed, packed.packed, strict=True):
        mine.copy_(theirs, non_blocking=non_blocking)
    return target


def _check_quantised_alike(target: VNMTensor, source: Tensor) -> None:
    """What is copied into a quantised weight is one that is quantised in the same way: nothing is rounded unasked."""
    alike = isinstance(source, VNMTensor) and source.layout_of_arrays == target.layout_of_arrays
    if not alike or source._transposed != target._transposed:  # type: ignore[attr-defined]
        kind = source.layout_of_arrays if isinstance(source, VNMTensor) else f"a dense one {list(source.shape)}"
        raise RefusedWrite(
            f"a weight stored as {target.layout_of_arrays} takes one that is stored so, not {kind}, which would have "
            "to be rounded. Call vnm.decompress_model(model) before, and vnm.quantize(model, ...) after."
        )


def _compressed_like(target: VNMTensor, source: Tensor) -> VNMTensor:
    """A dense weight compressed with the pattern and orientation of `target`."""
    source = source.expand(target.shape).to(target.dtype)
    if not target._transposed:
        return compress(source, target.spec)
    return compress(source.t(), target.spec).t()  # type: ignore[return-value]


_aten = torch.ops.aten
_DISPATCH: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _each,
    _aten.alias.default: _each,
    _aten.clone.default: _clone,
    _aten._pin_memory.default: _each,
    _aten._to_copy.default: _to_copy,
    _aten.empty_like.default: _empty_like,
    _aten.copy_.default: _copy_,
    _aten.t.default: _transpose,
    _aten.transpose.int: _transpose,
    _aten.permute.default: _transpose,
    _aten.detach_.default: _same,
    _aten.is_pinned.default: _all,
    _aten.record_stream.default: _on_each,
}


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[VNMTensor]:
    """The compressed weights among the arguments that `func` writes to."""
    # Collectives write without saying so.
    silent = func.namespace == "c10d"
    for i, info in enumerate(func._schema.arguments):
        if silent or (info.alias_info is not None and info.alias_info.is_write):
            given = args[i] if i < len(args) else kwargs.get(info.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, VNMTensor))


def _weight(*arguments: Any) -> VNMTensor:
    """The first compressed weight among the arguments."""
    return next(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, VNMTensor))


set_ops(torch_function, torch_dispatch)
