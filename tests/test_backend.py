"""backend="vnm" through torch.compile: right, never stale, never in the way."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import textwrap
import uuid
import weakref

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import vnm_compile as vnm
from tests.support import make_sparse_, random_sparse, with_slow

SPARSE = {"vnm.policy": "memory"}


class Block(nn.Module):
    """Attention-like siblings, a gated pair, and a residual: every kind of unit."""

    def __init__(self, width=64, hidden=96):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def block(spec="16:2:8", seed=0):
    torch.manual_seed(seed)
    return make_sparse_(Block(), spec, seed).eval()


def compiled(model, **kwargs):
    return torch.compile(model, backend="vnm", options=SPARSE, **kwargs)


def agree(model, other, x):
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), atol=2e-5, rtol=2e-5)


def decisions(model, *args, **options):
    report = vnm.explain(model, *args, options={**SPARSE, **options})
    return {layer.name: layer for layer in report.layers}


def test_a_process_that_imports_only_torch():
    script = """
        import torch
        model = torch.nn.Sequential(torch.nn.Linear(32, 32))
        with torch.no_grad():
            model[0].weight.mul_(torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]).repeat(4))
            x = torch.randn(3, 32)
            y = torch.compile(model, backend="vnm", options={"vnm.policy": "memory"})(x)
            assert torch.allclose(y, model(x), atol=1e-5)
        import sys
        assert "vnm_compile" in sys.modules
        print("right")
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.stdout.strip() == "right", result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_shapes(dynamic):
    model = block()
    run = compiled(model, dynamic=dynamic, fullgraph=True)
    for shape in ((2, 7, 64), (2, 9, 64), (3, 9, 64), (1, 1, 64)):
        agree(model, run, torch.randn(shape))


def test_dynamic_shapes_compile_once():
    model = block()
    run = compiled(model, dynamic=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("vnm")
    run = torch.compile(model, backend=counter, dynamic=True)
    for tokens in (5, 6, 17, 130):
        agree(model, run, torch.randn(2, tokens, 64))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "mode",
    with_slow(["default", "reduce-overhead", "max-autotune-no-cudagraphs"], quick=["default", "reduce-overhead"]),
)
def test_modes(mode):
    model = block()
    agree(model, torch.compile(model, backend="vnm", mode=mode), torch.randn(2, 5, 64))


def test_every_linear_is_sparse_and_joined_as_it_should_be():
    found = decisions(block(), torch.randn(2, 5, 64))
    assert {layer.decision for layer in found.values()} == {"sparse"}
    assert found["q"].joined == ("k", "v")
    assert found["gate"].joined == ("up",)
    assert found["down"].joined == ()
    apart = decisions(block(), torch.randn(2, 5, 64), **{"vnm.merge": False})
    assert all(layer.joined == () for layer in apart.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vnm.polcy": "memory"}, "unknown option vnm.polcy; there are vnm.policy, vnm.detect, vnm.merge"),
        ({"vnm.policy": "speed"}, "vnm.policy='speed'; it takes one of 'latency', 'memory'"),
        ({"vnm.detect": 1}, "vnm.detect=1; it takes one of True, False"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(Exception, match=message), torch.no_grad():
        torch.compile(block(), backend="vnm", options=options)(torch.randn(1, 64))


@pytest.mark.slow
def test_inductors_options_pass_through():
    with pytest.raises(Exception, match="no_such_option"), torch.no_grad():
        torch.compile(block(), backend="vnm", options={**SPARSE, "no_such_option": 1})(torch.randn(1, 1, 64))
    model = block()
    agree(
        model, torch.compile(model, backend="vnm", options={**SPARSE, "epilogue_fusion": False}), torch.randn(1, 3, 64)
    )


class TestNeverStale:
    """Promise 2: whatever happens to a weight after compiling, the next call sees it."""

    def check(self, change):
        model = block()
        run, x = compiled(model), torch.randn(2, 5, 64)
        agree(model, run, x)
        before = model(x)
        change(model)
        assert not torch.allclose(model(x.to(model.down.weight.dtype)).float(), before, atol=1e-3)
        with torch.no_grad():
            x = x.to(model.down.weight.dtype)
            torch.testing.assert_close(run(x), model(x), atol=2e-2 if x.dtype != torch.float32 else 2e-5, rtol=2e-2)

    def test_load_state_dict(self):
        self.check(lambda model: model.load_state_dict(block(seed=5).state_dict()))

    def test_load_state_dict_by_assignment(self):
        self.check(lambda model: model.load_state_dict(block(seed=5).state_dict(), assign=True))

    def test_in_place(self):
        def change(model):
            with torch.no_grad():
                model.down.weight.mul_(3)
                model.q.weight.copy_(random_sparse(64, 64, "16:2:8", seed=9))

        self.check(change)

    def test_new_parameter(self):
        def change(model):
            model.up.weight = nn.Parameter(random_sparse(96, 64, "16:2:8", seed=9))

        self.check(change)

    def test_data_assigned(self):
        def change(model):
            model.gate.weight.data = random_sparse(96, 64, "16:2:8", seed=9)

        self.check(change)

    def test_half_precision(self):
        self.check(lambda model: (model.load_state_dict(block(seed=5).state_dict()), model.bfloat16()))

    def test_optimizer_step(self):
        def change(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            model(torch.randn(2, 5, 64)).square().sum().backward()
            for layer in (model.q, model.k, model.v, model.gate, model.up, model.down):
                layer.weight.grad.mul_(layer.weight != 0)
            optimizer.step()

        self.check(change)

    def test_refresh_for_writes_that_torch_does_not_count(self):
        def change(model):
            for layer in (model.gate, model.up, model.down):
                layer.weight.data.mul_(2)
            vnm.refresh(model)

        self.check(change)

    @pytest.mark.parametrize("dynamic", with_slow([None, True], quick=[None]))
    def test_a_weight_that_loses_its_pattern_runs_dense(self, dynamic):
        model = block()
        run = compiled(model, dynamic=dynamic)
        agree(model, run, torch.randn(2, 5, 64))
        with torch.no_grad():
            model.down.weight.copy_(torch.randn(64, 96))
        for tokens in (5, 6, 7):
            agree(model, run, torch.randn(2, tokens, 64))

    def test_an_annotated_weight_that_loses_its_pattern_is_an_error(self):
        model = block()
        vnm.annotate(model, "16:2:8")
        run, x = compiled(model), torch.randn(2, 5, 64)
        agree(model, run, x)
        with torch.no_grad():
            model.down.weight.copy_(torch.randn(64, 96))
            with pytest.raises(vnm.VNMError, match=r"^down: weight \[64, 96\] is not 16:2:8"):
                run(x)


def test_regional_compile_shares_code_not_weights():
    layers = nn.ModuleList([block(seed=0), block(seed=1), block("32:2:4", seed=2), Block().eval()])
    for layer in layers:
        layer.compile(backend="vnm", options=SPARSE)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        for layer in layers:
            torch.testing.assert_close(layer(x), layer.forward(x), atol=2e-5, rtol=2e-5)


def test_gradients_of_a_frozen_model():
    model = block().requires_grad_(False)
    model.down.bias.requires_grad_()
    results = []
    for each in (model, compiled(model, fullgraph=True)):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        each(x).square().sum().backward()
        results.append((x.grad, model.down.bias.grad.clone()))
        model.down.bias.grad = None
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_a_weight_that_trains_stays_dense_and_says_so():
    model = block()
    run = compiled(model)
    x = torch.randn(2, 5, 64)
    run(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for one, other in zip(grads, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_autocast(context):
    model, x = block(), torch.randn(2, 5, 64)
    run = compiled(model)
    with context(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = run(x), model(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, atol=5e-2, rtol=5e-2)


def test_inference_tensors():
    with torch.inference_mode():
        model = block()
        agree(model, compiled(model), torch.randn(2, 5, 64))


def test_graph_breaks():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = block(seed=0), block(seed=1)

        def forward(self, x):
            x = self.one(x)
            torch._dynamo.graph_break()
            return self.two(x)

    model, x = Broken(), torch.randn(2, 5, 64)
    agree(model, compiled(model), x)
    report = vnm.explain(model, x, options=SPARSE)
    assert report.graphs == 2
    assert report.totals["sparse"] == 12


def test_no_pattern_no_difference():
    """Promise 3: a graph without V:N:M weights gives what Inductor gives."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="vnm")(x), torch.compile(model, backend="inductor")(x))


def test_policy_latency_measures_and_keeps_the_faster():
    model, x = block(), torch.randn(2, 5, 64)
    run = torch.compile(model, backend="vnm")
    agree(model, run, x)
    for layer in vnm.explain(model, x).layers:
        assert "measured" in layer.reason or "no sparse kernel" in layer.reason
        if layer.speedup is not None:
            assert (layer.decision == "sparse") == (layer.speedup > 1)


def test_detection_can_be_switched_off():
    model = block()
    vnm.annotate(model, "16:2:8", include="down")
    found = decisions(model, torch.randn(2, 5, 64), **{"vnm.detect": False})
    assert [name for name, layer in found.items() if layer.decision == "sparse"] == ["down"]
    assert "vnm.detect is off" in found["q"].reason


def test_tied_sliced_and_computed_weights_stay_dense_with_a_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, 64)
            self.fc = nn.Linear(64, 64)
            self.experts = nn.Parameter(torch.randn(2, 64, 64))

        def forward(self, ids):
            x = self.embedding(ids)
            x = x + nn.functional.linear(x, self.fc.weight[:64] * 2)
            x = x + torch.bmm(x, self.experts[: x.shape[0]].transpose(1, 2))
            return x @ self.embedding.weight.T

    model = make_sparse_(Odd(), "16:2:8").eval()
    with torch.no_grad():
        model.embedding.weight.copy_(random_sparse(64, 64, "16:2:8"))
    ids = torch.arange(6).view(2, 3)
    agree(model, compiled(model), ids)
    reasons = [layer.reason for layer in vnm.explain(model, ids, options=SPARSE).layers]
    for part in ("shared with embedding", "computed in the graph", "batch of weights"):
        assert any(part in reason for reason in reasons), reasons


def test_every_way_to_write_a_linear():
    weight = nn.Parameter(random_sparse(48, 64, "16:2:8"), requires_grad=False)
    bias = torch.randn(48)
    forms = {
        "F.linear": lambda x: nn.functional.linear(x, weight, bias),
        "@ .T": lambda x: x @ weight.T,
        "matmul t": lambda x: torch.matmul(x, weight.t()),
        "matmul transpose": lambda x: x.matmul(weight.transpose(0, 1)),
        "matmul permute": lambda x: torch.matmul(x, weight.permute(1, 0)),
        "mm": lambda x: torch.mm(x, weight.mT),
        "addmm": lambda x: torch.addmm(bias, x, weight.t()),
    }
    x = torch.randn(3, 64)
    for name, form in forms.items():
        log = []

        def count(gm, inputs, log=log):
            from vnm_compile.backend import prepare
            from vnm_compile.options import Options

            prepared = prepare(gm, inputs, Options(policy="memory"))
            log.extend(prepared.decisions)
            return prepared.rewritten.gm if prepared.rewritten is None else _bound(prepared)

        with torch.no_grad():
            result = torch.compile(form, backend=count)(x)
        assert [d.sparse for d in log] == [True], (name, log)
        torch.testing.assert_close(result, form(x), msg=name)


def _bound(prepared):
    return lambda *args: prepared.rewritten.gm(*args, *prepared.arrays)


def test_nothing_keeps_a_dead_model_alive():
    model = block()
    weight = weakref.ref(model.down.weight)
    agree(model, compiled(model), torch.randn(2, 5, 64))
    del model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None


def test_a_deepcopy_compiles_on_its_own():
    model = block()
    agree(model, compiled(model), torch.randn(2, 5, 64))
    other = copy.deepcopy(model)
    make_sparse_(other, "16:2:8", seed=4)
    agree(other, compiled(other), torch.randn(2, 5, 64))
    agree(model, compiled(model), torch.randn(2, 5, 64))


def test_the_users_own_pass_still_runs():
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Count(CustomGraphPass):
        calls = 0

        def __call__(self, graph):
            type(self).calls += 1

        def uuid(self):
            return uuid.uuid4().hex  # a graph found in Inductor's cache runs no pass, whoever's it is

    model = block()
    options = {**SPARSE, "post_grad_custom_post_pass": Count()}
    agree(model, torch.compile(model, backend="vnm", options=options), torch.randn(2, 3, 64))
    assert Count.calls > 0


def test_model_compile_in_place():
    model, x = block(), torch.randn(2, 5, 64)
    expected = model(x)
    model.compile(backend="vnm", options=SPARSE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=2e-5)
