"""Time the sparse kernel of a problem against the dense one, once a machine: what policy "latency" decides by.

Both are compiled as they would be in a model (a linear with its bias, through Inductor), run alternately on random
data, and on so many copies of the weights that no cache holds them: in a model, too, a weight comes from memory.
The result is kept beside Inductor's own caches, so a second process decides without measuring.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import tracing
from torch.utils._python_dispatch import _disable_current_modes

from vnm_compile.codegen.inductor import cache_dir, compile_graph, has_lowering, source_hash
from vnm_compile.format import Packed, align_rows, unpack
from vnm_compile.problem import Problem, Timing

log = logging.getLogger(__name__)

_STREAMED_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}  # of dense weights in turn: more than caches hold
_MOST_COPIES = 32
_SECONDS = 0.25  # of timing a problem, once compiled
_ROUNDS = (5, 50)  # at least, at most

_known: dict[Problem, Timing | None] = {}


def measure(problem: Problem) -> Timing | None:
    """Return the seconds of the sparse and of the dense kernel; None where there is no sparse kernel."""
    if problem not in _known:
        _known[problem] = _load(problem) or _measure(problem)
    return _known[problem]


def _measure(problem: Problem) -> Timing | None:
    if not has_lowering(problem.device.type):
        return None
    log.info("measuring %s", problem)
    # Measured outside of whatever is being traced, on real tensors.
    with torch.no_grad(), tracing(None), _disable_current_modes():
        timing = _time(problem)
    _store(problem, timing)
    return timing


def _time(problem: Problem) -> Timing:
    dense_bytes = problem.out_features * problem.in_features * problem.dtype.itemsize
    copies = max(1, min(_MOST_COPIES, -(-_STREAMED_BYTES[problem.device.type] // dense_bytes)))
    packed = [random_packed(problem, seed) for seed in range(copies)]
    if problem.device.type == "cuda":
        packed = [align_rows(each) for each in packed]
    size = problem.out_features, problem.in_features
    dense = [unpack(each, problem.spec, *size) for each in packed]
    x = torch.randn(problem.tokens, problem.in_features, device=problem.device).to(problem.dtype)
    bias = torch.randn(problem.out_features, device=problem.device).to(problem.dtype)
    spec = problem.spec

    def sparse_graph(x: Any, bias: Any, values: Any, metadata: Any, columns: Any) -> Any:
        args = (x, values, metadata, columns, spec.v, spec.n, spec.m, problem.in_features, problem.out_features)
        return torch.ops.vnm.linear(*args) + bias

    def dense_graph(x: Any, bias: Any, weight: Any) -> Any:
        return torch.nn.functional.linear(x, weight, bias)

    run_sparse = _compile(sparse_graph, [x, bias, *packed[0]])
    run_dense = _compile(dense_graph, [x, bias, dense[0]])
    return _alternate(
        [partial(run_sparse, x, bias, *each) for each in packed],
        [partial(run_dense, x, bias, each) for each in dense],
        problem.device,
    )


def _alternate(sparse: list[Callable[[], Any]], dense: list[Callable[[], Any]], device: torch.device) -> Timing:
    """Median seconds a call of each, the two taking turns so that what else the machine does hits both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    rounds = [_round(calls, device) for calls in (sparse, dense)]
    start = time.perf_counter()
    while len(seconds[0]) < _ROUNDS[0] or (time.perf_counter() - start < _SECONDS and len(seconds[0]) < _ROUNDS[1]):
        for taken, run in zip(seconds, rounds, strict=True):
            taken.append(run() / len(sparse))
    return Timing(median(seconds[0]), median(seconds[1]))


def _round(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
    """What makes all the calls once, and returns the seconds; it is warm."""
    if device.type == "cuda":
        return _replay(calls)
    calls[0]()

    def run() -> float:
        begin = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - begin

    return run


def _replay(calls: list[Callable[[], Any]]) -> Callable[[], float]:
    """As a CUDA graph: launched one by one, small kernels would take as long as their launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # allocates and tunes, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return run


def _compile(function: Callable[..., Any], inputs: list[Tensor]) -> Callable[..., Any]:
    gm = fx.symbolic_trace(function)
    return compile_graph(gm, inputs, {}, "measure")


def random_packed(problem: Problem, seed: int = 0) -> Packed:
    """Random canonical arrays for a problem: random kept columns, indices and values."""
    spec, device = problem.spec, problem.device
    generator = torch.Generator(device).manual_seed(seed)
    values, metadata, columns = spec.packed_shapes(problem.out_features, problem.in_features)
    kept = torch.rand(*columns[:2], spec.m, generator=generator, device=device).topk(4, -1).indices.sort(-1).values
    # The pairs of increasing 2-bit indices, two pairs a byte; with one value a group any index will do.
    pairs = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8, device=device)
    if spec.n == 2:
        low, high = (pairs[torch.randint(6, metadata, generator=generator, device=device)] for _ in range(2))
        indices = low | high << 4
    else:
        indices = torch.randint(256, metadata, generator=generator, device=device, dtype=torch.uint8)
    drawn = torch.randn(values, generator=generator, device=device) * problem.in_features**-0.5
    return Packed(drawn.to(problem.dtype), indices, kept.to(spec.column_dtype))


def _path(problem: Problem) -> Path:
    device = problem.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    key = repr((problem._replace(device=torch.device(device.type)), name, torch.__version__, source_hash("codegen")))
    return cache_dir() / "vnm" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _load(problem: Problem) -> Timing | None:
    try:
        return Timing(**json.loads(_path(problem).read_text()))
    except (OSError, ValueError, TypeError):
        return None  # not measured yet, or not by this version


def _store(problem: Problem, timing: Timing) -> None:
    path = _path(problem)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: another process may be reading.
    partial = path.with_suffix(f".{time.monotonic_ns()}.tmp")
    partial.write_text(json.dumps(timing._asdict()))
    partial.replace(path)
