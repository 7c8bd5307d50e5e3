"""Timings that outlive the process: one small JSON file a problem, beside Inductor's own caches.

Several processes may read and write at once, and the directory may be read-only, full, or hold files that were cut or
come from elsewhere: then a problem is measured again, never more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from contextlib import suppress
from functools import cache
from math import isfinite
from pathlib import Path

import torch

from vnm_compile.codegen.inductor import cache_dir, source_hash
from vnm_compile.hardware import allows_tf32
from vnm_compile.problem import Problem, Timing

log = logging.getLogger(__name__)

_LONGEST = 4096  # bytes; a file of ours has about 60


def key(problem: Problem) -> str:
    """All that the timing of a problem depends on: problem, processor, threads, precision, versions."""
    device = problem.device
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_capability(device)}"
    else:
        name = f"{_cpu()}, {torch.get_num_threads()} threads"
    versions = torch.__version__, source_hash("codegen")
    return repr((*problem[:-1], device.type, name, allows_tf32(), versions))


@cache
def _cpu() -> str:
    """The processor's model: the same cache directory may be seen from machines that differ."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu part", "cpu model")):
                return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.machine()} {platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def load(problem: Problem) -> Timing | None:
    """What was measured before; None where nothing was, or what is there cannot be a timing."""
    try:
        with _path(problem).open("rb") as file:
            found = json.loads(file.read(_LONGEST))
        timing = Timing(**found)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return timing if all(type(each) is float and isfinite(each) and each > 0 for each in timing) else None


def store(problem: Problem, timing: Timing) -> None:
    """Keep a timing; where that is impossible a line in the log says so."""
    partial = None
    try:
        path = _path(problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: another process may be reading.
        handle, partial = tempfile.mkstemp(".tmp", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(timing._asdict(), file)
        os.replace(partial, path)
    except OSError as error:
        log.warning("a timing could not be kept, and will be measured again: %s", error)
        if partial is not None:
            with suppress(OSError):
                os.unlink(partial)


def _path(problem: Problem) -> Path:
    return cache_dir() / "vnm" / f"{hashlib.sha256(key(problem).encode()).hexdigest()[:32]}.json"
