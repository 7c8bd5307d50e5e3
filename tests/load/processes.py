"""Processes that share a cache, caches that are broken, and processes that fork."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.load.threads import SPARSE, chain
from tests.load.worker import answer

ROOT = Path(__file__).resolve().parents[2]


def start(cache: Path, *args: str, limit: int | None = None) -> subprocess.Popen[str]:
    """A worker with a cache of its own; `limit` is the largest file it may write, in bytes."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.load.worker", *args]
    if limit is not None:
        command = ["prlimit", f"--fsize={limit}", *command]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def outcome(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """What a worker said; None where it failed."""
    out, _ = process.communicate()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if process.returncode == 0 and lines else None


def right(said: dict[str, Any] | None) -> bool:
    """Whether a worker answered, and rightly."""
    return said is not None and said["error"] < 1e-4


def one_cache(processes: int) -> tuple[int, int]:
    """How many of so many processes, started at once on an empty cache, answer rightly; and how many answers differ."""
    with tempfile.TemporaryDirectory() as cache:
        said = [outcome(each) for each in [start(Path(cache)) for _ in range(processes)]]
    good = [each for each in said if each is not None and right(each)]
    return len(good), len({each["digest"] for each in good}) - 1


def warm_start(policy: str = "memory") -> tuple[int, bool, int]:
    """Graphs that a second process compiles, whether its answer is bit-equal, and libraries that it adds."""
    with tempfile.TemporaryDirectory() as cache:
        first = outcome(start(Path(cache), policy))
        before = set(Path(cache).rglob("*.so"))
        second = outcome(start(Path(cache), policy))
        added = set(Path(cache).rglob("*.so")) - before
    assert first is not None
    assert second is not None
    return second["misses"], first["digest"] == second["digest"], len(added)


def killed(times: int, seed: int = 0) -> int:
    """How often a process is wrong, or fails, on a cache whose writer was killed at some moment."""
    moments, bad = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(times):
            process = start(Path(cache))
            time.sleep(moments.uniform(3, 12))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        bad += not right(outcome(start(Path(cache))))
    return bad


def cut_files() -> int:
    """Wrong answers on a cache in which every file of ours was cut in half."""
    with tempfile.TemporaryDirectory() as cache:
        outcome(start(Path(cache), "latency"))
        for path in Path(cache).glob("vnm/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return int(not right(outcome(start(Path(cache), "latency"))))


def full_disk() -> str:
    """What happens where no file may grow beyond 4 KB: a right answer, or Inductor's own error."""
    with tempfile.TemporaryDirectory() as cache:
        process = start(Path(cache), limit=4096)
        out, error = process.communicate()
    if process.returncode == 0:
        return "right" if right(json.loads(out.splitlines()[-1])) else "wrong"
    said = [line.strip() for line in error.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line.strip())]
    return f"Inductor's own error: {said[0][:80] if said else error[-80:]}"


def forked() -> bool:
    """Whether a forked child answers rightly with what its parent has compiled."""
    with tempfile.TemporaryDirectory() as cache:
        return right(outcome(start(Path(cache), "fork")))


def spawned() -> bool:
    """Whether a spawned child of a process that has compiled answers rightly."""
    answer()
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_tell, args=(queue,))
    child.start()
    child.join(300)
    if child.exitcode != 0:
        child.kill()
        return False
    return right(queue.get())


def _tell(queue: Any) -> None:
    queue.put(answer())


def rounds(count: int) -> tuple[float, int]:
    """MB that so many rounds of compiling and reset add in their second half, and packed weights kept after them."""
    from vnm_compile import dispatch

    rss: list[float] = []
    for i in range(count):
        model = chain(i % 4)
        with torch.no_grad():
            torch.compile(model, backend="vnm", options=SPARSE)(torch.randn(4, 64))
        del model
        torch._dynamo.reset()
        gc.collect()
        rss.append(psutil.Process().memory_info().rss / 1e6)
    return rss[-1] - rss[count // 2], len(dispatch.store._entries)
