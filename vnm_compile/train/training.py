"""`vnm.train.begin`: masks on a model's layers, and the clock that moves them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.annotate import ANY_SIZE, Selector, select_layers
from vnm_compile.checks import check_usable
from vnm_compile.errors import BadOption, BadScores, NothingSelected, UnsupportedWeight, VNMError, at_layer
from vnm_compile.format import check_pattern, detect
from vnm_compile.layers import Layer, check_module
from vnm_compile.spec import Spec
from vnm_compile.train.adapters import adapted_layers, check_adapter, put_adapter_mask
from vnm_compile.train.clock import Clock
from vnm_compile.train.finalize import finalize
from vnm_compile.train.masked import MaskedLayer, guard_loading, masked_layers, put_mask, unguard_loading
from vnm_compile.train.recipes import FixedMask, MaskDecay, Recipe, ThreeStagedLoRA


def begin(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None] | None,
    recipe: Recipe | None = None,
    steps: int | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> Training:
    """Put masks on the linears of `model` that tighten while it trains.

    The masks are parametrizations (`torch.nn.utils.parametrize`): parameters stay the same objects, so the optimizer
    may exist already; the forward pass multiplies by masked weights, and `state_dict` holds weights and masks.

    Args:
        model: its selected layers get masks, in place; on an error none does.
        spec: the goal, one pattern or one per selector, as for `vnm.annotate`; None with `FixedMask` takes the patterns
            that the weights follow.
        recipe: how masks come about; unless given, `ThreeStagedLoRA()` for a model with peft's LoRA layers, else
            `MaskDecay()`.
        steps: optimizer steps of the whole run; may be given later, to `Training.start`.
        optimizer: whose steps are counted from then on without a call to `Training.step`; also one that accelerate has
            wrapped. Steps that are left out (gradient accumulation, a loss scaler that skips) do not count.
        include, exclude: which linears, as for `vnm.annotate`. In a model with LoRA layers those are taken, not linears
            that are frozen and have no adapter, unless they are named.

    Returns:
        What is called `step` after each optimizer step, and `finalize` at the end.

    Raises:
        VNMError: no layer is selected, a weight cannot be trained so (compressed, tied, computed, no floats, frozen),
            holds NaN, or the steps are too few for the recipe.
    """
    check_module(model)
    adapted = adapted_layers(model)
    recipe = (ThreeStagedLoRA() if adapted else MaskDecay()) if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise BadOption(f"recipe is a {type(recipe).__name__}; give one such as vnm.train.MaskDecay().")
    chosen = _chosen(model, spec, recipe, include, exclude, adapted)
    for layer, layer_spec in chosen:
        if layer.module in adapted:
            put_adapter_mask(adapted[layer.module][1], layer, layer_spec, recipe)
        else:
            put_mask(layer, layer_spec, recipe)
    training = Training(model, recipe)
    added = {layer.module for layer, _ in chosen} | {
        adapted[layer.module][1] for layer, _ in chosen if layer.module in adapted
    }
    guard_loading(model)
    try:
        if steps is not None:
            training.start(steps, optimizer=optimizer)
        elif optimizer is not None:
            training.follow(optimizer)
    except BaseException:
        for each in masked_layers(model):
            if each.module in added:
                each.undo(model)
        unguard_loading(model)
        raise
    return training


class Training:
    """A model on its way into a pattern.

    Attributes:
        recipe: how masks come about.
        steps: optimizer steps of the run; None until it is started.
        step_number: optimizer steps that were made.
        flips: share of the masks' places that the last recomputation changed.
        mask_seconds: seconds spent on masks so far.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self.step_number, self.flips, self.mask_seconds = 0, 0.0, 0.0
        self._model = model
        self._layers = masked_layers(model)
        self._clock: Clock | None = None
        self._began = time.perf_counter()
        self._hook: Any = None

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None until it is started."""
        return self._clock.steps if self._clock else None

    def start(self, steps: int, step: int = 0, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set the clock: the run has `steps` optimizer steps, of which `step` are made.

        At step 0 the first masks are computed. Later, as where a checkpoint was loaded, masks stay as they are.

        Raises:
            VNMError: the steps are too few for the recipe, or a weight holds NaN.
        """
        clock = Clock.of(self.recipe, steps, [layer.masked.spec for layer in self._layers])
        if self.recipe.needs_optimizer and optimizer is None and self._hook is None:
            raise BadOption(f"{type(self.recipe).__name__} acts after the optimizer's steps; give optimizer=.")
        if type(step) is not int or not 0 <= step <= steps:
            raise BadOption(f"step={step!r}: the run has {steps} steps.")
        self._clock, self.step_number, self._began = clock, step, time.perf_counter()
        if step == 0:
            self._move()
        else:
            self._turn()
        if optimizer is not None:
            self.follow(optimizer)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the steps of an optimizer; `step` need not be called any more."""
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not hasattr(inner, "register_step_post_hook"):
            raise BadOption(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer.")
        self.unfollow()
        # It keeps this alive: a user who has given the optimizer need not keep what `begin` returned.
        self._hook = inner.register_step_post_hook(lambda optimizer, *_: self.step(optimizer))

    def unfollow(self) -> None:
        """Count no optimizer's steps any more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Move on by one optimizer step: recompute masks where it is time, and turn the recipe's dial.

        Raises:
            VNMError: the clock was not set, or a weight holds NaN. Nothing is changed then.
        """
        if self._clock is None:
            raise BadOption("the run was not started: give begin(..., steps=...), or call start(steps).")
        if optimizer is not None and self.recipe.needs_optimizer:
            self._after_step(optimizer)
        self.step_number += 1
        try:
            self._move()
        except BaseException:
            self.step_number -= 1
            raise

    @property
    def mask_share(self) -> float:
        """Share of the time since the start that went into masks."""
        return self.mask_seconds / max(1e-9, time.perf_counter() - self._began)

    def finalize(self) -> list[str]:
        """Make the weights exact and ordinary again; see `vnm.finalize`."""
        self.unfollow()
        return finalize(self._model)

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; weights and masks are in the model's own state dict."""
        return {"step": self.step_number, "steps": self.steps, **self.recipe.options()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run stopped; the model's state dict is loaded on its own.

        Raises:
            VNMError: that run had another recipe or length.
        """
        mine = {"steps": self.steps, **self.recipe.options()}
        theirs = {key: state.get(key) for key in mine if not (key == "steps" and mine[key] is None)}
        for key, value in theirs.items():
            if mine[key] != value:
                raise BadOption(f"the state is of a run with {key}={value!r}; this one has {mine[key]!r}.")
        self.start(state["steps"], state["step"])

    def __repr__(self) -> str:
        where = "not started" if self._clock is None else f"step {self.step_number} of {self.steps}"
        return (
            f"Training({self.recipe}, {len(self._layers)} layers, {where}, masks changed in {self.flips:.2%} of their "
            f"places, {self.mask_share:.1%} of the time)"
        )

    def _move(self) -> None:
        """Masks and dial for the step that comes."""
        clock, begin = self._clock, time.perf_counter()
        assert clock is not None
        step = self.step_number
        specs = {layer.masked.spec for layer in self._layers}
        moving = {spec for spec in specs if clock.recomputes(step, spec)}
        due = [layer for layer in self._layers if layer.masked.spec in moving]
        if clock.looks(step):
            for layer in self._layers:
                if layer not in due and layer.holds_nan():  # the others are looked at with their masks
                    raise _nan(layer)
        if due:
            share = clock.share(step)
            masks = _masks(due, self.recipe, share)  # all or none
            changed = sum(int((new != layer.masked.mask).sum()) for layer, new in masks)
            self.flips = changed / sum(new.numel() for _, new in masks)
            for layer, new in masks:
                layer.masked.mask.copy_(new)
        self._turn()
        self.mask_seconds += time.perf_counter() - begin

    def _turn(self) -> None:
        assert self._clock is not None
        dial = self.recipe.dial(self._clock.share(self.step_number)) if self._clock.masks(self.step_number) else 1.0
        final = self._clock.final(self.step_number)
        for layer in self._layers:  # always: a state dict may have been loaded
            layer.masked.dial.fill_(dial)
            layer.masked.final.fill_(final)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
        if self._clock is None or not self._clock.masks(self.step_number):
            return
        for layer in self._layers:
            weight, masked = layer.parameter, layer.masked
            if weight is not None and id(weight) in rates:
                self.recipe.after_step(weight, masked.mask, masked.dial, float(rates[id(weight)]))


@torch.no_grad()
def _masks(layers: list[MaskedLayer], recipe: Recipe, share: float) -> list[tuple[MaskedLayer, Tensor]]:
    """The next masks as the layers store them."""
    alike: dict[Any, list[tuple[MaskedLayer, Tensor]]] = {}
    for layer in layers:
        weight = layer.masked.as_stored(layer.pruned() if recipe.keeps_zeros else layer.weight())
        if weight.isnan().any():
            raise _nan(layer)
        pattern = recipe.pattern(layer.masked.spec, share)
        alike.setdefault((pattern, weight.dtype, weight.device), []).append((layer, weight))
    masks = []
    for (pattern, *_), group in alike.items():
        found = recipe.masks([weight for _, weight in group], pattern)
        masks += [(layer, layer.masked.as_stored(mask)) for (layer, _), mask in zip(group, found, strict=True)]
    return masks


def _nan(layer: MaskedLayer) -> VNMError:
    return at_layer(layer.name, "its weight holds NaN, so there is no mask for it; has the loss become NaN?", BadScores)


def _chosen(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None] | None,
    recipe: Recipe,
    include: Iterable[Selector] | Selector | None,
    exclude: Iterable[Selector] | Selector | None,
    adapted: Mapping[nn.Module, tuple[str, nn.Module]],
) -> list[tuple[Layer, Spec]]:
    """The layers that get masks, and their goals, checked."""
    if spec is None and not isinstance(recipe, FixedMask):
        raise BadOption("spec is None: only FixedMask takes the patterns that weights follow already.")
    selected = select_layers(model, ANY_SIZE if spec is None else spec, include, exclude)
    if adapted and include is None:
        selected = [(layer, goal) for layer, goal in selected if layer.module in adapted or not _is_frozen(layer)]
    layers = [layer for layer, _ in selected]
    plain = [layer for layer in layers if layer.module not in adapted]
    check_usable(plain, written=True)
    check_usable(layer for layer in layers if layer.module in adapted)
    for layer in layers:
        if layer.module in adapted:
            check_adapter(*adapted[layer.module], layer, recipe)
    for layer in plain:
        if _is_frozen(layer):
            raise at_layer(
                layer.name,
                "its weight does not require gradients, and no LoRA layer trains it; unfreeze or exclude it.",
                UnsupportedWeight,
            )
    if isinstance(recipe, ThreeStagedLoRA) and len(plain) == len(layers):
        raise NothingSelected("ThreeStagedLoRA is for peft's LoRA layers; none of the chosen layers is one.")
    if spec is None:
        found = [(layer, detect(layer.weight.detach())) for layer in layers]
        selected = [(layer, each) for layer, each in found if each is not None]
    if not selected:
        raise NothingSelected("no layer is left to train into a pattern; name layers with include=, or give another V.")
    if isinstance(recipe, FixedMask):
        for layer, goal in selected:
            check_pattern(layer.weight.detach(), goal, layer.name)
    return selected


def _is_frozen(layer: Layer) -> bool:
    return layer.stored is not None and not layer.stored.requires_grad
