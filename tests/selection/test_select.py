"""Choosing a pattern: fast enough, ranked by mask diversity, checked by loss, or one a layer."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from vnm_compile.cost import CostModel
from vnm_compile.layout import Layout
from vnm_compile.problem import Failure, Timing
from vnm_compile.selection import Trial
from vnm_compile.selection.knapsack import assign
from vnm_compile.spec import Spec

SIZES = [(128, 64), (64, 128)]  # of the layers below that are large enough
CANDIDATES = ["16:2:5", "32:2:8", "16:2:8", "16:2:16", "32:2:32"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 8)).eval()


def by_density(out_features, in_features, spec):
    """A machine whose time is the number of weights that it multiplies by."""
    return out_features * in_features * (spec.density if spec else 1.0)


def test_uniform_takes_the_most_diverse_of_the_fast_ones():
    dense = model()
    before = copy.deepcopy(dense.state_dict())
    found = vnm.select_spec(dense, 3.0, CANDIDATES, seconds=by_density)
    rows = {row.spec: row for row in found.candidates}
    assert str(found.choice) == "16:2:8"
    # The last layer has 8 rows: too small for every candidate, it keeps its dense time.
    small, large = 8 * 64, 2 * 64 * 128
    assert rows["16:2:8"].speedup == pytest.approx((large + small) / (large / 4 + small))
    assert rows["16:2:5"].speedup < 3.0 < rows["32:2:8"].speedup
    expected = 2 * Spec(16, 2, 8).log_mask_diversity(128, 64)
    assert rows["16:2:8"].log_masks == pytest.approx(expected)
    assert rows["16:2:8"].log_masks > rows["32:2:8"].log_masks > rows["32:2:32"].log_masks
    assert "too slow" in str(found)
    assert found.to_dict()["choice"] == "16:2:8"
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_the_cost_model_is_what_counts_without_measurements():
    dense = nn.Sequential(nn.Linear(256, 512, bias=False))
    found = vnm.select_spec(dense, 2.0, ["64:2:8"], tokens=16)
    cost = CostModel.on("cpu", 512, 256, Layout(Spec(64, 2, 8), 512, 256), torch.float32)
    assert found.chosen.speedup == pytest.approx(cost.speedup_at(16))


def test_data_overrules_the_ranking():
    """The best few are pruned and measured; here a loss that likes what the ranking does not."""
    tried = []

    def loss(pruned, batch):
        tried.append(str(vnm.detect(pruned[0].weight)))
        return -(pruned[0].weight == 0).sum()

    data = [torch.randn(32, 64)]
    found = vnm.select_spec(
        model(), 3.0, CANDIDATES, seconds=by_density, calibration=data, trial=Trial(loss=loss), progress=False
    )
    assert len(tried) == 3
    assert str(found.choice) == "16:2:16", "of the three best in rank the sparsest"
    assert found.chosen.loss == min(row.loss for row in found.candidates if row.loss is not None)
    measured = vnm.select_spec(model(), 3.0, CANDIDATES, seconds=by_density, calibration=data, progress=False)
    assert str(measured.choice) == "16:2:8"
    assert 0 < measured.chosen.loss < 1


@pytest.mark.parametrize("data", [None, [torch.randn(64, 64)]])
def test_per_layer_is_no_worse_than_uniform_at_the_same_speed(data):
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 64)).eval()
    with torch.no_grad():  # a layer that is sparse already, and costs nothing
        dense[1].weight.mul_(torch.arange(128) % 16 < 2)
    uniform = vnm.select_spec(dense, 3.0, CANDIDATES, seconds=by_density)
    found = vnm.select_spec(
        dense, 3.0, CANDIDATES, seconds=by_density, per_layer=True, calibration=data, progress=False
    )  # fmt: skip
    assert found.chosen.speedup >= 3.0
    rows = {row.spec: row for row in found.candidates}
    assert found.chosen.loss < rows[str(uniform.choice)].loss
    assert found.choice["1"].m >= 16, "the sparse layer pays for the others"
    assert "layers: " in str(found)
    vnm.sparsify(dense, found.choice, progress=False)
    for name, spec in found.choice.items():
        assert spec is None or vnm.matches(dense.get_submodule(name).weight, spec)


def test_the_knapsack_is_exact():
    torch.manual_seed(0)
    errors, costs = torch.rand(5, 4).tolist(), torch.rand(5, 4).tolist()
    for budget in (1.0, 1.5, 2.5, 9.0):
        found = assign(errors, costs, budget)
        allowed = [
            (sum(e[i] for e, i in zip(errors, choice, strict=True)), choice)
            for choice in product(range(4), repeat=5)
            if sum(c[i] for c, i in zip(costs, choice, strict=True)) <= budget
        ]
        if not allowed:
            assert found is None
            continue
        assert found is not None
        assert sum(e[i] for e, i in zip(errors, found, strict=True)) == pytest.approx(min(allowed)[0], rel=2e-4)


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_target_out_of_reach(per_layer):
    with pytest.raises(vnm.VNMError, match=r"no candidate reaches 40x: .* comes closest with \d+\.\d\dx"):
        vnm.select_spec(model(), 40.0, CANDIDATES, seconds=by_density, per_layer=per_layer, progress=False)


def test_mistakes():
    with pytest.raises(vnm.VNMError, match="at least one candidate"):
        vnm.select_spec(model(), 2.0, [])
    with pytest.raises(vnm.VNMError, match="no linear layer"):
        vnm.select_spec(nn.Sequential(nn.ReLU()))
    with pytest.raises(vnm.VNMError, match="must be positive"):
        vnm.select_spec(model(), 2.0, seconds=lambda *_: 0.0)

    with pytest.raises(vnm.VNMError, match="must be positive"):
        vnm.select_spec(model(), 2.0, seconds=lambda *_: "fast")
    with pytest.raises(vnm.VNMError, match="a loss has to be a finite number"):
        vnm.select_spec(
            model(), 3.0, CANDIDATES, seconds=by_density, calibration=torch.randn(8, 64),
            trial=Trial(loss=lambda *_: float("nan")), progress=False,
        )  # fmt: skip
    for data in ("text", [torch.randn(8, 63)]):
        with pytest.raises(vnm.VNMError, match="calibration"):
            vnm.select_spec(model(), 3.0, CANDIDATES, seconds=by_density, calibration=data, progress=False)
    quantised = model()
    quantised[0].weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(vnm.VNMError, match=r"^0: its weight is torch.int8"):
        vnm.select_spec(quantised, 2.0)


def test_as_this_machine_takes_them(monkeypatch):
    """`seconds="measured"`: the kernels' times, once for each size and pattern, and for the values asked for."""
    asked = []

    def timed(problems):
        asked.extend(problems)
        layouts = [problem.layout for problem in problems]
        return [Timing(by_density(each.out_features, each.in_features, each.spec), 2.0e4) for each in layouts]

    def use(measure):
        monkeypatch.setattr("vnm_compile.selection.measured.measure", measure)

    use(timed)
    dense = model()
    found = vnm.select_spec(
        dense, 2.0, CANDIDATES, seconds="measured", tokens=16, values="int8", group=32, progress=False
    )
    assert {(each.tokens, str(each.layout.quantization)) for each in asked} == {(16, "int8/32")}
    assert len(asked) == len(set(asked)) == 2 * len(CANDIDATES)  # the third layer is too small for all of them
    rows = {row.spec: row for row in found.candidates}
    small = 4.0e4 * CostModel.on("cpu", 8, 64, None, torch.float32).time_at(16, sparse=False)
    small /= sum(CostModel.on("cpu", *size, None, torch.float32).time_at(16, sparse=False) for size in SIZES)
    assert rows["16:2:8"].speedup == pytest.approx((4.0e4 + small) / (2 * 64 * 128 / 4 + small))
    use(lambda problems: [None] * len(problems))
    with pytest.raises(vnm.VNMError, match="no kernel"):
        vnm.select_spec(dense, 2.0, CANDIDATES, seconds="measured", progress=False)
    use(lambda problems: [Failure("no memory")] * len(problems))
    with pytest.raises(vnm.VNMError, match="no memory"):
        vnm.select_spec(dense, 2.0, CANDIDATES, seconds="measured", progress=False)
    with pytest.raises(vnm.VNMError, match="measured"):
        vnm.select_spec(dense, 2.0, CANDIDATES, seconds="timed", progress=False)


def test_measured_for_real():
    net = nn.Sequential(nn.Linear(256, 256)).eval()
    found = vnm.select_spec(net, 0.001, ["16:2:8", "64:2:8"], seconds="measured", progress=False)
    assert all(row.speedup > 0 for row in found.candidates)


def test_values_change_the_speed():
    plain, small = (vnm.select_spec(model(), 1.0, ["16:2:8"], values=values) for values in (None, "int4"))
    assert small.chosen.speedup > plain.chosen.speedup
