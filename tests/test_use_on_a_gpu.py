"""What users do with a model, on a real GPU: compile, write, train, prune, quantise, keep and generate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vnm_compile as vnm
from tests.support import assert_as_accurate_as_dense, make_sparse_
from vnm_compile.backend import vnm as backend
from vnm_compile.codegen.triton import lowering
from vnm_compile.hardware import Target

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MEMORY = {"vnm.policy": "memory"}


class Block(nn.Module):
    """Linears with biases, what is fused into them, and a gate."""

    def __init__(self, width: int = 512, inner: int = 1024) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def block(dtype: torch.dtype = torch.bfloat16, spec: str = "64:2:8") -> nn.Module:
    return make_sparse_(Block(), spec).to(DEVICE, dtype).eval().requires_grad_(False)


def compiled(model: nn.Module, mode: str | None = None, **options: Any) -> Any:
    return torch.compile(model, backend=backend, mode=mode, options=None if mode else MEMORY, **options)


def judge(model: nn.Module, actual: Tensor, x: Tensor, slack: float = 1.1) -> None:
    exact = copy.deepcopy(model).double()(x.double())
    assert_as_accurate_as_dense(actual, model(x), exact, slack)


def decompressed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    vnm.decompress_model(model)
    return model


def with_sparse_kernels(model: nn.Module, x: Tensor) -> int:
    return sum(layer.decision == "sparse" for layer in vnm.explain(model, x, options=MEMORY).layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations_as_models_have_them(dtype):
    model = block(dtype)
    run = compiled(model, dynamic=True)
    wide = torch.randn(3, 40, 1024, device=DEVICE).to(dtype)
    for x in (
        wide[..., :512],
        wide[:, 1:, 512:],
        wide[..., ::2],
        wide[:, :, :512].transpose(0, 1),
        wide[0, :1, :512],
        wide[0, 3, 100:612],
        torch.randn(512, 77, device=DEVICE).to(dtype).T,
        wide[:1, :1, :512].expand(5, 7, 512),
    ):
        judge(model, run(x), x)


@pytest.mark.parametrize("spec", ["64:2:8", "128:2:16", "32:1:8", "16:2:5"])
@pytest.mark.parametrize("tokens", [1, 9, 700])
def test_recorded_in_graphs(spec, tokens):
    model = block(spec=spec)
    run = compiled(model, "reduce-overhead")
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(tokens, 512, device=DEVICE).bfloat16()
        judge(model, run(x).clone(), x)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_writes_that_are_counted_are_seen_at_once(mode):
    model = block()
    run = compiled(model, mode)
    x = torch.randn(9, 512, device=DEVICE).bfloat16()
    for _ in range(3):
        judge(model, run(x).clone(), x)
    model.up.weight.mul_(2)
    judge(model, run(x).clone(), x)
    torch._foreach_mul_([model.gate.weight, model.down.weight], 0.5)
    judge(model, run(x).clone(), x)
    model.load_state_dict(block().state_dict())
    judge(model, run(x).clone(), x)
    model.down.weight = nn.Parameter(model.down.weight * 3, requires_grad=False)
    judge(model, run(x).clone(), x)
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=1e-2, fused=True)
    for parameter in model.parameters():
        parameter.grad = (parameter != 0).to(parameter.dtype)
    optimizer.step()
    model.requires_grad_(False)
    judge(model, run(x).clone(), x)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_writes_that_are_not_counted_are_seen_a_call_late(mode):
    model = block()
    run = compiled(model, mode)
    x = torch.randn(9, 512, device=DEVICE).bfloat16()
    for _ in range(3):
        run(x)
    model.up.weight.data.mul_(-2)
    run(x)
    torch.cuda.synchronize()
    judge(model, run(x).clone(), x)


def test_on_another_stream_and_in_a_graph_of_the_users_own():
    model = block()
    run = compiled(model)
    x = torch.randn(9, 512, device=DEVICE).bfloat16()
    run(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = run(x)
    torch.cuda.current_stream().wait_stream(stream)
    judge(model, y, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    x.copy_(torch.randn(9, 512, device=DEVICE))
    graph.replay()
    judge(model, y, x)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 4, 100, 1000])
def test_quantised_values(values, tokens):
    model = block()
    vnm.annotate(model, "64:2:8")
    vnm.quantize(model, values=values)
    x = torch.randn(tokens, 512, device=DEVICE).bfloat16()
    with torch.no_grad():
        assert with_sparse_kernels(model, x) == 3
        y = compiled(model)(x)
    judge(decompressed(model), y, x)


def test_compressed_weights_have_the_gradients_of_dense_ones():
    dense = block(torch.float32).requires_grad_(True)
    model = copy.deepcopy(dense)
    vnm.annotate(model, "64:2:8")
    vnm.compress_model(model)
    model.requires_grad_(True)
    x, same = (torch.randn(40, 512, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)) for _ in range(2))
    compiled(model)(x.requires_grad_()).square().sum().backward()
    dense(same.requires_grad_()).square().sum().backward()
    pairs = [(x, same), *zip(model.parameters(), dense.parameters(), strict=True)]
    for ours, theirs in pairs:
        bound = 2e-4 * float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, atol=bound, rtol=1e-3)


def test_compressed_weights_train():
    torch.manual_seed(0)
    model = block(torch.float32).requires_grad_(True)
    vnm.annotate(model, "64:2:8")
    vnm.train.compress_for_training(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    run = compiled(model)
    x, losses = torch.randn(64, 512, device=DEVICE), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.mse_loss(run(x), 2 * x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    vnm.finalize(model)
    model.eval().requires_grad_(False)
    assert vnm.matches(model.up.weight, "64:2:8")
    judge(model, compiled(model)(x), x)


@pytest.mark.parametrize("recipe", [vnm.train.MaskDecay(), vnm.train.StructureDecay(), vnm.train.SRSTE()])
def test_training_into_the_pattern(recipe):
    torch.manual_seed(0)
    model = Block().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    training = vnm.train.begin(model, "64:2:8", recipe, steps=30, optimizer=optimizer)
    for _ in range(30):
        x = torch.randn(64, 512, device=DEVICE)
        loss = F.mse_loss(model(x), 2 * x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    del training
    vnm.finalize(model)
    assert all(vnm.matches(model.get_submodule(name).weight, "64:2:8") for name in ("gate", "up", "down"))
    model.eval().requires_grad_(False)
    x = torch.randn(5, 512, device=DEVICE)
    judge(model, compiled(model)(x), x)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "second_order"])
def test_pruning_and_keeping(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(DEVICE).eval().requires_grad_(False)
    data = [torch.randn(64, 512, device=DEVICE) for _ in range(3)]
    vnm.sparsify(model, "64:2:8", method=method, calibration=data, progress=False)
    assert vnm.matches(model[0].up.weight, "64:2:8")
    assert model[0].up.weight.device.type == DEVICE
    vnm.save(model, tmp_path / "model", progress=False)
    again = nn.Sequential(Block(), Block()).to(DEVICE).eval()
    vnm.load(tmp_path / "model", again)
    x = torch.randn(17, 512, device=DEVICE)
    with torch.no_grad():
        judge(model, compiled(model)(x), x)
        judge(model, compiled(again)(x), x)


def test_masks_are_those_of_the_cpu():
    weight = torch.randn(256, 512)
    for spec in ("64:2:8", "16:2:5", "128:2:16"):
        here = vnm.prune.project(weight.to(DEVICE), spec)
        assert torch.equal(here.cpu(), vnm.prune.project(weight, spec))


def test_moved_after_compiling():
    model = block(torch.float32)
    run = compiled(model)
    x = torch.randn(9, 512, device=DEVICE)
    judge(model, run(x), x)
    model.cpu()
    judge(model, run(x.cpu()), x.cpu())
    model.to(DEVICE, torch.bfloat16)
    judge(model, run(x.bfloat16()), x.bfloat16())


def test_default_device_and_autocast():
    model = block(torch.float32)
    x = torch.randn(9, 512, device=DEVICE)
    torch.set_default_device(DEVICE)
    try:
        y = compiled(model)(x)
    finally:
        torch.set_default_device(None)
    judge(model, y, x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, dense = compiled(model)(x), model(x)
    exact = copy.deepcopy(model).double()(x.double())
    assert_as_accurate_as_dense(y, dense, exact, slack=1.2)


def test_what_latency_decides_is_right_and_told():
    model = block()
    x = torch.randn(64, 512, device=DEVICE).bfloat16()
    told = vnm.explain(model, x)
    assert all(layer.sparse_seconds and layer.dense_seconds for layer in told.layers)
    judge(model, torch.compile(model, backend=backend)(x), x)
    report = vnm.inspect(model, x, options=MEMORY)
    assert report.sparse
    chosen = vnm.select_spec(Block().to(DEVICE, torch.bfloat16), 1.1, ["64:2:8", "128:2:16"], seconds="measured")
    assert chosen.choice


@pytest.mark.parametrize("spec", ["64:2:8", "64:1:8", "128:2:16", "16:2:4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_tensor_cores(spec, dtype, monkeypatch, recwarn):
    """They are there on Hopper too, if slower than its dense ones: the only way to see their kernels on it."""
    monkeypatch.setattr(Target, "sparse_flops", property(lambda self: 8 * self.half_flops))
    used: list[bool] = []
    passes = lowering.self_check.passes
    monkeypatch.setattr(lowering.self_check, "passes", lambda *args: used.append(passes(*args)) or used[-1])
    torch._inductor.utils.clear_caches()
    layer = make_sparse_(nn.Linear(1003 if spec == "64:2:8" else 1024, 512), spec).to(DEVICE, dtype)
    for tokens in (16, 40, 500):
        torch._dynamo.reset()
        x = torch.randn(tokens, layer.in_features, device=DEVICE).to(dtype)
        with torch.no_grad(), torch._inductor.utils.fresh_cache():
            y = compiled(layer)(x)
            exact = x.double() @ layer.weight.double().T + layer.bias.double()
            assert_as_accurate_as_dense(y, layer(x), exact)
    assert used
    assert all(used)
    assert not [each for each in recwarn if "sparse tensor cores are not used" in str(each.message)]


def test_generating():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=512, num_key_value_heads=2, max_position_embeddings=128, **sizes)
    torch.manual_seed(0)
    model = make_sparse_(transformers.LlamaForCausalLM(config), "64:2:8").to(DEVICE).eval()
    ids = torch.randint(3, 500, (2, 9), device=DEVICE)
    options = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(ids, disable_compile=True, **options)
    vnm.annotate(model, "64:2:8")
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        how = transformers.CompileConfig(backend=backend, mode=mode, dynamic=False)
        assert torch.equal(model.generate(ids, compile_config=how, **options), expected)
