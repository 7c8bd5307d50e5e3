"""Which layers of a model are meant to be V:N:M, and with which pattern.

An annotation is stored on the layer itself and registered by it, so that the backend, which sees weights and no
modules, finds the pattern of a weight. It survives `copy.deepcopy`, pickling, `.to()`, and a new weight Parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.errors import VNMError
from vnm_compile.spec import Spec

Selector = str | type[nn.Module]
"""A layer name, a glob over names (`"*.mlp.*"`), or a module class."""

_ATTRIBUTE = "_vnm_annotation"
_annotated: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Annotation:
    """The pattern of one layer, and the name that the layer had in the annotated model."""

    def __init__(self, owner: nn.Module, spec: Spec, name: str) -> None:
        self.__setstate__({"owner": owner, "spec": spec, "name": name})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.spec: Spec = state["spec"]
        self.name: str = state["name"]
        self._owner = weakref.ref(state["owner"])
        _annotated.add(state["owner"])

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self._owner(), "spec": self.spec, "name": self.name}

    def __deepcopy__(self, memo: dict[int, Any]) -> Annotation:
        owner = self._owner()
        assert owner is not None, "an annotation is copied with the layer that holds it"
        # deepcopy enters the copy of a module in the memo before it copies what the module holds.
        return Annotation(memo.get(id(owner), owner), self.spec, self.name)


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies by a weight matrix: an nn.Linear, or a Conv1D, whose weight is stored `[in, out]`."""

    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the module stores its weight as `[in_features, out_features]`."""
        return not isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """The weight as `[out_features, in_features]`, a view of the module's own."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.t() if self.transposed else weight


def linear_layers(model: nn.Module) -> Iterator[Layer]:
    """Every nn.Linear and transformers Conv1D of a model, by its qualified name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            yield Layer(name, module)


def select_layers(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None],
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> list[tuple[Layer, Spec]]:
    """Return the layers that `annotate` and `sparsify` mean by these arguments, with the pattern of each.

    Left out unless `include` or a key of `spec` names them: the model's output head, weights shared with another
    module (tied embeddings), and layers smaller than one block of the pattern.

    Args:
        spec: one pattern, or a pattern per selector; the first selector that fits a layer counts, None leaves the
            layer dense.
        include: selectors of the layers to take; all when None.
        exclude: selectors of layers to leave out; wins over `include`.

    Raises:
        VNMError: a selector fits no layer of the model, or a pattern cannot be read.
    """
    rules = dict(spec) if isinstance(spec, Mapping) else {"*": spec}
    specs = {key: None if rule is None else Spec.parse(rule) for key, rule in rules.items()}
    wanted, unwanted = _selectors(include), _selectors(exclude)
    unused = {*rules, *(wanted or ()), *(unwanted or ())}
    every = frozenset(unused)
    shared, head = _shared_weights(model), _output_head(model)
    selected: list[tuple[Layer, Spec]] = []
    for layer in linear_layers(model):
        fitting = {selector for selector in every if _fits(selector, layer)}
        unused -= fitting
        chosen = next((specs[key] for key in rules if key in fitting), None)
        if chosen is None or fitting & set(unwanted or ()) or (wanted is not None and not fitting & set(wanted)):
            continue
        named = wanted is not None or any(isinstance(s, str) and not _is_glob(s) for s in fitting)
        unsuited = layer.module is head or id(layer.module.weight) in shared or _too_small(layer, chosen)
        if named or not unsuited:
            selected.append((layer, chosen))
    if unused:
        shown = ", ".join(sorted(s if isinstance(s, str) else s.__name__ for s in unused))
        raise VNMError(f"no linear layer of the model fits {shown}; vnm.explain(model) lists their names.")
    return selected


def annotate(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None],
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> list[str]:
    """Record on the layers of `model` which V:N:M pattern their weights follow; no weight is touched.

    `torch.compile(model, backend="vnm")` holds annotated weights to their pattern: one that breaks it is an error,
    where an unannotated weight would silently stay dense. See `select_layers` for the arguments.

    Returns:
        The names of the annotated layers.

    Raises:
        VNMError: as `select_layers`.

    >>> annotate(nn.Sequential(nn.Linear(64, 64)), "64:2:8")
    ['0']
    """
    selected = select_layers(model, spec, include, exclude)
    for layer, layer_spec in selected:
        set_annotation(layer.module, layer_spec, layer.name)
    return [layer.name for layer, _ in selected]


def annotation_of(module: nn.Module) -> Annotation | None:
    """The annotation of a layer, or None."""
    return getattr(module, _ATTRIBUTE, None)


def set_annotation(module: nn.Module, spec: Spec, name: str) -> None:
    """Annotate one layer, whose qualified name is `name`."""
    setattr(module, _ATTRIBUTE, Annotation(module, spec, name))


def clear_annotation(module: nn.Module) -> None:
    """Forget the annotation of a layer, if it has one."""
    if annotation_of(module) is not None:
        delattr(module, _ATTRIBUTE)
        _annotated.discard(module)


def annotations_by_weight() -> dict[int, Annotation]:
    """The annotations of all living layers, by the id of the weight that each holds now."""
    found = {}
    for module in list(_annotated):
        annotation, weight = annotation_of(module), getattr(module, "weight", None)
        if annotation is not None and isinstance(weight, torch.Tensor):
            found[id(weight)] = annotation
    return found


def _selectors(given: Iterable[Selector] | Selector | None) -> tuple[Selector, ...] | None:
    if given is None:
        return None
    return (given,) if isinstance(given, str | type) else tuple(given)


def _is_glob(selector: str) -> bool:
    return any(c in selector for c in "*?[")


def _fits(selector: Selector, layer: Layer) -> bool:
    if isinstance(selector, type):
        return isinstance(layer.module, selector)
    # A plain name also means everything below it, as a module path does.
    return fnmatchcase(layer.name, selector) or layer.name.startswith(selector + ".")


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2's linear), without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module of the model holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _too_small(layer: Layer, spec: Spec) -> bool:
    out_features, in_features = layer.weight.shape
    return out_features < spec.v or in_features < spec.m
