"""VNMTensor: a weight that is stored compressed and behaves as a weight.

It is a wrapper subclass around the canonical arrays. Moving, casting, copying, transposing and saving work on these;
any op that reads sees the dense weight, unpacked for that op alone, so that its result, its dtype and its gradients are
those of the dense weight; a write that could leave the pattern is an error. Where a compiler traces, multiplications
become `vnm::linear`. What is done by which op stands in `vnm_compile.tensor_ops`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vnm_compile._torch import FakeTensor
from vnm_compile.errors import DamagedWeight, RefusedWrite, UnsupportedWeight, VNMError, at_layer
from vnm_compile.format import Packed, pack, unpack
from vnm_compile.layout import ARRAYS, Layout
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec
from vnm_compile.validation import VALUE_DTYPES, own_arrays, stores_otherwise

Handler = Callable[[Any, Sequence[Any], dict[str, Any]], Any]
_ops: list[Handler] = []


def set_ops(torch_function: Handler, torch_dispatch: Handler) -> None:
    """Say what functions and ops do with a VNMTensor; `vnm_compile.tensor_ops` does, which needs the class first."""
    _ops[:] = torch_function, torch_dispatch


def write_refused(name: str, weight: VNMTensor) -> VNMError:
    """The error for an op that writes into a compressed weight."""
    return RefusedWrite(
        f"{name} writes into a compressed weight {list(weight.shape)}, which could leave its pattern {weight.spec}. "
        "Call vnm.decompress_model(model) first, and vnm.compress_model(model) after; a whole new weight is given to "
        "it by weight.data.copy_(dense)."
    )


class _Stored(NamedTuple):
    """What a VNMTensor holds; never in a pickle, so whoever has one got it from a constructor below."""

    packed: Packed
    layout: Layout
    transposed: bool


class _Unchecked(_Stored):
    """What a VNMTensor holds after somebody has set one of its arrays: checked when it is next used."""


class VNMTensor(Tensor):
    """A V:N:M weight `[out_features, in_features]`, compressed.

    Attributes:
        values: `[R, G*N]`, the weight's dtype; or levels, where they are quantised (`vnm_compile.quantization`).
        metadata: `[R, ceil(G*N / 4)]` uint8.
        columns: `[R/V, G, 4]` uint8 or uint16.
        scales: `[R, ceil(G*N / group)]`, the weight's dtype, where values are quantised.
        spec: the pattern.

    The view `weight.t()` is a VNMTensor of shape `[in_features, out_features]` over the same arrays.

    A gradient of the weight is dense, as that of a dense weight is: `requires_grad_()` is allowed, and `weight.grad` is
    right. An optimizer that then writes to the weight gets a VNMError.
    """

    values: Tensor  # type: ignore[assignment]
    metadata: Tensor
    columns: Tensor
    scales: Tensor
    _stored: _Stored

    @staticmethod
    def __new__(
        cls,
        values: Tensor,
        metadata: Tensor,
        columns: Tensor,
        spec: Spec,
        shape: Sequence[int],
        transposed: bool = False,
        scales: Tensor | None = None,
        quantization: Quantization | None = None,
    ) -> VNMTensor:
        """Wrap canonical arrays; `shape` is that of the tensor, `[in, out]` where `transposed`. Quantised values have
        `scales`, and a `quantization` that says how.

        Raises:
            VNMError: the arrays are not those of a weight of this shape and pattern. Their contents are checked too.
        """
        try:
            # A Spec of our own: an unpickled one may be changed, or have escaped its checks.
            spec = Spec(spec.v, spec.n, spec.m)
            first, second = (int(size) for size in shape)
        except (AttributeError, TypeError, ValueError) as error:
            raise DamagedWeight(f"not a compressed weight: pattern {spec!r:.100}, shape {shape!r:.100}.") from error
        if min(first, second) < 0 or type(transposed) is not bool:
            raise DamagedWeight(f"not a compressed weight: shape {list(shape)}, transposed={transposed!r:.100}.")
        if (scales is None) is not (quantization is None):
            raise DamagedWeight("not a compressed weight: quantised values have scales and say how they are stored.")
        rows, width = (second, first) if transposed else (first, second)
        arrays = (values, metadata, columns) if scales is None else (values, metadata, columns, scales)
        return cls._owning(Packed(*arrays), Layout(spec, rows, width, quantization), transposed)

    @classmethod
    def _owning(cls, packed: Packed, layout: Layout, transposed: bool) -> VNMTensor:
        """Wrap arrays that come from outside, checked."""
        return cls._wrap(own_arrays(packed, layout), layout, transposed)

    @classmethod
    @torch.compiler.disable
    def _wrap(cls, packed: Packed, layout: Layout, transposed: bool) -> VNMTensor:
        """Wrap arrays that are known to be right: derived from those of another weight, or just packed."""
        out_features, in_features = layout.out_features, layout.in_features
        weight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            (in_features, out_features) if transposed else (out_features, in_features),
            strides=(1, in_features) if transposed else (in_features, 1),
            dtype=layout.weight_dtype([array.dtype for array in packed]),
            device=packed.values.device,
        )
        weight._stored = _Stored(packed, layout, transposed)
        return weight

    @property
    def _checked(self) -> _Stored:
        stored = getattr(self, "_stored", None)
        if type(stored) is _Stored:
            return stored
        if type(stored) is not _Unchecked:
            raise DamagedWeight("not a compressed weight: it holds no arrays (a damaged or foreign file?).")
        self._take(VNMTensor._owning(*stored))
        return self._stored

    def _take(self, made: VNMTensor) -> None:
        """Hold the arrays of `made`, which are checked."""
        if (made.shape, made.dtype, made.device) != (self.shape, self.dtype, self.device):
            raise DamagedWeight(
                f"not a compressed weight: a {self.dtype} tensor {list(self.shape)} on {self.device} with "
                f"{made.dtype} values of {list(made.shape)} on {made.device}."
            )
        self._stored = made._stored

    def _set(self, name: str, array: Tensor) -> None:
        stored = self._checked if type(self._stored) is not _Unchecked else self._stored
        self._stored = _Unchecked(stored.packed.replaced(stored.layout.names.index(name), array), *stored[1:])

    @property
    def packed(self) -> Packed:
        """The canonical arrays."""
        return self._checked.packed

    @property
    def spec(self) -> Spec:
        """The pattern."""
        return self._checked.layout.spec

    @property
    def quantization(self) -> Quantization | None:
        """How values are quantised; None where they are floats of the weight's dtype."""
        return self._checked.layout.quantization

    @property
    def layout_of_arrays(self) -> Layout:
        """How the weight is stored, whichever way round it is seen: `[out_features, in_features]`."""
        return self._checked.layout

    @property
    def _transposed(self) -> bool:
        return self._checked.transposed

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self._checked.layout.out_features

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self._checked.layout.in_features

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that the arrays take."""
        return self.packed.nbytes

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """Return the dense weight, `shape` and dtype of this tensor (or `dtype`); gradients flow through it."""
        dense = _ToDense.apply(self) if self.requires_grad and torch.is_grad_enabled() else self._unpacked()
        return dense if dtype is None else dense.to(dtype)

    def _unpacked(self) -> Tensor:
        stored = self._checked
        dense = unpack(stored.packed, stored.layout)
        return dense.t() if stored.transposed else dense

    def share_memory_(self) -> VNMTensor:  # type: ignore[override]
        """Move the arrays to shared memory, in place."""
        for array in self.packed:
            array.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the arrays are in shared memory."""
        return all(array.is_shared() for array in self.packed)

    def numpy(self, *, force: bool = False) -> Any:
        """The dense weight as a NumPy array."""
        return self.to_dense().numpy(force=force)

    def tolist(self) -> Any:
        """The dense weight as nested lists."""
        return self._unpacked().tolist()

    def __array__(self, dtype: Any = None) -> Any:  # type: ignore[override]
        return self.to_dense().__array__(dtype) if dtype is not None else self.to_dense().__array__()

    def __dlpack__(self, **_: Any) -> Any:  # type: ignore[override]
        raise UnsupportedWeight(
            "a compressed weight has no dense memory to hand out; export weight.to_dense() instead."
        )

    def apply_(self, *_: Any) -> Tensor:  # type: ignore[override]
        """Refused: it writes."""
        raise write_refused("apply_", self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = self.layout_of_arrays.stored_as
        return f"VNMTensor({kind}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> VNMTensor:
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            copied = self.detach().clone()
        copied.requires_grad_(self.requires_grad)
        copied.grad = copy.deepcopy(self.grad, memo)
        extra = {key: value for key, value in self.__dict__.items() if key != "_stored"}
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(extra, memo))
        return copied  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        stored = self._stored  # whatever it is, it is checked where it is read
        spec = stored.layout.spec
        flags = stored.transposed, self.requires_grad, bool(getattr(self, "_is_param", False))
        if stored.layout.quantization is not None:
            return _rebuild_quantised, (*stored.packed, stored.layout.text, *flags)
        return _rebuild, (*stored.packed, (spec.v, spec.n, spec.m), tuple(self.shape), *flags)

    def __setstate__(self, state: Any) -> None:
        # Pickles from before `_rebuild` restored a bare tensor, then its attributes.
        state = state[0] if isinstance(state, tuple) else state
        arrays = [state.get(name) for name in ARRAYS[:3]] if isinstance(state, dict) else [None]
        if any(array is None for array in arrays):
            raise DamagedWeight("not a compressed weight: its state holds no arrays (a damaged or foreign file?).")
        made = VNMTensor(*arrays, state.get("spec"), self.shape, state.get("_transposed", False))  # type: ignore[call-arg]
        self._take(made)
        if state.get("_is_param") is True:
            self._is_param = True

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [*self._checked.layout.names], self._checked[1:]  # guards of compiled code ask at every call

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> VNMTensor:
        layout, transposed = context
        # What compiled code and tracing put together again: their arrays come from weights that were checked.
        return cls._wrap(Packed(*(inner[name] for name in layout.names)), layout, transposed)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code may depend on, for the AOTAutograd cache: the pattern and shape, never the values."""
        return f"VNMTensor({self.layout_of_arrays}, {self.dtype}, transposed={self._transposed})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ops[0](func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _ops[1](func, args, kwargs or {})


class _Array:
    """An attribute of a VNMTensor: one of its arrays, by its name."""

    def __init__(self, name: str) -> None:
        self._name, self._place = name, ARRAYS.index(name)  # a layout has the first of them

    def __get__(self, weight: VNMTensor | None, owner: type) -> Any:
        if weight is None:
            return self
        packed, layout, _ = weight._checked
        if self._place >= len(packed):
            raise AttributeError(f"a weight stored as {layout} has no {self._name}")
        return packed[self._place]

    def __set__(self, weight: VNMTensor, array: Tensor) -> None:
        weight._set(self._name, array)


for _name in ARRAYS:
    setattr(VNMTensor, _name, _Array(_name))


class _ToDense(torch.autograd.Function):
    """The dense weight, whose gradient is the weight's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: VNMTensor) -> Tensor:  # type: ignore[override]
        return weight._unpacked()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def compress(weight: Tensor, spec: Spec | str, layer: str | None = None) -> VNMTensor:
    """Return `weight` `[out_features, in_features]` compressed.

    Raises:
        VNMError: the weight breaks `spec`, or is no matrix of float32, bfloat16, float16 or float64 with values; the
            message starts with the name `layer`, if there is one.
    """
    spec = Spec.parse(spec)
    if isinstance(weight, Tensor):
        if weight.dtype not in VALUE_DTYPES:
            raise at_layer(
                layer,
                f"a weight of {weight.dtype} cannot be compressed; convert it to a float dtype.",
                UnsupportedWeight,
            )
        if stores_otherwise(type(weight)) and not isinstance(weight, VNMTensor | FakeTensor):
            kind = type(weight).__name__
            raise at_layer(
                layer, f"a {kind} stores its values in a way of its own; compress a plain tensor.", UnsupportedWeight
            )
    # Arrays made under inference_mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        return VNMTensor._wrap(pack(weight, spec, layer), Layout(spec, *weight.shape), False)


def _rebuild(
    values: Tensor,
    metadata: Tensor,
    columns: Tensor,
    spec: Sequence[int],
    shape: Sequence[int],
    transposed: bool,
    requires_grad: bool,
    is_parameter: bool,
) -> VNMTensor:
    """A pickled weight, checked: the file may come from anyone."""
    if not isinstance(spec, tuple) or len(spec) != 3:
        raise DamagedWeight(f"not a compressed weight: its pattern is {spec!r:.100}.")
    weight = VNMTensor(values, metadata, columns, Spec(*spec), shape, transposed)
    return _flagged(weight, requires_grad, is_parameter)


def _flagged(weight: VNMTensor, requires_grad: bool, is_parameter: bool) -> VNMTensor:
    if is_parameter is True:
        weight._is_param = True  # type: ignore[attr-defined]
    return weight.requires_grad_(requires_grad is True)  # type: ignore[return-value]


def _rebuild_quantised(
    values: Tensor,
    metadata: Tensor,
    columns: Tensor,
    scales: Tensor,
    layout: str,
    transposed: bool,
    requires_grad: bool,
    is_parameter: bool,
) -> VNMTensor:
    """As `_rebuild`, of quantised values."""
    parsed = Layout.parse(layout) if isinstance(layout, str) else None
    if parsed is None or parsed.quantization is None or type(transposed) is not bool:
        raise DamagedWeight(
            f"not a compressed weight: it is stored as {layout!r:.100}, transposed={transposed!r:.100}."
        )
    weight = VNMTensor._owning(Packed(values, metadata, columns, scales), parsed, transposed)
    return _flagged(weight, requires_grad, is_parameter)


# What torch.load(weights_only=True) may call: they check everything that they are given.
torch.serialization.add_safe_globals([_rebuild, _rebuild_quantised])
