"""VNMTensor: a weight that is stored compressed and behaves as a weight.

It is a wrapper subclass around the three canonical arrays. Linear algebra with an activation goes to `vnm::linear`;
moving, casting, copying and saving work on the arrays; any other reading op sees the dense weight, unpacked for that
op alone; a write that could leave the pattern is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vnm_compile.errors import VNMError
from vnm_compile.format import Packed, pack, unpack
from vnm_compile.ops import linear
from vnm_compile.spec import Spec

_ARRAYS = ["values", "metadata", "columns"]


class VNMTensor(Tensor):
    """A V:N:M weight `[out_features, in_features]`, compressed.

    Attributes:
        values: `[R, G*N]`, the weight's dtype.
        metadata: `[R, ceil(G*N / 4)]` uint8.
        columns: `[R/V, G, 4]` uint8 or uint16.
        spec: the pattern.

    The view `weight.t()` is a VNMTensor of shape `[in_features, out_features]` over the same arrays.
    """

    values: Tensor  # type: ignore[assignment]
    metadata: Tensor
    columns: Tensor
    spec: Spec
    _transposed: bool

    @staticmethod
    def __new__(
        cls,
        values: Tensor,
        metadata: Tensor,
        columns: Tensor,
        spec: Spec,
        shape: Sequence[int],
        transposed: bool = False,
    ) -> VNMTensor:
        """Wrap canonical arrays; `shape` is that of the tensor, `[in, out]` where `transposed`."""
        in_features = shape[0] if transposed else shape[1]
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            tuple(shape),
            strides=(1, in_features) if transposed else (in_features, 1),
            dtype=values.dtype,
            device=values.device,
        )

    def __init__(
        self,
        values: Tensor,
        metadata: Tensor,
        columns: Tensor,
        spec: Spec,
        shape: Sequence[int],
        transposed: bool = False,
    ) -> None:
        self.values, self.metadata, self.columns = values, metadata, columns
        self.spec, self._transposed = spec, transposed

    @property
    def packed(self) -> Packed:
        """The canonical arrays."""
        return Packed(self.values, self.metadata, self.columns)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[1] if self._transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[0] if self._transposed else self.shape[1]

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that the three arrays take."""
        return self.packed.nbytes

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the dense weight, `shape` and dtype of this tensor."""
        dense = unpack(self.packed, self.spec, self.out_features, self.in_features)
        return dense.t() if self._transposed else dense

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"VNMTensor({self.spec}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return _ARRAYS, (self.spec, tuple(self.shape), self._transposed)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> VNMTensor:
        spec, shape, transposed = context
        return cls(inner["values"], inner["metadata"], inner["columns"], spec, shape, transposed)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code may depend on, for the AOTAutograd cache: the pattern and shape, never the values."""
        return f"VNMTensor({self.spec}, {tuple(self.shape)}, {self.dtype}, transposed={self._transposed})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _FUNCTIONS.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DISPATCH:
            return _DISPATCH[func](func, *args, **kwargs)
        if func._schema.is_mutable and any(isinstance(arg, VNMTensor) for arg in _written(func, args)):
            raise VNMError(
                f"{func} writes into a compressed weight {list(args[0].shape)}, which could leave its pattern "
                f"{args[0].spec}. Call vnm.decompress_model(model) first, and vnm.compress_model(model) after."
            )
        args, kwargs = tree_map_only(VNMTensor, VNMTensor.to_dense, (args, kwargs))
        return func(*args, **kwargs)


def compress(weight: Tensor, spec: Spec | str, layer: str | None = None) -> VNMTensor:
    """Return `weight` `[out_features, in_features]` compressed; raises VNMError where it breaks `spec`."""
    spec = Spec.parse(spec)
    return VNMTensor(*pack(weight, spec, layer), spec, weight.shape)


# Functions with an activation: answered before autograd, so that gradients flow through vnm::linear.


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, VNMTensor) or weight._transposed:
        return NotImplemented
    spec = weight.spec
    y = linear(x, *weight.packed, spec.v, spec.n, spec.m, weight.in_features, weight.out_features)
    return y if bias is None else y + bias


def _matmul(x: Tensor, weight: Tensor) -> Any:
    return _linear(x, weight.t()) if isinstance(weight, VNMTensor) and weight._transposed else NotImplemented


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    y = _matmul(x, weight) if beta == alpha == 1 else NotImplemented
    return y if y is NotImplemented else y + bias


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
}


# Ops on the arrays themselves.


def _rewrap(weight: VNMTensor, change: Callable[[Tensor], Tensor], values: Tensor | None = None) -> VNMTensor:
    arrays = (change(weight.values) if values is None else values, change(weight.metadata), change(weight.columns))
    return VNMTensor(*arrays, weight.spec, weight.shape, weight._transposed)


def _each(func: Any, weight: VNMTensor, *args: Any, **kwargs: Any) -> VNMTensor:
    return _rewrap(weight, lambda array: func(array, *args, **kwargs))


def _to_copy(func: Any, weight: VNMTensor, **kwargs: Any) -> VNMTensor:
    # Only the values have the weight's dtype; the integer arrays move along and keep theirs.
    moved = {key: value for key, value in kwargs.items() if key != "dtype"}
    return _rewrap(weight, lambda array: func(array, **moved), func(weight.values, **kwargs))


def _transpose(func: Any, weight: VNMTensor, *dims: Any) -> Any:
    return VNMTensor(*weight.packed, weight.spec, tuple(reversed(weight.shape)), not weight._transposed)


def _copy_(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, VNMTensor):
        return func(target, source.to_dense(), non_blocking)
    packed = source if isinstance(source, VNMTensor) else _compressed_like(target, source)
    if (packed.spec, packed.shape, packed._transposed) != (target.spec, target.shape, target._transposed):
        raise VNMError(
            f"a weight {list(packed.shape)} with pattern {packed.spec} cannot be copied into one "
            f"{list(target.shape)} with pattern {target.spec}; compress the model with the same patterns first."
        )
    for mine, theirs in zip(target.packed, packed.packed, strict=True):
        mine.copy_(theirs, non_blocking=non_blocking)
    return target


def _compressed_like(target: VNMTensor, source: Tensor) -> VNMTensor:
    """A dense weight compressed with the pattern and orientation of `target`."""
    if not target._transposed:
        return compress(source, target.spec)
    return VNMTensor(*pack(source.t(), target.spec), target.spec, source.shape, transposed=True)


_aten = torch.ops.aten
_DISPATCH: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _each,
    _aten.alias.default: _each,
    _aten.clone.default: _each,
    _aten._pin_memory.default: _each,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
    _aten.t.default: _transpose,
}


def _written(func: Any, args: Sequence[Any]) -> list[Any]:
    schema = func._schema.arguments
    return [arg for arg, info in zip(args, schema, strict=False) if info.alias_info and info.alias_info.is_write]


torch.serialization.add_safe_globals([VNMTensor, Spec])
