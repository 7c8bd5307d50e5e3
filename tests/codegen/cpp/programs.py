"""Random programs over the outputs of sparse linears: what models compute after a linear, in any order.

A program is a list of steps drawn from `STEPS` by a seed; each appends a value to those before it. What it returns are
several of them, so that results are read by others in another order, seen from outside, or written to.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import make_sparse_

Step = Callable[[Tensor, Tensor, "Program"], Tensor]


def _in_place(y: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    y = y + 0
    write(y)
    return y


def _match(y: Tensor, other: Tensor) -> Tensor:
    """`other` in the shape of y, where it has as many elements; else y."""
    return other.reshape(y.shape) if other.numel() == y.numel() else y


# Each takes a value, another value, and the program (for its weights).
STEPS: dict[str, Step] = {
    "relu": lambda y, o, p: y.relu(),
    "gelu": lambda y, o, p: F.gelu(y),
    "scale": lambda y, o, p: y * 0.5 + 1,
    "square": lambda y, o, p: y * y,
    "add": lambda y, o, p: y + _match(y, o),
    "multiply": lambda y, o, p: y * _match(y, o),
    "bias": lambda y, o, p: y + p.a.bias[: y.shape[-1]].mean(),
    "column": lambda y, o, p: y + y[..., :1],
    "row": lambda y, o, p: y * y.flatten(0, -2)[0].sigmoid(),
    "transpose": lambda y, o, p: y.transpose(-1, -2),
    "transposed copy": lambda y, o, p: y.transpose(-1, -2).contiguous(),
    "multiply transposed": lambda y, o, p: (y * _match(y, o)).transpose(-1, -2).contiguous(),
    "leading transposed": lambda y, o, p: y.transpose(0, -2).contiguous() + 1,
    "heads": lambda y, o, p: y.unflatten(-1, (4, -1)) * 2 if y.shape[-1] % 4 == 0 else y,
    "heads first": lambda y, o, p: y.unflatten(-1, (2, -1)).transpose(-2, -3) * 2 if y.shape[-1] % 2 == 0 else y,
    "heads first copy": lambda y, o, p: (
        y.unflatten(-1, (2, -1)).transpose(-2, -3).contiguous() if y.shape[-1] % 2 == 0 else y
    ),
    "flatten": lambda y, o, p: y.flatten(0, 1).tanh(),
    "flatten all": lambda y, o, p: y.flatten() + 1,
    "flatten last": lambda y, o, p: y.flatten(-2, -1) + 1,
    "unsqueeze": lambda y, o, p: y.unsqueeze(0) + 1,
    "unsqueeze last": lambda y, o, p: (y.unsqueeze(-2) + 1).squeeze(-2),
    "flip": lambda y, o, p: y.flip(-1),
    "flip tokens": lambda y, o, p: y.flip(-2) * 2,
    "roll": lambda y, o, p: y.roll(1, -1) + y,
    "half": lambda y, o, p: y[..., : max(1, y.shape[-1] // 2)] * 2,
    "second half": lambda y, o, p: y[..., y.shape[-1] // 2 :].relu(),
    "every second": lambda y, o, p: y[..., ::2] + 1,
    "last token": lambda y, o, p: y[..., -1:, :] * 2,
    "rotate": lambda y, o, p: torch.cat([-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]], -1) + y,
    "cat": lambda y, o, p: torch.cat([y, _match(y, o)], 0),
    "cat last": lambda y, o, p: torch.cat([y.relu(), y], -1),
    "stack": lambda y, o, p: torch.stack([y, _match(y, o) + 1], -1),
    "pad": lambda y, o, p: F.pad(y, (1, 2)),
    "add in place": lambda y, o, p: _in_place(y, lambda z: z.add_(1)),
    "multiply a slice in place": lambda y, o, p: _in_place(y, lambda z: z[..., 1:].mul_(2)),
    "zero a slice in place": lambda y, o, p: _in_place(y, lambda z: z[..., :3].zero_()),
    "copy in place": lambda y, o, p: _in_place(y, lambda z: z.copy_(z.flip(-1))),
    "item": lambda y, o, p: _in_place(y, lambda z: z.__setitem__((..., 0), z[..., -1])),
    "masked fill": lambda y, o, p: y.masked_fill(_match(y, o) > 0, -1.0),
    "where": lambda y, o, p: torch.where(y > 0, y, _match(y, o)),
    "tril": lambda y, o, p: y.tril(),
    "softmax": lambda y, o, p: y.softmax(-1),
    "softmax over tokens": lambda y, o, p: y.softmax(-2),
    "layer norm": lambda y, o, p: F.layer_norm(y, y.shape[-1:]),
    "mean": lambda y, o, p: y - y.mean(-1, keepdim=True),
    "sum over tokens": lambda y, o, p: y + y.sum(-2, keepdim=True),
    "cumsum": lambda y, o, p: y.cumsum(-1) * 0.1,
    "double": lambda y, o, p: y.double().sin().to(y.dtype),
    "expand": lambda y, o, p: y.unsqueeze(0).expand(2, *y.shape) * 2,
    "broadcast": lambda y, o, p: (y.unsqueeze(-2) - y.unsqueeze(-3)).mean(-2),
    "gather": lambda y, o, p: y[..., torch.arange(y.shape[-1] - 1, -1, -1)] + y,
    "strided": lambda y, o, p: y.contiguous().as_strided(y.shape[-2:], (y.shape[-1], 1)) * 1.5,
    "linear": lambda y, o, p: p.a(y) if y.shape[-1] == p.width else y.relu(),
    "other linear": lambda y, o, p: p.b(y) if y.shape[-1] == p.width else y + 1,
    "linear without bias": lambda y, o, p: p.c(y) if y.shape[-1] == p.width else y * 2,
    "siblings": lambda y, o, p: p.d(y) * p.e(y) if y.shape[-1] == p.width else y.sin(),
    "gated": lambda y, o, p: F.silu(p.f(y)) * p.g(y) if y.shape[-1] == p.width else y.cos(),
}


class Program(nn.Module):
    """The program of a seed, over an input whose last dimension is `width`."""

    def __init__(self, seed: int, width: int = 64, length: int = 5, steps: list[str] | None = None) -> None:
        super().__init__()
        self.width = width
        draw = random.Random(seed)
        torch.manual_seed(seed)
        for name in "abcdefg":
            setattr(self, name, nn.Linear(width, width, bias=name in "ab" or (name in "de" and seed % 2 == 0)))
        make_sparse_(self, "16:2:8", seed)
        linears = ["linear", "other linear", "linear without bias", "siblings", "gated"]
        self.steps = steps or [draw.choice(linears), *(draw.choice(list(STEPS)) for _ in range(length))]
        # Mostly the value before; now and then an older one, so that values are read by several.
        self.sources = [i if draw.random() < 0.7 else draw.randint(0, i) for i in range(len(self.steps))]
        self.others = [draw.randint(0, i) for i in range(len(self.steps))]
        self.returned = sorted({draw.randint(1, len(self.steps)) for _ in range(2)} | {len(self.steps)})

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for name, source, other in zip(self.steps, self.sources, self.others, strict=True):
            values.append(STEPS[name](values[source], values[other], self))
        return [values[i] for i in self.returned]

    def takes(self, x: Tensor) -> bool:
        """Whether every step can be done in eager mode, and the results are numbers to compare."""
        try:
            with torch.no_grad():
                results = self(x)
        except (RuntimeError, IndexError):
            return False
        return all(bool(y.isfinite().all()) and y.abs().max() < 50 and y.numel() < 10**6 for y in results)

    def __str__(self) -> str:
        lines = [
            f"v{i + 1} = {name}(v{source}, v{other})"
            for i, (name, source, other) in enumerate(zip(self.steps, self.sources, self.others, strict=True))
        ]
        return "; ".join([*lines, "return " + ", ".join(f"v{i}" for i in self.returned)])
