"""A model as `torch.compile` runs it against what `backend="vnm"` makes of it: times, and whether both agree."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.convert import decompress_model
from vnm_compile.explanation import explain
from vnm_compile.explanation.explanation import Explanation
from vnm_compile.machine import processor

OURS, DENSE = "vnm", "torch.compile"
_ROUNDS = (7, 300)


@dataclass(frozen=True)
class Result:
    """What was measured of one case.

    Attributes:
        seconds: median seconds a call, or a part of it, by contender.
        baseline: the fastest contender other than ours.
        ratio: median seconds of the baseline over ours: above 1, ours is faster.
        low, high: quartiles of the same ratio taken round by round.
        rounds: calls of each contender.
    """

    seconds: dict[str, float]
    baseline: str
    ratio: float
    low: float
    high: float
    rounds: int


def compare(contenders: Mapping[str, Callable[[], Any]], ours: str, seconds: float = 1.0, parts: int = 1) -> Result:
    """Call the contenders in turn for about `seconds` (7 to 300 rounds), so that noise hits all of them alike.

    A call consists of `parts` alike, and the seconds are those of one.
    """
    for call in contenders.values():
        for _ in range(3):
            call()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    least, most = _ROUNDS
    begin = time.perf_counter()
    while len(taken[ours]) < least or (time.perf_counter() - begin < seconds and len(taken[ours]) < most):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) / parts)
    medians = {name: median(each) for name, each in taken.items()}
    baseline = min((name for name in medians if name != ours), key=medians.__getitem__)
    rounds = [dense / sparse for dense, sparse in zip(taken[baseline], taken[ours], strict=True)]
    low, _, high = quantiles(rounds, n=4)
    return Result(medians, baseline, medians[baseline] / medians[ours], low, high, len(rounds))


@dataclass(frozen=True)
class Comparison:
    """A model, dense and with its sparse layers.

    Attributes:
        result: times of eager, `torch.compile` and ours, all on the same masked weights.
        difference: largest difference between our outputs and those of `torch.compile`, over the largest output.
        device: what it ran on, by name.
        threads: of the CPU.
        explanation: what became of each layer.
    """

    result: Result
    difference: float
    device: str
    threads: int
    explanation: Explanation

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        more = {"difference": self.difference, "device": self.device, "threads": self.threads}
        return {**asdict(self.result), **more, "explanation": self.explanation.to_dict()}

    def __str__(self) -> str:
        times = ", ".join(f"{name} {seconds * 1e3:.4g} ms" for name, seconds in self.result.seconds.items())
        return (
            f"{self.result.ratio:.2f}x ({self.result.low:.2f} to {self.result.high:.2f} between quartiles) of the "
            f"faster dense one: {times}\n"
            f"on {self.device}, {self.threads} threads; outputs differ by {self.difference:.1e} of the largest."
        )


def compare_model(
    model: nn.Module, inputs: Mapping[str, Any], *, policy: str = "latency", seconds: float = 3.0
) -> Comparison:
    """Time `model` with sparse layers and without, on the same inputs; both are compiled.

    Args:
        model: in evaluation mode; compressed weights are made dense in a copy, for the dense side.
        inputs: keyword arguments of the model, on its device.
        policy: as `vnm.policy`; "memory" takes every sparse kernel, "latency" only those that are faster.
        seconds: of timing, after compiling.
    """
    dense = copy.deepcopy(model)
    decompress_model(dense)
    options: dict[str, Any] = {"vnm.policy": policy}
    ours: Any = torch.compile(model, backend="vnm", options=options)
    contenders: dict[str, Callable[..., Any]] = {"eager": dense, DENSE: torch.compile(dense), OURS: ours}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def bound(run: Callable[..., Any]) -> Callable[[], Any]:
        def call() -> Any:
            out = run(**inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return out

        return call

    calls = {name: bound(run) for name, run in contenders.items()}
    with torch.no_grad():
        difference = _difference(calls[OURS](), calls[DENSE]())
        result = compare(calls, OURS, seconds)
        explanation = explain(model, options=options, **inputs)
    return Comparison(result, difference, _name(device), torch.get_num_threads(), explanation)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _difference(ours: Any, dense: Any) -> float:
    """Largest difference of the floating-point outputs, over the largest of them."""
    pairs = zip(_floats(ours), _floats(dense), strict=True)
    return max((float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs), default=0.0)


def _floats(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returns, in order."""
    if isinstance(outputs, Tensor):
        return [outputs.double()] if outputs.is_floating_point() and outputs.numel() else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [each for part in outputs for each in _floats(part)] if isinstance(outputs, list | tuple) else []
