"""Time the sparse kernel of a problem against the dense one, once a machine: what policy "latency" decides by.

Both are compiled as they would be in a model (a linear with its bias, through Inductor), run alternately on random
data, and on copies of the weights, as many bytes of the one as of the other and more than caches hold: in a model, too,
a weight comes from memory. The result is kept beside Inductor's own caches, so a second process decides without
measuring.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn

from vnm_compile._torch import tracing, without_function_modes, without_modes
from vnm_compile.codegen import timings
from vnm_compile.codegen.inductor import compile_graph, has_lowering, prepack_of
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.format import Packed, unpack
from vnm_compile.layout import Layout
from vnm_compile.ops import weight_args
from vnm_compile.problem import Failure, Problem, Timing
from vnm_compile.session import session

log = logging.getLogger(__name__)

_STREAMED_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}  # of weights in turn: more than caches hold
_MOST_COPIES = {"cpu": 2048, "cuda": 256}
_SECONDS = 0.25  # of timing a problem, once compiled
_ROUNDS = (5, 50)  # at least, at most
_ROUND_SECONDS = 0.01  # of a round on a CPU: it makes as many calls as fit, at least one

_known: dict[str, Timing | Failure] = session.keep("timings", {})
_one_at_a_time = threading.RLock()


def measure(problems: Sequence[Problem]) -> list[Timing | Failure | None]:
    """Return the seconds of the sparse and of the dense kernel for each problem (for its `measured()`).

    None where there is no sparse kernel; a `Failure` where one of them cannot be compiled or run, such as for want of
    memory. That is not tried again in this process.
    """
    measured = [each.measured() for each in problems]
    keys = [timings.key(each) for each in measured]
    asked = {key: each for key, each in zip(keys, measured, strict=True) if has_lowering(each.device.type)}
    with _one_at_a_time:
        for key, problem in asked.items():
            if key not in _known and (timing := timings.load(problem)) is not None:
                _known[key] = timing
        new = {key: problem for key, problem in asked.items() if key not in _known}
        _compile_side_by_side(list(new.values()))
        for key, problem in new.items():
            _known[key] = _measure(problem)
        return [_known.get(key) for key in keys]


def _compile_side_by_side(problems: Sequence[Problem]) -> None:
    """Compile what will be timed as one graph a device: Inductor compiles the kernels of a graph side by side, and
    finds them in its cache when each is timed alone."""
    for device in {each.device for each in problems}:
        those = [each for each in problems if each.device == device]
        if len(those) == 1:
            continue
        try:
            with _undisturbed(device):
                operands = [_operands(each) for each in those]
                inputs = [
                    each for x, bias, packed in operands for each in (x, bias, *prepack_of(device.type).prepare(packed))
                ]
                _compile(_sparse_graph([each.layout for each in those]), inputs)
        except Exception:
            # Each is compiled alone again, which says what is the matter with which.
            log.debug("kernels could not be compiled side by side", exc_info=True)


def _measure(problem: Problem) -> Timing | Failure:
    log.info("measuring %s", problem)
    try:
        with _undisturbed(problem.device):
            timing = _time(problem)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        log.warning("%s could not be measured", problem, exc_info=True)
        return Failure(f"{type(error).__name__}: {lines[0]}"[:300])
    timings.store(problem, timing)
    return timing


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Neither does the caller's state reach what is measured (modes, gradients, autocast, default device, what is being
    traced), nor what is measured the caller's (random numbers, current device)."""
    devices = [device] if device.type == "cuda" else []
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    numbers = random.getstate()
    with ExitStack() as stack:
        stack.enter_context(without_function_modes())
        if devices:
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.random.fork_rng(devices))
        stack.callback(random.setstate, numbers)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        # Measured outside of whatever is being traced, on real tensors.
        stack.enter_context(tracing(None))
        stack.enter_context(without_modes())
        torch.use_deterministic_algorithms(False)
        stack.callback(torch.use_deterministic_algorithms, deterministic[0], warn_only=deterministic[1])
        yield


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Packed]:
    """A random activation, bias and packed weight."""
    layout, device = problem.layout, problem.device
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(problem.dtype)

    x, bias = drawn(problem.tokens, layout.in_features), drawn(layout.out_features)
    return x, bias, random_packed(layout, problem.dtype, device)


def _sparse_graph(layouts: Sequence[Layout]) -> fx.GraphModule:
    """Linears with their biases, one a layout: takes x, bias and the packed arrays of each."""
    graph, results = fx.Graph(), []
    for i, layout in enumerate(layouts):
        x, bias, *arrays = (graph.placeholder(f"{name}_{i}") for name in ("x", "bias", *layout.names))
        product = graph.call_function(torch.ops.vnm.linear.default, (x, *weight_args(arrays, layout)))
        results.append(graph.call_function(torch.add, (product, bias)))
    graph.output(tuple(results))
    return fx.GraphModule(nn.Module(), graph)


def _time(problem: Problem) -> Timing:
    layout, device = problem.layout, problem.device
    x, bias, packed = _operands(problem)
    weight = unpack(packed, layout)

    def dense_graph(x: Any, bias: Any, weight: Any) -> Any:
        return (torch.nn.functional.linear(x, weight, bias),)

    sparse_copies, dense_copies = copies(nbytes(packed), nbytes([weight]), device.type)
    prepare = prepack_of(device.type).prepare
    sparse = [prepare(packed.remade(array.clone() for array in packed)) for _ in range(sparse_copies)]
    dense = [weight.clone() for _ in range(dense_copies)]
    run_sparse = _compile(_sparse_graph([layout]), [x, bias, *sparse[0]])
    run_dense = _compile(fx.symbolic_trace(dense_graph), [x, bias, dense[0]])
    return _alternate(
        [partial(run_sparse, x, bias, *each) for each in sparse],
        [partial(run_dense, x, bias, each) for each in dense],
        device,
    )


def copies(sparse_bytes: int, dense_bytes: int, device: str) -> tuple[int, int]:
    """How many copies of the packed and of the dense weight are run in turn: as many bytes of one as of the other, so
    that no cache holds one of the two only."""
    streamed = min(_STREAMED_BYTES[device], _MOST_COPIES[device] * min(sparse_bytes, dense_bytes))
    streamed = max(streamed, sparse_bytes, dense_bytes)
    return -(-streamed // sparse_bytes), -(-streamed // dense_bytes)


def nbytes(arrays: Any) -> int:
    """Bytes that arrays take."""
    return sum(array.numel() * array.element_size() for array in arrays)


def _alternate(sparse: list[Callable[[], Any]], dense: list[Callable[[], Any]], device: torch.device) -> Timing:
    """Median seconds a call of each, the two taking turns so that what else the machine does hits both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    rounds = [_round(calls, device) for calls in (sparse, dense)]
    start = time.perf_counter()
    while len(seconds[0]) < _ROUNDS[0] or (time.perf_counter() - start < _SECONDS and len(seconds[0]) < _ROUNDS[1]):
        for taken, run in zip(seconds, rounds, strict=True):
            taken.append(run())
    return Timing(median(seconds[0]), median(seconds[1]))


def _round(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
    """What makes calls, on a CPU the next ones in turn, and returns the seconds a call; it is warm."""
    if device.type == "cuda":
        return _replay(calls)
    in_turn = cycle(calls)

    def run(count: int) -> float:
        begin = time.perf_counter()
        for call in islice(in_turn, count):
            call()
        return (time.perf_counter() - begin) / count

    run(1)
    return partial(run, max(1, min(len(calls), int(_ROUND_SECONDS / run(1)))))


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
        return start.elapsed_time(end) * 1e-3 / len(calls)

    return run


def _compile(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    return compile_graph(gm, inputs, {}, "measure")
