"""The activations of a gated pair, `activation(x @ gate.T) * (x @ up.T)`: one entry each, and nothing elsewhere.

An entry says how an activation is computed in eager mode, how programs write it, and how it is said in C++ and Triton.
Where a kernel cannot apply it itself (sums that are finished by another kernel), Inductor lowers the eager function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_DEFAULTS = {"inplace": False, "approximate": "none"}
"""Keywords that change nothing where they have these values."""


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: what `vnm::gated_linear` takes; a name in C++ and Python, which kernels are called after.
        eager: tensor to tensor of the same shape and dtype, element by element.
        functions, methods: what a node of an FX graph calls, with one positional argument, to apply it.
        keywords: the keywords of such a call, those at their defaults left out.
        cpp: body of a function of `x`, a `Vec` of floats, in C++.
        triton: body of a function of `x`, a tile of fp32, in Triton; `tl` and `libdevice` are known.
    """

    name: str
    eager: Callable[[Tensor], Tensor]
    functions: tuple[Callable[..., Any], ...]
    cpp: str
    triton: str
    methods: tuple[str, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def is_applied_by(self, node: fx.Node) -> bool:
        """Whether a node's value is this activation of its only argument, in a new tensor."""
        called = {"call_function": self.functions, "call_method": self.methods}.get(node.op, ())
        given = {key: value for key, value in node.kwargs.items() if _DEFAULTS.get(key, node) != value}
        return node.target in called and len(node.args) == 1 and given == self.keywords


_TABLE = (
    Activation(
        "silu",
        eager=F.silu,
        functions=(F.silu, torch._C._nn.silu),
        cpp="return x / (Vec(1.f) + x.neg().exp());",
        triton="return x / (1.0 + tl.exp(-x))",
    ),
    Activation(
        "gelu",
        eager=F.gelu,
        functions=(F.gelu, torch._C._nn.gelu),
        cpp="return Vec(.5f) * x * (Vec(1.f) + (x * Vec(0.70710678118654752f)).erf());",
        triton="return 0.5 * x * (1.0 + libdevice.erf(x * 0.7071067811865476))",
    ),
    Activation(
        "gelu_tanh",
        eager=lambda x: F.gelu(x, approximate="tanh"),
        functions=(F.gelu, torch._C._nn.gelu),
        keywords={"approximate": "tanh"},
        cpp=(
            "const auto inner = Vec(0.79788456080286536f) * (x + Vec(0.044715f) * x * x * x);\n"
            "return Vec(.5f) * x * (Vec(1.f) + inner.tanh());"
        ),
        triton="return 0.5 * x * (1.0 + libdevice.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))",
    ),
    Activation(
        "relu",
        eager=F.relu,
        functions=(F.relu, torch.relu),
        methods=("relu",),
        cpp="return at::vec::maximum(x, Vec(0.f));",
        triton="return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN",
    ),
    Activation(
        "sigmoid",
        eager=torch.sigmoid,
        functions=(F.sigmoid, torch.sigmoid),
        methods=("sigmoid",),
        cpp="return Vec(1.f) / (Vec(1.f) + x.neg().exp());",
        triton="return 1.0 / (1.0 + tl.exp(-x))",
    ),
    # tanh(log(1 + e^x)) is (e^2x + 2 e^x) / (e^2x + 2 e^x + 2), which for x > 20 is 1 in fp32 and e^x would overflow.
    Activation(
        "mish",
        eager=F.mish,
        functions=(F.mish, torch._C._nn.mish),
        cpp=(
            "const auto e = at::vec::minimum(x, Vec(20.f)).exp();\n"
            "const auto square = e * (e + Vec(2.f));\n"
            "return x * (square / (square + Vec(2.f)));"
        ),
        triton="e = tl.exp(tl.minimum(x, 20.0))\nreturn x * (e * (e + 2.0) / (e * (e + 2.0) + 2.0))",
    ),
)

ACTIVATIONS: dict[str, Activation] = {each.name: each for each in _TABLE}
"""Every activation by its name."""


def activation_of(node: fx.Node | None) -> str | None:
    """Name of the activation that a node applies, or None where it applies none that is known."""
    if node is None:
        return None
    return next((each.name for each in _TABLE if each.is_applied_by(node)), None)
