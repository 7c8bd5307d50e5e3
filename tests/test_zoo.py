"""Tiny random models of the architectures people run: sparse, compiled, right, and every linear accounted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import vnm_compile as vnm
from tests.support import with_slow
from vnm_compile.layers import linear_layers

SPARSE = {"vnm.policy": "memory"}
SPEC = "16:2:8"
TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DECODER = {**TEXT, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IMAGE = {k: TEXT[k] for k in TEXT if k != "vocab_size"} | {"image_size": 16, "patch_size": 4, "num_labels": 3}


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.arange(14).view(2, 7)}


def pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def pairs() -> dict[str, Any]:
    return {**tokens(), "decoder_input_ids": torch.arange(8).view(2, 4)}


GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
DISTIL = {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
OPT = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), tokens),
    "distilbert": (lambda: hf.DistilBertModel(hf.DistilBertConfig(**DISTIL)), tokens),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)), pixels),
    "deit": (lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**IMAGE)), pixels),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), tokens),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), tokens),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=16)), tokens),
    "gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, head_dim=16)), tokens),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER)), tokens),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), pairs),
    "opt": (lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=32)), tokens),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)), tokens),
}

# Linears of a model that stay dense, by the end of their name, and a part of the reason that must be given.
DENSE = {
    "bert": {"classifier": "no V:N:M pattern"},
    "vit": {"classifier": "no V:N:M pattern", "projection": "convolution"},
    "deit": {"classifier": "no V:N:M pattern", "projection": "convolution"},
    "gpt2": {"wte": "shared with embedding"},
    "llama": {"lm_head": "no V:N:M pattern"},
    "qwen3": {"lm_head": "no V:N:M pattern"},
    "gemma": {"embed_tokens": "shared with embedding"},
    "mistral": {"lm_head": "no V:N:M pattern"},
    "t5": {"embed_tokens": "shared with embedding"},
    "opt": {"embed_tokens": "shared with embedding"},
    "mixtral": {
        "lm_head": "no V:N:M pattern",
        "gate": "no V:N:M pattern",
        "experts.gate_up_proj": "expert",
        "experts.down_proj": "expert",
    },
}


# One of each kind; the others repeat what these have.
FIRST = ("bert", "llama")


@pytest.mark.parametrize("name", with_slow(ZOO, quick=FIRST))
def test_zoo(name):
    torch.manual_seed(0)
    make, make_inputs = ZOO[name]
    model, inputs = make().eval(), make_inputs()
    vnm.sparsify(model, SPEC, progress=False)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False)[0] if name in ("llama", "qwen3") else model(**inputs)[0]
        report = vnm.explain(model, **inputs, options=SPARSE)
        result = torch.compile(model, backend="vnm", options=SPARSE)(**inputs)[0]
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    found = {layer.name: layer for layer in report.layers}
    expected_dense = DENSE.get(name, {})
    for layer in report.layers:
        end = next((end for end in expected_dense if layer.name.endswith(end)), None)
        if end is None or layer.decision == "not run":
            assert layer.decision == "sparse" or "lm_head" in layer.name, (layer.name, layer.reason)
        else:
            assert layer.decision == "dense", layer.name
            assert expected_dense[end] in layer.reason, (layer.name, layer.reason)
    for layer in linear_layers(model):
        assert layer.name in found, f"{layer.name} is not accounted for"
    assert report.totals["sparse"] >= 8


@pytest.mark.parametrize("fastpath", [pytest.param(True, marks=pytest.mark.slow), False])
def test_transformer_encoder(fastpath):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    vnm.sparsify(model, SPEC, progress=False)
    x = torch.randn(2, 7, 32)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        with torch.no_grad():
            report = vnm.explain(model, x, options=SPARSE)
            result = torch.compile(model, backend="vnm", options=SPARSE)(x)
            torch.testing.assert_close(result, model(x), atol=1e-5, rtol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    names = {layer.name: layer for layer in report.layers}
    # Torch's fused paths compute on their own; what they hide is listed, with the way to see it where there is one.
    hidden = "set_fastpath_enabled(False)" if fastpath else "F.multi_head_attention_forward"
    assert hidden in names["layers.0.self_attn.out_proj"].reason
    assert hidden in names["layers.0.self_attn.in_proj_weight"].reason
    for linear in ("linear1", "linear2"):
        assert names[f"layers.1.{linear}"].decision == ("dense" if fastpath else "sparse")


@pytest.mark.slow
def test_generate_with_a_static_cache():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)).eval()
    vnm.sparsify(model, SPEC, progress=False)
    prompt = torch.arange(3, 9)[None]
    arguments = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(prompt, **arguments)
    config = hf.CompileConfig(backend="vnm", mode=None, options=SPARSE)
    config._compile_all_devices = True
    assert torch.equal(model.generate(prompt, **arguments, compile_config=config), expected)
