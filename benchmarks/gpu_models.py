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
from vnm_compile.annotate import annotate
from vnm_compile.backend import vnm
from vnm_compile.convert import decompress_model
from vnm_compile.quantizing import quantize
from vnm_compile.spec import Spec

MEMORY = {"vnm.policy": "memory"}


class Block(NamedTuple):
    """A block and what it reads: `inputs(dtype, device, tokens)`."""

    name: str
    spec: str
    tokens: tuple[int, ...]
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype, torch.device, int], tuple[Any, ...]]
    values: str | None = None

    @property
    def stored(self) -> str:
        """`64:2:8`, with quantised values `64:2:8 int4`."""
        return f"{self.spec} {self.values}" if self.values else self.spec


def _sequence(hidden: int, batch: int, dtype: torch.dtype, device: torch.device, tokens: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, tokens, hidden, device=device).to(dtype),)


def _rotated(hidden: int, dtype: torch.dtype, device: torch.device, tokens: int) -> tuple[Tensor, ...]:
    turn = angles(tokens, 0).to(device)
    return torch.randn(1, tokens, hidden, device=device).to(dtype), turn.cos().to(dtype), turn.sin().to(dtype)


BLOCKS = [
    Block("Llama-3-8B", "64:2:8", (1, 16, 2048), partial(LlamaBlock, 4096, 14336, 32), partial(_rotated, 4096)),
    Block("Llama-3-8B", "128:2:16", (1, 16, 2048), partial(LlamaBlock, 4096, 14336, 32), partial(_rotated, 4096)),
    Block("Llama-3-8B", "64:2:8", (1, 16), partial(LlamaBlock, 4096, 14336, 32), partial(_rotated, 4096), "int8"),
    Block("Llama-3-8B", "64:2:8", (1, 16), partial(LlamaBlock, 4096, 14336, 32), partial(_rotated, 4096), "int4"),
    Block("BERT-large", "64:2:8", (512,), partial(EncoderBlock, 1024, 4096, 16), partial(_sequence, 1024, 8)),
    Block("BERT-large", "128:2:16", (512,), partial(EncoderBlock, 1024, 4096, 16), partial(_sequence, 1024, 8)),
    Block("DeiT-base", "64:2:8", (197,), partial(EncoderBlock, 768, 3072, 12, True), partial(_sequence, 768, 32)),
]
_AGAIN = 5
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
    model = model.to(device, dtype).eval()
    if block.values:
        annotate(model, block.spec)
        quantize(model, values=block.values, progress=False)
    return model


def dense(block: Block, model: nn.Module) -> nn.Module:
    """A copy whose weights are dense tensors: decompressed where they are quantised."""
    model = copy.deepcopy(model)
    if block.values:
        decompress_model(model)
    return model


def errors(block: Block, model: nn.Module, tokens: int, way: str) -> tuple[float, float]:
    """Relative errors against float64 of the compiled block and of the eager one, in the model's dtype."""
    weight = next(model.parameters())
    inputs = block.inputs(weight.dtype, weight.device, tokens)
    torch._dynamo.reset()
    options: dict[str, Any] = dict(WAYS[way])
    compiled = torch.compile(model, backend=partial(vnm, mode=options.pop("mode", None), options=MEMORY), **options)
    with torch.no_grad():
        plain = dense(block, model)
        found = [compiled(*inputs).clone() for _ in range(_AGAIN)]  # CUDA graphs are recorded on the way
        theirs = plain(*inputs)
        exact = plain.double()(*(each.double() for each in inputs))
        # Attention of other libraries need not give the same bits again; a race in ours does more than that.
        return max(relative_error(ours, exact) for ours in found), relative_error(theirs, exact)


def check(block: Block, tokens: int, way: str, device: torch.device) -> tuple[str, ...]:
    """A line of `gpu_check`; plain `torch.compile` compiles its kernels, too."""
    torch.manual_seed(0)
    model = build(block, torch.bfloat16, device)
    ours, theirs = errors(block, model, tokens, way)
    if way == "default":
        with torch.no_grad():
            torch.compile(dense(block, model))(*block.inputs(torch.bfloat16, device, tokens))
    said = "" if ours <= 1.1 * theirs + 2**-8 else "WRONG"
    return f"{block.name} {way}", block.stored, str(tokens), "bfloat16", f"{ours:.2e}", f"{theirs:.2e}", said


def run(device: torch.device) -> Iterator[tuple[str, ...]]:
    """A line a block and number of tokens: dense microseconds, sparse ones, and those of policy "latency", with their
    ratios."""
    from benchmarks.gpu_timing import seconds_of_each

    for block in BLOCKS:
        torch.manual_seed(0)
        model = build(block, torch.bfloat16, device)
        for tokens in block.tokens:
            inputs = block.inputs(torch.bfloat16, device, tokens)
            torch._dynamo.reset()
            calls = {
                "dense": [partial(torch.compile(dense(block, model)), *inputs)],
                "memory": [partial(torch.compile(model, backend=partial(vnm, options=MEMORY)), *inputs)],
                "latency": [partial(torch.compile(copy.deepcopy(model), backend=vnm), *inputs)],
            }
            with torch.no_grad():
                taken = {name: 1e6 * median(each) for name, each in seconds_of_each(calls).items()}
            ratios = (f"{taken['dense'] / taken[name]:.2f}" for name in ("memory", "latency"))
            yield block.name, block.stored, str(tokens), *(f"{each:.1f}" for each in taken.values()), *ratios


HEADINGS = ("block", "pattern", "T", "dense us", "vnm us", "latency us", "ratio", "latency ratio")
