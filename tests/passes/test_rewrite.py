"""The rewritten graphs, as golden text, and that they compute what the original ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.support import make_sparse_, random_sparse
from tests.test_backend import Block
from vnm_compile.backend import prepare
from vnm_compile.options import Options


class Siblings(nn.Module):
    """Grouped-query attention: sections of different widths, one of them padded to whole blocks."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 24)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


class Bare(nn.Module):
    """Matrix products written by hand, one weight used twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(random_sparse(48, 32, "16:2:8"))

    def forward(self, x):
        y = x @ self.weight.T
        return torch.nn.functional.linear(y @ self.weight, self.weight)


class GPT2MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = Conv1D(64, 32)
        self.fc.weight = nn.Parameter(random_sparse(64, 32, "16:2:8").t().contiguous())

    def forward(self, x):
        return torch.nn.functional.gelu(self.fc(x), approximate="tanh")


def rewritten(model, x, **options):
    """The prepared graph of a model, and its value for x."""
    prepared = []

    def backend(gm, inputs):
        prepared.append(prepare(gm, inputs, Options(policy="memory", **options)))
        new = prepared[0].rewritten
        return lambda *args: new.gm(*args, *prepared[0].arrays)

    with torch.no_grad():
        result = torch.compile(model, backend=backend, fullgraph=True)(x)
    return prepared[0], result


@pytest.mark.parametrize(
    ("name", "make", "width"),
    [("block", lambda: Block(), 64), ("siblings", Siblings, 32), ("bare", Bare, 32), ("conv1d", GPT2MLP, 32)],
)
def test_graphs(golden, name, make, width):
    torch.manual_seed(0)
    model = make_sparse_(make(), "16:2:8").eval()
    x = torch.randn(2, 5, width)
    prepared, result = rewritten(model, x)
    torch.testing.assert_close(result, model(x), atol=1e-5, rtol=1e-5)
    golden(f"graphs/{name}.txt", str(prepared.rewritten.gm.graph) + "\n")


def test_the_original_graph_is_left_alone():
    model = make_sparse_(Block(), "16:2:8").eval()
    seen = []

    def backend(gm, inputs):
        before = str(gm.graph)
        prepare(gm, inputs, Options(policy="memory"))
        seen.append(before == str(gm.graph))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(1, 3, 64))
    assert seen == [True]


def test_a_gated_pair_needs_to_be_one():
    """Neither another use of the gate, nor a bias, nor another activation lets the pair be joined."""

    class Gate(Block):
        def forward(self, x):
            gate = torch.nn.functional.silu(self.gate(x))
            return gate * self.up(x), gate

    class Tanh(Block):
        def forward(self, x):
            return torch.tanh(self.gate(x)) * self.up(x)

    for kind in (Gate, Tanh):
        prepared, _ = rewritten(make_sparse_(kind(), "16:2:8").eval(), torch.randn(1, 3, 64))
        assert [unit.kind for unit in prepared.units] == ["siblings"]
    prepared, _ = rewritten(make_sparse_(Block(), "16:2:8").eval(), torch.randn(1, 3, 64), merge=False)
    assert {unit.kind for unit in prepared.units} == {"single"}
