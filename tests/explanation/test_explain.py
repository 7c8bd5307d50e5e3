"""What `explain` and the report of `sparsify` say: nothing omitted, names that can be used, true reasons."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vnm_compile as vnm
from tests.support import make_sparse_
from vnm_compile.inspection.kernel_report import KernelReport

SPARSE = {"vnm.policy": "memory"}


class Experts(nn.Module):
    """Experts as transformers 5 stores them: one parameter for all."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 32))
        self.scale = nn.Parameter(torch.randn(1, 1, 32))

    def forward(self, x):
        return (x @ self.gate_up_proj[0].T).chunk(2, -1)[0] * self.scale


class Mixed(nn.Module):
    """A linear, experts, convolutions, an embedding, a table of positions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.positions = nn.Parameter(torch.randn(1, 8, 32))
        self.fc = nn.Linear(32, 32)
        self.experts = Experts()
        self.point = nn.Conv2d(32, 32, 1)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.norm = nn.LayerNorm(32)
        self.small = nn.Linear(32, 8)

    def forward(self, ids):
        x = self.experts(self.fc(self.embed(ids) + self.positions)).transpose(1, 2)
        x = self.conv(self.point(x.unsqueeze(-1)).squeeze(-1))
        return self.small(self.norm(x.transpose(1, 2)))


def test_what_is_no_linear_is_listed_and_counted():
    model = make_sparse_(Mixed().eval(), "16:2:8")
    weights = {"fc": 32 * 32, "experts.gate_up_proj": 4 * 64 * 32, "point": 32 * 32, "conv": 32 * 32 * 3, "small": 256}
    for inputs in ((), (torch.zeros(1, 8, dtype=torch.int64),)):
        found = vnm.explain(model, *inputs, options=SPARSE)
        assert {layer.name for layer in found.layers} == set(weights)
        assert found["fc"].decision == "sparse"
        assert all(found[name].decision == "dense" for name in ("experts.gate_up_proj", "point", "conv"))
        assert found.totals["dense_bytes"] == 4 * sum(weights.values())
        assert "1x1 convolution" in found["point"].reason
        assert "other weights" in str(found)
    pruned = vnm.sparsify(model, "16:2:8", progress=False)
    assert [layer.name for layer in pruned.layers] == ["fc"]
    assert {each.name for each in pruned.dense} == set(weights) - {"fc"}
    assert pruned.totals["all_weights"] == sum(weights.values())
    assert "experts" in pruned["experts.gate_up_proj"].reason
    assert "9% of" in str(pruned).replace("(8%)", "") or "weights that are multiplied by" in str(pruned)
    assert pruned.to_dict()["dense"]


def test_unknown_names():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    found, pruned = vnm.explain(model), vnm.sparsify(model, "16:2:8", progress=False)
    empty = KernelReport([], [], [], found, None)
    for report in (found, pruned, empty):
        for kind in (vnm.VNMError, KeyError):
            with pytest.raises(kind, match=r"^no layer is called 'no such layer'"):
                report["no such layer"]
    model = nn.ModuleDict({"encoder": nn.Linear(32, 32)})
    with pytest.raises(vnm.VNMError, match="did you mean encoder"):
        vnm.explain(model)["encodr"]


def test_a_weight_that_breaks_its_pattern_is_no_sparse_layer():
    model = nn.Sequential(nn.Linear(32, 32))
    vnm.annotate(model, "16:2:8")
    for inputs in ((), (torch.zeros(2, 32),)):
        with pytest.raises(vnm.VNMError, match=r"^0: .* is not 16:2:8"):
            vnm.explain(model, *inputs, options=SPARSE)


def test_names_are_those_before_compilation():
    model = make_sparse_(nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32))), "16:2:8").eval()
    expected = ["0", "1.0"]
    model[1] = torch.compile(model[1], backend="eager")
    compiled = torch.compile(model, backend="eager")
    for each in (model, compiled):
        for inputs in ((), (torch.zeros(2, 32),)):
            assert sorted(layer.name for layer in vnm.explain(each, *inputs, options=SPARSE).layers) == expected


class Places(nn.Module):
    """Layers that run in a graph, outside of any, inside checkpointing, and not at all."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside, self.again, self.never = (nn.Linear(32, 32) for _ in range(4))

    @torch.compiler.disable
    def eager(self, x):
        return self.outside(x)

    def forward(self, x):
        return checkpoint(self.again, self.eager(self.inside(x)), use_reentrant=False)


def test_not_run_is_said_only_of_what_is_not_run():
    model = make_sparse_(Places().eval(), "16:2:8")
    found = vnm.explain(model, torch.zeros(2, 32), options=SPARSE)
    assert found["inside"].decision == "sparse"
    assert found["never"].decision == "not run"
    assert found["outside"].decision == "dense"
    assert "outside of the graphs" in found["outside"].reason
    assert found["again"].decision in ("sparse", "dense")
    assert all(layer.reason for layer in found.layers)


def test_markup_in_names_is_text():
    name = "[/red]"
    model = nn.Sequential()
    model.add_module(name, nn.Linear(32, 32))
    model.add_module("esc\x1b[31m", nn.Linear(32, 32))
    report = vnm.sparsify(model, "16:2:8", "wanda", calibration=[torch.randn(8, 32)], progress=True)
    for shown in (str(report), str(vnm.explain(model, torch.zeros(1, 32), options=SPARSE)), str(vnm.explain(model))):
        assert "[/red]" in shown
        assert "\x1b" not in shown


def test_markup_and_formulas_in_plots(tmp_path):
    model = nn.Sequential()
    model.add_module("$a^{$", nn.Linear(32, 32))
    report = vnm.sparsify(model, "16:2:8", progress=False)
    report.plot(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").exists()


def test_what_stays_in_memory_is_said():
    """A dense weight stays beside its packed arrays; compressed, nothing dense is left."""
    model, x = make_sparse_(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 20)).eval(), "16:2:8"), torch.randn(3, 32)
    with torch.no_grad():
        totals = vnm.explain(model, x, options=SPARSE).totals
        assert totals["resident_bytes"] == totals["dense_bytes"] + totals["stored_bytes"]
        assert "compress_model" in str(vnm.explain(model, x, options=SPARSE))
        vnm.compress_model(model)
        found = vnm.explain(model, x, options=SPARSE)
    assert found.totals["resident_bytes"] == found.totals["stored_bytes"] < found.totals["dense_bytes"]
    assert "In memory stay" not in str(found)
    assert found.to_dict()["layers"][0]["resident_bytes"] == found["0"].stored_bytes


@pytest.mark.parametrize(
    ("spec", "dtype", "target", "reason"),
    [
        ("8:2:8", torch.float16, "sm_90", "no kernel on GPUs takes blocks of 8 rows"),
        ("24:2:8", torch.float16, "gfx942", "no kernel on GPUs takes blocks of 24 rows"),
        ("16:2:8", torch.float64, "sm_80", "no kernel on GPUs takes float64"),
        ("16:2:8", torch.float64, None, "no kernel on CPUs takes float64"),
        ("8:2:8", torch.float16, None, None),
        ("48:2:8", torch.float32, "sm_80", None),
    ],
)
def test_weights_that_no_kernel_multiplies_by_are_told(spec, dtype, target, reason):
    """They are compressed, and what a call does is to unpack them; that must not be called sparse."""
    net = make_sparse_(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), spec).to(dtype)
    vnm.compress_model(net, spec)
    x = torch.randn(32, 64).to(dtype)
    report = vnm.inspect(net, x, target=target) if target else None
    layers = (report.explanation if report else vnm.explain(net, x)).layers
    assert {layer.decision for layer in layers} == {"sparse" if reason is None else "dense"}
    assert all(reason is None or reason in layer.reason for layer in layers)
    if report:
        assert bool(report.sparse) == (reason is None)
