"""Views of a compressed weight: they can be read, and a write into them, which would be lost, is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vnm_compile._torch import FakeTensor, disabled_torch_function, tree_leaves, tree_map_only, without_dispatch
from vnm_compile.errors import RefusedWrite, VNMError


def view_write_refused(name: str) -> VNMError:
    """The error for an op that writes into a view of a compressed weight."""
    return RefusedWrite(
        f"{name} writes into a view of a compressed weight, where it would be lost. Call vnm.decompress_model(model) "
        "first, or clone the view."
    )


_traced: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""The storages, by their ids, of fake tensors that are views of compressed weights: in a graph nothing else tells."""


def note_traced_views(result: Any) -> None:
    """Note that the fake tensors of `result` are views of a weight that was unpacked for them."""
    for each in tree_leaves(result):
        if isinstance(each, Tensor):
            storage = each.untyped_storage()
            _traced[id(storage)] = storage


def is_traced_view(value: Any) -> bool:
    """Whether one of the tensors in `value`, as tracing has it, lies in the memory of such a view."""
    plain = [each for each in tree_leaves(value) if isinstance(each, FakeTensor)]
    return any(_traced.get(id(each.untyped_storage())) is each.untyped_storage() for each in plain)


class ReadOnly(Tensor):
    """A view (`weight[3]`, `weight.narrow(...)`) of a weight that was unpacked for it.

    Reads as any tensor does, and what is computed from it is an ordinary tensor.
    """

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    @staticmethod
    def of(result: Any) -> Any:
        """Mark the tensors of `result`, which have no gradient, as views that are not to be written to."""
        return tree_map_only(Tensor, lambda each: torch.Tensor._make_subclass(ReadOnly, each), result)

    @staticmethod
    def keeping_grad(result: Tensor) -> Tensor:
        """Mark a tensor whose gradient may be asked for."""
        return _Marked.apply(result) if result.requires_grad else ReadOnly.of(result)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for i, info in enumerate(func._schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(info.name)
            writes = info.alias_info is not None and info.alias_info.is_write
            if writes and any(isinstance(leaf, ReadOnly) for leaf in tree_leaves(given)):
                raise view_write_refused(str(func))
        plain_args, plain_kwargs = tree_map_only(ReadOnly, _plain, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        views = any(info.alias_info is not None for info in func._schema.returns)
        return ReadOnly.of(result) if views else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = _plain(self.detach()).clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(_plain(self))


class _Marked(torch.autograd.Function):
    """The same values, read-only, with the gradient of what was marked."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # type: ignore[override]
        return ReadOnly.of(tensor.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def _plain(view: Tensor) -> Tensor:
    with without_dispatch():
        return torch.Tensor._make_subclass(Tensor, view)
