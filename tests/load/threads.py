"""Threads that call a compiled model while its weights are reloaded."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from tests.support import make_sparse_

SPARSE = {"vnm.policy": "memory"}
SETS = 4  # of weights, loaded in turn


@dataclass
class Served:
    """What came of a run."""

    calls: int
    reloads: int
    wrong: int  # answers that no single set of weights gives, or one that was no longer loaded when the call began
    stale_at_the_end: int  # threads whose last answer, after all reloads, was not that of the last set
    rss_growth: float  # of the second half of the run, in MB


class ReadersAndWriter:
    """Calls share it, a reload has it alone: how a server reloads in place."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers, self._writing = 0, False

    def __enter__(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._writing)
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._readers -= 1
            self._condition.notify_all()

    def alone(self, action: Callable[[], None]) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._writing)
            self._writing = True  # nobody begins
            self._condition.wait_for(lambda: self._readers == 0)
        action()
        with self._condition:
            self._writing = False
            self._condition.notify_all()


class NoLock:
    """Calls and reloads run into each other."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def alone(self, action: Callable[[], None]) -> None:
        action()


def chain(seed: int, layers: int = 3) -> nn.Module:
    """Linears one after the other; one alone has a single tensor, which is replaced at once or not at all."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=layers > 1) for _ in range(layers)))
    return make_sparse_(model, "16:2:8", 100 * seed).eval().requires_grad_(False)


def serve(
    calls: int,
    threads: int = 8,
    backend: str = "vnm",
    locked: bool = True,
    assign: bool = False,
    layers: int = 3,
    reloads_a_second: float = 50.0,
    write: Callable[[nn.Module, dict[str, torch.Tensor]], None] | None = None,
) -> Served:
    """Call a model `calls` times from each thread while another one loads other weights, and judge every answer."""
    model, x = chain(0, layers), torch.randn(4, 64)
    states = [{k: v.clone() for k, v in chain(i, layers).state_dict().items()} for i in range(SETS)]
    run = torch.compile(model, backend=backend, options=SPARSE if backend == "vnm" else None)
    expected = []
    with torch.no_grad():
        for state in states:
            model.load_state_dict(state)
            expected.append(model(x))
            run(x)
    lock = ReadersAndWriter() if locked else NoLock()
    loaded, wrong, stop = [SETS - 1], [0] * threads, threading.Event()
    last: list[torch.Tensor | None] = [None] * threads
    finished, rss = [0] * threads, []

    def reload() -> None:
        while not stop.wait(1 / reloads_a_second):
            which = (loaded[-1] + 1) % SETS

            def load(which: int = which) -> None:
                fresh = {k: v.clone() for k, v in states[which].items()} if assign else states[which]
                if write is None:
                    model.load_state_dict(fresh, assign=assign)
                else:
                    write(model, fresh)
                loaded.append(which)

            lock.alone(load)

    def call(thread: int) -> None:
        with torch.no_grad():
            for _ in range(calls):
                with lock:
                    first = len(loaded) - 1
                    y = run(x)
                    possible = loaded[first:]
                    # Without a lock the next set may be in place before it is written down.
                    possible = possible if locked else [*possible, (loaded[-1] + 1) % SETS]
                wrong[thread] += not any(torch.allclose(y, expected[i], atol=1e-4) for i in set(possible))
                finished[thread] += 1

    def last_call(thread: int) -> None:
        with torch.no_grad():
            last[thread] = run(x)

    writer = threading.Thread(target=reload)
    workers = [threading.Thread(target=call, args=(i,)) for i in range(threads)]
    for each in (writer, *workers):
        each.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.2)
        rss.append((sum(finished), psutil.Process().memory_info().rss / 1e6))
    stop.set()
    writer.join()
    workers = [threading.Thread(target=last_call, args=(i,)) for i in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    stale = sum(not torch.allclose(y, expected[loaded[-1]], atol=1e-4) for y in last if y is not None)
    gc.collect()
    half = next((mb for done, mb in rss if done >= calls * threads / 2), rss[-1][1] if rss else 0.0)
    growth = psutil.Process().memory_info().rss / 1e6 - half
    return Served(sum(finished), len(loaded) - 1, sum(wrong), stale, growth)
