"""`vnm.sparsify`: layers are pruned and annotated, all or none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from vnm_compile.annotate import annotation_of


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
