"""VENOM's pruning: the saliency against brute force, the Fisher against its definition, steps and retraining."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from vnm_compile.annotate import annotation_of
from vnm_compile.layers import Layer
from vnm_compile.prune import Fisher
from vnm_compile.prune.methods.fisher import relaxed
from vnm_compile.prune.methods.fisher_matrix import Part, fisher_blocks, parts_in_memory
from vnm_compile.prune.methods.fisher_solver import prune_rows
from vnm_compile.spec import Spec


def model(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, width), nn.GELU(), nn.Linear(width, 8)).eval()


def mean_square(net, batch):
    x, y = batch
    return (net(x) - y).square().mean()


def data(batches=40, rows=16, seed=0):
    """Regression on inputs of a decaying spectrum, as activations have, with noise: (x, y) each."""
    teacher = torch.Generator().manual_seed(9)
    mix = torch.randn(32, 32, generator=teacher) * torch.logspace(0, -1.5, 32).unsqueeze(1)
    smooth, bent = torch.randn(2, 32, 8, generator=teacher) / 3
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(rows, 32, generator=generator) @ mix for _ in range(batches)]
    return [
        (x, torch.tanh(x @ smooth) + (x @ bent).relu() + 0.05 * torch.randn(rows, 8, generator=generator)) for x in xs
    ]


def train(net, batches, epochs, rate):
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            mean_square(net, batch).backward()
            optimizer.step()


@pytest.fixture(scope="module")
def trained():
    """A model whose weights mean something, the batches it learnt from, and others."""
    net, batches = model(), data(100)
    train(net, batches, 6, 3e-3)
    return net, batches, data(seed=1)


def total_loss(net, batches):
    with torch.no_grad():
        return sum(mean_square(net, batch).item() for batch in batches)


def random_fisher(rows, size, seed=0):
    gradients = torch.randn(rows, 1, size, 3 * size, generator=torch.Generator().manual_seed(seed))
    return gradients @ gradients.mT / (3 * size)


def brute_force(w, fisher, spec):
    """The least cost of one V x M block: rows `[V, M]`, every set of columns, every choice in it, solved exactly."""
    best = torch.inf
    for columns in combinations(range(w.shape[1]), 4):
        total = 0.0
        for row, curvature in zip(w.double(), fisher.double(), strict=True):
            costs = []
            for kept in combinations(columns, spec.n):
                new = torch.zeros_like(row)
                s = list(kept)
                new[s] = torch.linalg.solve(curvature[s][:, s], (curvature @ row)[s])
                costs.append((new - row) @ curvature @ (new - row))
            total += min(costs)
        best = min(best, total)
    return best


@pytest.mark.parametrize("text", ["4:2:8", "3:1:6", "1:2:4", "2:2:10"])
def test_one_group_is_pruned_as_brute_force_does(text):
    spec = Spec.parse(text)
    w, fisher = torch.randn(spec.v, 1, spec.m), random_fisher(spec.v, spec.m)
    new = prune_rows(w, fisher, torch.ones_like(w, dtype=torch.bool), spec, 4, spec.n)
    assert vnm.matches(new[:, 0], spec)
    change = (new - w).double()
    cost = (change.unsqueeze(-2) @ fisher.double() @ change.unsqueeze(-1)).sum().item()
    assert cost == pytest.approx(float(brute_force(w[:, 0], fisher[:, 0], spec)), rel=1e-4)


def test_what_stays_in_a_block_is_at_its_minimum():
    spec = Spec(8, 2, 8)
    w, fisher = torch.randn(24, 2, 32), random_fisher(24, 32).expand(24, 2, 32, 32)
    new = prune_rows(w, fisher, torch.ones_like(w, dtype=torch.bool), spec, 4, 2)
    slope = (fisher @ (new - w).unsqueeze(-1)).squeeze(-1)
    assert float((slope * (new != 0)).abs().max()) < 1e-3
    magnitude = w * vnm.prune.project(w.abs().flatten(1), spec).view_as(w)
    cost = {name: ((c := each - w).unsqueeze(-2) @ fisher @ c.unsqueeze(-1)).sum() for name, each in
            {"new": new, "magnitude": magnitude}.items()}  # fmt: skip
    assert cost["new"] < 0.9 * cost["magnitude"]


def test_wide_groups_and_relaxed_steps_follow_their_pattern():
    w, fisher = torch.randn(16, 1, 40), random_fisher(16, 40)
    every = torch.ones_like(w, dtype=torch.bool)
    assert vnm.matches(prune_rows(w, fisher, every, Spec(8, 2, 20), 4, 2)[:, 0], "8:2:20")
    half = prune_rows(w, fisher, every, Spec(8, 2, 20), 12, 6)
    groups = (half[:, 0] != 0).view(2, 8, 2, 20)
    assert bool((groups.sum(3) == 6).all())
    assert bool((groups.any(1).sum(2) <= 12).all())
    last = prune_rows(half, fisher, half != 0, Spec(8, 2, 20), 4, 2)
    assert vnm.matches(last[:, 0], "8:2:20")
    assert not bool(((last != 0) & (half == 0)).any()), "a pruned weight does not come back"


def test_the_fisher_is_the_mean_of_squared_gradients():
    net = model()
    batches = data(5)
    part = Part(Layer("0", net[0]), Spec(4, 2, 8), 8, 20, 16)
    (found,) = fisher_blocks(net, [part], batches, mean_square, 100)
    gradients = []
    for batch in batches:
        net.zero_grad()
        mean_square(net, batch).backward()
        gradients.append(net[0].weight.grad[8:20].view(12, 2, 16).clone())
    expected = sum(g.unsqueeze(-1) * g.unsqueeze(-2) for g in gradients) / 5
    torch.testing.assert_close(found, expected)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_layers_are_cut_to_the_memory():
    net = model()
    selected = [(Layer("0", net[0]), Spec(16, 2, 8)), (Layer("2", net[2]), Spec(16, 2, 8))]
    whole = list(parts_in_memory(selected, 32, 1 << 30))
    assert [[(p.start, p.stop) for p in batch] for batch in whole] == [[(0, 64), (0, 32)]]
    budget = 16 * 32 * 32 * 4 * 2  # 32 rows of the first layer, 16 of the second
    cut = list(parts_in_memory(selected, 32, budget))
    assert [(p.layer.name, p.start, p.stop) for batch in cut for p in batch] == [
        ("0", 0, 32), ("0", 32, 64), ("2", 0, 16), ("2", 16, 32),
    ]  # fmt: skip
    assert all(sum(p.nbytes for p in batch) <= budget for batch in cut)


def test_memory_does_not_change_the_result():
    results = []
    for memory in (1, 1 << 30):
        net = model()
        vnm.sparsify(net, "16:2:8", Fisher(mean_square, memory=memory), calibration=data(), progress=False)
        results.append(net[0].weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("text", "steps"), [("64:2:8", 4), ("64:1:8", 3), ("32:2:5", 4), ("32:2:20", 3)])
def test_steps_lead_to_the_pattern(text, steps):
    spec = Spec.parse(text)
    stages = [relaxed(spec, step, steps) for step in range(1, steps + 1)]
    assert stages[-1] == (4, spec.n)
    assert stages == sorted(stages, reverse=True)
    assert all(kept <= columns <= spec.m for columns, kept in stages)


@pytest.mark.parametrize("spec", ["16:2:8", "16:2:5", "16:1:20"])
@pytest.mark.parametrize("loss", [mean_square, None])
def test_fisher_costs_less_than_magnitude(trained, spec, loss):
    dense, batches, unseen = trained
    inputs = [x for x, _ in batches]
    losses = {}
    for method, calibration in (("magnitude", inputs), (Fisher(loss, num_grads=128), batches if loss else inputs)):
        net = copy.deepcopy(dense)
        report = vnm.sparsify(net, spec, method, calibration=calibration, progress=False)
        assert vnm.matches(net[0].weight, spec)
        assert vnm.matches(net[2].weight, spec)
        losses[report.method] = total_loss(net, unseen)
    assert losses["fisher"] < 0.8 * losses["magnitude"]


def test_retraining_between_steps_keeps_the_masks_and_helps(trained):
    dense, batches, unseen = trained
    seen = []

    def retrain(net, step):
        zeros = net[0].weight == 0
        seen.append((step, zeros.float().mean().item()))
        net.train()
        train(net, batches, 1, 2e-3)
        net.eval()
        assert bool((net[0].weight[zeros] == 0).all())

    losses = {}
    for name, options in {"once": Fisher(mean_square), "steps": Fisher(mean_square, steps=4, retrain=retrain)}.items():
        net = copy.deepcopy(dense)
        vnm.sparsify(net, "16:2:8", options, calibration=batches, progress=False)
        assert vnm.matches(net[2].weight, "16:2:8")
        losses[name] = total_loss(net, unseen)
    # A row keeps at the most 5, 4, 3, 2 of 8; less where columns that its block drops held what it had left.
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert [share for _, share in seen] == pytest.approx([0.375, 0.5, 0.625, 0.75], abs=0.02)
    assert losses["steps"] < 0.8 * losses["once"]


def test_a_retraining_that_fails_leaves_the_whole_model_as_it_was():
    net = model()
    before = copy.deepcopy(net.state_dict())

    def retrain(net, step):
        with torch.no_grad():
            net[4].bias.add_(1.0)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        vnm.sparsify(net, "16:2:8", Fisher(mean_square, retrain=retrain), calibration=data(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert annotation_of(net[0]) is None


def test_frozen_models_and_gradients_of_the_user():
    net = model().requires_grad_(False)
    net[4].weight.requires_grad_(True)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    vnm.sparsify(net, "16:2:8", "fisher", calibration=[torch.randn(4, 32)] * 3, progress=False)
    assert [parameter.requires_grad for parameter in net.parameters()] == [False] * 4 + [True, False]
    assert bool((net[4].weight.grad == 1).all())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net, batch: torch.tensor(torch.nan), "must be a tensor of one finite number"),
        (lambda net, batch: net(batch[0]), "must be a tensor of one finite number"),
        (lambda net, batch: net[0](batch[0]).sum(), "^2: the loss does not depend on it"),
    ],
)
def test_losses_that_are_none(loss, message):
    net = model()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(vnm.VNMError, match=message):
        vnm.sparsify(net, "16:2:8", Fisher(loss), calibration=data(2), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_settings_out_of_range():
    with pytest.raises(vnm.VNMError, match=r"steps=0.*larger than 0"):
        Fisher(steps=0)
    with pytest.raises(vnm.VNMError, match="prunes all layers in every step"):
        vnm.sparsify(model(), "16:2:8", "fisher", calibration=[torch.randn(4, 32)], checkpoint="somewhere")
