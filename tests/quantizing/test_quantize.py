"""`vnm.quantize`: rounding, with and without data, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from tests.support import make_sparse_
from vnm_compile.errors import BadCalibration, BadOption, NothingSelected, UnsupportedWeight
from vnm_compile.quantization import Quantization
from vnm_compile.quantizing.descent import descend
from vnm_compile.quantizing.scales import choose_scales, grouped, nearest
from vnm_compile.tensor import VNMTensor

SPEC = "16:2:8"


def model(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 7))
    make_sparse_(net[:3], SPEC)
    return net.to(dtype).eval()


def data(batches=3, features=64):
    """Inputs of which some go together, as those of real layers do."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(features // 4, features, generator=generator)
    return [
        torch.randn(20, features // 4, generator=generator) @ mixed
        + 0.1 * torch.randn(20, features, generator=generator)
        for _ in range(batches)
    ]


@pytest.mark.parametrize("group", [32, 64, 128, "row"])
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_without_data_values_are_rounded_to_the_nearest(values, group):
    net = model()
    before = copy.deepcopy(net)
    report = vnm.quantize(net, values, group, progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    for i in (0, 2):
        weight, old = net[i].weight, before[i].weight.detach()
        assert isinstance(weight, VNMTensor)
        assert str(weight.quantization) == f"{values}/{group}"
        assert not weight.requires_grad
        new = weight.to_dense()
        assert torch.equal(new[old == 0], old[old == 0]), "zeros stay zeros"
        step = weight.scales.abs().amax()
        assert (new - old).abs().max() <= (0.51 if values == "int8" else 2) * step  # in 4 bits the largest are cut off
        row = report[str(i)]
        assert row.weight_error == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-4)
        assert row.weight_error < (0.01 if values == "int8" else 0.15)
        assert row.output_error is None
        assert (row.stored_bytes, row.spec) == (weight.nbytes, SPEC)
        assert vnm.matches(new, SPEC)
    assert not isinstance(net[4].weight, VNMTensor)
    text = str(report)
    assert f"{values}/{group}" in text
    assert report.to_dict()["totals"]["layers"] == 2


def test_scales_are_no_worse_than_those_of_the_largest_value():
    kept = torch.randn(40, 70)
    for quantization in (Quantization(8, 32), Quantization(4, 64), Quantization(4, None)):
        groups = grouped(kept, quantization)
        scales = choose_scales(kept, quantization, torch.float32)
        plain = groups.abs().amax(-1) / quantization.highest

        def error(scales, groups=groups, quantization=quantization):
            return (groups - nearest(groups, scales, quantization) * scales.unsqueeze(-1)).square().sum(-1)

        assert (error(scales) <= error(plain) * 1.0001).all()
    assert error(scales).sum() < 0.9 * error(plain).sum()  # 4 bits: cutting off pays


def test_zeros_and_single_values():
    kept = torch.zeros(2, 40)
    kept[1, 3] = -3.0
    for quantization in (Quantization(8, 32), Quantization(4, 32)):
        scales = choose_scales(kept, quantization, torch.float32)
        levels = nearest(grouped(kept, quantization), scales, quantization).flatten(1)[:, :40]
        spread = scales.repeat_interleave(32, 1)[:, :40]
        torch.testing.assert_close(levels * spread, kept)
        assert scales.isfinite().all()


def test_with_data_outputs_change_less():
    plain, compensated = model(), model()
    batches = data()
    vnm.quantize(plain, "int4", progress=False)
    report = vnm.quantize(compensated, "int4", calibration=batches, progress=False)
    dense = model()
    x = torch.cat(batches)
    with torch.no_grad():
        expected = dense[0](x)
        errors = [(net[0](x) - expected).norm() for net in (plain, compensated)]
    assert errors[1] < 0.8 * errors[0]
    measured = errors[1] / (expected - dense[0].bias).norm()
    assert report["0"].output_error == pytest.approx(measured.item(), rel=0.02)
    for i in (0, 2):
        assert vnm.matches(compensated[i].weight.to_dense(), SPEC)
        assert not compensated[i].weight.to_dense()[dense[i].weight == 0].any()


def test_descent_ends_where_no_single_value_could_do_better():
    torch.manual_seed(0)
    quantization = Quantization(4, None)
    weight, x = torch.randn(6, 16), torch.randn(200, 5) @ torch.randn(5, 16) + 0.2 * torch.randn(200, 16)
    weight[:, 3] = 0
    moment = x.T @ x / len(x)
    scales = (weight.abs().amax(1, keepdim=True) / 7).expand_as(weight)
    levels = descend(weight, scales, moment, quantization)
    assert (levels[:, 3] == 0).all()
    assert levels.min() >= -8
    assert levels.max() <= 7
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(16)

    def error(levels):
        difference = (levels * scales - weight).double()
        return ((difference @ damped.double()) * difference).sum(1)

    best = error(levels)
    for column in range(16):
        for change in (-1, 1):
            other = levels.clone()
            other[:, column] = (other[:, column] + change).clamp(-8, 7)
            if column != 3:
                assert (error(other) >= best - 1e-6).all()
    assert best.sum() < error((weight / scales).round()).sum()


def test_data_of_quantised_blocks():
    """A block is quantised on the inputs that the quantised ones before it make."""
    net = model()
    report = vnm.quantize(net, "int4", calibration=data(), exclude="0", progress=False)
    assert [layer.name for layer in report.layers] == ["2"]
    assert not isinstance(net[0].weight, VNMTensor)
    first = report["2"].output_error
    net = model()
    assert vnm.quantize(net, "int4", calibration=data(), progress=False)["2"].output_error != first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    net = model(dtype)
    vnm.quantize(net, "int8", calibration=[each.to(dtype) for each in data()], progress=False)
    assert net[0].weight.scales.dtype == net[0].weight.dtype == dtype
    x = torch.randn(4, 64).to(dtype)
    with torch.no_grad():
        error = (net(x) - model(dtype)(x)).double().norm() / model(dtype)(x).double().norm()
    assert error < 0.03


def test_compressed_and_conv1d():
    transformers = pytest.importorskip("transformers")
    net = model()
    vnm.compress_model(net)
    vnm.quantize(net, "int8", progress=False)
    assert net[0].weight.quantization is not None
    layer = transformers.pytorch_utils.Conv1D(48, 64)
    net = nn.Sequential(layer)
    vnm.sparsify(net, SPEC, progress=False)
    x = torch.randn(5, 64)
    expected = net(x)
    vnm.quantize(net, "int8", calibration=data(), progress=False)
    assert tuple(layer.weight.shape) == (64, 48)
    torch.testing.assert_close(net(x), expected, rtol=0.05, atol=0.02)
    vnm.decompress_model(net)
    torch.testing.assert_close(net(x), expected, rtol=0.05, atol=0.02)


def test_under_other_defaults():
    expected = vnm.quantize(model(), "int4", calibration=data(), progress=False).to_dict()
    net, batches = model(), data()
    torch.set_default_dtype(torch.float64)
    try:
        assert vnm.quantize(net, "int4", calibration=batches, progress=False).to_dict() == expected
    finally:
        torch.set_default_dtype(torch.float32)
    net = model()
    with torch.device("meta"):
        assert vnm.quantize(net, "int4", calibration=batches, progress=False).to_dict() == expected


def test_in_inference_mode():
    net = model()
    with torch.inference_mode():
        vnm.quantize(net, "int8", calibration=data(), progress=False)
    assert not net[0].weight.is_inference()
    net(torch.randn(2, 64, requires_grad=True)).sum().backward()


def broken(net):
    with torch.no_grad():
        net[2].weight.fill_(1.0)
    vnm.annotate(net, SPEC, include="2")


def with_nan(net):
    with torch.no_grad():
        net[2].weight[net[2].weight != 0] = torch.nan


WRONG = {
    "other values": (BadOption, "int8 and int4", lambda net: None, {"values": "int2"}),
    "another group": (BadOption, "share a scale", lambda net: None, {"group": 50}),
    "no pattern": (
        NothingSelected,
        "sparsify",
        lambda net: nn.init.normal_(net[0].weight) is nn.init.normal_(net[2].weight),
        {},
    ),
    "a broken pattern": (vnm.VNMError, "^2: ", broken, {}),
    "NaN": (UnsupportedWeight, "^2: .*NaN", with_nan, {}),
    "already": (UnsupportedWeight, "already", lambda net: vnm.quantize(net, progress=False), {}),
    "no data": (BadCalibration, "empty", lambda net: None, {"calibration": []}),
    "other data": (BadCalibration, "batch", lambda net: None, {"calibration": [torch.randn(3, 65)]}),
    "data with NaN": (BadCalibration, "NaN", lambda net: None, {"calibration": [torch.full((3, 64), torch.nan)]}),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named_and_nothing_is_changed(name):
    kind, text, spoil, options = WRONG[name]
    net = model()
    spoil(net)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(kind, match=text):
        vnm.quantize(net, progress=False, **options)
    for key, value in net.state_dict().items():
        assert type(value) is type(before[key])
        held = value.to_dense() if isinstance(value, VNMTensor) else value
        told = before[key].to_dense() if isinstance(value, VNMTensor) else before[key]
        torch.testing.assert_close(held, told, equal_nan=True)


def test_together_with_pruning():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    batches = [torch.randn(32, 64) for _ in range(2)]
    one, two = copy.deepcopy(dense), copy.deepcopy(dense)
    report = vnm.sparsify(one, "16:2:8", "wanda", calibration=batches, values="int4", group=32, progress=False)
    vnm.sparsify(two, "16:2:8", "wanda", calibration=batches, progress=False)
    found = vnm.quantize(two, "int4", 32, calibration=batches, progress=False)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(
            a.to_dense() if isinstance(a, vnm.VNMTensor) else a, b.to_dense() if isinstance(b, vnm.VNMTensor) else b
        )
    assert report.quantized.to_dict() == found.to_dict()
    assert "int4/32" in str(report)
    before = copy.deepcopy(dense.state_dict())
    for options in ({"values": "int7"}, {"values": "int8", "group": 48}):
        with pytest.raises(vnm.VNMError):
            vnm.sparsify(dense, "16:2:8", **options, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert vnm.sparsify(dense, "16:2:8", progress=False).quantized is None
