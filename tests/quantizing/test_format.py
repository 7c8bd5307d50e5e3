"""Quantised values as they are stored: text, sizes, levels, and every use of a weight that has them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vnm_compile as vnm
from tests.support import random_sparse
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.errors import BadOption, DamagedWeight, RefusedWrite, VNMError
from vnm_compile.format import Packed, pack, unpack
from vnm_compile.layout import Layout
from vnm_compile.quantization import Quantization, store_levels, stored_levels
from vnm_compile.quantizing.quantize import quantise_packed
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor

KINDS = ["int8/32", "int8/row", "int4/64", "int4/row"]


def quantised(kind="int4/32", spec="16:2:8", size=(48, 72), dtype=torch.float32, transposed=False):
    """A random quantised weight."""
    spec = Spec.parse(spec)
    floats = Layout(spec, *size)
    layout = Layout(spec, *size, Quantization.parse(kind))
    packed = quantise_packed(pack(random_sparse(*size, spec, dtype), spec), floats, layout)
    weight = VNMTensor._owning(packed, layout, False)
    return weight.t() if transposed else weight


@pytest.mark.parametrize("kind", KINDS)
def test_text_says_all_of_a_layout(kind):
    layout = Layout(Spec(64, 2, 8), 4096, 11008, Quantization.parse(kind))
    assert Layout.parse(layout.text) == layout
    assert layout.text == f"64:2:8 4096x11008 {kind}"
    assert Quantization.parse(str(Quantization.parse(kind))) == Quantization.parse(kind)
    assert Layout.parse("64:2:8 4096x11008").quantization is None


@pytest.mark.parametrize(
    "text", ["int2/64", "int8", "int8/0", "int8/16", "int4/65", "int4/rows", "INT8/64", " int8/64", ""]
)
def test_other_texts_are_refused(text):
    with pytest.raises(BadOption):
        Quantization.parse(text)
    with pytest.raises(VNMError):
        Layout.parse(f"64:2:8 4096x11008 {text}")


@pytest.mark.parametrize(
    "wrong", [("int3", 64), ("int8", 16), ("int8", "column"), ("int8", 64.0), ("int8", True), (8, 64)]
)
def test_mistakes_of_users_are_named(wrong):
    with pytest.raises(BadOption):
        Quantization.of(*wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spec", "size"), [("16:2:8", (48, 72)), ("16:1:5", (33, 47)), ("1:2:4", (3, 5)), ("64:2:32", (64, 640))]
)
def test_bytes_are_those_of_the_formula(kind, spec, size):
    layout = Layout(Spec.parse(spec), *size, Quantization.parse(kind))
    rows, kept = layout.rows, layout.groups * layout.spec.n
    group = layout.quantization.group or kept
    values = kept if layout.quantization.bits == 8 else -(-kept // 2)
    columns = layout.rows // layout.spec.v * layout.groups * 4
    for dtype in (torch.bfloat16, torch.float32):
        expected = rows * (values + -(-kept // 4) + -(-kept // group) * dtype.itemsize) + columns
        assert layout.nbytes(dtype) == expected
        packed = random_packed(layout, dtype, torch.device("cpu"))
        assert packed.nbytes == expected
        assert tuple(map(tuple, (each.shape for each in packed))) == layout.shapes


def test_a_dense_weight_takes_these_shares_of_bf16():
    """The figures of 64:2:8 with groups of 64: 0.57 bytes a dense weight in bf16, 0.34 in int8, 0.21 in int4."""
    weights = 4096 * 4096
    for kind, share in ((None, 0.57), ("int8/64", 0.33), ("int4/64", 0.21)):
        layout = Layout(Spec(64, 2, 8), 4096, 4096, Quantization.parse(kind) if kind else None)
        assert layout.nbytes(torch.bfloat16) / weights == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("kept", [0, 1, 2, 7, 64])
def test_levels_come_back(kept):
    for quantization in (Quantization(8), Quantization(4)):
        levels = torch.randint(quantization.lowest, quantization.highest + 1, (5, kept), dtype=torch.int8)
        stored = store_levels(levels, quantization)
        assert stored.dtype == quantization.dtype
        assert stored.shape == (5, quantization.width(kept))
        assert torch.equal(stored_levels(stored, quantization, kept), levels)
    every = torch.arange(-8, 8, dtype=torch.int8)[None]
    assert store_levels(every, Quantization(4))[0].tolist() == [0x98, 0xBA, 0xDC, 0xFE, 0x10, 0x32, 0x54, 0x76]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_its_level_times_its_scale(kind, dtype):
    weight = quantised(kind, "16:2:5", (33, 47), dtype)
    layout, packed = weight.layout_of_arrays, weight.packed
    levels = stored_levels(packed.values, layout.quantization, layout.kept)
    group = layout.quantization.group or layout.kept
    expected = torch.zeros(layout.rows, layout.groups * 5, dtype=torch.float64)
    for row in range(layout.rows):
        for i in range(layout.kept):
            index = packed.metadata[row, i // 4].item() >> 2 * (i % 4) & 3
            column = i // 2 * 5 + packed.columns[row // 16, i // 2, index].item()
            expected[row, column] += levels[row, i].item() * packed.scales[row, i // group].double().item()
    torch.testing.assert_close(weight.to_dense().double(), expected[:33, :47], rtol=torch.finfo(dtype).eps, atol=0)
    assert weight.dtype == dtype
    assert vnm.matches(weight.to_dense(), "16:2:5")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_uses_of_a_weight_are_those_of_the_dense_one(kind, transposed):
    weight = quantised(kind, transposed=transposed)
    dense = weight.to_dense()
    x = torch.randn(3, dense.shape[1])
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, dense))
    torch.testing.assert_close(x @ weight.t(), x @ dense.t())
    torch.testing.assert_close(weight * 2, dense * 2)
    torch.testing.assert_close(weight.sum(1), dense.sum(1))
    assert torch.equal(weight.t().to_dense(), dense.t())
    assert torch.equal(weight[1:3], dense[1:3])
    assert f"16:2:8 {kind}" in repr(weight)
    for moved in (weight.detach(), weight.clone(), copy.deepcopy(weight), weight.cpu(), weight.to(torch.float32)):
        assert isinstance(moved, VNMTensor)
        assert str(moved.quantization) == kind
        assert torch.equal(moved.to_dense(), dense)
    half = weight.to(torch.bfloat16)
    assert (half.dtype, half.scales.dtype, half.values.dtype) == (torch.bfloat16, torch.bfloat16, weight.values.dtype)
    torch.testing.assert_close(half.to_dense().float(), dense, rtol=0.01, atol=0)
    empty = torch.empty_like(weight)
    assert isinstance(empty, VNMTensor)
    assert not empty.to_dense().any()


def test_gradients_of_inputs_are_those_of_the_dense_weight():
    for kind in KINDS:
        weight = quantised(kind)
        for layer in (weight, weight.t()):
            x = torch.randn(3, layer.shape[1], requires_grad=True)
            (found,) = torch.autograd.grad(F.linear(x, layer).sin().sum(), x)
            (expected,) = torch.autograd.grad(F.linear(x, layer.to_dense()).sin().sum(), x)
            torch.testing.assert_close(found, expected)


def test_files_and_state_dicts(tmp_path):
    layer = nn.Linear(72, 48)
    layer.weight = nn.Parameter(quantised(), requires_grad=False)
    path = tmp_path / "state.pt"
    torch.save(layer.state_dict(), path)
    state = torch.load(path, weights_only=True)
    other = nn.Linear(72, 48)
    other.weight = nn.Parameter(torch.empty_like(layer.weight), requires_grad=False)
    other.load_state_dict(state)
    assert torch.equal(other.weight.to_dense(), layer.weight.to_dense())
    again = pickle.loads(pickle.dumps(layer.weight.data))
    assert torch.equal(again.to_dense(), layer.weight.to_dense())
    assert again.layout_of_arrays == layer.weight.layout_of_arrays
    shared = quantised()
    shared.share_memory_()
    assert shared.is_shared()


def test_nothing_is_rounded_unasked():
    weight, dense = quantised(), random_sparse(48, 72, "16:2:8")
    before = weight.to_dense()
    for source in (dense, vnm.compress(dense, "16:2:8"), quantised("int8/32"), quantised("int4/64")):
        with pytest.raises(RefusedWrite, match="rounded"):
            weight.data.copy_(source)
    with pytest.raises(RefusedWrite):
        weight[0] = 0
    assert torch.equal(weight.to_dense(), before)
    weight.data.copy_(quantised(dtype=torch.bfloat16))  # the same levels
    floats = vnm.compress(dense, "16:2:8")
    floats.data.copy_(weight)  # the other way nothing is lost
    assert torch.equal(floats.to_dense(), weight.to_dense())
    plain = torch.empty(48, 72)
    plain.copy_(weight)
    assert torch.equal(plain, weight.to_dense())


def test_layers_on_quantised_values_do_not_train():
    layer = nn.Sequential(nn.Linear(72, 48))
    layer[0].weight = nn.Parameter(quantised(), requires_grad=False)
    with pytest.raises(VNMError, match="int4"):
        vnm.train.compress_for_training(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    weight = quantised(dtype=torch.float32)
    bias, x = torch.randn(48), torch.randn(5, 72)
    with torch.autocast("cpu", dtype):
        found, expected = F.linear(x, weight, bias), F.linear(x, weight.to_dense(), bias)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


HOSTILE = {
    "no scales": lambda p, q: (Packed(*p[:3]), q),
    "scales of another dtype": lambda p, q: (p.replaced(3, p.scales.int()), q),
    "scales of another size": lambda p, q: (p.replaced(3, p.scales[:, :-1]), q),
    "values of another dtype": lambda p, q: (p.replaced(0, p.values.float()), q),
    "values of another size": lambda p, q: (p.replaced(0, p.values[:, :-1]), q),
    "other bits": lambda p, q: (p, "int8/32" if q.startswith("int4") else "int4/32"),
    "values in rows that are not there": lambda p, q: (p.replaced(0, torch.full_like(p.values, 1)), q),
    "columns beyond a group": lambda p, q: (p.replaced(2, p.columns + 3), q),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["int8/32", "int4/32"])
def test_hostile_arrays_are_refused(kind, name):
    weight = quantised(kind, "16:2:8", (40, 71))
    packed, text = HOSTILE[name](weight.packed, kind)
    with pytest.raises((DamagedWeight, ValueError)):
        VNMTensor._owning(packed, Layout(Spec(16, 2, 8), 40, 71, Quantization.parse(text)), False)


def test_hostile_levels_are_refused():
    weight = quantised("int8/32")
    values = weight.values.clone()
    values[0, 0] = -128
    with pytest.raises(DamagedWeight, match="-128"):
        VNMTensor(
            values,
            weight.metadata,
            weight.columns,
            weight.spec,
            weight.shape,
            False,
            weight.scales,
            weight.quantization,
        )
    odd = quantised("int4/32", "16:1:8", (16, 24))
    values = odd.values.clone()
    values[0, -1] |= 0x10
    with pytest.raises(DamagedWeight, match="half"):
        VNMTensor(values, odd.metadata, odd.columns, odd.spec, odd.shape, False, odd.scales, odd.quantization)
    with pytest.raises(DamagedWeight, match="scales"):
        VNMTensor(odd.values, odd.metadata, odd.columns, odd.spec, odd.shape, False, odd.scales)


def test_hostile_pickles_are_refused():
    weight = quantised()
    rebuild, arguments = weight.__reduce_ex__(2)
    for changed in ((*arguments[:4], "16:2:8 48x72", *arguments[5:]), (*arguments[:4], 7, *arguments[5:])):
        with pytest.raises(VNMError):
            rebuild(*changed)
    buffer = io.BytesIO()
    torch.save({"w": weight}, buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.load(buffer, weights_only=True)["w"].to_dense(), weight.to_dense())


def test_unpacking_is_of_the_weights_dtype_and_rounds_once():
    layout = Layout(Spec(1, 1, 4), 1, 4, Quantization(8, None))
    scale = torch.tensor([[1.0078125]], dtype=torch.bfloat16)
    packed = Packed(torch.tensor([[127]], dtype=torch.int8), torch.zeros(1, 1, dtype=torch.uint8),
                    torch.arange(4, dtype=torch.uint8).view(1, 1, 4), scale)  # fmt: skip
    exact = torch.tensor(127 * scale.double().item(), dtype=torch.float64)
    assert unpack(packed, layout)[0, 0] == exact.to(torch.bfloat16)
