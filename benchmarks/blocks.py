"""Transformer blocks in plain torch, for benchmarks on machines that have nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EncoderBlock(nn.Module):
    """A block as BERT's (norms after) and, with `pre_norm`, ViT's and DeiT's (norms before); `causal`, GPT's."""

    def __init__(
        self, hidden: int, intermediate: int, heads: int, pre_norm: bool = False, causal: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.pre_norm, self.causal = heads, pre_norm, causal
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, T, hidden]."""
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x))
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(x + self.mlp(x))

    def attention(self, x: Tensor) -> Tensor:
        """Every token attends to every token or, causal, to those before it."""
        q, k, v = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        """Two linears and a GELU."""
        return self.down(F.gelu(self.up(x)))


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


def angles(tokens: int, past: int, head: int = 128) -> Tensor:
    """Angles of the rotary embedding of `tokens` tokens after `past` others: [tokens, head]."""
    return torch.arange(past, past + tokens).outer(10000 ** -(torch.arange(0, head, 2) / head)).repeat(1, 2)
