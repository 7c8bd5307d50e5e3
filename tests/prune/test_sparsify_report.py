"""Held-out errors, the plot, runs that are taken up again, and models that are not as calibration wants them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from vnm_compile.prune.resume import fingerprint


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8)).eval()


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 32, generator=generator) for _ in range(3)]


def test_held_out_errors_are_those_of_the_dense_models_inputs():
    dense, pruned, unseen = model(), model(), batches(1)
    report = vnm.sparsify(
        pruned, "16:2:8", "second_order", calibration=batches(), held_out=unseen, progress=False
    )  # fmt: skip
    x = torch.cat(unseen).double()
    x2 = nn.functional.gelu(dense[0].double()(x))
    for layer, given, index in zip(report.layers, (x, x2), (0, 2), strict=True):
        before, after = dense[index].weight.double(), pruned[index].weight.double()
        expected = (given @ (after - before).T).norm() / (given @ before.T).norm()
        assert layer.held_out_error == pytest.approx(expected.item(), rel=1e-4)
        assert vnm.matches(pruned[index].weight, "16:2:8"), "the pruned weights are back"
    assert "held out" in str(report)
    with pytest.raises(vnm.VNMError, match="held_out= holds no data"):
        vnm.sparsify(model(), "16:2:8", held_out=[], progress=False)


def test_the_plot_shows_every_layer(tmp_path):
    report = vnm.sparsify(model(), "16:2:8", "wanda", calibration=batches(), held_out=batches(1), progress=False)
    for other in (report, vnm.sparsify(model(), "16:2:8", progress=False)):
        other.plot(tmp_path / "plot.svg")
        text = (tmp_path / "plot.svg").read_text()
        assert f"pruned by {other.method}" in text
    with pytest.raises(vnm.VNMError, match="cannot be written"):
        report.plot(tmp_path / "plot.nonsense")


class Interrupted(nn.Module):
    """A model that fails after so many calls."""

    def __init__(self, net, calls):
        super().__init__()
        self.net, self.calls = net, calls

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.net(x)


@pytest.mark.parametrize("method", ["wanda", "second_order"])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, method):
    expected = Interrupted(model(), 100)
    vnm.sparsify(expected, "16:2:8", method, calibration=batches(), progress=False)
    stopped = Interrupted(model(), 5)
    arguments = {"method": method, "calibration": batches(), "checkpoint": tmp_path / "run", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        vnm.sparsify(stopped, "16:2:8", **arguments)
    assert torch.equal(stopped.net[0].weight, model()[0].weight)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["net.0.safetensors"]
    # One call for the order, three for the second layer: the first is not looked at again.
    resumed = Interrupted(model(), 4)
    report = vnm.sparsify(resumed, "16:2:8", **arguments)
    for index in (0, 2):
        assert torch.equal(resumed.net[index].weight, expected.net[index].weight)
    assert all(layer.output_error is not None for layer in report.layers)
    # All is there: the model runs once.
    vnm.sparsify(Interrupted(model(), 1), "16:2:8", **arguments)


def test_layers_of_another_run_are_refused(tmp_path):
    arguments = {"method": "wanda", "calibration": batches(), "checkpoint": tmp_path, "progress": False}
    vnm.sparsify(model(), "16:2:8", **arguments)
    for change, named in [
        ({"method": "second_order"}, "method"),
        ({"calibration": batches(1)}, "calibration"),
        ({"method": vnm.prune.Wanda(norm="l2")}, "norm"),
        ({"method": vnm.prune.Wanda(sequential=False)}, "sequential"),
        ({"spec": "16:2:5"}, "layers, spec"),
    ]:
        with pytest.raises(vnm.VNMError, match=f"of a run with another {named};"):
            vnm.sparsify(model(), **{"spec": "16:2:8", **arguments, **change})
    other = model()
    with torch.no_grad():
        other[2].weight[0, 0] += 1
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(vnm.VNMError, match=r"^2: .* of a run with another weight;"):
        vnm.sparsify(other, "16:2:8", **arguments)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    (tmp_path / "0.safetensors").write_bytes(b"half a file")
    with pytest.raises(vnm.VNMError, match="cannot be read"):
        vnm.sparsify(model(), "16:2:8", **arguments)


def test_fingerprints_tell_data_apart():
    a = torch.zeros(4, dtype=torch.bfloat16)
    different = [a, a.view(2, 2), a.float(), [a], {"x": a}, {"y": a}, [a, a], [[a], a], [a, None], "0", 0, True]
    assert len({fingerprint(each) for each in different}) == len(different)
    assert fingerprint({"x": a, "n": 1}) == fingerprint({"x": a.clone(), "n": 1})
    with pytest.raises(vnm.VNMError, match="with a set"):
        fingerprint([{1, 2}])


@pytest.mark.parametrize("method", ["wanda", "second_order", "fisher"])
def test_a_model_in_train_mode_is_calibrated_without_dropout(method):
    plain = model()
    noisy = nn.Sequential(plain[0], nn.Dropout(0.5), *plain[1:])
    expected, trained = copy.deepcopy(noisy).eval(), copy.deepcopy(noisy).train()
    trained[0].eval()  # a mixed state comes back as it was
    for each in (expected, trained):
        torch.manual_seed(1)  # fisher draws noise
        vnm.sparsify(each, "16:2:8", method, calibration=batches(), held_out=batches(1), progress=False)
    assert torch.equal(expected[0].weight, trained[0].weight)
    assert torch.equal(expected[3].weight, trained[3].weight)
    assert [module.training for module in trained] == [False, True, True, True, True, True]


def test_torchs_fused_encoder_layer():
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    data = [torch.randn(2, 8, 32)]
    with pytest.raises(vnm.VNMError, match=r"^self_attn.out_proj: nn.MultiheadAttention multiplies .*exclude it"):
        vnm.sparsify(encoder, "16:2:8", "second_order", calibration=data, progress=False)
    vnm.sparsify(
        encoder, "16:2:8", "second_order", exclude="*.out_proj", calibration=data, held_out=data, progress=False
    )  # fmt: skip
    assert vnm.matches(encoder.linear2.weight, "16:2:8")
    assert torch.backends.mha.get_fastpath_enabled()
    vnm.sparsify(encoder, "16:2:8", "fisher", calibration=data, progress=False)
    assert vnm.matches(encoder.self_attn.out_proj.weight, "16:2:8")


def test_not_sequential_layers_see_the_dense_models_inputs():
    """Each layer comes out as if it were the only one to be pruned."""
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))).eval()
    batches = [torch.randn(64, 32) for _ in range(4)]

    def prune(include, sequential):
        model = copy.deepcopy(dense)
        method = vnm.prune.SecondOrder(sequential=sequential)
        vnm.sparsify(model, "16:2:8", method, include, calibration=batches, progress=False)
        return model

    together = prune(["0", "1", "2"], False)
    for i in range(3):
        torch.testing.assert_close(together[i].weight, prune([str(i)], True)[i].weight)
    assert not torch.equal(prune(["0", "1", "2"], True)[2].weight, together[2].weight)
