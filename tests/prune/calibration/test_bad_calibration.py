"""Calibration data of every kind: what counts as a batch, padding, modes of the caller, and clear errors."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vnm_compile as vnm
from vnm_compile.annotate import annotation_of
from vnm_compile.prune import Fisher
from vnm_compile.prune.calibration.padding import real_positions

CALIBRATED = ["wanda", "second_order", pytest.param(Fisher(num_grads=16), id="fisher")]


class Tokens(nn.Module):
    """Embeds, mixes within each position, and answers a position each; knows padding only by its mask."""

    def __init__(self, vocabulary=50):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 32)
        self.fc = nn.Linear(32, 32)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(32, 16)

    def forward(self, input_ids, attention_mask=None):
        return self.out(self.drop(self.fc(input=self.embed(input_ids)).relu()))


def tokens():
    torch.manual_seed(0)
    return Tokens().eval()


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8)).eval()


def pruned(model, calibration, method="wanda", **arguments):
    torch.manual_seed(1)  # fisher draws noise
    vnm.sparsify(model, "16:2:8", method, calibration=calibration, progress=False, **arguments)
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-3, rtol=2e-3)
        assert float(((value == 0) != (other[name] == 0)).float().mean()) < 0.005, name


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_one_tensor_or_dict_is_one_batch_and_everything_else_is_iterated():
    x = torch.randn(24, 32)
    expected = pruned(dense(), [x])
    forms = {
        "tensor": x,
        "dict": {"input": x},
        "mapping": UserDict(input=x),
        "generator": (each for each in x.split(8)),
        "tuples": ((each,) for each in x.split(8)),
        "lists": [[each] for each in x.split(8)],
        "loader": DataLoader(TensorDataset(x), batch_size=8),
        "dataset": TensorDataset(x.unsqueeze(1)),
        "dicts": [{"input": each} for each in x.split(8)],
    }
    for form in forms.values():
        assert_same(expected, pruned(dense(), form))


USED_UP = iter([torch.randn(4, 32)])
next(USED_UP)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("some text", "calibration= is a str.*tokenize"),
        (b"bytes", "calibration= is a bytes"),
        (np.zeros((4, 32), np.float32), "calibration= is a ndarray.*torch.from_numpy"),
        ([np.zeros((4, 32), np.float32)], r"batch 0.* is a ndarray.*torch.from_numpy"),
        ([{"input": np.zeros((4, 32), np.float32)}], "holds a ndarray.*torch.from_numpy"),
        (["a", "b"], "batch 0.* is a str.*tokenize"),
        ([("a text",)], "holds no tensor.*tokenize"),
        ([[1, 2, 3]], "holds no tensor.*torch.tensor"),
        (5, "calibration= is a int"),
        ([5], "batch 0.* is a int"),
        ([None], "batch 0.* is a NoneType"),
        ([{1: torch.zeros(4, 32)}], "keys"),
        ([{}], "holds no tensor"),
        ([()], "holds no tensor"),
        (USED_UP, "it is empty"),
        ((x for x in ()), "it is empty"),
        ({}, "holds no tensor"),
        (
            [{"inputs": torch.zeros(4, 32)}],
            r"the calibration batch \{inputs: float32 \[4, 32\]\}.*inputs",
        ),
        ([(torch.zeros(4, 32), torch.zeros(4))], "does not take the calibration batch"),
        ([torch.zeros(4, 31)], r"does not take the calibration batch float32 \[4, 31\]"),
        ([torch.zeros(4, 32, dtype=torch.float64)], "does not take the calibration batch float64"),
        ([torch.randn(8, 32), torch.full((4, 32), torch.inf)], "NaN or infinity"),
    ],
)
def test_no_calibration_data(calibration, message):
    model = dense().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(vnm.VNMError, match=message):
        vnm.sparsify(model, "16:2:8", "wanda", calibration=calibration, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert annotation_of(model[0]) is None
    assert all(module.training for module in model.modules())
    assert not hooks(model)


@pytest.mark.parametrize("method", CALIBRATED)
def test_tokens_outside_the_vocabulary(method):
    for ids in (torch.tensor([[1, 50]]), torch.tensor([[1, -1]])):
        model = tokens()
        with pytest.raises(vnm.VNMError, match=r"^embed: index (50|-1) .* embedding of 50 rows"):
            vnm.sparsify(model, "16:2:8", method, calibration=[{"input_ids": ids}], progress=False)
        assert not hooks(model)


@pytest.mark.parametrize("method", CALIBRATED)
def test_held_out_data_is_looked_at_the_same_way(method):
    model, x = dense(), [torch.randn(16, 32)]
    before = copy.deepcopy(model.state_dict())
    for held_out in ("text", [torch.zeros(4, 31)], [np.zeros((4, 32))], []):
        with pytest.raises(vnm.VNMError):
            pruned(model, x, method, held_out=held_out)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert annotation_of(model[0]) is None


def padded_ids(side):
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, 50, (length,), generator=generator) for length in (12, 5, 3)]
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(12 - len(row), 12)
        ids[i, where], mask[i, where] = row, 1
    return rows, ids, mask


def four_dimensional(mask, kind):
    keys = mask.bool()[:, None, None, :].expand(-1, 1, 12, -1)
    if "causal" in kind:
        keys = keys & torch.ones(12, 12, dtype=torch.bool).tril()
    if "open" in kind:  # queries that see nothing see everything, as for fused attention
        keys = keys | ~keys.any(-1, keepdim=True)
    return keys if "bool" in kind else torch.zeros(keys.shape).masked_fill(~keys, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bool", "bool causal", "added", "added causal", "added causal open"])
def test_masks_of_every_kind_tell_the_same(side, kind):
    _, _, mask = padded_ids(side)
    for each in (mask, torch.ones_like(mask)):
        assert torch.equal(real_positions(four_dimensional(each, kind)), each.bool())
        assert torch.equal(real_positions(each), each.bool())
        assert torch.equal(real_positions(each.float()), each.bool())


@pytest.mark.parametrize("method", ["wanda", "second_order"])
def test_padding_does_not_count(method):
    rows, ids, mask = padded_ids("right")
    expected = pruned(tokens(), [row.unsqueeze(0) for row in rows], method)
    forms = [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask.bool()},
        {"input_ids": ids, "attention_mask": four_dimensional(mask, "added causal")},
        (ids, mask),
    ]
    for form in forms:
        assert_same(expected, pruned(tokens(), [form], method))
    plain = pruned(tokens(), [{"input_ids": ids}], method)
    assert not torch.equal(plain["fc.weight"] == 0, expected["fc.weight"] == 0), "without a mask, padding counts"
    with pytest.raises(vnm.VNMError, match="hides every position"):
        pruned(tokens(), [{"input_ids": ids, "attention_mask": mask * 0}], method)


def test_padding_does_not_count_in_fisher_or_the_held_out_error():
    rows, ids, mask = padded_ids("right")
    junk = torch.where(mask == 1, ids, 7)
    results = [
        pruned(tokens(), [{"input_ids": each, "attention_mask": mask}], Fisher(num_grads=16)) for each in (ids, junk)
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    errors = []
    for held_out in ([{"input_ids": ids, "attention_mask": mask}], [row.unsqueeze(0) for row in rows]):
        report = vnm.sparsify(tokens(), "16:2:8", held_out=held_out, progress=False)
        errors.append([layer.held_out_error for layer in report.layers])
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


class Flat(nn.Module):
    """Works on tokens without their batch, and on positions first."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.out = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, input_ids, attention_mask=None):
        x = self.fc(self.embed(input_ids).flatten(0, 1))
        return self.out(x.view(*input_ids.shape, -1).transpose(0, 1))


def test_padding_in_other_arrangements():
    rows, ids, mask = padded_ids("left")
    torch.manual_seed(0)
    model = Flat()
    expected = pruned(copy.deepcopy(model), [row.unsqueeze(0) for row in rows])
    assert_same(expected, pruned(model, [{"input_ids": ids, "attention_mask": mask}]))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, again=True):
        y = self.fc(input=x)
        return self.fc(3 * x) + y if again else y


def test_layers_called_twice_and_not_at_all():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(16, 32)
    twice, once = copy.deepcopy(model), copy.deepcopy(model)
    pruned(twice, [x], exclude="unused")
    pruned(once, [{"x": torch.cat([x, 3 * x]), "again": False}], exclude="unused")
    assert torch.equal(twice.fc.weight == 0, once.fc.weight == 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(vnm.VNMError, match=r"^unused: no calibration data reached it"):
        pruned(model, [x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hooks(model)


@pytest.mark.parametrize("method", ["magnitude", *CALIBRATED])
def test_the_callers_modes_make_no_difference(method):
    x = torch.randn(32, 32)
    expected = pruned(dense(), [x], method)
    for mode in (
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.compiler.set_stance("default"),
    ):
        model = dense().train()
        with mode():
            found = pruned(model, [x.clone()], method)
        if mode is torch.inference_mode or mode is torch.no_grad:
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert vnm.matches(model[0].weight, "16:2:8")
        assert all(module.training for module in model.modules())
        assert all(p.requires_grad for p in model.parameters())
        assert model(x).requires_grad, "nothing of the mode stays in the model"


def test_compiled_models_are_pruned_as_they_are():
    x = torch.randn(32, 32)
    model = dense()
    model[2] = torch.compile(model[2], backend="eager")
    found = pruned(torch.compile(model, backend="eager"), [x])
    expected = pruned(dense(), [x])
    weight = next(value for name, value in found.items() if name.endswith("2._orig_mod.weight"))
    assert torch.equal(weight == 0, expected["2.weight"] == 0)


@pytest.mark.slow
def test_other_defaults_of_dtype_and_device():
    """In a process of its own: a default device reaches everything that is made without one."""
    code = """
import torch, vnm_compile as vnm
from torch import nn
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
x, out = torch.randn(64, 32), {}
def prune(method, **more):
    m = model().to("cpu", torch.float32) if torch.get_default_device().type == "cpu" else ready.pop()
    torch.manual_seed(1)
    vnm.sparsify(m, "16:2:8", method, calibration=[x], held_out=[x], progress=False, **more)
    return m[0].weight.detach().clone()
fisher = vnm.prune.Fisher(num_grads=16)
cases = [("magnitude", {}), ("wanda", {}), ("second_order", {}), (fisher, {}), ("wanda", {"permute": True})]
expected = [prune(*[c[0]], **c[1]) for c in cases]
ready = [model() for _ in range(2 * len(cases))]
torch.set_default_device("meta")
for (name, more), e in zip(cases, expected):
    found = prune(name, **more)
    assert found.device.type == "cpu", name
    if isinstance(name, str): assert torch.equal(found, e), name
torch.set_default_device("cpu")
torch.set_default_dtype(torch.float64)
for (name, more), e in zip(cases[:4], expected):
    torch.set_default_dtype(torch.float32); m = model(); torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    vnm.sparsify(m, "16:2:8", name, calibration=[x], held_out=[x], progress=False, **more)
    assert m[0].weight.dtype == torch.float32
    assert float(((m[0].weight == 0) == (e == 0)).float().mean()) > 0.98, name
torch.set_default_dtype(torch.bfloat16)
torch.set_default_dtype(torch.float32); m = model(); torch.set_default_dtype(torch.bfloat16)
for name, more in cases[:4]:
    vnm.sparsify(m, "16:2:8", name, calibration=[x], progress=False, **more)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", CALIBRATED)
def test_a_model_that_fails_half_way_is_as_it_was(method, error):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = dense(), 0

        def forward(self, x):
            self.calls += 1
            y = self.net[:3](x)
            if self.calls > 2:
                raise error("in the middle")
            return self.net[3:](y)

    model = Failing().train()
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    with pytest.raises(vnm.VNMError if error is RuntimeError else error):
        vnm.sparsify(model, "16:2:8", method, calibration=[torch.randn(8, 32)] * 3, progress=False)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hooks(model)
    assert model.training
    assert annotation_of(model.net[0]) is None
    assert all(p.requires_grad for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()
