"""The search for a better order of channels, and `sparsify(permute=True)`, which uses it."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import vnm_compile as vnm
from tests.support import with_slow
from vnm_compile.annotate import annotation_of
from vnm_compile.prune.permutation import Use, search
from vnm_compile.prune.permutation.search import retained
from vnm_compile.spec import Spec

PATTERN = Spec(16, 2, 8)


def made_for(spec, rows, columns, seed=0):
    """Scores that follow a pattern, as most of what a permuted matrix holds."""
    generator = torch.Generator().manual_seed(seed)
    follows = vnm.prune.project(torch.rand(rows, columns, generator=generator), spec)
    return follows + 0.02 * torch.rand(rows, columns, generator=generator)


def moved(use, order):
    return use.scores.index_select(use.dim, order)


@pytest.mark.parametrize("spec", ["16:2:8", "8:1:5", "16:2:4", "4:2:20"])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_search_never_loses_and_says_what_it_found(spec, dim):
    spec = Spec.parse(spec)
    scores = torch.rand(70, 90, generator=torch.Generator().manual_seed(dim)).pow(4)
    use = Use(scores, spec, dim)
    order, before, after = search([use])
    assert torch.equal(order.sort().values, torch.arange(scores.shape[dim]))
    assert before == pytest.approx(retained(scores, spec), abs=1e-6)
    assert after == pytest.approx(retained(moved(use, order), spec), abs=1e-6)
    if spec.m == 4 and dim == 0:
        assert after == before, "2 of 4 in a row has nothing to do with the order of rows"
    else:
        assert after > before * 1.005


@pytest.mark.parametrize(("dim", "at_least"), [(1, 0.97), (0, 0.97)])
def test_a_shuffled_pattern_is_nearly_recovered(dim, at_least):
    scores = made_for(PATTERN, 64, 64)
    shuffled = scores.index_select(dim, torch.randperm(64, generator=torch.Generator().manual_seed(5)))
    best = retained(scores, PATTERN)
    _, before, after = search([Use(shuffled, PATTERN, dim)])
    assert before < 0.85 * best
    assert after > at_least * best


def test_rows_and_columns_of_two_weights_find_one_order():
    producer, consumer = made_for(PATTERN, 64, 32), made_for(PATTERN, 32, 64, seed=1)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    uses = [Use(producer[shuffle], PATTERN, 0), Use(consumer[:, shuffle], PATTERN, 1)]
    order, before, after = search(uses)
    assert after > 1.1 * before
    assert after == pytest.approx(sum(retained(moved(use, order), PATTERN) for use in uses), abs=1e-6)


def test_channels_stay_in_their_blocks_and_copies_move_together():
    scores = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)).pow(4)
    order, before, after = search([Use(scores, Spec(16, 2, 4), 1)], block=8)
    assert after > before
    assert torch.equal(order // 8, torch.arange(64) // 8)
    # Channel i stands at i and at 32 + i, as a value channel does that two heads of queries read.
    places = torch.stack([torch.arange(32), torch.arange(32) + 32], 1)
    order, before, after = search([Use(scores, Spec(16, 2, 4), 1, places)])
    both = torch.cat([order, order + 32])
    assert after > before
    assert after == pytest.approx(retained(scores[:, both], Spec(16, 2, 4)), abs=1e-6)


def test_the_search_is_deterministic():
    scores = torch.rand(64, 96, generator=torch.Generator().manual_seed(0)).pow(4)
    first, again = (search([Use(scores.clone(), PATTERN, 1)], seed=3) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]


def test_what_cannot_be_searched():
    zeros = Use(torch.zeros(32, 32), PATTERN, 1)
    order, before, after = search([zeros])
    assert torch.equal(order, torch.arange(32))
    assert before == after
    with pytest.raises(vnm.VNMError, match="found none"):
        search([])
    with pytest.raises(vnm.VNMError, match="found of 32, 48 channels"):
        search([zeros, Use(torch.rand(48, 32), PATTERN, 0)])


def test_scipy_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(vnm.VNMError, match="needs SciPy"):
        search([Use(torch.rand(32, 32), PATTERN, 1)])


class Gelu(nn.Module):
    """A feed-forward layer of whichever kind of linear; its hidden channels differ much in size."""

    def __init__(self, conv1d=False, width=128):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(32, width), nn.Linear(width, 32), nn.LayerNorm(32)
        size = torch.randn(width, 1).exp()
        with torch.no_grad():
            self.up.weight.copy_(size * torch.randn(width, 32).pow(3))
            self.down.weight.mul_(size.T.roll(5, 1))
        if conv1d:
            for name in ("up", "down"):
                linear = getattr(self, name)
                new = Conv1D(linear.out_features, linear.in_features)
                new.weight.data, new.bias.data = linear.weight.data.T.contiguous(), linear.bias.data
                setattr(self, name, new)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 32, generator=generator) for _ in range(3)]


def weight(layer):
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@pytest.mark.parametrize("conv1d", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", with_slow(vnm.prune.METHODS, quick=("magnitude", "second_order")))
def test_permute_keeps_more_of_every_layer_and_lowers_its_error(method, conv1d):
    def prune(permute):
        pruned = Gelu(conv1d)
        report = vnm.sparsify(
            pruned, PATTERN, method, calibration=data(), held_out=data(1), permute=permute, progress=False
        )
        return pruned, report

    permuted, report = prune(True)
    _, unpermuted = prune(False)
    for name in ("up", "down"):
        assert vnm.matches(weight(getattr(permuted, name)), PATTERN)
    assert sum(layer.importance_after - layer.importance_before for layer in report.layers) > 0.02
    assert all(layer.importance_before is None for layer in unpermuted.layers)
    assert sum(e.held_out_error for e in report.layers) < sum(e.held_out_error for e in unpermuted.layers)
    assert "kept permuted" in str(report)
    assert "kept permuted" not in str(unpermuted)


@pytest.mark.slow
def test_layers_that_are_not_pruned_move_along():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    before = copy.deepcopy(model.state_dict())
    batch = {"input_ids": torch.arange(14).view(2, 7)}
    spec = {"*.mlp.gate_proj": "16:2:8", "*": None}
    report = vnm.sparsify(model, spec, calibration=[batch], permute=True, progress=False)
    assert [layer.name for layer in report.layers] == [f"model.layers.{i}.mlp.gate_proj" for i in (0, 1)]
    for name in ("embed_tokens", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"):
        old, new = before[f"model.{name}.weight"], model.get_submodule(f"model.{name}").weight
        assert not torch.equal(old, new)
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_whose_channels_were_shuffled_is_pruned_without_loss():
    """Its weight would follow the pattern in another order: that is found, and no gather is left."""
    model = Gelu(width=64)
    follows = torch.randn(64, 32) * vnm.prune.project(torch.rand(64, 32), PATTERN)
    with torch.no_grad():
        model.up.weight.copy_(follows[torch.randperm(64)])
    x = data()[0]
    expected = model(x)
    assert not vnm.matches(model.up.weight, PATTERN)
    report = vnm.sparsify(model, PATTERN, include="up", calibration=[x], permute=True, progress=False)
    assert report.layers[0].retained == 1.0
    assert vnm.matches(model.up.weight, PATTERN)
    torch.testing.assert_close(model(x), expected)
    compiled = torch.compile(model, backend="vnm")
    torch.testing.assert_close(compiled(x), expected)
    graph = torch.export.export(model, (x,)).graph
    assert not [node for node in graph.nodes if "index" in str(node.target) or "gather" in str(node.target)]


def test_the_permuted_dense_model_computes_the_same():
    from rich.progress import Progress

    from vnm_compile.annotate import select_layers
    from vnm_compile.prune.permutation.permute import permuted

    model, x = Gelu().double(), data()[0].double()
    expected = model(x)
    up = model.up.weight.detach().clone()
    with permuted(model, select_layers(model, PATTERN), [x], True, Progress(disable=True)):
        assert not torch.equal(up, model.up.weight)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_on_a_failure_every_parameter_is_back_in_its_place(failure, monkeypatch):
    model = Gelu()
    before = copy.deepcopy(model.state_dict())
    seen = []

    def fail(*_):
        seen.append(not torch.equal(model.up.bias, before["up.bias"]))
        raise failure

    monkeypatch.setattr(sys.modules["vnm_compile.prune.sparsify"], "held_out_errors", fail)
    with pytest.raises(failure):
        vnm.sparsify(model, PATTERN, calibration=data(), held_out=data(1), permute=True, progress=False)
    assert seen == [True], "it failed after the biases had been moved"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert annotation_of(model.up) is None


def test_a_failure_in_the_middle_of_the_search_leaves_the_model_alone(monkeypatch):
    model = nn.Sequential(Gelu(), Gelu())
    before = copy.deepcopy(model.state_dict())
    calls = []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return search(*arguments, **options)

    monkeypatch.setattr("vnm_compile.prune.permutation.permute.search", failing)
    with pytest.raises(KeyboardInterrupt):
        vnm.sparsify(model, PATTERN, calibration=data(), permute=True, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_permute_asks_for_calibration_and_a_model_that_can_be_exported():
    with pytest.raises(vnm.VNMError, match=r"permute=True needs calibration data, and there is none"):
        vnm.sparsify(Gelu(), PATTERN, permute=True)

    class Branches(Gelu):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = Branches()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(vnm.VNMError, match="cannot be exported"):
        vnm.sparsify(model, PATTERN, calibration=data(), permute=True, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_weight_with_both_its_sides_in_one_order_stays():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mix, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.mix(x))

    torch.manual_seed(0)
    report = vnm.sparsify(
        Mixer(), PATTERN, include="mix", calibration=[torch.randn(4, 8)], permute=True, progress=False
    )
    assert report.layers[0].importance_before == report.layers[0].importance_after


@pytest.mark.slow
def test_a_permuted_run_goes_on_from_its_checkpoint(tmp_path):
    class Interrupted(Gelu):
        calls = 1000

        def forward(self, x):
            self.calls -= 1
            if self.calls == 0:
                raise KeyboardInterrupt
            return super().forward(x)

    arguments = {"calibration": data(), "permute": True, "progress": False, "checkpoint": tmp_path / "run"}
    expected = nn.ModuleDict({"0": Gelu()})["0"]
    vnm.sparsify(expected, PATTERN, "wanda", **{**arguments, "checkpoint": None})
    resumed = Gelu()
    vnm.sparsify(resumed, PATTERN, "wanda", **arguments)
    again = Gelu()
    vnm.sparsify(again, PATTERN, "wanda", **arguments)
    for model in (resumed, again):
        assert all(torch.equal(v, expected.state_dict()[name]) for name, v in model.state_dict().items())
    with pytest.raises(vnm.VNMError, match="is of a run with another permute"):
        vnm.sparsify(Gelu(), PATTERN, "wanda", **{**arguments, "permute": False})


def test_the_plot_shows_the_importance_lost_before_and_after(tmp_path):
    report = vnm.sparsify(Gelu(), PATTERN, calibration=data(), permute=True, progress=False)
    report.plot(tmp_path / "plot.svg")
    assert "importance lost, permuted" in (tmp_path / "plot.svg").read_text()
    assert report.to_dict()["layers"][0]["importance_after"] == report.layers[0].importance_after
