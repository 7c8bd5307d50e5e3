"""Llama-shaped models of random weights, dense and V:N:M, for `benchmarks.generate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.layout import Layout
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor

SHAPES: dict[str, dict[str, int]] = {
    "160M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32000,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Of Llama-160M and Llama-3.2-1B, but for the latter's head, which is not tied to its embeddings here."""

SPEC = Spec(64, 2, 8)


def random_model(shape: str, quantization: Quantization | None = None, sparse: bool = False) -> Any:
    """The model in bf16; a `sparse` one has compressed weights in all linears, the head too, and never a dense one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, max_position_embeddings=2048)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear) and sparse:
            layout = Layout(SPEC, *module.weight.shape, quantization)
            packed = random_packed(layout, torch.bfloat16, torch.device("cpu"))
            module.weight = nn.Parameter(VNMTensor._wrap(packed, layout, False), False)
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty_like(parameter, device="cpu")
            if parameter.dim() == 1:
                made.fill_(1)
            else:
                made.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # computed from the config, so not on meta
    model.generation_config.pad_token_id = 0
    return model.eval()
