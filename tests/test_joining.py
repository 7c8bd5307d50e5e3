"""Joining moves multiplications: never past a write to what they read."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vnm_compile as vnm
from tests.passes.running import assert_alike, check, copies, linears, run_rewritten
from tests.support import assert_as_accurate_as_dense, make_sparse_, random_sparse, with_slow
from vnm_compile import dispatch
from vnm_compile.format import unpack
from vnm_compile.passes.effects import effect_of

SINGLES = [("single", "a"), ("single", "b")]

torch.library.define(
    "vnm_tests::bump", "(Tensor(a!) x, Tensor y) -> Tensor", lib=(_lib := torch.library.Library("vnm_tests", "DEF"))
)
_lib.impl("bump", lambda x, y: x.add_(1).sum() + y.sum(), "CompositeExplicitAutograd")
_lib.impl("bump", lambda x, y: x.new_empty(()), "Meta")

WRITES = {
    "add_": lambda h: h.add_(1),
    "keyword": lambda h: h.clamp_(min=0.5),
    "operator": lambda h: h.__iadd__(2),
    "view": lambda h: h.view(-1)[3:9].mul_(5),
    "transposed": lambda h: h.t().mul_(2),
    "chunk": lambda h: h.chunk(2, -1)[1].zero_(),
    "unbind": lambda h: h.unbind(0)[0].fill_(2),
    "detached": lambda h: h.detach().mul_(2),
    "data": lambda h: h.data.mul_(2),
    "copy_": lambda h: h.copy_(torch.ones(4, 32)),
    "item assignment": lambda h: h.__setitem__(0, 1),
    "masked assignment": lambda h: h.__setitem__(h > 0, 1),
    "masked_fill_": lambda h: h.masked_fill_(h > 0, 3),
    "index_put_": lambda h: h.index_put_((torch.tensor([0]),), torch.ones(1, 32)),
    "scatter_": lambda h: h.scatter_(1, torch.zeros(4, 1, dtype=torch.long), 7.0),
    "out": lambda h: torch.add(h, 1, out=h),
    "out of a view": lambda h: torch.add(h[0], 1, out=h[1]),
    "foreach": lambda h: torch._foreach_add_([h[0], h[1]], 1),
    "inplace": lambda h: F.relu(h, inplace=True),
    "inplace by position": lambda h: (F.dropout(h, 0.0, True, True), F.silu(h, True)),
    "init": lambda h: nn.init.ones_(h),
    "custom op": lambda h: torch.ops.vnm_tests.bump(h, torch.ones(3)),
    "statistics": lambda h: F.batch_norm(torch.eye(4, 32), h[0], h[1], training=True),
}


@pytest.mark.parametrize("write", WRITES)
def test_siblings_do_not_cross_a_write(write):
    model = linears("a", "b")

    def function(x):
        h = x * 2
        y = model.a(h)
        WRITES[write](h)
        return y + model.b(h), h

    with torch.no_grad():
        units, _ = check(function, torch.randn(4, 32))
    assert units == SINGLES


def test_a_write_to_something_else_does_not_keep_siblings_apart():
    model = linears("a", "b")

    def function(x):
        h = x * 2
        y = model.a(h)
        other = (x + 1).add_(1)
        other[0] = h[0] * 3
        return y + model.b(h), other

    with torch.no_grad():
        units, _ = check(function, torch.randn(4, 32))
    assert units == [("siblings", "a", "b")]


def test_the_input_of_a_graph_is_written():
    """Also where another input may be a view of it: nobody guards that they share no memory."""
    model = linears("a", "b")

    def function(x, other):
        y = model.a(x)
        other.mul_(3)
        return y + model.b(x)

    x = torch.randn(4, 32)
    with torch.no_grad():
        for other in (torch.randn(2, 32), x[1:3]):
            torch._dynamo.reset()
            prepared, _ = run_rewritten(function, x, other)
            assert [unit.kind for unit in prepared[0].units] == ["single", "single"]


@pytest.mark.parametrize("write", ["add_", "view", "item assignment", "out", "custom op"])
def test_gated_pairs_do_not_cross_a_write(write):
    model = linears("a", "b", bias=False)

    def between(x):
        h = x * 2
        gate = F.silu(model.a(h))
        WRITES[write](h)
        return gate * model.b(h)

    def before_the_product(x):
        h = x * 2
        gate, up = model.a(h), model.b(h)
        WRITES[write](h)
        return F.silu(gate) * up, h

    with torch.no_grad():
        assert check(between, torch.randn(4, 32))[0] == SINGLES
        # The two are next to each other, so they are joined; but not moved down to the product.
        assert check(before_the_product, torch.randn(4, 32))[0] == [("siblings", "a", "b")]


def test_outputs_of_siblings_are_written():
    model = linears("a", "b")

    def function(x):
        y, z = model.a(x), model.b(x)
        y.add_(1)
        z[:, 0] = y[:, 1]
        return y, z

    with torch.no_grad():
        units, _ = check(function, torch.randn(4, 32))
    assert units == [("siblings", "a", "b")]


def test_a_bias_that_is_written_computed_or_of_another_size():
    model = linears("a", "b")

    def written(x):
        y = model.a(x)
        model.b.bias.add_(1)
        z = model.b(x)
        model.b.bias.sub_(1)
        return y, z

    def computed(x):
        return model.a(x), F.linear(x, model.b.weight, model.b.bias * 2), F.linear(x, model.a.weight, model.b.bias[:])

    one, scalar, matrix = torch.randn(1), torch.tensor(3.0), torch.randn(4, 32)

    def other_sizes(x):
        biases = (one, scalar, matrix)
        return [F.linear(x, layer.weight, bias) for layer in (model.a, model.b) for bias in biases]

    with torch.no_grad():
        for function in (written, computed, other_sizes):
            units, reasons = check(function, torch.randn(4, 32))
            assert {kind for kind, *_ in units} == {"single"}, function
            assert not reasons


def test_a_weight_that_the_graph_writes_stays_dense():
    model, buffer = linears("a", "b"), torch.zeros(2, 32, 32)

    def double(x):
        model.a.weight.mul_(2)
        y = model.a(x), model.b(x)
        model.a.weight.div_(2)
        return y

    def double_data(x):
        model.a.weight.data.mul_(2)
        y = model.a(x), model.b(x)
        model.a.weight.data.div_(2)
        return y

    def double_view(x):
        model.a.weight.t()[0].mul_(2)
        y = model.a(x), model.b(x)
        model.a.weight.t()[0].div_(2)
        return y

    def flat_buffer(x):
        buffer.mul_(2)
        y = model.a(x), model.b(x)
        buffer.div_(2)
        return y

    with torch.no_grad():
        for function in (double, double_data, double_view, flat_buffer):
            if function is flat_buffer:
                buffer[0] = model.a.weight
                model.a.weight.data = buffer[0]
            units, reasons = check(function, torch.randn(4, 32))
            assert units == [("single", "b")]
            assert ["write" in reason or "written" in reason for reason in reasons] == [True], reasons


def test_compiled():
    """Several of them at once, through Inductor."""
    model = linears("a", "b", bias=False)
    writes = [WRITES[name] for name in ("view", "item assignment", "out", "inplace")]

    def function(x):
        results = []
        for write in writes:
            h = x * 2
            y = model.a(h)
            write(h)
            results.append(F.silu(y) * model.b(h))
        return results

    x = torch.randn(4, 32)
    with torch.no_grad():
        actual = torch.compile(function, backend="vnm", options={"vnm.policy": "memory"})(*copies([x]))
        assert_alike(actual, function(x), 2e-5)
    assert vnm.explain(model).totals["layers"] == 2


def test_what_is_not_known_counts_as_writing():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    unknown = graph.call_function(print, (x,))
    unknown.target = copies  # a Python function that torch knows nothing of
    assert effect_of(unknown).written == (x,)
    assert effect_of(unknown).barrier
    hooked = graph.call_method("register_hook", (x, print))
    assert effect_of(hooked).barrier
    for harmless in (graph.call_method("view", (x, -1)), graph.call_function(torch.split, (x, 2))):
        assert effect_of(harmless).written == ()
        assert not effect_of(harmless).barrier


STORED = [None, "int8", "int4"]
ACCURATE = [(None, True, torch.bfloat16), ("int8", False, torch.float32), ("int4", True, torch.bfloat16)]


class Attended(nn.Module):
    """Three linears of one input, of other heights and with biases or not, and a gated pair."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(96, width, bias=bias) for width in (96, 40, 33))
        self.gate, self.up = (nn.Linear(96, 70, bias=False) for _ in range(2))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x).relu(), self.v(x)
        return q * 2, k, v, F.silu(self.gate(x)) * self.up(x)


def compressed(values: str | None = None, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = make_sparse_(Attended(bias), "16:2:8").to(dtype).eval().requires_grad_(False)
    vnm.annotate(model, "16:2:8")
    if values is None:
        vnm.compress_model(model)
    else:
        vnm.quantize(model, values, group=32, progress=False)
    return model


def decompressed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    vnm.decompress_model(model)
    return model


@pytest.mark.parametrize("values", STORED)
def test_compressed_weights_are_joined(values):
    model = compressed(values)
    with torch.no_grad():
        units, _ = check(model, torch.randn(5, 96))
    assert units == [("siblings", "q", "k", "v"), ("gated", "gate", "up")]


def test_compressed_weights_are_not_copied_for_it():
    model, x = compressed(), torch.randn(5, 96)
    before = len(dispatch.store)
    with torch.no_grad():
        (prepared,), _ = run_rewritten(model, x)
    ours = [array for name in ("q", "k", "v", "gate", "up") for array in model.get_submodule(name).weight.packed]
    assert [array.data_ptr() for array in prepared.arrays] == [array.data_ptr() for array in ours]
    assert len(dispatch.store) == before


def in_double(model: nn.Module) -> nn.Module:
    """The model in float64, its weights levels times scales, not rounded."""
    exact = decompressed(model).double()
    for name in ("q", "k", "v", "gate", "up"):
        weight = model.get_submodule(name).weight
        packed, layout = weight.packed, weight.layout_of_arrays
        if layout.quantization is not None:
            weight = unpack(packed.replaced(3, packed.scales.double()), layout)
            exact.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return exact


@pytest.mark.parametrize(
    "case", with_slow(product(STORED, (False, True), (torch.float32, torch.bfloat16)), ACCURATE), ids=str
)
def test_joined_compressed_weights_are_as_accurate_as_dense_ones(case):
    values, bias, dtype = case
    model = compressed(values, bias, dtype)
    dense, exact = decompressed(model), in_double(model)
    run = torch.compile(model, backend="vnm")
    with torch.no_grad():
        for tokens in (1, 2, 7, 40):
            x = torch.randn(2, tokens, 96).to(dtype)
            for ours, theirs, reference in zip(run(x), dense(x), exact(x.double()), strict=True):
                assert_as_accurate_as_dense(ours, theirs, reference)
                assert ours.stride() == theirs.stride()


def test_joined_weights_whose_activations_are_rounded():
    x = torch.randn(2, 7, 96)
    rounding = make_sparse_(Attended(), "16:2:8").eval().requires_grad_(False)
    vnm.annotate(rounding, "16:2:8")
    vnm.quantize(rounding, "int8", group=32, activations="int8", progress=False)
    with torch.no_grad():
        units, _ = check(rounding, x)
        assert units == [("siblings", "q", "k", "v"), ("gated", "gate", "up")]
        for ours, expected in zip(torch.compile(rounding, backend="vnm")(x), rounding(x), strict=True):
            assert (ours - expected).norm() < 0.01 * expected.norm()  # an activation may be rounded to the next level


def test_with_gradients_compressed_weights_stay_single():
    model = compressed()
    x = torch.randn(5, 96, requires_grad=True)
    units, _ = check(model, x)
    assert [kind for kind, *_ in units] == ["single"] * 5


def test_compressed_weights_that_differ_stay_single():
    """In kind, in pattern, in how values are stored; a kernel reads no array twice."""
    model = compressed()
    vnm.decompress_model(model.k)
    model.v.weight = nn.Parameter(vnm.compress(random_sparse(33, 96, "16:2:12"), "16:2:12"), requires_grad=False)
    model.up.weight = model.gate.weight
    with torch.no_grad():
        units, _ = check(model, torch.randn(5, 96))
    assert [kind for kind, *_ in units] == ["single"] * 5
    other = compressed("int8")
    other.k = compressed("int4").k
    with torch.no_grad():
        units, _ = check(other, torch.randn(5, 96))
    assert units == [("siblings", "q", "v"), ("single", "k"), ("gated", "gate", "up")]


def test_joined_compressed_weights_that_change():
    model, x = compressed(), torch.randn(5, 96)
    run = torch.compile(model, backend="vnm")

    def agree(what: str = "") -> None:
        with torch.no_grad():
            given = x.to(model.q.weight.dtype)
            for ours, expected in zip(run(given), decompressed(model)(given), strict=True):
                torch.testing.assert_close(ours, expected, atol=2e-2 if what == "bf16" else 2e-5, rtol=2e-2)

    agree()
    model.k.weight.values.data.mul_(2)
    agree("a write to the values of one")
    model.load_state_dict(decompressed(compressed()).state_dict())
    agree("load_state_dict")
    model.to(torch.bfloat16)
    agree("bf16")
    model.float()
    model.v.weight = nn.Parameter(vnm.compress(random_sparse(33, 96, "16:2:8", seed=7), "16:2:8"), requires_grad=False)
    agree("another weight")
    model.v.weight = nn.Parameter(vnm.compress(random_sparse(33, 96, "8:2:12", seed=7), "8:2:12"), requires_grad=False)
    agree("another pattern")
    vnm.decompress_model(model.k)
    agree("one of them dense")
    vnm.compress_model(model, exclude=["v"])
    agree("compressed again")


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_biases_are_added_before_anything_is_rounded(stored, dynamic):
    """By the kernel that multiplies, whatever reads the sections; a kernel of its own would read rounded products."""
    model, x = compressed(dtype=torch.bfloat16), torch.randn(2, 9, 96).bfloat16()
    exact = in_double(model)
    model = model if stored else decompressed(model)
    run = torch.compile(model, backend="vnm", dynamic=dynamic, options={"vnm.policy": "memory"})
    with torch.no_grad():
        for ours, theirs, reference in zip(run(x), decompressed(model)(x), exact(x.double()), strict=True):
            assert_as_accurate_as_dense(ours, theirs, reference)
        kernels = vnm.inspect(model, x, options={"vnm.policy": "memory"}).sparse
    assert any({"vnm.linear", "aten.add"} <= {*kernel.fused_ops} for kernel in kernels)


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_biases_are_added_by_the_kernel_on_gpus_too(target, tokens):
    model, x = compressed(dtype=torch.bfloat16), torch.randn(tokens, 96).bfloat16()
    kernels = vnm.inspect(decompressed(model), x, target=target).sparse
    assert any({"vnm.linear", "aten.add"} <= {*kernel.fused_ops} for kernel in kernels)


def test_two_models_of_joined_compressed_weights_share_a_graph():
    one, other, x = compressed(), compressed(), torch.randn(5, 96)
    other.load_state_dict(make_sparse_(decompressed(other), "16:2:8", seed=50).state_dict())
    run = torch.compile(lambda model, x: model(x), backend="vnm")
    with torch.no_grad():
        for model in (one, other, one):
            for ours, expected in zip(run(model, x), decompressed(model)(x), strict=True):
                torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def test_explain_tells_what_is_joined():
    model = compressed("int4")
    told = vnm.explain(model, torch.randn(5, 96))
    assert told["q"].joined == ("k", "v")
    assert told["up"].joined == ("gate",)
    assert all(layer.decision == "sparse" for layer in told.layers)
