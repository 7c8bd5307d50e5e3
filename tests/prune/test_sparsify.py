"""Pruning: the best masks, second-order updates that pay, and all layers or none."""

from __future__ import annotations

import copy
import dataclasses
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vnm_compile as vnm
from vnm_compile.annotate import annotation_of
from vnm_compile.prune import project
from vnm_compile.prune.calibration import output_error
from vnm_compile.prune.methods.second_order import second_order
from vnm_compile.prune.project import _exact, column_value, grow_columns
from vnm_compile.prune.pruned import Pruned
from vnm_compile.spec import Spec


def best_value(block, n):
    """The largest sum that a block [V, M] can keep, by trying everything."""
    m = block.shape[1]
    return max(block[:, list(c)].topk(n, dim=1).values.sum().item() for c in combinations(range(m), 4))


@settings(max_examples=40, deadline=None)
@given(m=st.integers(4, 16), v=st.sampled_from([1, 4, 16]), n=st.sampled_from([1, 2]), seed=st.integers(0, 999))
def test_the_mask_of_a_block_is_the_best_one(m, v, n, seed):
    scores = torch.rand(v, m, generator=torch.Generator().manual_seed(seed))
    mask = project(scores, Spec(v, n, m))
    assert torch.isclose((scores * mask).sum(), torch.tensor(best_value(scores, n)), rtol=1e-5)
    assert bool((mask.sum(1) == n).all())


@pytest.mark.parametrize(("out", "width", "spec"), [(70, 45, "16:2:7"), (33, 100, "32:1:40"), (5, 6, "128:2:5")])
def test_masks_follow_the_pattern_at_the_tails(out, width, spec):
    scores = torch.rand(out, width)
    assert vnm.matches(project(scores, spec).float(), spec)


def test_wide_groups_are_never_worse_than_greedy_and_close_to_exact():
    blocks = torch.rand(50, 16, 14)
    for n in (1, 2):
        exact = column_value(blocks, _exact(blocks, n), n)
        found = column_value(blocks, grow_columns(blocks, n), n)
        assert bool((found <= exact * (1 + 1e-5)).all())
        assert float((found / exact).mean()) > 0.995


def inputs_like_a_layers(tokens=2000, width=64, seed=0):
    """Correlated inputs with channels of very different size, as those of a transformer are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / 3 + torch.eye(width)
    scale = torch.rand(width, generator=generator).mul(3).exp()
    return torch.randn(tokens, width, generator=generator) @ mix * scale


@pytest.mark.parametrize("spec", ["16:2:8", "16:1:5", "32:2:20", "1:2:4"])
def test_second_order_beats_magnitude_on_held_out_inputs(spec):
    spec = Spec.parse(spec)
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), inputs_like_a_layers()
    fitted, held_out = x[:1500].T @ x[:1500] / 1500, x[1500:].T @ x[1500:] / 500
    pruned = second_order(weight, fitted, spec)
    assert vnm.matches(pruned, spec)
    magnitude = output_error(weight, weight * project(weight.abs(), spec), held_out)
    wanda = output_error(weight, weight * project(weight.abs() * fitted.diagonal().sqrt(), spec), held_out)
    found = output_error(weight, pruned, held_out)
    assert found < 0.8 * magnitude
    assert found < wanda


def test_second_order_is_no_worse_than_sparsegpt_at_2_of_4():
    """Against a plain SparseGPT, written here from its paper: column by column, saliency of single weights."""
    torch.manual_seed(1)
    weight, x = torch.randn(48, 64), inputs_like_a_layers(seed=1)
    moment = x.T @ x / len(x)
    h = moment + 0.01 * moment.diagonal().mean() * torch.eye(64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = weight.clone()
    for j in range(64):
        if j % 4 == 0:
            saliency = (w[:, j : j + 4] / upper.diagonal()[j : j + 4]).square()
            keep = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, saliency.topk(2, 1).indices, True)
        error = torch.where(keep[:, j % 4], 0.0, w[:, j]) / upper[j, j]
        w[:, j:] -= error.unsqueeze(1) * upper[j, j:]
        w[:, j] = torch.where(keep[:, j % 4], w[:, j], 0.0)
    ours = second_order(weight, moment, Spec(1, 2, 4))
    assert output_error(weight, ours, moment) < output_error(weight, w, moment)


def test_dead_inputs_and_singular_moments():
    torch.manual_seed(0)
    x = torch.randn(10, 32)  # fewer tokens than inputs
    x[:, 5] = 0
    pruned = second_order(torch.randn(16, 32), x.T @ x / 10, Spec(16, 2, 8))
    assert pruned.isfinite().all()
    assert bool((pruned[:, 5] == 0).all())
    assert second_order(torch.randn(16, 32), torch.zeros(32, 32), Spec(16, 2, 8)).isfinite().all()


def test_dead_inputs_do_not_change_what_the_others_get():
    """However small the live inputs are, damping is a share of them and not of the dead ones."""
    torch.manual_seed(0)
    weight, x = torch.randn(16, 32), inputs_like_a_layers(width=32)
    x[:, ::2] = 0
    large, small = (second_order(weight, s * s * (x.T @ x) / len(x), Spec(16, 2, 8)) for s in (1.0, 1e-2))
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)


def test_a_layer_may_be_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            return self.fc(input=x)

    keyword = Keyword().eval()
    vnm.sparsify(keyword, "16:2:8", method="wanda", calibration=[torch.randn(8, 32)], progress=False)
    assert vnm.matches(keyword.fc.weight, "16:2:8")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8)).eval()


def test_a_name_means_the_defaults_and_an_object_carries_the_options():
    data = [torch.randn(64, 32) @ torch.randn(32, 32)]

    def pruned(method):
        result = model()
        report = vnm.sparsify(result, "16:2:8", method, calibration=data, progress=False)
        assert report.method == "second_order"
        return result[2].weight

    assert torch.equal(pruned("second_order"), pruned(vnm.prune.SecondOrder()))
    assert not torch.equal(pruned("second_order"), pruned(vnm.prune.SecondOrder(damping=10.0)))


def test_every_method_is_in_the_table_with_options_that_have_defaults():
    for name, method in vnm.prune.METHODS.items():
        assert method.name == name
        assert method.summary
        assert dataclasses.is_dataclass(method())
        with pytest.raises(dataclasses.FrozenInstanceError):
            method().name = "another"


def test_a_method_of_ones_own():
    """Random pruning, in the words of the table."""

    @dataclasses.dataclass(frozen=True)
    class Random(vnm.prune.LayerMethod):
        seed: int = 0
        name = "random"
        summary = "keep any weights"
        needs_calibration = False

        def prune_layer(self, layer, spec, moment):
            generator = torch.Generator().manual_seed(self.seed)
            weight = layer.weight.detach()
            scores = torch.rand(weight.shape, generator=generator)
            return Pruned.of(layer, spec, weight * project(scores, spec), weight)

    pruned = model()
    report = vnm.sparsify(pruned, "16:2:8", Random(seed=3), progress=False)
    assert report.method == "random"
    assert vnm.matches(pruned[0].weight, "16:2:8")
    assert not torch.equal(pruned[0].weight, model()[0].weight)


@pytest.mark.parametrize("method", vnm.prune.METHODS)
def test_methods_prune_and_annotate(method):
    pruned = model()
    data = [torch.randn(64, 32), (torch.randn(64, 32),), {"input": torch.randn(64, 32)}]
    report = vnm.sparsify(pruned, "16:2:8", method=method, calibration=data, progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    for index in (0, 2):
        assert vnm.matches(pruned[index].weight, "16:2:8")
        assert str(annotation_of(pruned[index]).spec) == "16:2:8"
    assert not vnm.matches(pruned[4].weight, "16:2:8"), "smaller than a block"
    assert all(0.3 < layer.retained < 1 for layer in report.layers)
    assert all((layer.output_error is None) == (method in ("magnitude", "fisher")) for layer in report.layers)
    assert "output error" in str(report)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "needs calibration data, and there is none"),
        ([], "needs calibration data, and it is empty"),
        ([torch.randn(4, 32), "text"], "is a str"),
        ([torch.full((4, 32), torch.nan)], "hold NaN or infinity"),
        ([torch.empty(0, 32)], "no calibration data reached it"),
    ],
)
def test_bad_calibration_leaves_the_model_alone(calibration, message):
    pruned = model()
    before = copy.deepcopy(pruned.state_dict())
    with pytest.raises(vnm.VNMError, match=message):
        vnm.sparsify(pruned, "16:2:8", method="second_order", calibration=calibration, progress=False)
    for name, value in pruned.state_dict().items():
        assert torch.equal(value, before[name])
    assert annotation_of(pruned[0]) is None


def test_other_mistakes():
    with pytest.raises(vnm.VNMError, match="unknown method 'magic'; there are magnitude"):
        vnm.sparsify(model(), "16:2:8", method="magic")
    with pytest.raises(vnm.VNMError, match="large enough"):
        vnm.sparsify(nn.Sequential(nn.Linear(8, 8)), "64:2:8")
    broken = model()
    with torch.no_grad():
        broken[2].weight[3, 3] = torch.nan
    with pytest.raises(vnm.VNMError, match=r"^2: its weight holds NaN"):
        vnm.sparsify(broken, "16:2:8", progress=False)
    compressed = model()
    vnm.sparsify(compressed, "16:2:8", progress=False)
    vnm.compress_model(compressed)
    with pytest.raises(vnm.VNMError, match="compressed already"):
        vnm.sparsify(compressed, "16:2:8", progress=False)
