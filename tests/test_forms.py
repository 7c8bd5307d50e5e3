"""Every way to write a product: functions, methods, aten ops, keywords, views of the weight, and autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.running import assert_alike, check, linears
from tests.support import random_sparse

aten = torch.ops.aten
WEIGHT = nn.Parameter(random_sparse(48, 32, "16:2:8"), requires_grad=False)
OTHER = nn.Parameter(random_sparse(48, 32, "16:2:8", seed=1), requires_grad=False)
BIAS = torch.linspace(-1, 1, 48)
ONE, SCALAR, MATRIX = BIAS[:1].clone(), torch.tensor(3.0), torch.linspace(-2, 2, 4 * 48).view(4, 48)

SPARSE = {
    "keywords": lambda x: (
        F.linear(input=x, weight=WEIGHT),
        F.linear(x, weight=WEIGHT, bias=BIAS),
        torch.matmul(input=x, other=WEIGHT.T),
        torch.mm(x, mat2=WEIGHT.t()),
        torch.addmm(input=BIAS, mat1=x, mat2=WEIGHT.t()),
        torch.addmm(BIAS, x, WEIGHT.t(), alpha=1, beta=1),
        BIAS.addmm(x, WEIGHT.mT),
    ),
    "views": lambda x: (
        x @ WEIGHT.H,
        x @ WEIGHT.adjoint(),
        x @ WEIGHT.swapaxes(0, 1),
        x @ WEIGHT.transpose(-1, -2),
        x @ torch.movedim(WEIGHT, 0, 1),
        x @ WEIGHT.detach().t(),
        F.linear(x, WEIGHT[:]),
        F.linear(x, WEIGHT.view(48, 32)),
        F.linear(x, WEIGHT.float()),
    ),
    "aten": lambda x: (
        aten.linear.default(x, WEIGHT, BIAS),
        aten.addmm.default(BIAS, x, WEIGHT.t()),
        aten.mm.default(x, aten.t.default(WEIGHT)),
        aten.matmul(x, aten.numpy_T(WEIGHT)),
        aten.matmul.default(x, aten.mT(WEIGHT)),
        aten.linear(x, aten.permute.default(aten.transpose.int(WEIGHT, 0, 1), [1, 0])),
    ),
    "biases": lambda x: [F.linear(x, w, b) for w in (WEIGHT, OTHER) for b in (ONE, SCALAR, MATRIX, BIAS * 2, BIAS[:])],
    "added by addmm": lambda x: [torch.addmm(b, x, WEIGHT.t()) for b in (ONE, SCALAR, MATRIX, MATRIX[:, :1])],
    "dimensions": lambda x: (
        x[0] @ WEIGHT.T,
        F.linear(x[0], WEIGHT, BIAS),
        F.linear(x.view(2, 1, 2, 1, 32), WEIGHT, BIAS),
        F.linear(x.view(2, 2, 32).transpose(0, 1), WEIGHT),
        F.linear(x[:, None].expand(4, 3, 32), WEIGHT, BIAS),
        F.linear(x[:0], WEIGHT, BIAS),
    ),
}


@pytest.mark.parametrize("name", SPARSE)
def test_forms(name):
    x = torch.randn(4, 32)
    with torch.no_grad():
        units, reasons = check(SPARSE[name], x)
    assert sum(len(members) for _, *members in units) == len(SPARSE[name](x))
    assert not reasons


def test_what_stays_dense_says_why():
    shared = torch.empty(4, 48)
    forms = {
        "alpha or beta": lambda x: (
            torch.addmm(BIAS, x, WEIGHT.t(), alpha=2),
            torch.addmm(BIAS, x, WEIGHT.t(), beta=0),
        ),
        "out=": lambda x: torch.mm(x, WEIGHT.t(), out=shared) + torch.addmm(BIAS, x, WEIGHT.t(), out=shared),
        "bias has 2 dimensions": lambda x: F.linear(x.view(2, 2, 32), WEIGHT, MATRIX[:2]),
        "vector from the left": lambda x: torch.mv(WEIGHT, x[0]),
        "by inner": lambda x: torch.inner(x, WEIGHT),
        "by tensordot": lambda x: torch.tensordot(x, WEIGHT, dims=([1], [1])),
        "computed in the graph": lambda x: F.linear(x, WEIGHT[:16]),
    }
    for part, form in forms.items():
        with torch.no_grad():
            units, reasons = check(form, torch.randn(4, 32))
        assert not units, part
        assert all(part in reason for reason in reasons), reasons


def test_exported_programs():
    model = nn.Sequential(linears("a").a, nn.ReLU(), linears("a").a)
    x = torch.randn(4, 32)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        units, reasons = check(exported, x)
        assert [kind for kind, *_ in units] == ["single", "single"]
        assert not reasons
        compiled = torch.compile(exported, backend="vnm", options={"vnm.policy": "memory"})
        assert_alike(compiled(x), model(x))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_eager(lower):
    cases = [
        (nn.Parameter(WEIGHT.to(kind), requires_grad=False), BIAS.to(other), SCALAR.to(other))
        for kind, other in itertools.product(DTYPES, repeat=2)
    ]

    def function(x):
        with torch.autocast("cpu", lower):
            results = [F.linear(x, weight, bias) for weight, bias, _ in cases]
            results += [torch.addmm(bias, x, weight.t()) for weight, bias, _ in cases]
            results += [x @ weight.T + bias for weight, bias, _ in cases]
            return results + [F.linear(x, weight, scalar) for weight, _, scalar in cases]

    with torch.no_grad():
        units, reasons = check(function, torch.randn(4, 32), tolerance=0.1)
    assert sum(len(members) for _, *members in units) == 4 * len(cases)
    assert not reasons


def test_autocast_compiled():
    """Siblings with biases of another dtype than the result, single layers, and fp16 weights under bf16 autocast."""
    model = linears("a", "b")
    half = linears("a", "b", dtype=torch.float16)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model.a(x), model.b(x), F.linear(x + 1, model.a.weight, ONE), half.a(x), half.b(x)

    compiled = torch.compile(function, backend="vnm", options={"vnm.policy": "memory"})
    x = torch.randn(4, 32)
    with torch.no_grad():
        for one, other in zip(compiled(x), function(x), strict=True):
            assert one.dtype == other.dtype == torch.bfloat16
            torch.testing.assert_close(one, other, atol=5e-2, rtol=5e-2)


def test_mixed_dtypes_are_left_to_torch():
    """Without autocast eager refuses them; the graph says so too, and nothing is added that would promote."""
    model = linears("a", dtype=torch.bfloat16)
    bias = torch.randn(32)

    def function(x):
        return F.linear(x, model.a.weight, bias)

    x = torch.randn(4, 32, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(RuntimeError):
        function(x)
    with torch.no_grad(), pytest.raises(Exception, match="dtype"):
        torch.compile(function, backend="vnm", options={"vnm.policy": "memory"})(x)
