"""Activations, biases and packed arrays of any layout, and results laid out as eager lays them out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vnm_compile as vnm
from tests.support import assert_as_accurate_as_dense, make_sparse_, random_sparse, with_slow
from vnm_compile.layout import Layout
from vnm_compile.ops import linear
from vnm_compile.spec import Spec

OPTIONS = {"vnm.policy": "memory"}

# Of an activation [3, 6, 128], what a layer of 64 columns may read.
VIEWS = {
    "last row": lambda x: x[-1, :, :64],
    "last token": lambda x: x[:, -1, 64:],
    "all but the first": lambda x: x[1:, 2:, :64],
    "narrow": lambda x: x.narrow(1, 2, 3).narrow(2, 5, 64),
    "every second column": lambda x: x[..., ::2],
    "every second row": lambda x: x[::2, ::2, 3:67],
    "transposed": lambda x: x.flatten(0, 1)[:, 1:9].t().repeat(1, 4)[:, 1:65],
    "tokens first": lambda x: x[..., 64:].transpose(0, 1),
    "one row expanded": lambda x: x[1, 2, 32:96].expand(2, 5, 64),
    "zero stride": lambda x: x[0, 0, 7:8].expand(4, 64),
    "windows": lambda x: x.flatten()[3:].unfold(0, 64, 2)[:9],
    "one dimension": lambda x: x[2, 1, 1:65],
    "four dimensions": lambda x: x[..., 64:].unflatten(1, (2, 3))[:, 1:],
    "diagonal": lambda x: x.flatten(0, 1)[:, :64].as_strided((5, 64), (129, 1), 70),
    "view of a view": lambda x: x[1:][:, 1:].flatten(1)[:, 40:].unfold(1, 64, 64)[0],
    "rows": lambda x: torch.stack([chunk[-1] for row in x.chunk(3) for chunk in row.unbind()[0].split(64, -1)]),
}


class OverViews(nn.Module):
    """One layer over several views of what `prepare` makes of the input."""

    def __init__(self, prepare=None, views=()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 40)
        make_sparse_(self, "16:2:8")
        self.prepare, self.views = prepare, views

    def forward(self, x):
        x = self.prepare(x)
        return [self.layer(VIEWS[name](x)) for name in self.views]


def check(model: nn.Module, compiled, *inputs: torch.Tensor) -> None:
    """Results of a compiled model against its own in float64: value, dtype, shape and strides."""
    eager, actual = model(*inputs), compiled(*inputs)
    weights = {name: p.double() for name, p in model.named_parameters()}
    reference = torch.func.functional_call(model, weights, tuple(x.double() for x in inputs))
    for ours, dense, exact in zip(actual, eager, reference, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (dense.dtype, dense.shape, dense.stride())
        if ours.numel():
            assert_as_accurate_as_dense(ours, dense, exact, slack=1.5)


@pytest.mark.slow
def test_views_of_an_input():
    model = OverViews(lambda x: x, VIEWS)
    with torch.no_grad():
        check(model, torch.compile(model, backend="vnm", options=OPTIONS), torch.randn(3, 6, 128))


def test_views_of_what_is_computed():
    model = OverViews(lambda x: x.cos(), ["last row", "all but the first", "every second column", "windows", "rows"])
    with torch.no_grad():
        check(model, torch.compile(model, backend="vnm", options=OPTIONS), torch.randn(3, 6, 128))


def test_views_in_another_dtype():
    model, x = OverViews(), torch.randn(3, 6, 64)

    @torch.compile(backend="vnm", options=OPTIONS)
    def run(x, bits):
        return model.layer(bits[1:].view(torch.float32)), model.layer((x + 1).view(torch.int16).view(torch.float32))

    with torch.no_grad():
        actual = run(x, x.view(torch.int32))
        torch.testing.assert_close(actual, (model.layer(x[1:]), model.layer(x + 1)))


@pytest.mark.parametrize("dynamic", with_slow([None, True], quick=[None]), ids=["static", "dynamic"])
def test_inputs_that_arrive_as_views(dynamic):
    """Also no tokens at all, and one token or one batch whose stride means nothing."""
    model = OverViews()
    base = torch.randn(5, 7, 64)
    inputs = [base, base[1:], base[:0], base[:, :1], base[:1], torch.randn(5, 64, 7).mT, base.transpose(0, 1)]
    inputs += [base[:1, :3].as_strided((1, 3, 64), (999, 64, 1)), base[:1].expand(5, 7, 64)]
    run = torch.compile(lambda x: [F.gelu(model.layer(x))], backend="vnm", options=OPTIONS, dynamic=dynamic)
    with torch.no_grad():
        for x in inputs[: None if dynamic else 3]:
            (actual,), eager = run(x), F.gelu(model.layer(x))
            torch.testing.assert_close(actual, eager)
            assert actual.stride() == eager.stride()


def test_tokens_chosen_by_a_mask():
    """Their number is only known when the graph runs."""
    model = OverViews()

    @torch.compile(backend="vnm", options=OPTIONS, fullgraph=True)
    def run(x):
        rows = (x[:, 0] > 0).nonzero().squeeze(1)
        return model.layer(x[rows]).relu()

    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for x in (torch.randn(9, 64), -torch.rand(9, 64)):
            torch.testing.assert_close(run(x), model.layer(x[x[:, 0] > 0]).relu())


def test_bias_and_residual_of_any_layout():
    layer = OverViews().layer
    table, x, wide = torch.randn(4, 80), torch.randn(6, 64), torch.randn(80, 12)

    def forward(table, x, wide):
        residual = wide[1:41, ::2].t()
        return [
            F.linear(x, layer.weight, table[-1, :40]),
            F.linear(x, layer.weight, table[1, ::2]) + residual,
            F.linear(x, layer.weight, table[1, 3:4].expand(40)) * residual.flip(0),
            F.linear(x[1:], layer.weight) + table[:3, :40].repeat(2, 1)[1:],
            F.linear(x, layer.weight, table[2, 40:]) + x[..., 24:],
        ]

    with torch.no_grad():
        actual = torch.compile(forward, backend="vnm", options=OPTIONS)(table, x, wide)
        for ours, eager in zip(actual, forward(table, x, wide), strict=True):
            torch.testing.assert_close(ours, eager)
            assert ours.stride() == eager.stride()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_packed_arrays_may_lie_anywhere(dtype):
    """In one storage, at addresses that no vector is aligned to, and with strides."""
    spec, out_features, in_features = Spec(16, 2, 8), 40, 72
    weight = random_sparse(out_features, in_features, spec, dtype)
    packed = vnm.compress(weight, spec)
    arrays = [packed.values, packed.metadata, packed.columns]
    storage = torch.zeros(1 + sum(a.nbytes + 3 for a in arrays), dtype=torch.uint8)
    placed, start = [], dtype.itemsize
    for array in arrays:
        part = storage[start : start + array.nbytes]
        part.copy_(array.contiguous().view(torch.uint8).flatten())
        placed.append(part.view(array.dtype).view(array.shape))
        start += -(-array.nbytes // dtype.itemsize) * dtype.itemsize + (dtype.itemsize if len(placed) == 1 else 1)
    strided = [torch.stack([array, array], -1)[..., 0] for array in arrays]

    layout = Layout(spec, out_features, in_features)

    @torch.compile(backend="vnm", options=OPTIONS)
    def run(x, *a):
        sliced = [torch.cat([each, each])[each.shape[0] :] for each in a]
        return [linear(x, each, layout) for each in (a, sliced)]

    for tokens in (1, 3, 70):
        x = torch.randn(tokens, in_features).to(dtype)
        for each in (placed, strided):
            for y in run(x, *each):
                assert_as_accurate_as_dense(y, F.linear(x, weight), x.double() @ weight.double().T)


class Siblings(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(64, 40, bias), nn.Linear(64, 24, bias), nn.Linear(64, 24, bias)
        make_sparse_(self, "16:2:8")

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return [q, k.unflatten(-1, (4, -1)).transpose(1, 2), v.flatten(0, 1), q.as_strided((3, 4), (4, 1), 2) + 1]


@pytest.mark.parametrize(("bias", "tokens"), [(True, 5), (False, 1)])
def test_outputs_of_joined_layers_are_tensors_of_their_own(bias, tokens):
    """The joined layers write into one buffer; a caller sees eager's strides and keeps only what he got alive."""
    model, x = Siblings(bias), torch.randn(2, tokens, 64)
    compiled = torch.compile(model, backend="vnm", options=OPTIONS)
    with torch.no_grad():
        check(model, compiled, x)
        q, k, v, _ = compiled(x)
        q.view(2, -1)
        for section in (q, k, v):
            assert section.untyped_storage().nbytes() == section.numel() * section.element_size()


def test_a_joined_output_survives_a_graph_break():
    model = Siblings(True)

    @torch.compile(backend="vnm", options=OPTIONS)
    def run(x):
        q, k = model.q(x), model.k(x)
        torch._dynamo.graph_break()
        return q.view(2, -1), k.view(-1)

    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        q, k = run(x)
        torch.testing.assert_close((q, k), (model.q(x).view(2, -1), model.k(x).view(-1)))
