"""Which layers of a model are meant to be V:N:M, and with which pattern.

An annotation is stored on the layer itself and registered by it, so that the backend, which sees weights and no
modules, finds the pattern of a weight. It survives `copy.deepcopy`, pickling, `.to()`, and a new weight Parameter.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from vnm_compile.checks import check_usable, why_unusable
from vnm_compile.errors import BadOption, NothingSelected, UnsupportedWeight, VNMError, at_layer
from vnm_compile.layers import Layer, linear_layers, plain_name, shared_weights
from vnm_compile.session import session
from vnm_compile.spec import Spec

Selector = str | type[nn.Module]
"""A layer name, a glob over names (`"*.mlp.*"`), or a module class."""

ANY_SIZE = Spec(1, 1, 4)
"""For `select_layers`, where patterns are chosen later: hardly a layer is smaller than a block of it."""

_ATTRIBUTE = "_vnm_annotation"
_ADAPTER = re.compile(r"(^|_)lora(_|$)", re.IGNORECASE)
_annotated: weakref.WeakSet[nn.Module] = session.keep("annotations", weakref.WeakSet(), lasting=True)


class Annotation:
    """The pattern of one layer, and the name that the layer had in the annotated model."""

    def __init__(self, owner: nn.Module, spec: Spec, name: str) -> None:
        self.__setstate__({"owner": owner, "spec": spec, "name": name})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.spec: Spec = state["spec"]
        self.name: str = state["name"]
        self._owner = weakref.ref(state["owner"])
        _annotated.add(state["owner"])

    @property
    def evaluates(self) -> bool:
        """Whether the layer is in evaluation mode (`model.eval()`)."""
        owner = self._owner()
        return owner is not None and not owner.training

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self._owner(), "spec": self.spec, "name": self.name}

    def __deepcopy__(self, memo: dict[int, Any]) -> Annotation:
        owner = self._owner()
        assert owner is not None, "an annotation is copied with the layer that holds it"
        # deepcopy enters the copy of a module in the memo before it copies what the module holds.
        return Annotation(memo.get(id(owner), owner), self.spec, self.name)


def select_layers(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None],
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> list[tuple[Layer, Spec]]:
    """Return the layers that `annotate` and `sparsify` mean by these arguments, with the pattern of each.

    Left out unless `include` or a key of `spec` names them: the model's output head, layers smaller than one block of
    the pattern, and low-rank adapters (which a selector has to mean: `"*.lora_A.*"`, not `"*"`). A weight that is
    shared with another module (tied embeddings) is never taken.

    Args:
        spec: one pattern, or a pattern per selector; the first selector that fits a layer counts, None leaves the
            layer dense.
        include: selectors of the layers to take; all when None.
        exclude: selectors of layers to leave out; wins over `include`.

    Raises:
        VNMError: a selector fits no layer of the model or is the name of one whose weight is shared, `spec` or
            `include` is empty, or a pattern cannot be read.
    """
    layers = list(linear_layers(model))
    rules = _rules(spec)
    specs = {key: None if rule is None else Spec.parse(rule) for key, rule in rules.items()}
    wanted, unwanted = _selectors("include", include), _selectors("exclude", exclude)
    if wanted == ():
        raise NothingSelected("include is empty and names no layer; leave it out to take all layers.")
    unused = {*rules, *(wanted or ()), *(unwanted or ())}
    every = frozenset(unused)
    shared, head, adapters = shared_weights(model), _inside(_output_head(model)), _adapters(model)
    selected: list[tuple[Layer, Spec]] = []
    for layer in layers:
        fitting = {selector for selector in every if _fits(selector, layer)}
        unused -= fitting
        chosen = next((specs[key] for key in rules if key in fitting), None)
        if chosen is None or fitting & set(unwanted or ()) or (wanted is not None and not fitting & set(wanted)):
            continue
        others = shared.get(id(layer.module._parameters.get("weight")))
        if others and layer.name in fitting:
            raise _shared_error(layer, others)
        if others or (layer.module in adapters and not any(_means_adapters(each, layer) for each in fitting)):
            continue
        named = wanted is not None or any(isinstance(s, str) and not _is_glob(s) for s in fitting)
        if named or not (layer.module in head or _too_small(layer, chosen)):
            selected.append((layer, chosen))
    if unused and not layers:
        raise NothingSelected("the model has no linear layer (nn.Linear, or Conv1D of transformers).")
    if unused:
        shown = ", ".join(sorted(s if isinstance(s, str) else s.__name__ for s in unused))
        raise NothingSelected(f"no linear layer of the model fits {shown}; vnm.explain(model) lists their names.")
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
        VNMError: as `select_layers`; nothing is left to annotate; or a layer's weight is none that can be handled
            (see `vnm_compile.checks`). No layer is annotated then.

    >>> annotate(nn.Sequential(nn.Linear(64, 64)), "64:2:8")
    ['0']
    """
    selected = select_layers(model, spec, include, exclude)
    if not selected:
        raise _nothing_selected(model, spec)
    check_usable((layer for layer, _ in selected), values=False)
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


def _rules(
    spec: Spec | str | Mapping[Selector, Spec | str | None],
) -> dict[Selector, Spec | str | None]:
    if not isinstance(spec, Mapping):
        return {"*": Spec.parse(spec)}
    if not spec:
        raise BadOption('no pattern is given: the mapping is empty; write {"*.mlp.*": "64:2:8"}, for example.')
    return dict(zip(_selectors("a key of spec", spec) or (), spec.values(), strict=True))


def _selectors(what: str, given: Iterable[Selector] | Selector | None) -> tuple[Selector, ...] | None:
    if given is None:
        return None
    several = (given,) if isinstance(given, str | type) or not isinstance(given, Iterable) else tuple(given)
    for each in several:
        if not isinstance(each, str | type):
            raise BadOption(f"{what} is {each!r}; a selector is a layer name, a glob such as '*.mlp.*', or a class.")
    return tuple(plain_name(each) if isinstance(each, str) else each for each in several)


def _is_glob(selector: str) -> bool:
    return any(c in selector for c in "*?[")


def _fits(selector: Selector, layer: Layer) -> bool:
    if isinstance(selector, type):
        return isinstance(layer.module, selector)
    # A plain name also means everything below it, as a module path does.
    return fnmatchcase(layer.name, selector) or layer.name.startswith(selector + ".")


def _shared_error(layer: Layer, places: Sequence[str]) -> VNMError:
    others = ", ".join(name for name in places if name != f"{layer.name}.weight".lstrip("."))
    return at_layer(
        layer.name,
        f"its weight is also {others}, which would change with it. Untie it first (layer.weight = "
        "nn.Parameter(layer.weight.detach().clone()); in transformers also config.tie_word_embeddings = False), "
        "or leave this layer out.",
        UnsupportedWeight,
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a base model without one
        return None


def _inside(module: nn.Module | None) -> set[nn.Module]:
    return set(module.modules()) if isinstance(module, nn.Module) else set()


def _adapters(model: nn.Module) -> set[nn.Module]:
    """The modules that belong to low-rank adapters: those that a peft layer lists as such, or that are named so."""
    found: set[nn.Module] = set()
    for name, module in model.named_modules():
        if any(_ADAPTER.search(part) for part in name.split(".")):
            found |= _inside(module)
        for attribute in getattr(type(module), "adapter_layer_names", ()):
            found |= _inside(getattr(module, attribute, None))
    return found


def _means_adapters(selector: Selector, layer: Layer) -> bool:
    """Whether a selector asks for an adapter's layers, where `"*"` or a class only happens to fit them."""
    if isinstance(selector, type):
        return False
    return selector == layer.name or any(_ADAPTER.search(part) for part in selector.split("."))


def _too_small(layer: Layer, spec: Spec) -> bool:
    if why_unusable(layer, values=False) is not None:
        # What is wrong with it is said by whoever needs the weight; a layer of no size needs no saying.
        weight = layer.module._parameters.get("weight")
        return weight is not None and not nn.parameter.is_lazy(weight) and weight.dim() == 2 and weight.numel() == 0
    return not spec.fits(*layer.weight.shape)


def _nothing_selected(model: nn.Module, spec: object) -> VNMError:
    count = sum(1 for _ in linear_layers(model))
    shown = ", ".join(map(str, spec.values())) if isinstance(spec, Mapping) else str(spec)
    return NothingSelected(
        f"no linear layer (of {count}) is left to annotate with {shown}: output heads, tied weights, adapters and "
        "layers smaller than one block (V rows, M columns) are left out. Choose a smaller V or M, or name the layers: "
        "include=[...]."
    )
