"""Training on compressed weights: gradients by kernels of their own, and layers whose parameters are kept values."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

import vnm_compile as vnm
from tests.support import assert_as_accurate_as_dense, make_sparse_
from vnm_compile import ops, train
from vnm_compile.errors import NothingSelected, PatternViolation, UnsupportedWeight
from vnm_compile.format import pack, unpack
from vnm_compile.layout import Layout
from vnm_compile.native import gradients
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor
from vnm_compile.train.values import ValuesLinear

SPEC = "16:2:8"
CASES = [
    ("64:2:8", 128, 64, 70), ("16:1:5", 37, 43, 3), ("4:2:4", 10, 9, 130), ("1:2:16", 5, 40, 65), ("8:2:7", 24, 20, 1),
    ("32:2:300", 64, 700, 20), ("128:2:8", 200, 384, 64), ("24:2:6", 60, 31, 49), ("256:1:16", 300, 100, 200),
    ("7:2:9", 45, 61, 131),
]  # fmt: skip


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(24, 48, bias=bias), nn.Linear(48, 24, bias=bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def pruned(spec=SPEC, **options):
    torch.manual_seed(0)
    net = Net(**options)
    for layer in (net.up, net.down):
        make_sparse_(layer, spec)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("spec", "out_features", "in_features", "tokens"), CASES)
def test_gradients_by_kernels(spec, out_features, in_features, tokens, dtype):
    """As accurate as dense products of the dtype, judged in double precision."""
    torch.manual_seed(tokens)
    layout = Layout(Spec.parse(spec), out_features, in_features)
    layer = make_sparse_(nn.Linear(in_features, out_features), spec)
    values, *structure = pack(layer.weight.detach().to(dtype), layout.spec)
    weight = unpack(pack(layer.weight.detach().to(dtype), layout.spec), layout)
    grad, x = torch.randn(tokens, out_features).to(dtype), torch.randn(tokens, in_features).to(dtype)
    dx = torch.ops.vnm.linear_input_grad(grad, values, structure, layout.text)
    dv = torch.ops.vnm.linear_values_grad(grad, x, structure, layout.text)
    assert (dx.dtype, dx.shape, dx.is_contiguous()) == (dtype, x.shape, True)
    assert (dv.dtype, dv.shape, dv.is_contiguous()) == (dtype, values.shape, True)
    used = (weight != 0).any(0)  # the rest is zero, exactly, and no error to be compared
    assert not dx[:, ~used].any()
    exact_dx = grad.double() @ weight[:, used].double()
    exact_dv = ops._linear_values_grad(grad.double(), x.double(), structure, layout.text)
    for mine, exact, dense in (
        (dx[:, used], exact_dx, grad @ weight[:, used]),
        (dv, exact_dv, ops._linear_values_grad(grad, x, structure, layout.text)),
    ):
        if dtype == torch.float64:
            torch.testing.assert_close(mine, exact)
        else:
            assert_as_accurate_as_dense(mine, dense, exact)


@pytest.mark.parametrize("hidden", ["__AVX512BF16__", "__AVX512F__"])
def test_gradients_on_lesser_machines(hidden, monkeypatch):
    """The same source where the compiler does not know of some instructions."""
    without = f"#undef {hidden}\n#undef __AVX512BF16__\n{gradients.source()}"
    monkeypatch.setattr(gradients, "source", lambda: without)
    gradients._function.cache_clear()
    try:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for case in (CASES[0], CASES[1], CASES[-1]):
                test_gradients_by_kernels(*case, dtype)
    finally:
        gradients._function.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["offset", "transposed", "expanded", "three dimensions", "no tokens", "rows apart"])
def test_gradients_of_operands_that_lie_otherwise(kind, dtype):
    torch.manual_seed(0)
    layout = Layout(Spec.parse("16:2:8"), 40, 56)
    layer = make_sparse_(nn.Linear(56, 40), "16:2:8")
    values, *structure = pack(layer.weight.detach().to(dtype), layout.spec)
    make = {
        "offset": lambda n: torch.randn(9, n, dtype=torch.float64).to(dtype)[2:],
        "transposed": lambda n: torch.randn(n, 7, dtype=torch.float64).t(),
        "expanded": lambda n: torch.randn(1, n, dtype=torch.float64).expand(7, n),
        "three dimensions": lambda n: torch.randn(2, n, 5, dtype=torch.float64).transpose(1, 2),
        "no tokens": lambda n: torch.randn(0, n, dtype=torch.float64),
        "rows apart": lambda n: torch.randn(7, n, dtype=torch.float64),
    }[kind]
    if kind == "rows apart":
        wide = [F.pad(each, (0, 8)) for each in (values, structure[0])]
        values, structure = wide[0][:, : values.shape[1]], [wide[1][:, : structure[0].shape[1]], structure[1]]
    grad, x = make(40).to(dtype), make(56).to(dtype)
    dx = torch.ops.vnm.linear_input_grad(grad, values, structure, layout.text)
    dv = torch.ops.vnm.linear_values_grad(grad, x, structure, layout.text)
    wide = (grad.double(), values.double(), x.double())
    close = {} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}  # of a result that is rounded to bf16
    exact = ops._linear_input_grad(wide[0], wide[1], structure, layout.text)
    torch.testing.assert_close(dx.double(), exact, **close)
    exact = ops._linear_values_grad(wide[0], wide[2], structure, layout.text)
    torch.testing.assert_close(dv.double(), exact, **close)


def test_derivatives_against_differences():
    net = pruned().double()
    train.compress_for_training(net)
    layer = net.up
    structure, text = [layer.metadata, layer.columns], layer.stored_layout.text

    def product(x, values):
        return torch.ops.vnm.linear(x, values, structure, text)

    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    values = layer.values.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(product, (x, values))
    assert torch.autograd.gradgradcheck(product, (x, values))


@pytest.mark.parametrize("compiled", [False, True])
def test_it_trains_as_the_masked_dense_model(compiled):
    net, masked = pruned().double(), pruned().double()
    assert train.compress_for_training(net) == ["up", "down"]
    assert isinstance(net.up, ValuesLinear)
    train.begin(masked, None, train.FixedMask(), steps=20)
    call = torch.compile(net, backend="vnm") if compiled else net
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0) for each in (net, masked)]
    kept = {key for state in (net.state_dict(),) for key in state}
    assert kept == {f"{layer}.{name}" for layer in ("up", "down") for name in ("values", "metadata", "columns", "bias")}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(6):
            x = torch.randn(8, 24, dtype=torch.float64)
            losses = []
            for model, optimizer in zip((call, masked), optimizers, strict=True):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), x)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    x = torch.randn(4, 24, dtype=torch.float64)
    expected = net(x)
    assert vnm.finalize(net) == ["up", "down"]
    vnm.finalize(masked, now=True)
    assert type(net.up) is nn.Linear
    assert net.up.weight.requires_grad
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net.up.weight, masked.up.weight)
    assert vnm.matches(net.down.weight, SPEC)
    with torch.no_grad():
        sparse = torch.compile(net, backend="vnm", options={"vnm.policy": "memory"})(x)
    torch.testing.assert_close(sparse, expected)


def test_optimizer_state_is_as_small_as_the_values():
    net = pruned()
    train.compress_for_training(net)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 24)).sum().backward()
    optimizer.step()
    numbers = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert numbers == 48 * 24 // 4 + 24 // 16 * 16 * 48 // 4 + 16 * 48 // 4 + 48 + 24  # 24 rows are stored as 32


def test_under_autocast_and_without_biases():
    net = pruned(bias=False)
    dense = copy.deepcopy(net)
    train.compress_for_training(net)
    x = torch.randn(5, 24)
    results = []
    for each in (net, dense):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        results.append(y)
    torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)
    gradient = unpack(net.up.packed.replaced(0, net.up.values.grad), net.up.stored_layout)
    torch.testing.assert_close(
        gradient, torch.where(dense.up.weight != 0, dense.up.weight.grad, 0), atol=0.1, rtol=0.05
    )


def test_compressed_weights_become_compressed_again():
    net = pruned()
    vnm.annotate(net, SPEC)
    vnm.compress_model(net)
    x = torch.randn(3, 24)
    expected = net(x)
    train.compress_for_training(net)
    torch.testing.assert_close(net(x), expected)
    assert net.up.values.requires_grad
    vnm.finalize(net)
    assert isinstance(net.up.weight, VNMTensor)
    torch.testing.assert_close(net(x), expected)


def test_gpt2s_transposed_weights():
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = hf.GPT2LMHeadModel(config).eval()
    vnm.sparsify(model, SPEC, progress=False)
    ids = torch.randint(50, (2, 7))
    expected = model(ids).logits
    assert len(train.compress_for_training(model)) == 4
    torch.testing.assert_close(model(ids).logits, expected)
    vnm.finalize(model)
    torch.testing.assert_close(model(ids).logits, expected)
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 128)


def test_explain_knows_them():
    net = pruned()
    train.compress_for_training(net)
    for explanation in (vnm.explain(net), vnm.explain(net, torch.randn(3, 24))):
        assert [(each.name, each.decision, each.spec) for each in explanation.layers] == [
            ("up", "sparse", SPEC), ("down", "sparse", SPEC),
        ]  # fmt: skip
        assert all("values train" in each.reason for each in explanation.layers)


def test_copies_and_state_dicts():
    net = pruned()
    train.compress_for_training(net)
    other = copy.deepcopy(net)
    x = torch.randn(3, 24)
    with torch.no_grad():
        net.up.values.mul_(2)
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    vnm.finalize(other)
    assert isinstance(net.up, ValuesLinear), "the copy's end is not the original's"
    torch.testing.assert_close(net(x), other(x))


def test_what_is_refused_leaves_the_model_as_it_was():
    with pytest.raises(NothingSelected, match="prune first"):
        train.compress_for_training(Net())
    with pytest.raises(UnsupportedWeight, match="one layer"):
        train.compress_for_training(make_sparse_(nn.Linear(24, 48), SPEC))

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for change, match in (
        (lambda net: setattr(net, "up", make_sparse_(Scaled(24, 48), SPEC)), "Scaled has a forward of its own"),
        (lambda net: net.up.register_forward_hook(lambda module, given, y: y + 1), "hooks"),
        (lambda net: net.up.register_full_backward_hook(lambda *_: None), "hooks"),
        (lambda net: setattr(net.up, "forward", lambda x: x[..., :1]), "forward was replaced"),
        (lambda net: net.up.register_buffer("scale", torch.ones(1)), "scale"),
    ):
        net = pruned()
        change(net)
        with pytest.raises(UnsupportedWeight, match=f"up.*{match}"):
            train.compress_for_training(net)
        assert train.compress_for_training(net, exclude="up") == ["down"]
    net = pruned()
    with torch.no_grad():
        net.down.weight.fill_(1)
    with pytest.raises(PatternViolation, match="down"):
        train.compress_for_training(net, SPEC)
    assert type(net.up) is nn.Linear
    assert net.up.weight is not None
    masked = pruned()
    train.begin(masked, SPEC, train.FixedMask(), steps=5)
    with pytest.raises(UnsupportedWeight, match="finalize"):
        train.compress_for_training(masked)


class Wrapper(nn.Module):
    """As many do, it hands on what it does not have."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x):
        return self.module(x)


def test_a_layer_in_two_places_and_behind_a_wrapper():
    net = nn.Sequential(make_sparse_(nn.Linear(24, 24), SPEC), nn.ReLU(), nn.Linear(24, 24, bias=False))
    net[2] = Wrapper(net[0])
    dense, x = copy.deepcopy(net), torch.randn(3, 24)
    train.compress_for_training(net)
    torch.testing.assert_close(net(x), dense(x))
    assert [each.name for each in vnm.explain(net).layers] == ["0"]
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(net, backend="vnm")(x), dense(x))
    vnm.finalize(net)
    assert net[2].module is net[0]
    assert type(net[0]) is nn.Linear
    torch.testing.assert_close(net(x), dense(x))
