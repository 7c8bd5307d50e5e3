"""Transformer blocks on a GPU, compiled as users compile them: right against float64, and how fast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.blocks import EncoderBlock, LlamaBlock, angles
from benchmarks.contenders import fill_with_pattern
from benchmarks.gpu_cases import relative_error
from vnm_compile.backend import vnm
from vnm_compile.spec import Spec

MEMORY = {"vnm.policy": "memory"}


class Block(NamedTuple):
    """A block and what it reads: `inputs(dtype, device, tokens)`."""

    name: str
    spec: str
    tokens: tuple[int, ...]
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype, torch.device, int], tuple[Any, ...]]


def _sequence(hidden: int, batch: int, dtype: torch.dtype, device: torch.device, tokens: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, tokens, hidden, device=device).to(dtype),)


def _rotated(hidden: int, dtype: torch.dtype, device: torch.device, tokens: int) -> tuple[Tensor, ...]:
    turn = angles(tokens, 0).to(device)
    return torch.randn(1, tokens, hidden, device=device).to(dtype), turn.cos().to(dtype), turn.sin().to(dtype)


BLOCKS = [
    Block("Llama-3-8B", "64:2:8", (1, 16, 2048), partial(LlamaBlock, 4096, 14336, 32), partial(_rotated, 4096)),
    Block("Llama-3-8B", "128:2:16", (1, 16, 2048), partial(LlamaBlock, 4096, 14336, 32), partial(_rotated, 4096)),
    Block("BERT-large", "64:2:8", (512,), partial(EncoderBlock, 1024, 4096, 16), partial(_sequence, 1024, 8)),
    Block("BERT-large", "128:2:16", (512,), partial(EncoderBlock, 1024, 4096, 16), partial(_sequence, 1024, 8)),
    Block("DeiT-base", "64:2:8", (197,), partial(EncoderBlock, 768, 3072, 12, True), partial(_sequence, 768, 32)),
]
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "dynamic": {"dynamic": True},
}


def build(block: Block, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The block with random weights of its pattern, scaled so that activations keep their size."""
    model = fill_with_pattern(block.make(), Spec.parse(block.spec))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_((Spec.parse(block.spec).density * layer.in_features) ** -0.5)
    return model.to(device, dtype).eval()


def errors(block: Block, model: nn.Module, tokens: int, way: str) -> tuple[float, float]:
    """Relative errors against float64 of the compiled block and of the eager one, in the model's dtype."""
    weight = next(model.parameters())
    inputs = block.inputs(weight.dtype, weight.device, tokens)
    torch._dynamo.reset()
    options: dict[str, Any] = dict(WAYS[way])
    compiled = torch.compile(model, backend=partial(vnm, mode=options.pop("mode", None), options=MEMORY), **options)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*(each.double() for each in inputs))
        for _ in range(3):  # CUDA graphs are recorded on the way
            ours = compiled(*inputs).clone()
        return relative_error(ours, exact), relative_error(model(*inputs), exact)


def run(device: torch.device) -> Iterator[tuple[str, ...]]:
    """A line a block and number of tokens: errors in every way, dense and sparse microseconds, their ratio."""
    from benchmarks.gpu_timing import seconds_of_each

    for block in BLOCKS:
        torch.manual_seed(0)
        model = build(block, torch.bfloat16, device)
        for tokens in block.tokens:
            ways = WAYS if tokens == block.tokens[0] else ("default",)
            found = {way: errors(block, model, tokens, way) for way in ways}
            wrong = [way for way, (ours, dense) in found.items() if not ours <= 1.1 * dense + 2**-8]
            inputs = block.inputs(torch.bfloat16, device, tokens)
            torch._dynamo.reset()
            calls = {
                "dense": [partial(torch.compile(copy.deepcopy(model)), *inputs)],
                "vnm": [partial(torch.compile(model, backend=partial(vnm, options=MEMORY)), *inputs)],
            }
            with torch.no_grad():
                taken = {name: 1e6 * median(each) for name, each in seconds_of_each(calls).items()}
            worst = max(ours for ours, _ in found.values())
            yield (
                block.name,
                block.spec,
                str(tokens),
                f"{worst:.2e}",
                f"{found['default'][1]:.2e}",
                f"{taken['dense']:.1f}",
                f"{taken['vnm']:.1f}",
                f"{taken['dense'] / taken['vnm']:.2f}",
                f"WRONG {' '.join(wrong)}" if wrong else "",
            )


HEADINGS = ("block", "pattern", "T", "error", "dense error", "dense us", "vnm us", "ratio", "")
