"""A case: steps over one activation, the weights they need, and how the module is built, compiled and called."""

from __future__ import annotations

import json
import linecache
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Weight:
    """A weight of a program.

    Attributes:
        name: attribute of the module.
        form: "linear" (an nn.Linear), "param" (a Parameter `[out, in]`) or "conv1d" (a Parameter `[in, out]`).
        bias: shape of the bias as text: "none", "row" `[out]`, "one" `[1]`, "scalar" `[]`, "matrix" `[1, out]`.
        spec: the pattern, or None for a dense weight.
    """

    name: str
    form: str
    out_features: int
    in_features: int
    bias: str
    spec: str | None

    @property
    def path(self) -> str:
        return f"{self.name}.weight" if self.form == "linear" else self.name

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        shapes = {"row": (self.out_features,), "one": (1,), "scalar": (), "matrix": (1, self.out_features)}
        return shapes.get(self.bias)

    def declaration(self) -> list[str]:
        if self.form == "linear":
            return [
                f"self.{self.name} = nn.Linear({self.in_features}, {self.out_features}, bias={self.bias != 'none'})"
            ]
        shape = (self.out_features, self.in_features)
        lines = [f"self.{self.name} = nn.Parameter(torch.zeros{shape if self.form == 'param' else shape[::-1]})"]
        if self.bias_shape is not None:
            lines.append(f"self.{self.name}_bias = nn.Parameter(torch.zeros({list(self.bias_shape)}))")
        return lines


@dataclass(frozen=True)
class Step:
    """Statements that read `h` (`[batch, tokens, width]`), `e` (an earlier h), `x`, `flag`, and leave a new `h`.

    They may append to `outs`. Any step can be deleted without making another one invalid.
    """

    kind: str
    lines: tuple[str, ...]
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How a program is built, compiled and called; all of it plain values."""

    seed: int = 0
    width: int = 24
    dtype: str = "float32"
    mode: str = "no_grad"  # no_grad, inference, input_grad, train
    autocast: str = "none"  # none, bfloat16: around every call
    dynamic: bool | None = None
    storage: str = "dense"  # dense, compressed
    annotated: bool = False
    merge: bool = True
    through: str = (
        "fx"  # what runs the rewritten graph: fx (eager, node by node), aot (AOTAutograd), inductor (kernels)
    )
    frozen: bool = True  # weights do not require grad
    flat: bool = False  # parameters are views of one flat buffer
    input: str = "contiguous"  # contiguous, offset, transposed, expanded
    calls: tuple[tuple[int, int], ...] = ((2, 3), (2, 5))  # batch and tokens of each
    writes: tuple[str, ...] = ()  # one before each call but the first; "none" for none


@dataclass(frozen=True)
class Program:
    steps: tuple[Step, ...]
    settings: Settings = field(default_factory=Settings)

    @property
    def weights(self) -> list[Weight]:
        found = {weight.name: weight for step in self.steps for weight in step.weights}
        return list(found.values())

    def source(self) -> str:
        """The module as Python source."""
        declared = [line for weight in self.weights for line in weight.declaration()]
        body = ["h, e, outs = x * 1, x, []"]
        for step in self.steps:
            body += [f"# {step.kind}", *step.lines]
        lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in declared]
        lines += ["", "    def forward(self, x, flag=True):"]
        lines += [f"        {line}" for line in body] + ["        return [h, *outs]", ""]
        return "\n".join(lines)

    def script(self, note: str = "") -> str:
        """A file that `python -m tests.fuzz --replay FILE` (or python itself, at the root) runs."""
        comment = "".join(f"# {line}\n" for line in note.splitlines())
        return (
            f"{comment}{HEADER}\n\n{self.source()}\n"
            f"WEIGHTS = {_pretty([asdict(weight) for weight in self.weights])}\n"
            f"SETTINGS = {_pretty(asdict(self.settings))}\n"
            f"KINDS = {sorted({step.kind for step in self.steps})}\n\n"
            'if __name__ == "__main__":\n    from tests.fuzz.run import replay\n\n    replay(globals())\n'
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Program:
        given = json.loads(text)
        steps = tuple(
            Step(s["kind"], tuple(s["lines"]), tuple(Weight(**weight) for weight in s["weights"]))
            for s in given["steps"]
        )
        return Program(steps, settings_from(given["settings"]))

    def changed(self, **settings: Any) -> Program:
        return replace(self, settings=replace(self.settings, **settings))


HEADER = """import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16"""


def settings_from(given: dict[str, Any]) -> Settings:
    given = dict(given)
    given["calls"] = tuple(tuple(call) for call in given["calls"])
    given["writes"] = tuple(given["writes"])
    return Settings(**given)


def _pretty(value: Any) -> str:
    import pprint

    return pprint.pformat(value, width=110, sort_dicts=False)


_count = 0


def load(source: str, double: bool = False) -> type[nn.Module]:
    """The class `Model` of a program's source; with `double`, the names of low precisions mean float64."""
    global _count
    _count += 1
    name = f"<fuzz {_count}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "fuzz_case"}
    exec(HEADER, namespace)
    if double:
        namespace.update(F32=torch.float64, BF16=torch.float64)
    exec(compile(source, name, "exec"), namespace)
    return namespace["Model"]
