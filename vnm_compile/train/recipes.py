"""How masks come about while a model trains: a recipe each, its clock and its formulas.

A recipe is asked with the share of its masked phase that has passed, from 0 (the first masked step) to 1 (masks are
final). It keeps no state, so a run that is taken up again anywhere goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from vnm_compile.errors import BadOption
from vnm_compile.spec import KEPT_COLUMNS, Spec
from vnm_compile.train.pattern import Pattern

_GRADS = ("scaled", "ste")


@dataclass(frozen=True)
class Recipe:
    """What all recipes have; the masked weight is the product of the weight and a fixed mask.

    The steps of a run are, in order: dense ones, without masks; masked ones, in which masks are recomputed and the
    recipe tightens; and fixed ones, in which the final masks stay and what they keep settles.

    Attributes:
        dense, fixed: the shares of the steps that the first and the last phase take.
        every: optimizer steps from one recomputation of the masks to the next. Where the recipe goes from one pattern
            to another, masks are recomputed in any case.
    """

    dense: float = 0.0
    fixed: float = 0.1
    every: int = 10

    def __post_init__(self) -> None:
        for name in ("dense", "fixed"):
            share = getattr(self, name)
            if not isinstance(share, int | float) or not 0 <= share < 1:
                raise BadOption(f"{self._called()}: {name}={share!r} is a share of the steps, from 0 to below 1.")
        if self.dense + self.fixed >= 1:
            raise BadOption(
                f"{self._called()}: dense={self.dense} and fixed={self.fixed} leave no steps in which masks come about."
            )
        if type(self.every) is not int or self.every < 1:
            raise BadOption(f"{self._called()}: every={self.every!r} is a number of steps, from 1 on.")

    def _called(self) -> str:
        return type(self).__name__

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise BadOption(f"{self._called()}: {name}={getattr(self, name)!r}; there are {', '.join(known)}.")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise BadOption(f"{self._called()}: {name}={value!r}; it is a positive number.")

    def options(self) -> dict[str, object]:
        """The recipe as plain data, by which two runs are told apart."""
        return {"recipe": self._called(), **{each.name: getattr(self, each.name) for each in fields(self)}}

    def pattern(self, spec: Spec, share: float) -> Pattern:
        """The pattern of a layer that is to follow `spec`; at share 1 it is `spec`."""
        return Pattern.of(spec)

    def frames(self, spec: Spec) -> int:
        """How many patterns a layer passes through: as many masked steps are the least."""
        return 1

    def dial(self, share: float) -> float:
        """The one number that changes with the share: `masked` and `decay` read it. At share 1 it is 0."""
        return 0.0

    def masks(self, weights: Sequence[Tensor], pattern: Pattern) -> list[Tensor]:
        """The masks of weights `[O, K]` without NaN, of one dtype and device: the largest magnitudes."""
        return pattern.masks([each.abs() for each in weights])

    def masked(self, weight: Tensor, mask: Tensor, dial: Tensor) -> Tensor:
        """The weight that the model multiplies by, differentiable in `weight`.

        Args:
            weight: what is trained.
            mask: of its shape, bool.
            dial: `dial(share)` in a tensor, so that a new number does not recompile a graph.
        """
        return torch.where(mask, weight, 0)

    @property
    def keeps_zeros(self) -> bool:
        """Whether masks are the zeros of a model that was pruned before."""
        return False

    @property
    def needs_optimizer(self) -> bool:
        """Whether something is done to the weights after each optimizer step: `after_step`."""
        return False

    def after_step(self, weight: Tensor, mask: Tensor, dial: Tensor, lr: float) -> None:
        """Change the weight in place after an optimizer's step of learning rate `lr`."""


@dataclass(frozen=True)
class FixedMask(Recipe):
    """The masks of a model that is pruned already, by whatever method: zeros stay zeros. The plain baseline.

    The patterns are looked for in the weights' zeros, so a model comes from `vnm.sparsify` or is pruned otherwise.
    """

    fixed: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense:
            raise BadOption(f"{self._called()}: dense={self.dense} would train the zeros away that it is to keep.")

    @property
    def keeps_zeros(self) -> bool:
        """Always."""
        return True

    def masks(self, weights: Sequence[Tensor], pattern: Pattern) -> list[Tensor]:
        """Where values stand; no place is filled up that the pattern would allow."""
        return [each != 0 for each in weights]


@dataclass(frozen=True)
class ThreeStagedLoRA(Recipe):
    """Three-staged LoRA, arXiv 2410.16135: adapters train without masks, then with masks of `W + BA` that are
    recomputed, then with fixed ones; the weight is `(W + BA) * mask`. The first two stages take a tenth of the steps.

    For models with peft's LoRA layers. Every other recipe takes these, too, but those that write weights.
    """

    dense: float = 0.05
    fixed: float = 0.9
    every: int = 5


@dataclass(frozen=True)
class MaskDecay(Recipe):
    """Pruning mask decay: weights outside of the mask fade, and what they pass back with them.

    The weight is `w * (mask + dial * (1 - mask))`. From arXiv 2209.07617 (linear, `grad="scaled"`) and 2402.04744
    (linear or exponential, `grad="ste"`), which name it MdGf. Both leave the last bit of the way to a flag of the
    caller; here the dial is exactly 0 from the first fixed step on.

    Attributes:
        decay: "linear", or "exponential" down to `floor` and then 0.
        floor: what the exponential decay comes down to.
        grad: "scaled" (the gradient of a fading weight fades too), or "ste" (straight through: it does not).
    """

    decay: Literal["linear", "exponential"] = "exponential"
    floor: float = 0.01
    grad: Literal["scaled", "ste"] = "scaled"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("decay", ("linear", "exponential"))
        self._one_of("grad", _GRADS)
        self._positive("floor")
        if self.floor >= 1:
            raise BadOption(f"{self._called()}: floor={self.floor!r}; it lies between 0 and 1.")

    def dial(self, share: float) -> float:
        """What a weight outside of the mask still counts: linear or exponential in the share, 0 from 1 on."""
        if share >= 1:
            return 0.0
        return 1 - share if self.decay == "linear" else self.floor**share

    def masked(self, weight: Tensor, mask: Tensor, dial: Tensor) -> Tensor:
        """`w * (mask + dial * (1 - mask))`, and either gradient."""
        faded = weight * torch.where(mask, 1.0, dial.to(weight.dtype))
        return faded if self.grad == "scaled" else _straight_through(faded, weight)


@dataclass(frozen=True)
class StructureDecay(Recipe):
    """Sparse structure decay: the pattern tightens over frames of equal length, with a hard mask in each.

    From arXiv 2402.04744 (SdGf), carried to V:N:M. *stepwise*: first whole columns of a block go, M-1, M/2, M/4 and so
    on down to 4, then in each row values of those 4, down to N. *geometric*: the density is that of the goal from the
    start, in blocks that are 8, 4, 2 and 1 times as wide: 4 * 2^k columns of M * 2^k, N * 2^k in each row.

    Attributes:
        kind: "stepwise" or "geometric".
        grow_v: let V grow, too: blocks of 1 row in the first frame, and of twice as many rows in each, so that the
            last of these is V.
        grad: "ste" (the papers': weights outside of the mask get the gradient as if inside, and may come back), or
            "scaled" (they get none, and come back only where masks loosen).
    """

    kind: Literal["stepwise", "geometric"] = "stepwise"
    grow_v: bool = False
    grad: Literal["scaled", "ste"] = "ste"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("kind", ("stepwise", "geometric"))
        self._one_of("grad", _GRADS)

    def patterns(self, spec: Spec) -> list[Pattern]:
        """The patterns of all frames, in order; the last is that of `spec`."""
        shapes = _stepwise(spec) if self.kind == "stepwise" else _geometric(spec)
        heights = [spec.v] * len(shapes)
        if self.grow_v:
            doublings = [1]
            while doublings[-1] * 2 < spec.v:
                doublings.append(doublings[-1] * 2)
            doublings = doublings if spec.v == 1 else [*doublings, spec.v]
            # As many frames as the longer of the two has; both end in their last.
            count = max(len(shapes), len(doublings))
            shapes = [shapes[i * len(shapes) // count] for i in range(count)]
            heights = [doublings[i * len(doublings) // count] for i in range(count)]
            heights[-1] = spec.v
        return [Pattern(v, *shape) for v, shape in zip(heights, shapes, strict=True)]

    def frames(self, spec: Spec) -> int:
        """The patterns of `patterns`."""
        return len(self.patterns(spec))

    def pattern(self, spec: Spec, share: float) -> Pattern:
        """That of the frame."""
        patterns = self.patterns(spec)
        return patterns[min(int(share * len(patterns)), len(patterns) - 1)]

    def masked(self, weight: Tensor, mask: Tensor, dial: Tensor) -> Tensor:
        """`w * mask`, and either gradient."""
        kept = torch.where(mask, weight, 0)
        return kept if self.grad == "scaled" else _straight_through(kept, weight)


@dataclass(frozen=True)
class SRSTE(Recipe):
    """Sparse-refined straight-through estimator, arXiv 2102.04010: `w * mask` forward, the gradient straight through,
    and what lies outside of the mask is pulled to zero: `gradient + decay * (1 - mask) * w`.

    Attributes:
        decay: the paper's lambda.
        decoupled: subtract `lr * decay * (1 - mask) * w` after the optimizer's step instead of adding to the gradient,
            whose moments it would be mixed into: for Adam and AdamW. Needs `begin(..., optimizer=...)`.
        ramp: share of the masked phase over which `decay` grows from 0 (as in AST, arXiv 2407.20584); 0 for none.
    """

    decay: float = 2e-4
    decoupled: bool = False
    ramp: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("decay")
        if not isinstance(self.ramp, int | float) or not 0 <= self.ramp <= 1:
            raise BadOption(f"{self._called()}: ramp={self.ramp!r} is a share of the masked phase, from 0 to 1.")

    def dial(self, share: float) -> float:
        """The decay at a share of the masked phase; none where masks are final, since what they leave out is gone."""
        if share >= 1:
            return 0.0
        return self.decay * min(1.0, share / self.ramp) if self.ramp else self.decay

    def masked(self, weight: Tensor, mask: Tensor, dial: Tensor) -> Tensor:
        """`w * mask`, whose gradient has the decay in it unless that is decoupled."""
        if self.decoupled:
            return _straight_through(torch.where(mask, weight, 0), weight)
        return _Refined.apply(weight, mask, dial)  # type: ignore[no-any-return]

    @property
    def needs_optimizer(self) -> bool:
        """Decoupled, the decay follows the optimizer's learning rate."""
        return self.decoupled

    def after_step(self, weight: Tensor, mask: Tensor, dial: Tensor, lr: float) -> None:
        """`w -= lr * decay * (1 - mask) * w`."""
        weight.mul_(torch.where(mask, 1.0, 1 - lr * dial.to(weight.dtype)))


class _Refined(torch.autograd.Function):
    """`w * mask`, whose gradient is that of the product and `dial * (1 - mask) * w`, whatever the loss."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, dial: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return tangent.clone()  # straight through; the decay is no derivative of anything

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight, mask, dial = ctx.saved_tensors
        return grad + dial.to(weight.dtype) * torch.where(mask, 0, weight), None, None


def _straight_through(value: Tensor, weight: Tensor) -> Tensor:
    """`value`, to the bit, with the gradient of `weight`."""
    return value.detach() + (weight - weight.detach())


def _stepwise(spec: Spec) -> list[tuple[int, int, int]]:
    """(columns, n, m) of the frames: halving columns down to 4, then one value of a row less each."""
    columns = [spec.m - 1] if spec.m - 1 > KEPT_COLUMNS else []
    width = spec.m // 2
    while width > KEPT_COLUMNS:
        columns.append(width)
        width //= 2
    whole = [(each, each, spec.m) for each in dict.fromkeys([*columns, KEPT_COLUMNS]) if each < spec.m]
    inside = [(KEPT_COLUMNS, n, spec.m) for n in range(KEPT_COLUMNS - 1, spec.n - 1, -1)]
    return [*whole, *inside]


def _geometric(spec: Spec) -> list[tuple[int, int, int]]:
    """(columns, n, m) of the frames: 8, 4, 2 and 1 times as wide."""
    return [(KEPT_COLUMNS << k, spec.n << k, spec.m << k) for k in (3, 2, 1, 0)]
