"""Time calls on a GPU: replays of a CUDA graph over several sets of weights, larger than the L2 together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

_ROUNDS = 30
_LONGEST = 0.25  # seconds of timing a contender


def sets_needed(nbytes: int, device: torch.device) -> int:
    """Copies of a weight of `nbytes` that together exceed the L2 four times; at least two, at most 24."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(24, -(-4 * cache // max(1, nbytes))))


def seconds_of_each(contenders: dict[str, Sequence[Callable[[], Any]]]) -> dict[str, list[float]]:
    """Seconds a call by contender, one figure a round; rounds take turns so that the clock's moods hit all alike. One
    that cannot be captured is left out, with a line that says why.

    Args:
        contenders: for each, one call for every set of weights.
    """
    graphs = {}
    for name, calls in contenders.items():
        try:
            graphs[name] = _capture(calls)
        except Exception as error:
            print(f"{name} was not timed: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    lengths = {name: len(calls) for name, calls in contenders.items()}
    for graph in graphs.values():
        _replay(graph)
    slowest = max((_replay(graph) for graph in graphs.values()), default=0.0)
    rounds = max(7, min(_ROUNDS, int(_LONGEST / max(slowest, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            taken[name].append(_replay(graph) / lengths[name])
    return taken


def _capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):  # compiles, tunes and allocates
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def ceilings(device: torch.device) -> tuple[float, float]:
    """Measured bytes/s of a copy (read plus written) and bf16 flop/s of a matrix product, on random data."""
    size = 1 << 31
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    n = 8192
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    # A kernel, as a copy in a CUDA graph goes to the copy engine, which is slower.
    calls: dict[str, Sequence[Callable[[], Any]]] = {
        "copy": [lambda: torch.neg(source, out=target)],
        "product": [lambda: torch.mm(a, b, out=out)],
    }
    taken = seconds_of_each(calls)
    return 2 * size / median(taken["copy"]), 2 * n**3 / median(taken["product"])
