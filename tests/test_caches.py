"""Inductor's caches across processes: useful, and never wrong (promise 4)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
    import sys
    import torch
    from torch._dynamo.utils import counters
    from tests.support import random_sparse
    from vnm_compile.codegen.inductor import cache_key

    seed, version = int(sys.argv[1]), sys.argv[2]
    cache_key.source_hash = lambda folder="": version
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()).eval()
    with torch.no_grad():
        model[0].weight.copy_(random_sparse(64, 64, "16:2:8", seed=seed))
        x = torch.randn(5, 64)
        y = torch.compile(model, backend="vnm", options={"vnm.policy": "memory"})(x)
        assert torch.allclose(y, model(x), atol=1e-5)
    print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""


def hits(folder: Path, seed: int, version: str) -> int:
    """Cache hits of a process that compiles a model with other weights, for a version of the package's sources."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(seed), version]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


@pytest.mark.slow
def test_a_second_process_starts_warm_and_right(tmp_path):
    assert hits(tmp_path, seed=0, version="one") == 0
    assert hits(tmp_path, seed=1, version="one") > 0, "other weights, same code: from the cache"
    assert hits(tmp_path, seed=2, version="two") == 0, "kernels of another version of the package are not reused"
