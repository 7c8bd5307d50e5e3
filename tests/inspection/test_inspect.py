"""vnm.inspect: the kernels of real layers, their machine code for GPUs that are not there, and what is said of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import triton
from torch import nn
from torch.torch_version import TorchVersion

import vnm_compile as vnm
from tests.support import make_sparse_, with_slow
from vnm_compile.cost import CostModel
from vnm_compile.hardware import TARGETS
from vnm_compile.inspection.kernel import TOKENS
from vnm_compile.layout import Layout

NEW_TRITON = TorchVersion(triton.__version__) >= (3, 9)
TENSOR_CORE = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
    "gfx1100": "v_wmma",
}

# One target of each kind of code in `make test`, those that get the same with `make test-slow`.
EVERY_TARGET = with_slow(TARGETS, quick=("sm_90", "sm_100", "gfx942"))


def feed_forward(width: int = 512, hidden: int = 1024, spec: str = "64:2:8", dtype: torch.dtype = torch.bfloat16):
    layer = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    return make_sparse_(layer, spec).to(dtype).eval()


def bert_layer():
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    return make_sparse_(BertLayer(config), "64:2:8").to(torch.bfloat16).eval()


def llama_layer():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=1024, intermediate_size=704, num_attention_heads=4, num_key_value_heads=2)
    layer = make_sparse_(LlamaDecoderLayer(config, 0), "64:2:8").to(torch.bfloat16).eval()
    x = torch.randn(1, 160, 1024, dtype=torch.bfloat16)
    return layer, x, LlamaRotaryEmbedding(config)(x, torch.arange(160)[None])


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_sparse_kernels_for_every_target(target):
    """Nothing spills, tensor cores multiply, and the hot loop has no load narrower than an asynchronous copy."""
    report = vnm.inspect(feed_forward(2048, 2048), torch.randn(256, 2048, dtype=torch.bfloat16), target=target)
    first, _ = report.sparse
    assert first.fused_ops[:3] == ("vnm.linear", "aten.add", "aten.gelu")
    for kernel in report.sparse:
        assert kernel.spills == 0
        assert 0 < kernel.registers <= 255
        assert 0 < kernel.shared_bytes <= TARGETS[target].shared_bytes
        names = [name for name in kernel.instructions.names if name.startswith(TENSOR_CORE[target])]
        assert names, f"{kernel.name}: {kernel.instructions.names}"
        assert kernel.loop.tensor_core > 0
        assert min(kernel.loop.loads) >= 4, kernel.loop.loads
        assert kernel.loop.loads.get(16)
        assert kernel.binary[:4] == b"\x7fELF"
        nvidia = target.startswith("sm_")
        assert [text is not None for text in (kernel.ptx, kernel.sass, kernel.amdgcn)] == [nvidia, nvidia, not nvidia]
        named = rf"\.target {target}" if nvidia else rf"amdhsa-(unknown)?-{target}"  # "unknown" from Triton 3.9 on
        assert re.search(named, kernel.ptx or kernel.amdgcn)
    assert target in str(report)


@pytest.mark.parametrize("tokens", [1, 16, 64, 1024])
@pytest.mark.parametrize(
    "spec",
    with_slow(["64:2:8", "32:2:5", "128:2:16", "16:2:4", "64:1:8"], quick=["64:2:8"]),
)
def test_nothing_spills_from_decode_to_prefill(spec, tokens):
    # 820 groups of 5 have rows of 410 bytes of metadata, which only aligned rows load well.
    layer = make_sparse_(nn.Linear(4096, 512), spec).to(torch.float16).eval()
    (kernel,) = vnm.inspect(layer, torch.randn(tokens, 4096, dtype=torch.float16), target="sm_90").sparse
    # Triton 3.9 stops at 168 registers, of which 32:2:5 with 64 tokens would take two more.
    assert kernel.spills <= (8 if (spec, tokens) == ("32:2:5", 64) and NEW_TRITON else 0)
    # One token's activations are gathered two bytes at a time; a thread uses them for all of its rows.
    wide = [size for size in kernel.loop.loads if tokens > 1 or size > 2]
    assert min(wide) >= 4, kernel.loop.loads
    assert 16 in wide


@pytest.mark.slow
def test_a_bert_layer():
    report = vnm.inspect(bert_layer(), torch.randn(2, 64, 256, dtype=torch.bfloat16), target="sm_90")
    # q, k and v are one; each of the others takes its bias along, the first of the feed-forward its activation.
    assert len(report.sparse) == 4
    assert {kernel.template for kernel in report.sparse} == {"vnm_linear"}
    _, _, up, _ = report.sparse
    assert report.explanation["attention.self.query"].joined == ("attention.self.key", "attention.self.value")
    assert "aten.gelu" in up.fused_ops
    # Between attention and the end nothing stands alone: both residuals and biases are in a kernel with the norm.
    rest = [kernel.name for kernel in report.kernels if kernel.template is None]
    assert "native_layer_norm" in rest[-1]
    assert sum("layer_norm" in name for name in rest) == 2
    # What Inductor did not generate is the attention, not a sparse product by the reference.
    calls = [call.name for call in report.library_calls]
    assert calls
    assert all("bmm" in name or "attention" in name for name in calls), calls


def test_a_llama_layer():
    layer, x, positions = llama_layer()
    report = vnm.inspect(layer, x, position_embeddings=positions, target="sm_90")
    assert [kernel.template for kernel in report.sparse] == ["vnm_linear", "vnm_linear", "vnm_gated_silu", "vnm_linear"]
    gated = report.sparse[2]
    assert gated.loop.tensor_core >= 2
    # The product goes straight to where the next kernel reads it: nothing is launched between the two.
    position = report.kernels.index(gated)
    assert report.kernels[position + 1] is report.sparse[3]


@pytest.mark.parametrize("target", with_slow(["sm_90", "sm_80", "sm_100"], quick=["sm_90"]))
@pytest.mark.parametrize("dtype", with_slow([torch.float32, torch.bfloat16], quick=[torch.bfloat16]), ids=str)
def test_narrow_layers_do_not_spill(dtype, target):
    for width in (64, 192, 256):
        layer = make_sparse_(nn.Linear(width, 192), "64:2:8").to(dtype).eval()
        report = vnm.inspect(layer, torch.randn(2, width).to(dtype), target=target)
        assert [kernel.spills for kernel in report.sparse] == [0], width


class Literals(nn.Module):
    """Makes tensors of numbers where its input is, as transformers' caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = make_sparse_(nn.Linear(128, 64), "16:2:8").to(torch.bfloat16)

    def forward(self, x):
        empty = torch.tensor([], dtype=x.dtype, device=x.device)
        return torch.cat([self.linear(x) * torch.tensor([0.5], dtype=x.dtype, device=x.device), empty.view(0, 64)])


def test_tensors_made_of_numbers():
    report = vnm.inspect(Literals().eval(), torch.randn(8, 128, dtype=torch.bfloat16), target="sm_86")
    assert len(report.sparse) == 1


@pytest.mark.slow
def test_what_was_inspected_before_makes_no_difference():
    model = feed_forward()
    sources = []
    for tokens in (32, 48, 32):
        report = vnm.inspect(model, torch.randn(tokens, 512, dtype=torch.bfloat16), target="sm_90")
        sources.append(report.sparse[0].source)
    assert "T = 48" in sources[1]
    assert sources[0] == sources[2]


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_kernels_for_any_number_of_tokens_do_not_spill(target):
    layer = make_sparse_(nn.Linear(1024, 512), "64:2:8").to(torch.bfloat16).eval()
    report = vnm.inspect(layer, torch.randn(300, 1024, dtype=torch.bfloat16), target=target, dynamic=True)
    assert [kernel.spills for kernel in report.sparse] == [0]


def test_symbolic_tokens():
    model = feed_forward()
    report = vnm.inspect(model, torch.randn(48, 512, dtype=torch.bfloat16), target="sm_80", dynamic=True)
    kernel = report.sparse[0]
    spec = vnm.Spec.parse("64:2:8")
    # Two flops for each of the four kept columns of a group, row and token.
    assert kernel.flops == 2 * TOKENS * 1024 * 4 * 64
    # The weight and the bias once, the activations a token, and what they are rounded up to.
    stored = Layout(spec, 1024, 512).nbytes(torch.bfloat16) + 2 * 1024
    assert kernel.bytes_moved.subs(TOKENS, 48) == stored + 48 * 2 * (512 + 1024)
    assert "ks0" in kernel.source


def test_roofline_of_a_hand_computed_case():
    """64:2:8, 1024 x 512, 4096 tokens in bf16, on an H200 (4.8 TB/s, 989 Tflop/s)."""
    report = vnm.inspect(feed_forward(), torch.randn(4096, 512, dtype=torch.bfloat16), target="sm_90")
    kernel = report.sparse[0]
    # Half of the columns are kept: 2 x 4096 x 1024 x 256 flops, 2.2 us.
    assert kernel.flops.subs(TOKENS, 4096) == 2_147_483_648
    # 1024 x 64 groups of two values with a quarter byte of metadata each, 16 x 64 x 4 columns, 1024 biases, and the
    # activations, 4096 x (512 + 1024): 2.7 us, which is more.
    moved = 294_912 + 4_096 + 2_048 + 12_582_912
    assert kernel.bytes_moved.subs(TOKENS, 4096) == moved
    assert kernel.roofline_seconds == pytest.approx(moved / 4.8e12)


def test_the_kernels_of_this_machine():
    model = feed_forward(dtype=torch.float32)
    options = {"vnm.policy": "memory"}
    report = vnm.inspect(model, torch.randn(32, 512), options=options)
    assert [kernel.language for kernel in report.kernels] == ["cpp", "cpp"]
    assert report.sparse == report.kernels
    assert "aten.gelu" in report.kernels[0].fused_ops
    assert all(kernel.registers is None and kernel.binary is None for kernel in report.kernels)
    assert "CPU" in str(report)


def test_graph_breaks_and_a_dense_layer():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.dense = feed_forward(), feed_forward(), nn.Linear(512, 64, dtype=torch.bfloat16)

        def forward(self, x):
            x = self.one(x)
            torch._dynamo.graph_break()
            return self.dense(self.two(x))

    report = vnm.inspect(Broken().eval(), torch.randn(40, 512, dtype=torch.bfloat16), target="sm_90")
    assert len(report.wrappers) == 2
    assert len(report.sparse) == 4
    assert [call.fused_ops[-1] for call in report.library_calls] == ["aten.addmm"]
    assert report.explanation["dense"].decision == "dense"


def test_saved_files_and_the_script_that_repeats_a_kernel(tmp_path):
    report = vnm.inspect(feed_forward(), torch.randn(64, 512, dtype=torch.bfloat16), target="sm_86")
    folder = report.save(tmp_path / "report")
    kernel = report.sparse[0]
    written = folder / kernel.name
    assert (written / "source.py").read_text() == kernel.source
    assert (written / "kernel.ptx").read_text() == kernel.ptx
    assert (written / "kernel.cubin").read_bytes() == kernel.binary
    figures = json.loads((written / "figures.json").read_text())
    assert figures["registers"] == kernel.registers
    assert figures["hot_loop"]["tensor_core"] == kernel.loop.tensor_core
    done = subprocess.run(
        [sys.executable, str(written / "reproduce.py")], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert f"{kernel.registers} registers" in done.stdout


def test_nothing_of_the_model_changes():
    model = feed_forward()
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    gpu = torch.cuda.is_available()
    vnm.inspect(model, torch.randn(8, 512, dtype=torch.bfloat16), target="sm_90")
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
    assert torch.cuda.is_available() == gpu


@pytest.mark.slow
def test_a_wrapper_in_cpp_shows_the_same_kernels():
    model, x = feed_forward(), torch.randn(48, 512, dtype=torch.bfloat16)
    options = {"cpp_wrapper": True}
    plain, wrapped = (vnm.inspect(model, x, target="sm_90", options=each) for each in ({}, options))
    assert [kernel.source for kernel in wrapped.kernels] == [kernel.source for kernel in plain.kernels]
    assert len(wrapped.sparse) == 2
    here = vnm.inspect(model.float(), x.float(), options={**options, "vnm.policy": "memory"})
    assert [kernel.language for kernel in here.sparse] == ["cpp", "cpp"]


@contextmanager
def precision(setting: str):
    """TF32 allowed by one of torch's settings; all of them as before afterwards, in a way that raises nowhere."""
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision
    try:
        if setting == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        elif setting == "matmul.fp32_precision":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        elif setting == "fp32_precision":
            torch.backends.cuda.matmul.fp32_precision = "none"  # or what was said of matmul before would hold
            torch.backends.fp32_precision = "tf32"
        elif setting == "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision = before


SETTINGS = ["none", "allow_tf32", "matmul.fp32_precision", "fp32_precision", "set_float32_matmul_precision"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_tf32_by_any_of_torchs_settings(setting):
    layer, x = make_sparse_(nn.Linear(512, 64), "64:2:8").eval(), torch.randn(256, 512)
    with precision(setting):
        seen = torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision
        (kernel,) = vnm.inspect(layer, x, target="sm_80").sparse
        assert f"ALLOW_TF32 : tl.constexpr = {setting != 'none'}" in kernel.source
        assert bool(kernel.loop.tensor_core) == (setting != "none")
        rate = TARGETS["sm_80"].tf32_flops if setting != "none" else TARGETS["sm_80"].fp32_flops
        flops = float(kernel.flops.subs(TOKENS, 256))
        moved = float(kernel.bytes_moved.subs(TOKENS, 256)) / TARGETS["sm_80"].bandwidth
        assert kernel.roofline_seconds == pytest.approx(max(moved, flops / rate))
        assert seen == (torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision)


def test_multiplications_and_additions_are_fused_by_what_is_written_not_by_default(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    (kernel, *_) = vnm.inspect(feed_forward(), torch.randn(4, 512, dtype=torch.bfloat16), target="sm_90").sparse
    assert "'enable_fp_fusion': True" in kernel.source
    assert any(name.startswith("FFMA") for name in kernel.instructions.names)


def test_unknown_target():
    with pytest.raises(vnm.VNMError, match="sm_90"):
        vnm.inspect(feed_forward(), torch.randn(8, 512, dtype=torch.bfloat16), target="sm_50")


def test_limits_are_those_of_the_target():
    """What explains the layers is the GPU that code is generated for, not the machine that the model is on."""
    model, x = feed_forward(), torch.randn(2048, 512, dtype=torch.bfloat16)
    limits = {}
    for name in ("sm_80", "sm_90"):
        explanation = vnm.inspect(model, x, target=name).explanation
        assert explanation.device == name
        layer = explanation["0"]
        layout = Layout(vnm.Spec.parse("64:2:8"), 1024, 512)
        limits[name] = CostModel.on(TARGETS[name], 1024, 512, layout, torch.bfloat16).speedup_at(2048)
        assert layer.limit == pytest.approx(limits[name])
    assert limits["sm_80"] != limits["sm_90"]
    here = vnm.inspect(model, x, options={"vnm.policy": "memory"}).explanation
    assert here.device == "cpu"
    assert here["0"].limit not in limits.values()
