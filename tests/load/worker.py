"""A process that compiles a model and says what came of it, as one line of JSON: `python -m tests.load.worker`.

With the argument `fork` it compiles and calls the model, forks, and the child says what comes of it there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import torch
from torch._dynamo.utils import counters

from tests.load.threads import SPARSE, chain


def answer(policy: str = "memory") -> dict[str, object]:
    """The digest of the model's answer, its error, and how often Inductor's cache did not know a graph."""
    model = chain(0)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = torch.compile(model, backend="vnm", options={**SPARSE, "vnm.policy": policy})(x)
        error = (y - model(x)).abs().max().item()
    return {
        "digest": hashlib.sha256(y.numpy().tobytes()).hexdigest(),
        "error": error,
        "misses": counters["inductor"]["fxgraph_cache_miss"],
    }


def fork() -> None:
    """Answer in a child. On one thread: those of OpenMP do not survive a fork, whoever's kernels they run."""
    torch.set_num_threads(1)
    answer()
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(answer()), flush=True)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:] == ["fork"]:
        fork()
    print(json.dumps(answer(*sys.argv[1:])))
