"""Training on compressed weights: the kept values of a pruned model are its parameters, and its structure stays.

Forward and backward multiply by the compressed weight. What an optimizer keeps is as small as the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vnm_compile import ops
from vnm_compile.annotate import ANY_SIZE, Selector, annotation_of, select_layers, set_annotation
from vnm_compile.checks import check_usable, why_more_than_a_product
from vnm_compile.errors import NothingSelected, UnsupportedWeight, at_layer
from vnm_compile.format import Packed, check_pattern, detect, pack, unpack
from vnm_compile.layers import Layer, OnValues, on_values, replace_module
from vnm_compile.layout import Layout
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor, compress


class ValuesLinear(OnValues):
    """A linear layer whose parameter is what its pruned weight keeps: `values` `[R, G*N]` (see `docs/format.md`).

    Attributes:
        values: trained. Places that the pattern allows and the pruned weight left zero train, too.
        bias: that of the layer it stands for.
        stored_layout: of the weight.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: Layer, spec: Spec) -> None:
        super().__init__()
        module = layer.module
        weight = layer.weight.detach()
        self.stored_layout = Layout(spec, *weight.shape)
        values, *structure = weight.packed if isinstance(weight, VNMTensor) else pack(weight, spec, layer.name)
        self._trains = bool(layer.stored.requires_grad)  # type: ignore[union-attr]
        self._compressed = isinstance(weight, VNMTensor)
        self.values = nn.Parameter(values.clone(), requires_grad=self._trains or self._compressed)
        for name, array in zip(self.stored_layout.names[1:], structure, strict=True):
            self.register_buffer(name, array.clone())
        self.bias = module.bias  # type: ignore[assignment]
        self.train(module.training)
        # What it stands for comes back at the end; in a list it is no module of this one.
        self._transposed = layer.transposed
        self._ordinary = [module]
        module._parameters["weight"] = None

    @property
    def packed(self) -> Packed:
        """The arrays of the weight."""
        return Packed(*(getattr(self, name) for name in self.stored_layout.names))

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out_features, in_features]`, unpacked; not what trains."""
        return unpack(self.packed, self.stored_layout)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T + bias`."""
        y = ops.linear(x, self.packed, self.stored_layout)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias and pattern."""
        layout = self.stored_layout
        return f"{layout.in_features}, {layout.out_features}, bias={self.bias is not None}, {layout.spec}"

    @torch.no_grad()
    def ordinary(self) -> nn.Module:
        """The layer that this stood for, with the trained weight."""
        module = self._ordinary[0]
        weight: Tensor = compress(self.weight, self.stored_layout.spec) if self._compressed else self.weight
        weight = weight.t() if self._transposed else weight
        weight = weight if self._compressed else weight.contiguous()
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=self._trains)
        module.train(self.training)
        return module


def compress_for_training(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None] | None = None,
    *,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> list[str]:
    """Have the pruned linears of `model` train on what they keep, in place; `vnm.finalize(model)` ends it.

    Call it before the optimizer is made: the parameter of such a layer is `values`, no longer `weight`. Forward and
    backward multiply by compressed weights, with `torch.compile(model, backend="vnm")` in kernels with bias and
    activation fused; nothing is packed again between steps. The masks are those that the weights have.

    Args:
        model: pruned, and not yet compressed or compressed.
        spec: the patterns that the weights follow, as for `vnm.annotate`; None for those that were annotated, or that
            are found in the weights.
        include, exclude: which linears, as for `vnm.annotate`.

    Returns:
        The names of the layers.

    Raises:
        VNMError: no layer follows a pattern, one breaks the one that it was given, or holds a weight that cannot be
            handled. The model is as it was then.
    """
    selected = select_layers(model, ANY_SIZE if spec is None else spec, include, exclude)
    check_usable(layer for layer, _ in selected)
    if spec is None:
        found = [(layer, _followed(layer)) for layer, _ in selected]
        selected = [(layer, each) for layer, each in found if each is not None]
    if not selected:
        raise NothingSelected("no layer follows a pattern; prune first (vnm.sparsify, or a recipe of vnm.train).")
    for layer, goal in selected:
        why = why_more_than_a_product(layer)
        if why is not None:
            raise at_layer(layer.name, why, UnsupportedWeight)
        if layer.module is model:
            raise at_layer(layer.name, "the model is this one layer; put it into an nn.Sequential.", UnsupportedWeight)
        if not isinstance(layer.stored, VNMTensor):
            check_pattern(layer.weight.detach(), goal, layer.name)
        elif layer.stored.quantization is not None:
            kind = layer.stored.quantization.kind
            raise at_layer(
                layer.name, f"its values are {kind}, which do not train; decompress the model first.", UnsupportedWeight
            )
        elif layer.stored.spec != goal:
            raise at_layer(layer.name, f"it is compressed as {layer.stored.spec}, not {goal}.", UnsupportedWeight)
    for layer, goal in selected:
        replace_module(model, layer.module, ValuesLinear(layer, goal))
    return [layer.name for layer, _ in selected]


def _followed(layer: Layer) -> Spec | None:
    if isinstance(layer.stored, VNMTensor):
        return layer.stored.spec
    annotation = annotation_of(layer.module)
    return annotation.spec if annotation is not None else detect(layer.weight.detach())


def make_ordinary(model: nn.Module) -> list[str]:
    """Put ordinary layers back where `compress_for_training` put its own; return their names."""
    names = []
    for name, module in on_values(model):
        if isinstance(module, ValuesLinear):
            layer = module.ordinary()
            replace_module(model, module, layer)
            set_annotation(layer, module.stored_layout.spec, name)
            names.append(name)
    return names
