"""The recipes' formulas and clocks."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.nn import functional as F

from vnm_compile import Spec, VNMError
from vnm_compile.format import matches
from vnm_compile.prune.project import project_together
from vnm_compile.train import SRSTE, FixedMask, MaskDecay, StructureDecay
from vnm_compile.train.clock import Clock
from vnm_compile.train.pattern import Pattern

SPEC = Spec(16, 2, 8)
SHARES = (0.0, 0.1, 0.5, 0.999, 1.0)


def gradient(recipe, weight, mask, share, x):
    """What a weight gets from the loss `(x @ masked.T).sin().sum()`."""
    weight = weight.clone().requires_grad_()
    masked = recipe.masked(weight, mask, torch.tensor(recipe.dial(share)))
    F.linear(x, masked).sin().sum().backward()
    return masked.detach(), weight.grad


def given():
    weight, x = torch.randn(32, 24, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    return weight, Pattern.of(SPEC).mask(weight.abs()), x


def of_product(masked, x):
    """The gradient of the loss for the masked weight itself."""
    masked = masked.clone().requires_grad_()
    F.linear(x, masked).sin().sum().backward()
    return masked.grad


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("decay", ["linear", "exponential"])
def test_mask_decay(decay, share):
    weight, mask, x = given()
    expected = {"linear": 1 - share, "exponential": 0.01**share}[decay] if share < 1 else 0.0
    for grad in ("scaled", "ste"):
        recipe = MaskDecay(decay=decay, grad=grad)
        assert recipe.dial(share) == pytest.approx(expected)
        masked, found = gradient(recipe, weight, mask, share, x)
        factor = mask + torch.tensor(recipe.dial(share)).double() * ~mask
        assert torch.equal(masked, weight * factor)
        inner = of_product(masked, x)
        torch.testing.assert_close(found, inner * factor if grad == "scaled" else inner)
        if share == 1:
            assert matches(masked, SPEC), "hard at the end, to the bit"


@pytest.mark.parametrize("grad", ["scaled", "ste"])
def test_structure_decay_masks_hard_in_every_frame(grad):
    weight, mask, x = given()
    masked, found = gradient(StructureDecay(grad=grad), weight, mask, 0.5, x)
    assert torch.equal(masked, weight * mask)
    inner = of_product(masked, x)
    torch.testing.assert_close(found, inner * mask if grad == "scaled" else inner)


def test_frames():
    def names(recipe, spec):
        return [str(each) for each in recipe.patterns(Spec.parse(spec))]

    assert names(StructureDecay(), "64:2:8") == ["64:(7 of 7):8", "64:4:8", "64:3:8", "64:2:8"]
    assert names(StructureDecay(), "16:1:16")[:3] == ["16:(15 of 15):16", "16:(8 of 8):16", "16:4:16"]
    assert names(StructureDecay(), "1:2:4") == ["1:3:4", "1:2:4"]
    assert names(StructureDecay(), "8:2:5") == ["8:4:5", "8:3:5", "8:2:5"]
    geometric = StructureDecay(kind="geometric").patterns(SPEC)
    assert [(each.columns, each.n, each.m) for each in geometric] == [(32, 16, 64), (16, 8, 32), (8, 4, 16), (4, 2, 8)]
    assert {each.density for each in geometric} == {0.25}
    grown = StructureDecay(grow_v=True).patterns(Spec(64, 2, 8))
    assert [each.v for each in grown] == [1, 2, 4, 8, 16, 32, 64]
    assert grown[-1] == Pattern.of(Spec(64, 2, 8))
    assert [each.v for each in StructureDecay(grow_v=True).patterns(Spec(1, 2, 8))] == [1] * 4


@pytest.mark.parametrize("kind", ["stepwise", "geometric"])
@pytest.mark.parametrize("grow_v", [False, True])
@pytest.mark.parametrize("spec", ["64:2:8", "16:1:16", "1:2:4", "48:2:5", "32:2:32"])
def test_masks_of_every_frame_keep_what_they_say(spec, grow_v, kind):
    """On odd shapes: as many values a row and group, in as many columns a block."""
    spec, scores = Spec.parse(spec), torch.rand(100, 130)
    for pattern in StructureDecay(kind=kind, grow_v=grow_v).patterns(spec):
        mask = pattern.mask(scores)
        whole = mask[:, : 130 // pattern.m * pattern.m].unflatten(1, (-1, pattern.m))
        assert (whole.sum(-1) == pattern.n).all()
        for block in whole.split(pattern.v):
            assert (block.any(0).sum(-1) <= pattern.columns).all()
    assert matches(scores * mask, spec)


@pytest.mark.parametrize(
    "pattern", [Pattern(16, 4, 2, 8), Pattern(1, 4, 2, 4), Pattern(8, 5, 5, 8), Pattern(64, 4, 3, 20)]
)
def test_many_weights_at_once_get_the_masks_that_each_would_get(pattern, monkeypatch):
    weights = [torch.randn(o, k).abs() for o, k in ((64, 128), (33, 17), (8, 8), (1, 1), (130, 260), (64, 128))]
    each = [pattern.mask(weight) for weight in weights]
    for most in (1, 5000, 1 << 22):  # alone, by neighbours, all
        monkeypatch.setattr(sys.modules[project_together.__module__], "CHUNK_ELEMENTS", most)
        together = pattern.masks(weights)
        assert all(torch.equal(ours, alone) for ours, alone in zip(together, each, strict=True))
        assert all(mask.is_contiguous() for mask in together)
    assert pattern.masks([]) == []


def test_whole_columns_are_those_with_the_largest_sums():
    scores = torch.rand(32, 16)
    mask = Pattern(16, 5, 5, 8).mask(scores)
    sums = scores.view(2, 16, 2, 8).sum(1)
    expected = torch.zeros(2, 2, 8, dtype=torch.bool).scatter_(2, sums.topk(5).indices, True)
    assert torch.equal(mask.view(2, 16, 2, 8), expected.unsqueeze(1).expand(-1, 16, -1, -1))


def test_sr_ste():
    weight, mask, x = given()
    recipe = SRSTE(decay=0.5)
    masked, found = gradient(recipe, weight, mask, 0.3, x)
    assert torch.equal(masked, weight * mask)
    torch.testing.assert_close(found, of_product(masked, x) + 0.5 * ~mask * weight)
    recipe = SRSTE(decay=0.5, decoupled=True)
    _, found = gradient(recipe, weight, mask, 0.3, x)
    torch.testing.assert_close(found, of_product(masked, x))
    changed = weight.clone()
    recipe.after_step(changed, mask, torch.tensor(recipe.dial(0.3)), lr=0.1)
    torch.testing.assert_close(changed, weight - 0.1 * 0.5 * ~mask * weight)
    assert [SRSTE(decay=2.0, ramp=0.5).dial(share) for share in (0, 0.25, 0.5, 0.9, 1)] == [0, 1, 2, 2, 0]


def test_sr_ste_in_other_modes():
    """Forward mode, and gradients of each sample, as `torch.func.jvp` and `vmap` of `grad` ask for them."""
    weight, mask, x = given()
    recipe, dial = SRSTE(decay=0.5), torch.tensor(0.5)
    tangent = torch.randn_like(weight)
    masked, moved = torch.func.jvp(lambda w: recipe.masked(w, mask, dial), (weight,), (tangent,))
    assert torch.equal(masked, weight * mask)
    assert torch.equal(moved, tangent)

    def loss(weight, row):
        return F.linear(row, recipe.masked(weight, mask, dial)).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    for row, found in zip(x, each, strict=True):
        torch.testing.assert_close(found, torch.func.grad(loss)(weight, row))


def test_the_clock():
    clock = Clock.of(MaskDecay(dense=0.1, fixed=0.2, every=7), 100, [SPEC])
    assert (clock.first, clock.last) == (10, 80)
    assert [clock.share(step) for step in (0, 10, 45, 80, 100)] == [0, 0, 0.5, 1, 1]
    due = [step for step in range(101) if clock.recomputes(step, SPEC)]
    assert due == [*range(10, 80, 7), 80]
    assert not clock.masks(9)
    assert clock.final(80)
    frames = Clock.of(StructureDecay(fixed=0.0, every=1000), 40, [SPEC])
    assert [step for step in range(41) if frames.recomputes(step, SPEC)] == [0, 10, 20, 30, 40]


def test_it_never_ends_without_the_final_mask():
    """Whatever the shares: beta 0, the final pattern, and a mask computed for it."""
    for recipe in (MaskDecay(decay="linear"), MaskDecay(), StructureDecay(kind="geometric"), SRSTE()):
        for steps in (7, 100, 1001):
            clock = Clock.of(recipe, steps, [SPEC])
            assert recipe.dial(clock.share(clock.last)) == 0
            assert recipe.pattern(SPEC, clock.share(clock.last)) == Pattern.of(SPEC)
            assert clock.recomputes(clock.last, SPEC)
    fixed = Clock.of(FixedMask(), 100, [SPEC])
    assert [step for step in range(101) if fixed.recomputes(step, SPEC)] == [0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MaskDecay(dense=0.5, fixed=0.5),
        lambda: MaskDecay(dense=-0.1),
        lambda: FixedMask(dense=0.1),
        lambda: MaskDecay(fixed=math.nan),
        lambda: MaskDecay(dense="some"),
        lambda: MaskDecay(every=0),
        lambda: MaskDecay(every=2.5),
        lambda: MaskDecay(decay="cosine"),
        lambda: MaskDecay(grad="none"),
        lambda: MaskDecay(floor=0.0),
        lambda: MaskDecay(floor=1.5),
        lambda: StructureDecay(kind="densify"),
        lambda: SRSTE(decay=-1),
        lambda: SRSTE(decay=math.inf),
        lambda: SRSTE(ramp=2),
        lambda: Clock.of(StructureDecay(), 3, [SPEC]),
        lambda: Clock.of(MaskDecay(dense=0.5, fixed=0.4), 2, [SPEC]),
        lambda: Clock.of(MaskDecay(), 0, [SPEC]),
        lambda: Clock.of(MaskDecay(), 2.0, [SPEC]),
    ],
)
def test_bad_recipes(make):
    with pytest.raises(VNMError):
        make()
