"""Models on their way into the pattern: masks, optimizers, checkpoints, the end, and what goes wrong."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F

import vnm_compile as vnm
from vnm_compile import train
from vnm_compile.errors import BadOption, BadScores, NothingSelected, UnfinishedTraining, UnsupportedWeight
from vnm_compile.train.masked import masked_layers

SPEC = "16:2:8"
RECIPES = {
    "linear, scaled": train.MaskDecay(decay="linear", every=3),
    "exponential, ste": train.MaskDecay(grad="ste", dense=0.2, every=1),
    "stepwise": train.StructureDecay(every=5),
    "geometric": train.StructureDecay(kind="geometric", grad="scaled", every=5),
    "growing V": train.StructureDecay(grow_v=True),
    "SR-STE": train.SRSTE(decay=0.01, every=2),
    "SR-STE, decoupled": train.SRSTE(decay=0.1, decoupled=True, ramp=0.5),
}
STEPS = 20


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 32))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 24, generator=generator), torch.randn(8, 32, generator=generator)) for _ in range(count)]


def loss_of(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def run(net, optimizer, data, training=None):
    for batch in data:
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        if training is not None:
            training.step()


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_ends_in_exact_weights_that_run_sparse(name):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    parameters = {id(each) for each in net.parameters()}
    training = train.begin(net, SPEC, RECIPES[name], STEPS, optimizer=optimizer)
    assert {id(each) for each in net.parameters()} == parameters, "the optimizer's parameters are still the model's"
    first = loss_of(net, batches(1)[0]).item()
    run(net, optimizer, batches(1) * STEPS)
    assert training.step_number == STEPS
    assert loss_of(net, batches(1)[0]).item() < first
    assert vnm.finalize(net) == ["0", "2"]
    assert {id(each) for each in net.parameters()} == parameters
    assert sorted(net.state_dict()) == sorted(model().state_dict())
    for layer in (net[0], net[2]):
        assert vnm.matches(layer.weight, SPEC)
        assert vnm.detect(layer.weight) is not None
    net.eval().requires_grad_(False)
    x = torch.randn(5, 24)
    report = vnm.explain(net, x, options={"vnm.policy": "memory"})
    assert report.totals["sparse"] == 2
    compiled = torch.compile(net, backend="vnm", options={"vnm.policy": "memory"})
    torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stop", [3, 11, 19])
def test_a_run_that_goes_on_from_a_checkpoint_is_the_same_to_the_bit(name, stop):
    data = batches(STEPS)

    def begun():
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        return net, optimizer, train.begin(net, SPEC, RECIPES[name], STEPS, optimizer=optimizer)

    whole, optimizer, training = begun()
    run(whole, optimizer, data)
    first, optimizer, training = begun()
    run(first, optimizer, data[:stop])
    kept = copy.deepcopy((first.state_dict(), optimizer.state_dict(), training.state_dict()))
    second, optimizer, training = begun()
    second.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    training.load_state_dict(kept[2])
    assert training.step_number == stop
    run(second, optimizer, data[stop:])
    for one, other in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(BadOption, match="the state is of a run with every=77"):
        training.load_state_dict({**kept[2], "every": 77})
    with pytest.raises(BadOption, match="the state is of a run with steps=21"):
        training.load_state_dict({**kept[2], "steps": 21})


def test_steps_that_are_left_out_do_not_count():
    """Accumulated gradients are one step; what a loss scaler skips is none."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    training = train.begin(net, SPEC, train.MaskDecay(), STEPS, optimizer=optimizer)
    for i, batch in enumerate(batches(6)):
        loss_of(net, batch).backward()
        if i % 3 == 2:
            optimizer.step()
    assert training.step_number == 2
    training.unfollow()
    optimizer.step()
    assert training.step_number == 2


def test_by_hand():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    training = train.begin(net, SPEC, train.MaskDecay(every=2), STEPS)
    run(net, optimizer, batches(STEPS), training)
    assert training.step_number == STEPS
    assert 0 <= training.mask_share < 1
    assert "step 20 of 20" in repr(training)
    training.finalize()
    assert vnm.matches(net[0].weight, SPEC)


def test_a_fixed_mask_keeps_the_zeros_of_a_pruned_model():
    net = model()
    vnm.sparsify(net, {"0": "16:2:8", "2": "8:1:4"}, progress=False)
    zeros = [layer.weight == 0 for layer in (net[0], net[2])]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    train.begin(net, None, train.FixedMask(), 5, optimizer=optimizer)
    run(net, optimizer, batches(5))
    vnm.finalize(net)
    for layer, before in zip((net[0], net[2]), zeros, strict=True):
        assert torch.equal(layer.weight == 0, before)
    with pytest.raises(vnm.VNMError, match="is not 16:2:8"):
        train.begin(model(), SPEC, train.FixedMask(), 5)


def test_a_fixed_mask_keeps_zeros_that_the_pattern_would_allow_values_for():
    net = model()
    vnm.sparsify(net, SPEC, progress=False)
    with torch.no_grad():
        net[0].weight[3] = 0
        net[0].weight[5, ::3] = 0
    zeros = net[0].weight == 0
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    train.begin(net, SPEC, train.FixedMask(every=1), 6, optimizer=optimizer)
    run(net, optimizer, batches(6))
    vnm.finalize(net)
    assert torch.equal(net[0].weight == 0, zeros)


@pytest.mark.parametrize("now", [False, True])
def test_a_fixed_mask_stays_where_an_optimizer_moves_what_is_outside_of_it(now):
    """Moments of a phase before the pruning go on moving weights that get no gradient any more."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    run(net, optimizer, batches(5))
    vnm.sparsify(net, SPEC, progress=False)
    zeros = net[0].weight == 0
    train.begin(net, SPEC, train.FixedMask(every=2), 9, optimizer=optimizer)
    run(net, optimizer, batches(8 if now else 9))
    assert (net[0].parametrizations.weight.original[zeros] != 0).any(), "the test shows nothing"
    assert torch.equal(net[0].parametrizations.weight[0].mask, ~zeros)
    vnm.finalize(net, now=now)
    assert torch.equal(net[0].weight == 0, zeros)


def test_a_decay_that_follows_the_optimizer_is_not_left_out_silently():
    training = train.begin(model(), SPEC, train.SRSTE(decoupled=True))
    with pytest.raises(BadOption, match="optimizer="):
        training.start(9)


def test_conv1d_is_masked_the_way_round_that_it_multiplies():
    transformers = pytest.importorskip("transformers")
    net = nn.Sequential(transformers.pytorch_utils.Conv1D(48, 24))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    train.begin(net, SPEC, train.MaskDecay(), 4, optimizer=optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(3, 24)).square().sum().backward()
        optimizer.step()
    vnm.finalize(net)
    assert vnm.matches(net[0].weight.t(), SPEC)


def test_compiled_training_is_not_compiled_again_as_the_recipe_moves():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    train.begin(net, SPEC, train.MaskDecay(every=2), STEPS, optimizer=optimizer)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, eager = torch.compile(net, backend=counter), copy.deepcopy(net)
    for batch in batches(6):
        optimizer.zero_grad()
        eager.load_state_dict(net.state_dict())
        torch.testing.assert_close(loss_of(compiled, batch), loss_of(eager, batch))
        loss_of(compiled, batch).backward()
        optimizer.step()
    assert counter.frame_count == 1


def test_training_through_our_backend_is_dense_and_says_why():
    net = model()
    train.begin(net, SPEC, train.MaskDecay(), STEPS)
    x = torch.randn(8, 24)
    compiled = torch.compile(net, backend="vnm")
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    assert net[0].parametrizations.weight.original.grad.abs().sum() > 0
    assert all("vnm.finalize" in layer.reason for layer in vnm.explain(net).layers)


def wrong(change, spec=SPEC, kind=vnm.VNMError, match="", **options):
    return pytest.param(change, spec, kind, match, options, id=match or kind.__name__)


@pytest.mark.parametrize(
    ("change", "spec", "kind", "match", "options"),
    [
        wrong(vnm.compress_model, kind=UnsupportedWeight, match="compressed"),
        wrong(lambda m: m[0].requires_grad_(False), kind=UnsupportedWeight, match="gradients"),
        wrong(lambda m: nn.utils.parametrizations.weight_norm(m[0]), kind=UnsupportedWeight, match="computed"),
        wrong(lambda m: train.begin(m, SPEC), kind=UnsupportedWeight, match="vnm.finalize"),
        wrong(lambda m: m[0].weight.data.fill_(torch.nan), kind=BadScores, match="NaN", steps=9),
        wrong(lambda m: m.double().to(torch.float8_e4m3fn), kind=UnsupportedWeight, match="float8"),
        wrong(lambda m: None, spec="512:2:8", kind=NothingSelected, match="no layer is left"),
        wrong(lambda m: None, kind=NothingSelected, match="no linear layer of the model fits", include="no.such"),
        wrong(lambda m: None, kind=BadOption, match="reach its final masks", steps=1, recipe=train.StructureDecay()),
        wrong(lambda m: None, kind=BadOption, match="recipe is a str", recipe="mask decay"),
        wrong(lambda m: None, spec=None, kind=BadOption, match="only FixedMask"),
        wrong(lambda m: None, kind=BadOption, match="optimizer=", steps=9, recipe=train.SRSTE(decoupled=True)),
        wrong(lambda m: None, kind=BadOption, match="give a torch.optim.Optimizer", steps=9, optimizer="adam"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(change, spec, kind, match, options):
    net = model()
    if change is vnm.compress_model:
        vnm.sparsify(net, SPEC, progress=False)
    change(net)
    before = {name: id(each) for name, each in net.named_parameters()}
    with pytest.raises(kind, match=match):
        train.begin(net, spec, **options)
    assert {name: id(each) for name, each in net.named_parameters()} == before


def test_tied_weights_are_refused_by_name():
    net = nn.ModuleDict({"embed": nn.Embedding(48, 24), "head": nn.Linear(24, 48, bias=False), "fc": nn.Linear(24, 48)})
    net["head"].weight = net["embed"].weight
    with pytest.raises(UnsupportedWeight, match="head"):
        train.begin(net, SPEC, include="head")
    train.begin(net, SPEC)
    assert [layer.name for layer in masked_layers(net)] == ["fc"]


@pytest.mark.parametrize("recipe", [train.MaskDecay(every=1), train.FixedMask(every=1)], ids=["decay", "fixed"])
def test_a_loss_that_becomes_nan_is_told_at_the_next_mask(recipe):
    net = model()
    vnm.sparsify(net, SPEC, progress=False)
    training = train.begin(net, SPEC, recipe, STEPS)
    with torch.no_grad():
        net[2].parametrizations.weight.original[3, 4] = torch.nan
    with pytest.raises(BadScores, match=r"^2: .*NaN"):
        training.step()
    assert training.step_number == 0


@pytest.mark.parametrize(("dense", "fixed", "at"), [(0.9, 0.0, 4), (0.0, 0.9, 16)], ids=["dense", "fixed"])
def test_nan_is_told_where_masks_do_not_move(dense, fixed, at):
    net = model()
    training = train.begin(net, SPEC, train.MaskDecay(dense=dense, fixed=fixed, every=3), STEPS)
    for _ in range(at):
        training.step()
    with torch.no_grad():
        net[2].parametrizations.weight.original[3, 4] = torch.nan
    training.step()
    with pytest.raises(BadScores, match=r"^2: .*NaN"):
        training.step()


def test_the_end_cannot_come_before_the_recipes():
    net = model()
    training = train.begin(net, SPEC, train.MaskDecay(every=4), STEPS)
    for _ in range(10):
        training.step()
    with pytest.raises(UnfinishedTraining, match="not final"):
        vnm.finalize(net)
    assert len(masked_layers(net)) == 2
    vnm.finalize(net, now=True)
    assert vnm.matches(net[0].weight, SPEC)
    with pytest.raises(NothingSelected, match="no layer of the model has masks"):
        vnm.finalize(net)


def test_masks_of_another_recipe_are_not_loaded():
    net, other = model(), model(seed=3)
    train.begin(net, SPEC, train.MaskDecay(), STEPS)
    train.begin(other, SPEC, train.MaskDecay(every=5), STEPS)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(BadOption, match="another recipe"):
        other.load_state_dict(net.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    vnm.finalize(other, now=True)
    other.load_state_dict(model().state_dict())


def test_copies_and_state_dicts():
    net = model()
    train.begin(net, SPEC, train.MaskDecay(), STEPS)
    again = copy.deepcopy(net)
    again.load_state_dict(net.state_dict())
    assert len(masked_layers(again)) == 2
    vnm.finalize(again, now=True)
    assert len(masked_layers(net)) == 2, "the copy's end is not the original's"
